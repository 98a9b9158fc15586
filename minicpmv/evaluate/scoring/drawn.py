"""Scores of answers to the questions that the repository draws (NanoBench).

What is special:
- strict: the whole answer, stripped, equals the expected one; no case is folded and no part of an answer is searched;
- scores that are summed over answers before they are divided (characters, objects) come with their own aggregate.
"""

from collections import Counter
from collections.abc import Callable

from minicpmv.evaluate.benchmark import Metrics, Scores


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
