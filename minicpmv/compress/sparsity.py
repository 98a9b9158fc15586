"""Zeros in place of weights, for comparison only: by size, or by size and activation; anywhere, or two of each four.

Nothing of this is saved. Zeros that are stored make no file smaller, and only kernels for two of four, which some GPUs have,
make them faster; a structured cut is smaller and faster everywhere.

Sources: https://arxiv.org/abs/2306.11695 (Wanda), https://arxiv.org/abs/2104.08378 (two of four).
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from minicpmv.compress.importance import Batch, answer_loss


METHODS = ("magnitude", "wanda")
PATTERNS = ("half of each row", "2 of each 4")


def linear_layers(model: Any) -> dict[str, nn.Linear]:
    """The matrices of the language model's layers, which zeros go into."""
    return {name: module for name, module in model.llm.model.layers.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def input_norms(model: Any, batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The L2 norm of each input of each matrix over conversations."""
    squares: dict[str, Tensor] = {}
    layers = linear_layers(model)

    def watch(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Tensor]) -> None:
            found = args[0].float().pow(2).flatten(0, -2).sum(0)
            squares[name] = squares[name] + found if name in squares else found

        return layers[name].register_forward_pre_hook(see)

    handles = [watch(name) for name in layers]
    try:
        for batch in batches:
            model(**send_to_device(batch, model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: value.sqrt() for name, value in squares.items()}


def zeroed(weight: Tensor, scores: Tensor, pattern: str) -> Tensor:
    """A matrix with the lower-scored half of its weights zero: of each row, or of each four neighbors."""
    groups = scores.unflatten(1, (-1, 4)) if pattern == PATTERNS[1] else scores
    lowest = groups.topk(groups.shape[-1] // 2, dim=-1, largest=False).indices
    mask = torch.ones_like(groups, dtype=torch.bool).scatter(-1, lowest, False)
    return weight * mask.reshape(weight.shape)


@torch.no_grad()
def compare(model: Any, calibration: Iterable[Batch], held_out: list[Batch]) -> dict[str, float]:
    """`{method, pattern: loss}` with half of the weights of the language model's layers zero."""
    norms, found = input_norms(model, calibration), {}
    for method in METHODS:
        for pattern in PATTERNS:
            sparse = copy.deepcopy(model)
            for name, layer in linear_layers(sparse).items():
                scores = layer.weight.abs() * (norms[name] if method == "wanda" else 1)
                layer.weight.copy_(zeroed(layer.weight, scores, pattern))
            found[f"{method}, {pattern}"] = answer_loss(sparse, held_out)
    return found
