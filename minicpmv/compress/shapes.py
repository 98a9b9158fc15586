"""What can be cut of a model, as numbers: how large it then is, and how much it computes.

What is special:
- One table says which dimension of which weight belongs to which cut. Sizes are counted and weights are cut by the same
  table, so a count is that of the checkpoint, not of a formula.
- A cut has one size for all layers, since a configuration has one field for it; which channels stay, each layer chooses.
- What a configuration cannot say is not cut: the width of the language model's states (the resampler writes into them),
  and the width of its heads.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from minicpmv.errors import MiniCPMVError


class CompressionError(MiniCPMVError):
    """A model cannot be cut as asked: the message names the value, the limit and the remedy."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that surgery can change."""

    layers: int  # of the language model
    heads: int  # key-value heads of a layer; the query heads of each go with it
    mlp: int  # width of its MLPs
    vocabulary: int  # rows of the embedding and of the head
    tower_layers: int
    tower_heads: int  # heads of a layer; the tower is as wide as they are together
    tower_mlp: int
    queries: int  # tokens that a slice, or a pack of frames, takes in the language model

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(asdict(self).items())


KINDS = tuple(entry.name for entry in fields(Shape))
PARTS = {
    "llm": ("layers", "heads", "mlp", "vocabulary"),
    "tower": ("tower_layers", "tower_heads", "tower_mlp"),
    "resampler": ("queries",),
}
MODULES = {"llm": "llm.", "tower": "vpm.", "resampler": "resampler."}  # how the names of their weights begin

# Weights, and what their dimensions run over. Widths of "rows" follow from heads.
_LLM, _TOWER = r"llm\.model\.layers\.\d+\.", r"vpm\.encoder\.layers\.\d+\."
RULES: tuple[tuple[re.Pattern[str], dict[int, str]], ...] = tuple(
    (re.compile(pattern), dimensions)
    for pattern, dimensions in (
        (_LLM + r"mlp\.(gate|up)_proj\.weight", {0: "mlp"}),
        (_LLM + r"mlp\.down_proj\.weight", {1: "mlp"}),
        (_LLM + r"self_attn\.q_proj\.(weight|bias)", {0: "query_rows"}),
        (_LLM + r"self_attn\.[kv]_proj\.(weight|bias)", {0: "key_rows"}),
        (_LLM + r"self_attn\.o_proj\.weight", {1: "query_rows"}),
        (r"llm\.(model\.embed_tokens|lm_head)\.weight", {0: "vocabulary"}),
        (_TOWER + r"mlp\.fc1\.weight", {0: "tower_mlp", 1: "tower_channels"}),
        (_TOWER + r"mlp\.fc1\.bias", {0: "tower_mlp"}),
        (_TOWER + r"mlp\.fc2\.weight", {0: "tower_channels", 1: "tower_mlp"}),
        (_TOWER + r"mlp\.fc2\.bias", {0: "tower_channels"}),
        (_TOWER + r"self_attn\.[qkv]_proj\.weight", {0: "tower_rows", 1: "tower_channels"}),
        (_TOWER + r"self_attn\.[qkv]_proj\.bias", {0: "tower_rows"}),
        (_TOWER + r"self_attn\.out_proj\.weight", {0: "tower_channels", 1: "tower_rows"}),
        (_TOWER + r"self_attn\.out_proj\.bias", {0: "tower_channels"}),
        (_TOWER + r"layer_norm[12]\.(weight|bias)", {0: "tower_channels"}),
        (r"vpm\.post_layernorm\.(weight|bias)", {0: "tower_channels"}),
        (r"vpm\.embeddings\.patch_embedding\.(weight|bias)", {0: "tower_channels"}),
        (r"vpm\.embeddings\.position_embedding\.weight", {1: "tower_channels"}),
        (r"resampler\.kv_proj\.weight", {1: "tower_channels"}),
        (r"resampler\.query", {0: "queries"}),
    )
)
# Looked up, or not multiplied with an image: they cost no FLOPs there.
NOT_APPLIED = (
    "llm.model.embed_tokens.weight",
    "llm.lm_head.weight",
    "vpm.embeddings.position_embedding.weight",
    "resampler.query",
)
_LAYER = re.compile(r"(llm\.model|vpm\.encoder)\.layers\.(\d+)\.")


def dimensions_of(name: str) -> dict[int, str]:
    """`{dimension: what it runs over}` of a weight, as far as it can be cut."""
    return next((dimensions for rule, dimensions in RULES if rule.fullmatch(name)), {})


def layer_of(name: str) -> tuple[str, int] | None:
    """`("layers" or "tower_layers", number)` of a weight in a layer; None of all others."""
    found = _LAYER.match(name)
    return found and ("layers" if found[1] == "llm.model" else "tower_layers", int(found[2]))


def renumbered(name: str, number: int) -> str:
    """The name of a weight when its layer has another number."""
    return _LAYER.sub(lambda found: f"{found[1]}.layers.{number}.", name)


def shape_of(config: Any) -> Shape:
    """The shape that a configuration describes."""
    vision = config.vision_config
    return Shape(
        layers=config.num_hidden_layers,
        heads=config.num_key_value_heads,
        mlp=config.intermediate_size,
        vocabulary=config.vocab_size,
        tower_layers=vision.num_hidden_layers - bool(config.drop_vision_last_layer),
        tower_heads=vision.num_attention_heads,
        tower_mlp=vision.intermediate_size,
        queries=config.query_num,
    )


def widths(config: Any, shape: Shape) -> dict[str, int]:
    """The size of everything that RULES name, when the model of `config` has this shape."""
    vision, sizes = config.vision_config, dict(shape)
    tower_width = shape.tower_heads * (vision.hidden_size // vision.num_attention_heads)
    key_rows = shape.heads * config.head_dim
    queries_a_key = config.num_attention_heads // config.num_key_value_heads
    rows = {"key_rows": key_rows, "query_rows": key_rows * queries_a_key}
    return sizes | rows | {"tower_rows": tower_width, "tower_channels": tower_width}


def check(config: Any, shape: Shape) -> None:
    """Refuse sizes that are not between 1 and the model's own.

    Raises:
        CompressionError: names the first such size.
    """
    whole = dict(shape_of(config))
    for name, size in shape:
        if not 1 <= size <= whole[name]:
            raise CompressionError(f"{name}={size}, but the model has {whole[name]}: choose from 1 to {whole[name]}")


def resized(config: Any, shape: Shape, kept_layers: Iterable[int], changes: Mapping[str, Any]) -> Any:
    """The configuration of the cut model, with further `changes`; it has no field that the model's own one does not have.

    Raises:
        CompressionError: a size is none that the model can have.
    """
    check(config, shape)
    numbers, output = widths(config, shape), config.to_dict()
    output |= {
        "num_hidden_layers": shape.layers,
        "max_window_layers": min(config.max_window_layers, shape.layers),
        "num_key_value_heads": shape.heads,
        "num_attention_heads": numbers["query_rows"] // config.head_dim,
        "head_dim": config.head_dim,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocabulary,
        "query_num": shape.queries,
        "drop_vision_last_layer": False,  # if the model leaves it out, its weights are not there
        **changes,
    }
    if output.get("layer_types"):
        output["layer_types"] = [output["layer_types"][layer] for layer in kept_layers]
    output["vision_config"] = output["vision_config"] | {
        "num_hidden_layers": shape.tower_layers,
        "num_attention_heads": shape.tower_heads,
        "hidden_size": numbers["tower_channels"],
        "intermediate_size": shape.tower_mlp,
    }
    return type(config)(**output)


@dataclass(frozen=True)
class Sizes:
    """How large a model of some shape is, and how much it computes."""

    parameters: int
    llm_parameters: int
    tower_parameters: int
    resampler_parameters: int
    bytes: int  # of the weights, in the types they have
    flops_per_image: int  # of one slice of the nominal size: tower, resampler, and its tokens in the language model
    flops_per_token: int  # of one written token, attention to earlier ones not counted


def measure(model: Any, shape: Shape | None = None) -> Sizes:
    """The sizes that `model` has in `shape` (its own one by default). Its weights may lie on the meta device.

    FLOPs are two for every weight and input of a matrix, and for every product inside the attentions to patches.
    """
    config = model.config
    shape = shape or shape_of(config)
    numbers, patches = widths(config, shape), (config.image_size // config.patch_size) ** 2
    count, flops, total_bytes = dict.fromkeys(MODULES, 0), dict.fromkeys(MODULES, 0), 0
    # How often a matrix is applied, for one slice; that of the resampler's attention holds those of queries, keys and values.
    times = {"llm": shape.queries, "tower": patches, "resampler": shape.queries}
    times |= {"resampler.kv_proj.weight": patches, "resampler.attn.in_proj_weight": (2 * patches + shape.queries) / 3}
    for name, parameter in model.named_parameters():
        layer = layer_of(name)
        if layer is not None and layer[1] >= dict(shape)[layer[0]]:
            continue  # which of the layers goes does not matter: they are alike
        sizes = list(parameter.shape)
        for dimension, what in dimensions_of(name).items():
            sizes[dimension] = numbers[what]
        numel = math.prod(sizes)
        part = next(part for part, begin in MODULES.items() if name.startswith(begin))
        count[part] += numel
        total_bytes += numel * parameter.element_size()
        if len(sizes) > 1 and name not in NOT_APPLIED:
            flops[part] += round(2 * numel * times.get(name, times[part]))
    flops["tower"] += 4 * shape.tower_layers * patches**2 * numbers["tower_rows"]
    flops["resampler"] += 4 * patches * shape.queries * config.hidden_size
    head = 2 * shape.vocabulary * config.hidden_size
    return Sizes(
        parameters=sum(count.values()),
        llm_parameters=count["llm"],
        tower_parameters=count["tower"],
        resampler_parameters=count["resampler"],
        bytes=total_bytes,
        flops_per_image=sum(flops.values()),
        flops_per_token=flops["llm"] // shape.queries + head,
    )
