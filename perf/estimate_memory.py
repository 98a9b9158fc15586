"""GPU memory of QLoRA on the full-size model, computed from shapes: no weights, no GPU, a minute or two of one core.

    python perf/estimate_memory.py [--tokens 4096] [--batch_size 1] [--lora_r 16]

What is special:
- torch goes through whole training steps (forward with gradient checkpointing, backward, AdamW) on tensors that have a shape
  and no storage, and counts what lives at the highest point: the model of config.json, the adapter of
  recipes/sft_qlora.yaml, TRL's loss with every token a label;
- the steps run with bfloat16 in place of the 4-bit weights, which changes nothing else: neither kind keeps anything for the
  backward pass. One weight, unpacked to be used, comes on top;
- left out is what a machine adds (the CUDA context, workspaces of libraries, fragmentation), and pictures on their way
  through the frozen tower, which are gone before the highest point.
"""

import argparse
import weakref
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForImageTextToText
from trl.trainer.utils import add_fused_lm_head

from minicpmv.train.common.arguments import AdapterArguments
from minicpmv.train.common.loading import part_of, train_in_float32


REPOSITORY = Path(__file__).resolve().parents[1]
GIB = 2**30


def quantized_bytes(weights: int) -> int:
    """NF4: half a byte a weight, a byte for each 64 of them, 4 bytes for each 256 of those."""
    return weights // 2 + -(-weights // 64) + 4 * -(-weights // (64 * 256))


def is_quantized(name: str) -> bool:
    """Whether a parameter is one of those in 4 bits: the linear layers under the adapter."""
    return name.endswith("base_layer.weight")


def qlora_model(folder: Path, lora_r: int):
    """The model of a folder's configuration under LoRA, as training has it, in bfloat16 throughout."""
    from peft import get_peft_model

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True, dtype=torch.bfloat16)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as SFTTrainer does it
    adapter = AdapterArguments("lora", lora_r=lora_r, lora_alpha=2 * lora_r).peft_config()
    model = get_peft_model(model, adapter, autocast_adapter_dtype=False)
    train_in_float32(model)
    return model


def bytes_of_weights(model) -> dict[str, int]:
    """What lies in memory before the first step, in bytes: `{what: bytes}`."""
    found = dict.fromkeys(("4-bit language model", "embeddings, head, norms", "tower", "resampler", "adapter"), 0)
    for name, parameter in model.named_parameters():
        part, size = part_of(name), parameter.numel()
        if parameter.requires_grad:
            found["adapter"] += 4 * size
        elif part != "llm":
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

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        self.highest = max(self.highest, self.alive)
        return result

    def count(self, storage):
        if not hasattr(storage, "is_counted"):
            storage.is_counted = True
            self.alive += storage.nbytes()
            weakref.finalize(storage, self.forget, storage.nbytes())

    def forget(self, size):
        self.alive -= size


def peak_of_step(model, tokens: int, batch_size: int) -> int:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=REPOSITORY, help="Folder with the config.json.")
    parser.add_argument("--tokens", type=int, default=4096, help="Of a sample, pictures included.")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--lora_r", type=int, default=16)
    options = parser.parse_args()
    model = qlora_model(options.model, options.lora_r)
    lines = bytes_of_weights(model)
    unpacked = max(2 * weight.numel() for name, weight in model.named_parameters() if is_quantized(name))
    lines["a step: activations, gradients, AdamW"] = peak_of_step(model, options.tokens, options.batch_size)
    lines["the largest 4-bit weight, unpacked"] = unpacked
    lines["all"] = sum(lines.values())
    for name, size in lines.items():
        print(f"{name:40}{size / GIB:8.2f} GiB")


if __name__ == "__main__":
    main()
