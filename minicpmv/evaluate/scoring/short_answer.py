"""Short answers against references: relaxed accuracy (ChartQA), ANLS (DocVQA), VQA accuracy (TextVQA).

Known defects of the reference, kept:
- ChartQA: a year within 5 % counts (2019 for 2011); a number with a comma or a unit is a text; a reference of 0 is a text;
- DocVQA: blanks are collapsed before texts are compared, but the distance is divided by the length before that.
"""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from minicpmv.evaluate.benchmark import Metrics, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.normalization import normalize


TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5
YEARS = range(1900, 2101)


def relaxed_accuracy(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """ChartQA (Masry et al. 2022): a number within 5 % of the reference, or the same text in any case.

    Args:
        expected: `answers`, of which one has to fit.
        strict: years have to be the same; thousands separators, a dollar and a closing period are not read.
    """
    right = any(_is_close(answer.strip(), str(reference), strict) for reference in expected["answers"])
    return {"exact": float(right), "extracted": answer.strip()}


def _is_close(answer: str, reference: str, strict: bool) -> bool:
    if strict:
        answer, reference = (
            text.strip().rstrip(".").replace(",", "").replace("$", "") for text in (answer, reference)
        )
    value, target = _number(answer), _number(reference)
    if strict and target is not None and target in YEARS:
        return value == target
    if value is not None and target:
        return abs(value - target) / abs(target) <= TOLERANCE
    return answer.lower() == reference.lower() or (strict and value is not None and value == target)


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def anls(answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """DocVQA (Mathew et al. 2021): 1 - edit distance / length to the closest reference; 0 where that is below 0.5.

    Args:
        expected: `answers`.
        strict: the length is that of the texts that are compared.
    """
    similarity = 1 - min(_relative_distance(answer, str(reference), strict) for reference in expected["answers"])
    return {"score": similarity if similarity >= ANLS_THRESHOLD else 0.0, "extracted": answer}


def _relative_distance(answer: str, reference: str, strict: bool) -> float:
    from rapidfuzz.distance import Levenshtein

    collapsed = [" ".join(text.lower().split()) for text in (answer, reference)]
    length = max(map(len, collapsed) if strict else (len(answer.upper()), len(reference.upper())))
    return Levenshtein.distance(*collapsed) / length if length else 0.0


def vqa_accuracy(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """TextVQA: agreement with ten people. Each is left out in turn, and three of the others suffice: min(1, matches / 3).

    Args:
        expected: `answers`, one of each person.
    """
    said, people = normalize(answer), [normalize(str(reference)) for reference in expected["answers"]]
    matches = sum(person == said for person in people)
    score = fmean(min(1.0, (matches - (person == said)) / 3) for person in people)
    return {"score": score, "extracted": said}


def mean_score(scores: list[Scores]) -> Metrics:
    return {"score": fmean(score["score"] for score in scores)}


def mean_of_splits(scores: list[Scores]) -> Metrics:
    """ChartQA: the mean of `human` and `augmented` questions, each weighing half. Each score's facts name its `split`."""
    splits: dict[str, list[float]] = {}
    for score in scores:
        splits.setdefault(score["facts"]["split"], []).append(score["exact"])
    means = {name: fmean(values) for name, values in splits.items()}
    return {"accuracy": fmean(means.values()), **{name.removeprefix("test_"): mean for name, mean in means.items()}}
