"""MMMU, validation set (Yue et al. 2024): 900 questions of college subjects, some with several pictures, some without options.

Pictures stand where the question says `<image k>`. The reference turns a question without options into a choice between its answer
and "Other Answers".
"""

import re
from typing import Any

from minicpmv.evaluate.scoring.choice import accuracy, choice, judge_of_choice
from minicpmv.evaluate.suite import Asking, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import (
    GREEDY,
    THINKING,
    choices,
    columns,
    cut_choice,
    general_choice,
    step_by_step_choice,
)


def with_pictures(words: str, sample: Sample) -> list[Any]:
    """The words with each picture in its place; pictures that they do not name stand before them."""
    parts = re.split(r"<image (\d)>", words)
    pictures = sample.pictures
    if len(parts) == 1:
        return [*pictures, words]
    return [pictures[int(part) - 1] if place % 2 else part for place, part in enumerate(parts)]


def expected(sample: Sample) -> dict[str, Any]:
    return {"answer": sample["answer"], "choices": choices(sample), "question": sample["question"]}


SUITE = Suite(
    "mmmu",
    "MMMU val",
    1,
    (
        Task(
            id="mmmu",
            title="college subjects, validation set",
            data="mmmu",
            plain=Asking(lambda sample: with_pictures(general_choice(sample), sample), GREEDY),
            published=Asking(lambda sample: with_pictures(step_by_step_choice(sample), sample), THINKING, cut_choice),
            expected=expected,
            facts=columns("category", "l2-category"),
            scorer=choice,
            aggregate=accuracy,
            keep=lambda record: record["split"] == "validation",
            breakdowns=("l2_category", "category"),
            judge=judge_of_choice,
        ),
    ),
)
