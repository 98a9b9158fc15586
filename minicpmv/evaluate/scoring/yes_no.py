"""Yes or no, and the figures made of pairs and groups of such answers (HallusionBench, MME).

A reply means yes where it holds the word yes and not the word no, and the other way round. With both or neither it is
unknown, which is wrong unless a judge reads it.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any

from minicpmv.evaluate.benchmark import Entry, Judge, Metrics, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.choice import is_undecided, matching_model, scored_text
from minicpmv.evaluate.scoring.normalization import strip_punctuation


PERCEPTION = ("OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene")
COGNITION = ("code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation")
FIRST_WORD = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)


def infer_yes_no(reply: str) -> str | None:
    """ "Yes", "No", or None where the reply holds both words or neither."""
    words = strip_punctuation(reply.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "Yes" if "yes" in words else "No"


def yes_no(answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """Score a reply to a question of yes or no.

    Args:
        expected: `answer`, "Yes" or "No"; `question` is for the judge.
        strict: a reply that begins with one of the words means it, whatever follows.
    """
    begins = FIRST_WORD.match(answer) if strict else None
    extracted = begins[1].capitalize() if begins else infer_yes_no(answer)
    return {"exact": float(extracted == expected["answer"]), "extracted": extracted, "undecided": extracted is None}


def hallusion(scores: list[Scores]) -> Metrics:
    """HallusionBench: the mean of `aAcc` (answers), `fAcc` (figures) and `qAcc` (questions).

    A figure counts if every question about it is answered right, a question if it is for every figure of its set. Each
    score's facts name `l2_category`, `set`, `figure` and `question`.
    """

    def all_right(part: str) -> float:
        groups = defaultdict(list)
        for score in scores:
            facts = score["facts"]
            groups[facts["l2_category"], facts["set"], facts[part]].append(score["exact"])
        return fmean(min(group) for group in groups.values())

    metrics = {
        "aAcc": fmean(score["exact"] for score in scores),
        "fAcc": all_right("figure"),
        "qAcc": all_right("question"),
    }
    return {"mean": fmean(metrics.values()), **metrics}


def hallusion_facts(index: str) -> dict[str, str]:
    """`set`, `figure` and `question` out of an index of HallusionBench's file: the parts 3 to 5 between its `_`."""
    parts = index.split("_")
    return {"set": parts[3], "figure": parts[4], "question": parts[5]}


def mme(scores: list[Scores]) -> Metrics:
    """MME: of each subtask the points acc + acc+, at most 200; `total` is the sum of 14 of them, at most 2800.

    acc is the percentage of right answers, acc+ that of pictures with both questions right. Each score's facts name the
    subtask (`category`) and the `picture`. Subtasks that are not there add nothing.
    """
    subtasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for score in scores:
        subtasks[score["facts"]["category"]][score["facts"]["picture"]].append(score["exact"])
    points = {name: _acc_and_acc_plus(pictures.values()) for name, pictures in subtasks.items()}
    perception = sum(points.get(name, 0.0) for name in PERCEPTION)
    cognition = sum(points.get(name, 0.0) for name in COGNITION)
    return {"total": perception + cognition, "perception": perception, "cognition": cognition, **points}


def _acc_and_acc_plus(pictures: Iterable[list[float]]) -> float:
    pictures = list(pictures)
    acc = fmean(score for answers in pictures for score in answers)
    return 100 * (acc + fmean(min(answers) for answers in pictures))


REQUEST = (
    "You match a reply to a question with one of two options, Yes and No. You are given the question and the reply. Decide "
    "which option the reply means. If its meaning clearly differs from both, the output is Unknown. Output one of these "
    "three words and nothing else: Yes, No, Unknown.\n"
    "Example 1:\nQuestion: Is the left bar taller than the right one?\nReply: The left bar is the taller of the two.\n"
    "Your output: Yes\n"
    "Example 2:\nQuestion: Is the left bar taller than the right one?\nReply: The right bar rises above it.\n"
    "Your output: No\n"
    "Example 3:\nQuestion: {question}?\nReply: {reply}\nYour output: "
)


def judge_of_yes_no(scoring: Scoring = "current", strict: bool = False) -> Judge:
    """The judge of replies with both words or neither: asked five times, ever more freely."""

    def scores(said: str | None, entry: Entry) -> Scores:
        right = float(said == entry["expected"]["answer"])
        return {"exact": right, "extracted": said, "undecided": said is None, "judged": True}

    def messages(entry: Entry) -> list[dict[str, Any]]:
        request = REQUEST.format(question=entry["expected"].get("question", ""), reply=scored_text(entry))
        return [{"role": "user", "content": request}]

    def read(reply: str, entry: Entry) -> Scores | None:
        said = infer_yes_no(reply)
        return scores(said, entry) if said else None

    return Judge(
        model=matching_model(scoring),
        applies=is_undecided,
        messages=messages,
        read=read,
        give_up=lambda entry: scores(None, entry),
        tries=5,
        temperatures=(0.0, 0.5, 1.0, 1.5, 2.0),
    )
