"""What a model needs least, and what it loses: importance of everything that can be cut, and the loss on answers.

What is special:
- One pass over conversations measures all kinds at once, from what flows through the whole model.
- A channel of an MLP, or a head, weighs its mean absolute activation times the norm of the column that reads it: the size
  of what it adds to the states (as Wanda weighs single weights, https://arxiv.org/abs/2306.11695).
- A layer weighs how far it turns the states: 1 - cosine of before and after (block influence of ShortGPT,
  https://arxiv.org/abs/2403.03853). A channel of the tower weighs its mean absolute value behind the norms (Minitron,
  https://arxiv.org/abs/2407.14679).
- Queries are chosen together: each next one is that whose features the chosen ones explain least.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from minicpmv.compress.shapes import CompressionError, Shape, widths
from minicpmv.compress.surgery import Kept
from minicpmv.data.collator import IGNORED, ConversationCollator


Batch = dict[str, Any]  # of one conversation, as the collator makes it


@dataclass
class Importance:
    """How much everything weighs; the more, the later it goes. Float64 on the CPU."""

    layers: Tensor  # [layers]
    heads: Tensor  # [layers, key-value heads]
    mlp: Tensor  # [layers, width]
    tower_layers: Tensor
    tower_heads: Tensor
    tower_mlp: Tensor
    tower_channels: Tensor  # [width of the tower]
    queries: Tensor  # [Q, Q]: products of the features of each two queries

    def choose(self, config: Any, shape: Shape) -> Kept:
        """What stays of the model in this shape. The vocabulary stays whole: a corpus decides about it."""
        channels = widths(config, shape)["tower_channels"]
        return Kept(
            layers=_largest(self.layers, shape.layers),
            heads=_largest(self.heads, shape.heads),
            mlp=_largest(self.mlp, shape.mlp),
            vocabulary=torch.arange(config.vocab_size),
            tower_layers=_largest(self.tower_layers, shape.tower_layers),
            tower_heads=_largest(self.tower_heads, shape.tower_heads),
            tower_mlp=_largest(self.tower_mlp, shape.tower_mlp),
            tower_channels=_largest(self.tower_channels, channels),
            queries=most_different(self.queries, shape.queries),
        )

    def kept_shares(self, kept: Kept) -> dict[str, list[float]]:
        """Which share of its importance each layer keeps, of what is chosen layer by layer: where it is low, it hurts."""
        shares = {}
        for kind in ("mlp", "heads", "tower_mlp", "tower_heads"):
            weights, chosen = getattr(self, kind), getattr(kept, kind)
            shares[kind] = (weights.gather(1, chosen).sum(1) / weights.sum(1)).tolist()
        return shares


def _largest(weights: Tensor, count: int) -> Tensor:
    """Sorted indices of the largest, of each row."""
    return weights.topk(count, dim=-1).indices.sort(-1).values


def most_different(products: Tensor, count: int) -> Tensor:
    """Sorted indices of rows that explain the others best, from the products of each two (a pivoted Cholesky factor)."""
    left = products.diagonal().clone()  # of each row's square, what the chosen ones do not explain
    factor = products.new_zeros(count, len(products))
    chosen: list[int] = []
    for number in range(count):
        left[chosen] = -torch.inf
        pivot = int(left.argmax())
        chosen.append(pivot)
        column = products[:, pivot] - factor[:number, pivot] @ factor[:number]
        factor[number] = column / column[pivot].clamp(min=1e-30).sqrt()
        left -= factor[number].square()
    return torch.tensor(sorted(chosen))


@torch.no_grad()
def measure_importance(model: Any, batches: Iterable[Batch]) -> Importance:
    """Run a model over conversations, and see what in it weighs how much.

    Raises:
        CompressionError: none of them shows an image.
    """
    sums: dict[str, dict[int, Tensor]] = {}
    with ExitStack() as hooks:

        def watch(module: nn.Module, kind: str, layer: int, weigh: Callable[..., Tensor]) -> None:
            def see(module: nn.Module, args: tuple, output: Any) -> None:
                found = sums.setdefault(kind, {})
                after = output[0] if isinstance(output, tuple) else output
                value = weigh(module, args[0].float(), after.float()).double().cpu()
                found[layer] = found[layer] + value if layer in found else value

            hooks.callback(module.register_forward_hook(see).remove)

        for layer, block in enumerate(model.llm.model.layers):
            watch(block, "layers", layer, _turn)
            watch(block.self_attn.o_proj, "heads", layer, _reading)
            watch(block.mlp.down_proj, "mlp", layer, _reading)
        for layer, block in enumerate(model.vpm.encoder.layers):
            watch(block, "tower_layers", layer, _turn)
            watch(block.self_attn.out_proj, "tower_heads", layer, _reading)
            watch(block.mlp.fc2, "tower_mlp", layer, _reading)
            for norm in (block.layer_norm1, block.layer_norm2):
                watch(norm, "tower_channels", 0, lambda module, before, after: after.abs().flatten(0, -2).sum(0))
        watch(model.resampler, "queries", 0, lambda module, before, after: torch.einsum("uqd,upd->qp", after, after))
        for batch in batches:
            model(**send_to_device(batch, model.device))
    if "queries" not in sums:
        raise CompressionError(
            "None of the conversations shows an image, so tower and queries cannot be weighed: give some that do"
        )
    found = {kind: torch.stack([values[layer] for layer in sorted(values)]) for kind, values in sums.items()}
    for kind, heads in (
        ("heads", model.config.num_key_value_heads),
        ("tower_heads", model.config.vision_config.num_attention_heads),
    ):
        found[kind] = found[kind].unflatten(1, (heads, -1)).sum(-1)
    for kind in ("tower_channels", "queries"):
        found[kind] = found[kind][0]
    return Importance(**found)


def _reading(module: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    """What each input of a matrix adds to its outputs."""
    return before.abs().flatten(0, -2).sum(0) * module.weight.float().norm(dim=0)


def _turn(module: nn.Module, before: Tensor, after: Tensor) -> Tensor:
    return (1 - nn.functional.cosine_similarity(before, after, dim=-1)).mean()


@torch.no_grad()
def answer_loss(model: Any, batches: Iterable[Batch]) -> float:
    """Mean cross-entropy of the answers' tokens, in nats."""
    total, tokens = 0.0, 0
    for batch in batches:
        answer = int((batch["labels"][:, 1:] != IGNORED).sum())
        total += float(model(**send_to_device(batch, model.device)).loss) * answer
        tokens += answer
    return total / tokens


def encode(processor: Any, rows: Iterable[dict[str, Any]], queries: int) -> list[Batch]:
    """Conversations as batches of one, for a model that has so many queries."""
    collator = ConversationCollator(processor)
    with with_queries(processor, queries):
        return [collator([row]) for row in rows]


@contextmanager
def with_queries(processor: Any, queries: int) -> Iterator[None]:
    """Give a processor the slots of a model with so many queries, for images and for frames; then its own again."""
    readers = (processor.image_processor, processor.video_processor.image_processor)
    own = [reader.image_feature_size for reader in readers]
    try:
        for reader in readers:
            reader.image_feature_size = queries
        yield
    finally:
        for reader, size in zip(readers, own, strict=True):
            reader.image_feature_size = size
