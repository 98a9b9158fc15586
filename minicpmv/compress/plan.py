"""How far to cut what, for a target: a pass that measures how much each cut alone costs, then a path from the whole model down.

What is special:
- Costs of cuts are taken to add up, which they do as long as they are small; the report says what came out.
- The path takes, step by step, the cut that costs the least loss for what it saves. Without weights nothing can be measured:
  then every kind keeps about the same share.
- Nothing goes below the smallest size that was measured, unless its size is given: what was not measured is not guessed.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from minicpmv.compress.shapes import KINDS, PARTS, CompressionError, Shape, Sizes


AUTOMATIC = tuple(kind for kind in KINDS if kind != "vocabulary")  # a corpus decides about the vocabulary
MEASURED_SHARES = (0.875, 0.75, 0.625, 0.5, 0.25)
STEP = {"mlp": 16, "tower_mlp": 16, "queries": 2}  # sizes that kernels like; all others go by one
UNITS = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}
ANSWER_TOKENS = 32  # of the question whose time counts

Curves = dict[str, list[tuple[int, float]]]  # of each kind: (size, loss), from the whole size down


@dataclass(frozen=True)
class Target:
    """Most parameters of the model, or of one of its parts."""

    part: str | None  # of PARTS; None: all of it
    value: float
    is_share: bool

    @classmethod
    def parse(cls, text: str) -> "Target":
        """`75%`, `6e9`, `6B`, `500M`, `llm=75%`.

        Raises:
            CompressionError: it is none of these.
        """
        part, _, amount = text.rpartition("=")
        found = re.fullmatch(r"([\d.]+(?:e\d+)?)([kmb%]?)", amount.strip().lower())
        if part not in ("", *PARTS) or found is None:
            raise CompressionError(f"the target {text!r} is none: write 75%, 6e9, 6B, or for a part llm=75%, tower=2B")
        value, unit = float(found[1]), found[2]
        is_share = unit == "%"
        if is_share and not 0 < value <= 100:
            raise CompressionError(f"the target {text!r} is no share: write one above 0% and up to 100%")
        return cls(part or None, value / 100 if is_share else value * UNITS[unit], is_share)

    @property
    def kinds(self) -> tuple[str, ...]:
        return AUTOMATIC if self.part is None else tuple(kind for kind in PARTS[self.part] if kind in AUTOMATIC)

    def of(self, sizes: Sizes) -> int:
        """The parameters that it is about."""
        return sizes.parameters if self.part is None else getattr(sizes, f"{self.part}_parameters")

    def limit(self, whole: Sizes) -> float:
        return self.value * self.of(whole) if self.is_share else self.value


def sizes_of(kind: str, whole: int, least: float) -> list[int]:
    """All sizes of at least `least` that the path may give to a kind, from the whole one down."""
    step = STEP.get(kind, 1)
    below = range((whole - 1) // step * step, 0, -step)
    return [whole, *(size for size in below if size >= least)]


def measured_sizes(kind: str, whole: int) -> list[int]:
    """The sizes below the whole one at which the loss is measured."""
    sizes = sizes_of(kind, whole, MEASURED_SHARES[-1] * whole)[1:]
    return sorted({min(sizes, key=lambda size: abs(size - share * whole)) for share in MEASURED_SHARES if sizes})[::-1]


def sensitivity(
    whole: Shape,
    kinds: Sequence[str],
    loss_of: Callable[[Shape], float],
    note: Callable[[str], None] = lambda what: None,
) -> Curves:
    """How the loss rises with each cut alone.

    Args:
        loss_of: the loss of the model cut to a shape.
        note: hears what was measured.
    """
    planned = [(kind, size) for kind in kinds for size in measured_sizes(kind, dict(whole)[kind])]
    base = loss_of(whole)
    note(f"loss of the whole model: {base:.4f}")
    curves: Curves = {kind: [(dict(whole)[kind], base)] for kind in kinds}
    for number, (kind, size) in enumerate(planned, start=1):
        curves[kind].append((size, loss_of(replace(whole, **{kind: size}))))
        note(f"{number} of {len(planned)}: {kind} {size} of {dict(whole)[kind]}, loss {curves[kind][-1][1]:.4f}")
    return curves


def steps(
    whole: Shape, kinds: Sequence[str], cost: Callable[[Shape], float], curves: Curves | None
) -> Iterator[Shape]:
    """Shapes from the whole model down, one cut at a time, as `curves` advise.

    Args:
        kinds: what may be cut.
        cost: what is to be saved.
        curves: losses of each cut alone; None: every kind keeps about the same share.
    """
    least = {kind: min(size for size, _ in points) for kind, points in (curves or {}).items()}
    grids = {kind: sizes_of(kind, dict(whole)[kind], least.get(kind, 0)) for kind in kinds}
    rises = {kind: _rise(points) for kind, points in (curves or {}).items()}
    shape = whole
    yield shape
    while True:
        options: list[tuple[float, int, Shape]] = []
        for kind in kinds:
            size = dict(shape)[kind]
            place = grids[kind].index(size) + 1
            if place == len(grids[kind]):
                continue
            smaller = replace(shape, **{kind: grids[kind][place]})
            if curves is None:
                price = -size / dict(whole)[kind]
            else:
                price = (rises[kind](grids[kind][place]) - rises[kind](size)) / max(cost(shape) - cost(smaller), 1e-9)
            options.append((price, len(options), smaller))
        if not options:
            return
        shape = min(options)[2]
        yield shape


def _rise(points: Sequence[tuple[int, float]]) -> Callable[[int], float]:
    """The loss by size; noise does not make it fall where more is cut."""
    sizes = [size for size, _ in points]
    losses = np.maximum.accumulate([loss for _, loss in points])
    return lambda size: float(np.interp(size, sizes[::-1], losses[::-1]))


def choose(
    whole: Shape, kinds: Sequence[str], cost: Callable[[Shape], float], limit: float, curves: Curves | None
) -> Shape:
    """The first shape on the path whose cost is within the limit, without the cuts that its last one made needless.

    Raises:
        CompressionError: none is.
    """
    shape = whole
    for shape in steps(whole, kinds, cost, curves):
        if cost(shape) <= limit:
            return given_back(shape, whole, cost, limit, curves or {})
    raise CompressionError(
        f"{limit:,.0f} cannot be reached: {', '.join(kinds)} cut as far as it goes leave {cost(shape):,.0f}. Cut more kinds, "
        "or give smaller sizes yourself"
    )


def given_back(shape: Shape, whole: Shape, cost: Callable[[Shape], float], limit: float, curves: Curves) -> Shape:
    """A shape within the limit, larger where that is still within it: a whole layer saves more than was left to save, and
    what was cut before it may stay. What wins back most of the loss comes first."""
    while True:
        options: list[tuple[float, int, Shape]] = []
        for kind, points in curves.items():
            rise, now = _rise(points), dict(shape)[kind]
            for size in sizes_of(kind, dict(whole)[kind], now + 1):
                larger = replace(shape, **{kind: size})
                if size > now and cost(larger) <= limit:
                    options.append((rise(now) - rise(size), len(options), larger))
        if not options:
            return shape
        shape = max(options, key=lambda option: option[:2])[2]


def choose_by_time(path: Sequence[Shape], seconds_of: Callable[[Shape], float], limit: float) -> Shape:
    """The first shape on a path, from slow to fast, that is fast enough: found by halving, so few are timed.

    Raises:
        CompressionError: the last one is still too slow.
    """
    low, high = 0, len(path) - 1
    if (fastest := seconds_of(path[high])) > limit:
        raise CompressionError(
            f"{1000 * limit:,.0f} ms cannot be reached: cut as far as it goes, a question takes {1000 * fastest:,.0f} ms here"
        )
    while low < high:
        middle = (low + high) // 2
        if seconds_of(path[middle]) <= limit:
            high = middle
        else:
            low = middle + 1
    return path[high]


@torch.inference_mode()
def seconds_of_question(model: Any, inputs: Mapping[str, Any], repeats: int = 3) -> float:
    """Median time to read a prompt with its image and to write `ANSWER_TOKENS` tokens."""
    found = []
    for _ in range(repeats + 1):  # the first one warms up
        begin = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=ANSWER_TOKENS, min_new_tokens=ANSWER_TOKENS, do_sample=False, use_cache=True
        )
        found.append(time.perf_counter() - begin)
    return median(found[1:])


def draw(curves: Curves, saved: Callable[[str, int], float], path: Path) -> None:
    """The loss of each cut alone over the share of the model's parameters that it saves, as an image."""
    from matplotlib.figure import Figure  # not pyplot: its back ends want a screen

    figure = Figure(figsize=(8, 4), layout="constrained")
    by_size, by_saving = figure.subplots(1, 2, sharey=True)
    for kind, points in curves.items():
        sizes, losses = zip(*points, strict=True)
        by_size.plot([100 * size / sizes[0] for size in sizes], losses, "o-", ms=3, label=kind)
        by_saving.plot([100 * saved(kind, size) for size in sizes], losses, "o-", ms=3, label=kind)
    by_size.invert_xaxis()
    by_size.set(xlabel="% of its size that stays", ylabel="loss on answers", yscale="log")
    by_saving.set(xlabel="% of all parameters that go")
    by_size.legend(fontsize="small")
    figure.savefig(path)
