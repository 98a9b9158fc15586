"""GPU memory that QLoRA takes, computed from shapes: no weights, no GPU, a minute or two of one core.

    minicpmv train estimate [--model FOLDER] [--tokens 4096] [--batch_size 1] [--lora_r 16]

What is special:
- torch goes through whole training steps (forward with gradient checkpointing, backward, AdamW) on tensors that have a shape
  and no storage, and counts what lives at the highest point: the model of a config.json under LoRA, TRL's loss with every
  token a label;
- the steps run with bfloat16 in place of the 4-bit weights, which changes nothing else: neither kind keeps anything for the
  backward pass. One weight, unpacked to be used, comes on top;
- left out is what a machine adds (the CUDA context, workspaces of libraries, fragmentation), and images on their way
  through the frozen tower, which are gone before the highest point.
"""

import argparse
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from minicpmv.checkpoint import source_of
from minicpmv.errors import one_line, one_line_errors
from minicpmv.train.common.arguments import AdapterArguments
from minicpmv.train.common.errors import ArgumentsError
from minicpmv.train.common.loading import part_of, train_in_float32
from minicpmv.train.common.names import check_model_name


GIB = 2**30


def quantized_bytes(weights: int) -> int:
    """NF4: half a byte a weight, a byte for each 64 of them, 4 bytes for each 256 of those."""
    return weights // 2 + -(-weights // 64) + 4 * -(-weights // (64 * 256))


def is_quantized(name: str) -> bool:
    """Whether a parameter is one of those in 4 bits: the linear layers under the adapter."""
    return name.endswith("base_layer.weight")


def qlora_model(name: str | Path, lora_r: int, trust_remote_code: bool = False) -> nn.Module:
    """The model of a configuration under LoRA, as training has it, in bfloat16 throughout.

    Raises:
        CheckpointError: the code of a Hub model is not trusted.
        ArgumentsError: there is no configuration.
    """
    from peft import get_peft_model

    try:
        config = AutoConfig.from_pretrained(**source_of(name, trust_remote_code=trust_remote_code))
    except OSError as error:
        raise ArgumentsError(f"The config.json of {name} cannot be loaded: {one_line(error)}") from error
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does it
    adapter = AdapterArguments("lora", lora_r=lora_r, lora_alpha=2 * lora_r).peft_config()
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    train_in_float32(model)
    return model


def bytes_of_weights(model: nn.Module) -> dict[str, int]:
    """What lies in memory before the first step, in bytes: `{what: bytes}`."""
    found = dict.fromkeys(("4-bit language model", "embeddings, head, norms", "tower", "resampler", "adapter"), 0)
    for name, parameter in model.named_parameters():
        part, size = part_of(name), parameter.numel()
        if parameter.requires_grad:
            found["adapter"] += 4 * size
        elif part is not None and part != "llm":
            found[part] += 2 * size
        elif is_quantized(name):
            found["4-bit language model"] += quantized_bytes(size)
        else:
            found["embeddings, head, norms"] += 2 * size
    return found


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and keeps the highest count."""

    def __init__(self):
        super().__init__()
        self.alive = self.highest = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.highest = max(self.highest, self.alive)
        return result

    def count(self, storage: Any) -> None:
        if not hasattr(storage, "is_counted"):
            storage.is_counted = True
            self.alive += storage.nbytes()
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, size: int) -> None:
        self.alive -= size


def peak_of_step(model: nn.Module, tokens: int, batch_size: int) -> int:
    """Bytes at the highest point of a training step beyond those of the weights."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with FakeTensorMode(), Peak() as peak:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                setattr(module, name, torch.nn.Parameter(fake, parameter.requires_grad))
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
        weights = peak.alive
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for _ in range(2):  # the optimizer has its states from the end of the first on
            ids = torch.zeros(batch_size, tokens, dtype=torch.long)
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, fused_lm_head=True, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return peak.highest - weights


def estimate(
    name: str | Path, tokens: int = 4096, batch_size: int = 1, lora_r: int = 16, trust_remote_code: bool = False
) -> dict[str, int]:
    """Bytes that QLoRA takes on a GPU, by what takes them, and "all" of them: `{what: bytes}`.

    Args:
        name: a folder with a config.json, or owner/name on the Hub.
        tokens: of a sample, those of images included.

    Raises:
        ArgumentsError, CheckpointError: as in [`qlora_model`].
    """
    model = qlora_model(name, lora_r, trust_remote_code)
    found = bytes_of_weights(model)
    unpacked = max(2 * weight.numel() for name, weight in model.named_parameters() if is_quantized(name))
    found["a step: activations, gradients, AdamW"] = peak_of_step(model, tokens, batch_size)
    found["the largest 4-bit weight, unpacked"] = unpacked
    return found | {"all": sum(found.values())}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="minicpmv train estimate", description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default=".", help="Folder with a config.json, or owner/name on the Hub.")
    parser.add_argument("--tokens", type=int, default=4096, help="Tokens of a sample, those of images included.")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=1, help="Samples on the GPU at a time.")
    parser.add_argument("--lora_r", "--lora-r", type=int, default=16, help="Rank of the adapter.")
    parser.add_argument(
        "--trust_remote_code",
        "--trust-remote-code",
        action="store_true",
        help="Run the code that the Hub model brings.",
    )
    options = parser.parse_args(argv)
    with one_line_errors():
        check_model_name(options.model)
        for name in ("tokens", "batch_size", "lora_r"):
            if getattr(options, name) < 1:
                raise ArgumentsError(f"--{name} is {getattr(options, name)}, but has to be at least 1.")
        found = estimate(options.model, options.tokens, options.batch_size, options.lora_r, options.trust_remote_code)
    for name, size in found.items():
        print(f"{name:40}{size / GIB:8.2f} GiB")
