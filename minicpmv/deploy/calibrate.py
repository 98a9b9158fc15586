"""Integers chosen so that conversations change least: GPTQ and AWQ of llm-compressor, over images and packed videos.

What is special:
- It runs in the environment of `make quantize-env`, since llm-compressor wants other versions of transformers.
- The library traces a layer at a time. What it cannot trace, the way from pixels to embeddings, it is told to run as it is.
- It traces once, so every conversation brings the same inputs: one without an image brings empty ones.
- llm-compressor writes the whole layers by name and forgets those of a class that it does not know; they are written here.
- What stays whole is stored in the type that it came in, and not in the one that was computed in.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.args import DatasetArguments
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import nn
from transformers import AutoProcessor

from minicpmv.checkpoint import load
from minicpmv.data.collator import ConversationCollator
from minicpmv.deploy.source import Checkpoint
from minicpmv.files import read_json


LAYER = "Qwen3DecoderLayer"
STILL_IMAGE = [[[-1]]]
INPUTS = ("input_ids", "attention_mask", "pixel_values", "tgt_sizes", "temporal_ids")
# Only in the language model: the tower has layers of the same names, which are not smoothed.
MAPPINGS = [
    AWQMapping(f"re:llm[.].*{norm}$", [f"re:llm[.].*{layer}_proj$" for layer in layers])
    for norm, layers in {"input_layernorm": "qkv", "post_attention_layernorm": ("gate", "up")}.items()
] + [AWQMapping("re:llm[.].*up_proj$", ["re:llm[.].*down_proj$"])]


def calibrate(
    checkpoint: Checkpoint,
    folder: Path,
    algorithm: str,
    scheme: QuantizationScheme,
    ignore: list[str],
    rows: Sequence[dict[str, Any]],
    note: Callable[[str], None],
) -> dict[str, Any]:
    """Write the weights of a checkpoint into a folder, in integers; returns `quantization_config`.

    Args:
        algorithm: "gptq" or "awq".
        scheme: how the integers are stored.
        ignore: patterns of the layers that stay whole.
        rows: the conversations.

    Raises:
        DataError: the processor cannot read one; before the model is loaded.
    """
    note(f"Reading {len(rows)} conversations")
    processor = AutoProcessor.from_pretrained(str(checkpoint.folder), trust_remote_code=True)
    batches = list(encode(processor, rows))
    model, _ = load(checkpoint.folder)
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
    note(f"{algorithm} over {len(rows)} conversations, layer by layer")
    own_class = type(model)
    model.__class__ = type(own_class.__name__, (own_class,), {"forward": forward})
    oneshot(
        model=model,
        processor=processor,
        dataset=torch.utils.data.DataLoader(batches, batch_size=None),
        recipe=recipe,
        num_calibration_samples=len(rows),
        sequential_targets=[LAYER],
        tracing_ignore=[*DatasetArguments().tracing_ignore, "_inputs_embeds"],
        trust_remote_code_model=True,
    )
    model.__class__ = own_class
    model.__dict__.pop("forward", None)  # the library leaves its own
    for name, parameter in model.named_parameters():
        if name in checkpoint.files:
            parameter.data = parameter.data.to(checkpoint.dtype(name))
    model.save_pretrained(folder, save_compressed=True)
    return read_json(folder / "config.json")["quantization_config"] | {"ignore": ignore}


def encode(processor: Any, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, torch.Tensor]]:
    """Conversations as inputs of the model, one at a time, all with the same keys."""
    collator = ConversationCollator(processor)
    empty = {"pixel_values": torch.empty(1, 0), "tgt_sizes": torch.empty(1, 0, 2, dtype=torch.long)}
    for row in rows:
        inputs = empty | collator([row])
        inputs.setdefault("temporal_ids", torch.tensor(STILL_IMAGE).expand(1, inputs["tgt_sizes"].shape[1], 1))
        yield {name: inputs[name] for name in INPUTS}


def _inputs_embeds(model: nn.Module, input_ids: Any, visual: dict[str, Any]) -> torch.Tensor:
    return model._embed(input_ids, None, model._take_features(visual) if visual["pixel_values"].numel() else None)


def forward(self, input_ids, attention_mask, pixel_values, tgt_sizes, temporal_ids) -> Any:  # type: ignore[no-untyped-def]
    visual = {"pixel_values": pixel_values, "tgt_sizes": tgt_sizes, "temporal_ids": temporal_ids}
    return self.llm(inputs_embeds=_inputs_embeds(self, input_ids, visual), attention_mask=attention_mask)
