"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): right if the box of the reply covers the true one by half.

Known defect of the reference, kept: the scale of a box is guessed from its largest number. Up to 1.5 they are shares of the
image, up to 1000 thousandths, beyond that pixels; a box in pixels of an image below 1000 pixels is read as thousandths.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from minicpmv.evaluate.benchmark import Metrics, Scores
from minicpmv.evaluate.scoring import Scoring


THRESHOLD = 0.5
NUMBER = r"[-+]?\d*\.?\d+(?:[eE][-+]?\d+)?"
BETWEEN = r"(?:\s*,\s*|\s+)"
BRACKETED = re.compile(rf"\[\s*({NUMBER}){BETWEEN}({NUMBER}){BETWEEN}({NUMBER}){BETWEEN}({NUMBER})\s*\]")

Box = tuple[float, float, float, float]  # left, top, right, bottom


def find_box(reply: str) -> Box | None:
    """The first four numbers in brackets, or else the first four of all."""
    found = BRACKETED.search(reply)
    numbers = list(found.groups()) if found else re.findall(NUMBER, reply)[:4]
    return tuple(map(float, numbers)) if len(numbers) == 4 else None  # type: ignore[return-value]


def in_pixels(box: Box, width: float, height: float, scale: float | None = None) -> Box:
    """A box of a reply in pixels of the image: inside it, corners in order.

    Args:
        scale: what the whole width and height are in the reply, 1 or 1000; guessed if None, and pixels beyond 1000.
    """
    largest = max(map(abs, box))
    if scale is None and largest <= 1000:
        scale = 1 if largest <= 1.5 else 1000
    if scale:
        box = (box[0] / scale * width, box[1] / scale * height, box[2] / scale * width, box[3] / scale * height)
    left, right = sorted(min(max(x, 0.0), width) for x in box[0::2])
    top, bottom = sorted(min(max(y, 0.0), height) for y in box[1::2])
    return left, top, right, bottom


def iou(one: Sequence[float], other: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum(max(box[2] - box[0], 0) * max(box[3] - box[1], 0) for box in (one, other))
    return width * height / (areas - width * height)


def refcoco(answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """Score a reply with a box.

    Args:
        expected: the true `box` in pixels, and the image's `width` and `height`.
        strict: numbers are thousandths whatever their size, as MiniCPM-V writes them.
    """
    found, width, height = find_box(answer), expected["width"], expected["height"]
    box = in_pixels(found, width, height, scale=1000 if strict else None) if found and width and height else None
    overlap = iou(box, expected["box"]) if box else 0.0
    return {"exact": float(overlap >= THRESHOLD), "iou": overlap, "extracted": list(box) if box else None}


def mean_of_parts(scores: list[Scores]) -> Metrics:
    """The mean accuracy of the eight splits (facts: `split`), each with the same weight, and the mean overlap."""
    splits: dict[str, list[float]] = defaultdict(list)
    for score in scores:
        splits[score["facts"]["split"]].append(score["exact"])
    return {
        "accuracy": fmean(fmean(hits) for hits in splits.values()),
        "iou": fmean(score["iou"] for score in scores),
    }
