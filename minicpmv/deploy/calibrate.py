"""4-bit integers chosen so that conversations change least: GPTQ and AWQ of llm-compressor, over drawn images and packed
videos.

What is special:
- It runs in the environment of `make quantize-env`, since llm-compressor wants other versions of transformers.
- The library traces a layer at a time. What it cannot trace, the way from pixels to embeddings, it is told to run as it is.
- llm-compressor writes the whole layers by name and forgets those of a class that it does not know; they are written here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.args import DatasetArguments
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn

from minicpmv.checkpoint import load
from minicpmv.deploy import rounding
from minicpmv.deploy.source import Checkpoint
from minicpmv.drawn.samples import Mixture, make_sample
from minicpmv.drawn.stream import conversation_row
from minicpmv.files import read_json


LAYER = "Qwen3DecoderLayer"
STILL_IMAGE = [[[-1]]]
# Only in the language model: the tower has layers of the same names, which are not smoothed.
MAPPINGS = [
    AWQMapping(f"re:llm[.].*{norm}$", [f"re:llm[.].*{layer}_proj$" for layer in layers])
    for norm, layers in {"input_layernorm": "qkv", "post_attention_layernorm": ("gate", "up")}.items()
] + [AWQMapping("re:llm[.].*up_proj$", ["re:llm[.].*down_proj$"])]


def calibrate(
    checkpoint: Checkpoint,
    folder: Path,
    algorithm: str,
    group_size: int,
    ignore: list[str],
    count: int,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Write the weights of a checkpoint into a folder, with 4-bit integers; returns `quantization_config`.

    Args:
        algorithm: "gptq" or "awq".
        ignore: patterns of the layers that stay whole.
        count: conversations.
    """
    model, processor = load(checkpoint.folder)
    scheme = rounding.scheme_of("w4a16", group_size)
    groups = {"group_0": scheme}
    if algorithm == "gptq":
        recipe: Any = GPTQModifier(config_groups=groups, ignore=ignore)
    else:
        scheme.weights.symmetric = False
        recipe = [
            AWQModifier(mappings=MAPPINGS, duo_scaling=False),
            QuantizationModifier(config_groups=groups, ignore=ignore),
        ]
        if not torch.accelerator.is_available():
            IntermediatesCache.pin_memory = lambda self, *arguments: None  # asks for an accelerator that is not there
    note(f"Drawing {count} conversations")
    rows = list(conversations(processor, count))
    note(f"{algorithm} over {count} conversations, layer by layer")
    own_class = type(model)
    model.__class__ = type(own_class.__name__, (own_class,), {"forward": forward})
    oneshot(
        model=model,
        processor=processor,
        dataset=torch.utils.data.DataLoader(rows, batch_size=None),
        recipe=recipe,
        num_calibration_samples=count,
        sequential_targets=[LAYER],
        tracing_ignore=[*DatasetArguments().tracing_ignore, "_inputs_embeds"],
        trust_remote_code_model=True,
    )
    model.__class__ = own_class
    model.__dict__.pop("forward", None)  # the library leaves its own
    model.save_pretrained(folder, save_compressed=True)
    return read_json(folder / "config.json")["quantization_config"] | {"ignore": ignore}


def conversations(processor: Any, count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Drawn conversations about images and packed videos, as inputs of the model, all with the same keys."""
    found, index = 0, 0
    while found < count:
        row = conversation_row(make_sample("train", 0, index, Mixture()))
        index += 1
        inputs = processor.apply_chat_template(
            row.pop("messages"),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            pad_pixel_values=True,
            **row,
        )
        slices = inputs["tgt_sizes"]
        if not len(slices) or not isinstance(inputs["pixel_values"], torch.Tensor):
            continue
        if inputs.get("temporal_ids") is None:
            inputs["temporal_ids"] = torch.tensor(STILL_IMAGE).expand(1, slices.shape[-2], 1)
        names = ("input_ids", "attention_mask", "pixel_values", "tgt_sizes", "temporal_ids")
        found += 1
        yield {name: inputs[name] for name in names}


def _inputs_embeds(model: nn.Module, input_ids: Any, visual: dict[str, Any]) -> torch.Tensor:
    return model._embed(input_ids, None, model._take_features(visual))


def forward(self, input_ids, attention_mask, pixel_values, tgt_sizes, temporal_ids) -> Any:  # type: ignore[no-untyped-def]
    visual = {"pixel_values": pixel_values, "tgt_sizes": tgt_sizes, "temporal_ids": temporal_ids}
    return self.llm(inputs_embeds=_inputs_embeds(self, input_ids, visual), attention_mask=attention_mask)
