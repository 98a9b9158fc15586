"""What stays takes over from what goes: the matrices that read the MLPs and heads are fitted anew, without training.

What is special:
- A channel that goes is predicted, by least squares over conversations, from those of its layer that stay, and what it wrote
  is written by their columns (as SparseGPT does for single weights, https://arxiv.org/abs/2301.00774). Where the matrix has
  a bias, that takes over what is constant.
- Channels of MLPs are chosen for that: each next one is that of which the chosen ones explain least. Importance, which looks at
  each alone, keeps several that say the same.
- One half of the conversations is fitted, the other says how far that is to be trusted: a matrix is left alone where few
  conversations tell nothing.
- The fit needs the products of each two channels of a layer. As many layers as fit `BYTES_AT_ONCE` are measured in one pass
  over the conversations.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from minicpmv.compress.importance import most_different
from minicpmv.compress.shapes import dimensions_of, layer_of
from minicpmv.compress.surgery import Kept, indices


READ = ("mlp", "query_rows", "tower_mlp", "tower_rows")  # inputs of the matrices that are fitted
CHOSEN = ("mlp", "tower_mlp")  # those that are chosen anew, by all of their products and not one by one
BYTES_AT_ONCE = 8e9
RIDGES = (0.001, 0.01, 0.1, 1.0)  # of each channel's own square: what rests on few tokens is trusted less


@torch.no_grad()
def fitted(model: Any, kept: Kept, batches: Sequence[dict[str, Any]]) -> tuple[Kept, dict[str, Tensor]]:
    """What stays, with the MLPs' channels chosen anew, and the weights of `model` to be cut in place of its own, `{name: weight}`.

    Args:
        kept: of the shape that is wanted.
        batches: conversations to choose by and to fit on.
    """
    readers: dict[str, tuple[str, int]] = {}  # matrices some of whose inputs go: name -> what these are, layer
    for name, weight in model.named_parameters():
        what, layer = dimensions_of(name).get(1), layer_of(name)
        if what not in READ or layer is None or layer[1] not in getattr(kept, layer[0]):
            continue
        if len(indices(what, layer[1], model.config, kept)) < weight.shape[1]:
            readers[name.removesuffix(".weight")] = what, layer[1]
    chosen = {what: getattr(kept, what).clone() for what in CHOSEN}
    found: dict[str, Tensor] = {}
    for names in _groups(model, readers):
        for name, products in _products(model, names, batches).items():
            module, (what, number) = model.get_submodule(name), readers[name]
            if what in CHOSEN:
                chosen[what][number] = _channels(module, products, chosen[what].shape[1])
            stays = chosen[what][number] if what in CHOSEN else indices(what, number, model.config, kept)
            weight, bias = _fitted(module, products, stays.to(products.device))
            found[f"{name}.weight"] = weight
            if bias is not None:
                found[f"{name}.bias"] = bias
    return replace(kept, **chosen), found


def _channels(module: nn.Linear, products: Tensor, count: int) -> Tensor:
    """The inputs of a matrix that explain best, together, what all of them write."""
    norms = module.weight.double().norm(dim=0)
    inputs = products.sum(0)[: len(norms), : len(norms)].double()
    return most_different(inputs * norms[:, None] * norms, count)


def _groups(model: Any, names: Iterable[str]) -> Iterator[list[str]]:
    """The names in groups whose products fit the memory together."""
    group: list[str] = []
    taken = 0.0
    for name in names:
        needed = 8 * model.get_submodule(name).in_features ** 2
        if group and taken + needed > BYTES_AT_ONCE:
            yield group
            group, taken = [], 0.0
        group.append(name)
        taken += needed
    if group:
        yield group


def _products(model: Any, names: Sequence[str], batches: Iterable[dict[str, Any]]) -> dict[str, Tensor]:
    """Sums of the products of each two inputs over all tokens of even, and of odd conversations [2, inputs, inputs].

    A bias counts as an input that is always 1.
    """
    sums: dict[str, Tensor] = {}
    half = 0

    def watch(name: str, module: nn.Linear) -> Any:
        def see(module: nn.Linear, args: tuple) -> None:
            inputs = args[0].float().flatten(0, -2)
            if module.bias is not None:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            if name not in sums:
                sums[name] = inputs.new_zeros(2, inputs.shape[1], inputs.shape[1])
            sums[name][half] += inputs.T @ inputs

        return module.register_forward_pre_hook(see).remove

    with ExitStack() as hooks:
        for name in names:
            hooks.callback(watch(name, model.get_submodule(name)))
        for batch in batches:
            model(**send_to_device(batch, model.device))
            half = 1 - half
    return sums


def _fitted(module: nn.Linear, products: Tensor, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a matrix whose kept inputs write also what the others wrote; the others' columns stay as they are."""
    whole = module.weight.double()
    if module.bias is not None:
        whole = torch.cat([whole, module.bias.double()[:, None]], 1)
        kept = torch.cat([kept, kept.new_tensor([whole.shape[1] - 1])])
    is_gone = torch.ones(whole.shape[1], dtype=torch.bool, device=whole.device)
    is_gone[kept] = False
    # What the inputs that go write, predicted by those that stay: products within and across, and the outputs' own.
    gone = whole[:, is_gone]
    inner, across = products[:, kept][:, :, kept].double(), products[:, kept][:, :, is_gone].double() @ gone.T

    def columns(half: Tensor, targets: Tensor, ridge: float) -> Tensor:
        """[kept, outputs]"""
        half = half.clone()
        half.diagonal().mul_(1 + ridge).clamp_(min=1e-30)
        return torch.linalg.solve(half, targets)

    def gained(ridge: float) -> float:
        """By how much the columns that one half of the conversations gives lower the squared error on the other."""
        found = columns(inner[0], across[0], ridge)
        return float((found * (2 * across[1] - inner[1] @ found)).sum())

    gains = {ridge: gained(ridge) for ridge in RIDGES}
    best = max(gains, key=gains.__getitem__)
    if gains[best] > 0:
        whole[:, kept] += columns(inner.sum(0), across.sum(0), best).T
    whole = whole.to(module.weight.dtype)
    return (whole, None) if module.bias is None else (whole[:, :-1].contiguous(), whole[:, -1].contiguous())
