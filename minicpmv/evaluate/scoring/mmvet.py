"""MM-Vet (Yu et al. 2023): a judge grades every reply with 0.0 to 1.0.

The paper's judge is GPT-4 of June 2023; VLMEvalKit's is gpt-4-1106-preview.
"""

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from minicpmv.evaluate.benchmark import Entry, Judge, Metrics, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.choice import is_undecided, scored_text


CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")

REQUEST = """Grade a model's prediction by comparing it with the ground truth.
<AND> in the ground truth: the prediction is totally right only if it has every element that the <AND>s join. <OR>: it is
totally right if it has any one of them. The grade is one of 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9 and
1.0 (totally right). Complete the last cell of the table, with the grade alone.

Question | Ground truth | Prediction | Correctness
--- | --- | --- | ---
Which values can y take? | 2 <AND> -7 | y = 4 | 0.0
Which values can y take? | 2 <AND> -7 | y = 2 | 0.5
Which values can y take? | 2 <AND> -7 | y = -7 | 0.5
Which values can y take? | 2 <AND> -7 | y = -7 or 7 | 0.5
Which values can y take? | 2 <AND> -7 | y = -7 or y = 2 | 1.0
What is funny here? | The dog sits at the desk and wears its owner's tie while the owner lies in the basket below: they have
changed places. | A dog wears a tie. | 0.4
What is funny here? | The dog sits at the desk and wears its owner's tie while the owner lies in the basket below: they have
changed places. | The joke turns the household round: the dog, in a tie, does the office work, and the man rests in the dog's
basket. | 1.0

{question} | {answer} | {prediction} | """


def mmvet(answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """Nothing that rules decide: `answer` (parts joined by <AND>, <OR>) and `question` are for the judge."""
    return {"score": None, "extracted": None, "undecided": True}


def read_grade(reply: str) -> float | None:
    """The grade that a judge's whole reply is; None if it is no number from 0 to 1."""
    try:
        grade = float(reply)
    except ValueError:
        return None
    return grade if math.isfinite(grade) and 0 <= grade <= 1 else None


def mmvet_score(scores: list[Scores]) -> Metrics:
    """The mean grade, of all and of each capability that a question needs (facts: `capabilities`)."""
    graded = [score for score in scores if score["score"] is not None]
    metrics: Metrics = {"score": _mean(graded)}
    for capability in CAPABILITIES:
        metrics[capability] = _mean([score for score in graded if capability in score["facts"]["capabilities"]])
    return metrics


def _mean(scores: list[Scores]) -> float | None:
    return fmean(score["score"] for score in scores) if scores else None


def judge_of_mmvet(scoring: Scoring = "current", strict: bool = False) -> Judge:
    """The judge that grades: asked up to five times, ever more freely; then the grade is 0."""

    def scores(grade: float) -> Scores:
        return {"score": grade, "extracted": None, "undecided": False, "judged": True}

    def messages(entry: Entry) -> list[dict[str, Any]]:
        expected = entry["expected"]
        truth = str(expected["answer"]).replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        request = REQUEST.format(question=expected["question"], answer=truth, prediction=scored_text(entry))
        return [{"role": "user", "content": request}]

    def read(reply: str, entry: Entry) -> Scores | None:
        grade = read_grade(reply)
        return None if grade is None else scores(grade)

    return Judge(
        model="gpt-4-1106-preview",
        applies=is_undecided,
        messages=messages,
        read=read,
        give_up=lambda entry: scores(0.0),
        tries=5,
        temperatures=(0.0, 0.5, 1.0, 1.5, 2.0),
        max_tokens=3,
        required=True,
    )
