"""Which type matrix products take in training."""

import torch


def fast_type(device: torch.device) -> torch.dtype:
    """bfloat16 where a device multiplies in it; float32 on a CPU without AVX-512, which takes thirty times as long in bfloat16."""
    is_slow = device.type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.float32 if is_slow else torch.bfloat16


def fast_products(device: torch.device) -> torch.autocast:
    """Lets matrix products be computed in that type: a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_type(device) is torch.bfloat16)
