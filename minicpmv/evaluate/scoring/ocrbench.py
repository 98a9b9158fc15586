"""OCRBench (Liu et al. 2023): a reply is right if it contains a reference.

Known defect of the reference, kept: no word boundaries, so "category" contains the right answer "cat".
"""

import re
from collections.abc import Mapping
from typing import Any

from minicpmv.evaluate.benchmark import Metrics, Scores
from minicpmv.evaluate.scoring import Scoring


FORMULAS = "Handwritten Mathematical Expression Recognition"
TEXT_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
QUESTIONS = 1000


def ocrbench(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """Score a reply: cases are folded and line breaks are blanks; formulas lose their blanks and keep their case.

    Args:
        expected: `answers`, of which one has to be contained, and the question's `category`.
        strict: a reference of letters and digits has to be there as words (not in formulas).
    """
    formula = expected["category"] == FORMULAS
    said = _comparable(answer, formula)
    right = any(
        _contains(said, _comparable(str(reference), formula), whole_words=strict and not formula)
        for reference in expected["answers"]
    )
    return {"exact": float(right), "extracted": said}


def _comparable(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", " ")
    return text.replace(" ", "") if formula else text.lower()


def _contains(text: str, part: str, whole_words: bool) -> bool:
    if not whole_words:
        return part in text
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def ocrbench_points(scores: list[Scores]) -> Metrics:
    """The `accuracy` that is published (as percent, or a tenth of `points`), and right answers of 1000 (`points`)."""
    right = sum(score["exact"] for score in scores)
    return {"accuracy": right / len(scores), "points": QUESTIONS * right / len(scores)}
