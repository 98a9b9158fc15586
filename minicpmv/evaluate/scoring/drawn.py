"""Scores of answers to the questions that the repository draws (NanoBench).

What is special:
- strict: the whole answer, stripped, equals the expected one; no case is folded and no part of an answer is searched;
- scores that are summed over answers before they are divided (characters, objects) come with their own aggregate.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import zip_longest
from statistics import fmean

from minicpmv.evaluate.benchmark import Metrics, Scores
from minicpmv.evaluate.scoring.boxes import THRESHOLD, iou


BOX = re.compile(r"<box>(\d+) (\d+) (\d+) (\d+)</box>")
BOXES = re.compile(rf"(?:<ref>[^<]*</ref>)?((?:{BOX.pattern})+)")


def exact_match(answer: str, expected: str) -> Scores:
    return {"exact": float(answer.strip() == expected)}


def printed_characters(answer: str, expected: str) -> Scores:
    """Exact match, and the fewest characters to insert, delete or replace to come from the answer to what is printed."""
    from rapidfuzz.distance import Levenshtein

    return exact_match(answer, expected) | {
        "edits": float(Levenshtein.distance(answer.strip(), expected)),
        "printed": float(len(expected)),
    }


def share_of_characters(scores: list[Scores]) -> Metrics:
    """`exact`, and `characters`: 1 - edits / printed characters, both summed over all answers (1 - CER), 0 at least."""
    error_rate = sum(score["edits"] for score in scores) / sum(score["printed"] for score in scores)
    return {"exact": _share(scores, "exact", len(scores)), "characters": max(0.0, 1 - error_rate)}


def boxes_found(answer: str, expected: str) -> Scores:
    """Boxes as the model writes them, with their name or without: `exact` where there are as many as expected and each
    covers its own by half (IoU at least 0.5), from left to right; `iou` is their mean. A sentence has to be the same."""
    (is_boxes, wanted), (is_answered, found) = _boxes(expected), _boxes(answer)
    if not is_boxes:
        return exact_match(answer, expected) | {"iou": exact_match(answer, expected)["exact"]}
    overlaps = [iou(one, other) if one and other else 0.0 for one, other in zip_longest(wanted, found)]
    return {"exact": float(is_answered and min(overlaps) >= THRESHOLD), "iou": fmean(overlaps)}


def _boxes(text: str) -> tuple[bool, list[tuple[float, ...]]]:
    """Whether a text is boxes and nothing else, and which."""
    if not (whole := BOXES.fullmatch(text.strip())):
        return False, []
    return True, [tuple(map(float, corners)) for corners in BOX.findall(whole[1])]


def same_json(answer: str, expected: str) -> Scores:
    """`exact`: JSON, and the same value, in any order of keys; `valid`: JSON of the same kind, such as an object."""
    try:
        value = json.loads(answer)
    except ValueError:
        return {"exact": 0.0, "valid": 0.0}
    wanted = json.loads(expected)
    return {"exact": float(value == wanted), "valid": float(isinstance(value, type(wanted)))}


def same_cells(answer: str, expected: str) -> Scores:
    """Pages in Markdown with a table: `exact` where all lines and cells are the same, however wide the columns are written;
    `cells`: the share of cells that stand in their places."""
    written, wanted = _lines(answer), _lines(expected)
    missing: list[list[str]] = [[]] * len(wanted)
    cells = [
        float(cell == other)
        for line, own in zip(wanted, written + missing, strict=False)
        if len(line) > 1
        for cell, other in zip_longest(line, own)
    ]
    return {"exact": float(written == wanted), "cells": fmean(cells)}


def _lines(markdown: str) -> list[list[str]]:
    """Cells of each line that is not empty; a line outside of a table is one cell, and one of dashes does not count."""
    lines = [line.strip() for line in markdown.strip().splitlines() if line.strip()]
    split = [
        [cell.strip() for cell in line[1:-1].split("|")] if line[0] == line[-1] == "|" and len(line) > 1 else [line]
        for line in lines
    ]
    return [cells for cells in split if not all(re.fullmatch(r":?-+:?", cell) for cell in cells)]


def hallucinated_objects(named_objects: Callable[[str], list[str]]) -> Callable[[str, list[str]], Scores]:
    """Scorer of captions: counts objects that a caption names and the image does not hold.

    An object that is named more often than it is there is counted for every time too many.

    Args:
        named_objects: finds the objects in a caption; expected are those in the image, under the same names.
    """

    def scorer(answer: str, expected: list[str]) -> Scores:
        named, there = Counter(named_objects(answer)), Counter(expected)
        invented = (named - there).total()
        return {
            "invented": float(invented),
            "named": float(named.total()),
            "found": float((named & there).total()),
            "there": float(there.total()),
            "caption_with_invented": float(invented > 0),
        }

    return scorer


def chair(scores: list[Scores]) -> Metrics:
    """CHAIR (Rohrbach et al. 2018): `chair_i`, invented objects over objects named, and `chair_s`, captions with one.

    `recall`, named objects over those in the images, is reported with them because a model that names nothing invents
    nothing; where no caption names anything, both rates are None.
    """
    named = sum(score["named"] for score in scores)
    return {
        "chair_i": _share(scores, "invented", named) if named else None,
        "chair_s": _share(scores, "caption_with_invented", len(scores)) if named else None,
        "recall": _share(scores, "found", sum(score["there"] for score in scores)),
    }


def _share(scores: list[Scores], name: str, whole: float) -> float:
    return sum(score[name] for score in scores) / whole
