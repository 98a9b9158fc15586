"""Weights in 16 hexadecimal digits, computed where the weights are.

Hashing with SHA-256 would copy 17 GB off the accelerator at each start. Here each tensor is reduced to one 64-bit number on
its own device, and only those numbers are hashed.
"""

import hashlib

import torch
from accelerate.utils import align_module_device


ROW = 2**16  # words of 64 bits: half a megabyte, which stays in a CPU's cache
ROWS_AT_ONCE = {"cpu": 1}  # an accelerator takes more, so that starting a kernel costs little
MORE_ROWS = 64
ODD = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)  # the constants of SplitMix64, as signed numbers


def weights_fingerprint(model: torch.nn.Module) -> str:
    """16 hexadecimal digits that stand for all that a model would store, as it is in memory now: weights, buffers, and the
    scales of quantized weights.

    Equal weights of equal dtype give equal digits on any device, also where accelerate has moved them to the CPU or the
    disk. One changed bit always gives other digits; that unequal weights agree by chance has odds of about 2**-64 a
    tensor. It is not made to withstand someone who looks for such weights.
    """
    stored = model.state_dict()  # without the buffers that are computed when a model is built
    digest, seen = hashlib.sha256(), set()

    def add(name: str, tensor: torch.Tensor) -> None:
        seen.add(name)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {checksum(tensor)}\n".encode())

    for place, module in model.named_modules():
        with align_module_device(module):  # weights that accelerate put elsewhere
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                path = f"{place}.{name}" if place else name
                if path in stored:
                    add(path, tensor)
    for name, value in stored.items():
        if name not in seen and isinstance(value, torch.Tensor):  # what bitsandbytes keeps with a weight
            add(name, value)
    return digest.hexdigest()[:16]


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> int:
    """A 64-bit number from the bytes of a tensor and their places."""
    if hasattr(tensor, "__tensor_flatten__"):  # a quantized tensor that is made of several plain ones
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return sum((place + 1) * checksum(part) for place, part in enumerate(parts)) % 2**64
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()  # words have to begin where a word can
    tail = len(data) % (8 * ROW)
    rows = data[: len(data) - tail].view(torch.int64).view(-1, ROW)
    at_once = ROWS_AT_ONCE.get(tensor.device.type, MORE_ROWS)
    sums = [_mixed_sums(rows[start : start + at_once]) for start in range(0, len(rows), at_once)]
    if tail:
        end = torch.nn.functional.pad(data[len(data) - tail :], (0, 8 * ROW - tail))
        sums.append(_mixed_sums(end.view(torch.int64)[None]))
    return _mixed_sums(torch.cat(sums)[None]).item() % 2**64 if sums else 0


def _mixed_sums(words: torch.Tensor) -> torch.Tensor:
    """Sums over the last dimension of words [rows, n] that are scrambled first, each by its place; int64 wraps around."""
    places = torch.arange(words.shape[-1], device=words.device) * ODD[0]
    mixed = (words ^ places).mul_(ODD[1])
    return mixed.bitwise_xor_(mixed >> 29).sum(-1)
