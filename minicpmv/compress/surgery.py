"""The surgery: a model and what is to stay of it -> a smaller model of the same class, which any `from_pretrained` loads.

The model that is cut stays as it is. Everything here works on the meta device as well, where only shapes are real.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minicpmv.compress.shapes import (
    KINDS,
    CompressionError,
    Shape,
    dimensions_of,
    layer_of,
    renumbered,
    resized,
    shape_of,
    widths,
)


TOKEN_IDS = ("image_token_id", "bos_token_id", "eos_token_id", "pad_token_id")  # fields of the configurations


@dataclass(frozen=True)
class Kept:
    """What stays of a model: sorted indices.

    `layers`, `tower_layers`, `queries`, `tower_channels` and `vocabulary` are one tensor each; the others one row a layer,
    of all layers, those that go as well: `heads` and `tower_heads` [layers, heads], `mlp` and `tower_mlp` [layers, width].
    `tower_channels` are the channels of the tower's states.
    """

    layers: Tensor
    heads: Tensor
    mlp: Tensor
    vocabulary: Tensor
    tower_layers: Tensor
    tower_heads: Tensor
    tower_mlp: Tensor
    tower_channels: Tensor
    queries: Tensor

    def shape(self) -> Shape:
        """The shape of what stays."""
        return Shape(**{name: getattr(self, name).shape[-1] for name in KINDS})


def everything(config: Any) -> Kept:
    """All of a model."""
    return first(config, shape_of(config))


def first(config: Any, shape: Shape) -> Kept:
    """The first of everything: for shapes alone, where there is nothing to choose by."""
    whole, channels = shape_of(config), widths(config, shape)["tower_channels"]
    found = {name: torch.arange(size) for name, size in shape}
    for name in ("heads", "mlp"):
        found[name] = found[name].expand(whole.layers, -1)
        found[f"tower_{name}"] = found[f"tower_{name}"].expand(whole.tower_layers, -1)
    return Kept(**found, tower_channels=torch.arange(channels))


def cut(model: Any, kept: Kept, changed: Mapping[str, Tensor] | None = None) -> Any:
    """A smaller model of what is kept, in evaluation mode, on the same device and in the same types.

    With another vocabulary, the ids in its configurations are new ones: its tokenizer has to be cut alike
    ([`minicpmv.compress.vocabulary`]). With fewer queries, the processor's `image_feature_size` has to follow.

    Args:
        changed: weights of the whole model to be cut in place of its own ([`minicpmv.compress.refit`]).

    Raises:
        CompressionError: a size is none that the model can have, or a token that the configuration names would go.
    """
    new_ids = {old: new for new, old in enumerate(kept.vocabulary.tolist())}
    config = resized(model.config, kept.shape(), kept.layers.tolist(), _token_ids(model.config, new_ids))
    generation = copy.deepcopy(model.generation_config)
    generation.update(**_token_ids(generation, new_ids))
    weights = cut_weights(model.state_dict() | dict(changed or {}), model.config, kept)
    with torch.device("meta"):
        smaller = type(model)(config)
    smaller.load_state_dict(weights, assign=True)
    smaller.tie_weights()
    # Its frequencies are no weights; they follow from the width of a head, which stays.
    smaller.llm.model.rotary_emb = model.llm.model.rotary_emb
    smaller.generation_config = generation
    return smaller.eval()


def cut_weights(weights: Mapping[str, Tensor], config: Any, kept: Kept) -> dict[str, Tensor]:
    """Those of `weights` that stay, under their new names."""
    numbers = {
        kind: {int(old): new for new, old in enumerate(getattr(kept, kind))} for kind in ("layers", "tower_layers")
    }
    output = {}
    for name, weight in weights.items():
        layer = layer_of(name)
        if layer is not None and layer[1] not in numbers[layer[0]]:
            continue
        number = None if layer is None else layer[1]
        for dimension, what in dimensions_of(name).items():
            chosen = indices(what, number, config, kept)
            if len(chosen) < weight.shape[dimension]:
                weight = weight.index_select(dimension, chosen.to(weight.device))
        output[name if layer is None else renumbered(name, numbers[layer[0]][layer[1]])] = weight.detach()
    return output


def indices(what: str, layer: int | None, config: Any, kept: Kept) -> Tensor:
    """Which indices stay of a dimension of a weight."""
    vision = config.vision_config
    if what == "key_rows":
        return _rows(kept.heads[layer], config.head_dim)
    if what == "query_rows":
        return _rows(kept.heads[layer], config.head_dim * config.num_attention_heads // config.num_key_value_heads)
    if what == "tower_rows":
        return _rows(kept.tower_heads[layer], vision.hidden_size // vision.num_attention_heads)
    chosen = getattr(kept, what)
    return chosen if chosen.dim() == 1 else chosen[layer]


def _rows(heads: Tensor, width: int) -> Tensor:
    """The rows of heads that are `width` wide."""
    return (heads[:, None] * width + torch.arange(width)).flatten()


def _token_ids(config: Any, new_ids: Mapping[int, int]) -> dict[str, Any]:
    """The tokens that a configuration names, as they are numbered among those that stay."""
    found = {}
    for name in TOKEN_IDS:
        ids = getattr(config, name, None)
        if ids is None:
            continue
        listed = ids if isinstance(ids, list) else [ids]
        if gone := [token for token in listed if token not in new_ids]:
            raise CompressionError(f"{name} is {gone[0]}, which is not among the tokens that stay: keep it")
        numbers = [new_ids[token] for token in listed]
        found[name] = numbers if isinstance(ids, list) else numbers[0]
    return found


def only(kept: Kept, whole: Kept, kind: str) -> Kept:
    """`whole` with the cut of one kind taken from `kept`."""
    names = (kind, "tower_channels") if kind == "tower_heads" else (kind,)
    return replace(whole, **{name: getattr(kept, name) for name in names})
