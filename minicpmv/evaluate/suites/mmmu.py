"""MMMU, validation set (Yue et al. 2024): 900 questions of college subjects, some with several images, some without options.

Images stand where the question says `<image k>`. The reference turns a question without options into a choice between its answer
and "Other Answers".
"""

import re
from typing import Any

from minicpmv.evaluate.scoring.choice import accuracy, choice, judge_of_choice
from minicpmv.evaluate.suite import Asking, Sample, Suite, SuiteError, Task
from minicpmv.evaluate.suites.asking import (
    GREEDY,
    THINKING,
    columns,
    cut_choice,
    expected_choice,
    general_choice,
    step_by_step_choice,
)


def with_images(words: str, sample: Sample) -> list[Any]:
    """The words with each image in its place; where they name none, all stand before them.

    Raises:
        SuiteError: they name one that is not there.
    """
    parts = re.split(r"<image (\d)>", words)
    images = sample.images
    if len(parts) == 1:
        return [*images, words]
    if absent := [number for number in parts[1::2] if not 1 <= int(number) <= len(images)]:
        raise SuiteError(
            f"question {sample['index']} of {sample.data.id} has {len(images)} images and names {absent[0]}"
        )
    return [images[int(part) - 1] if place % 2 else part for place, part in enumerate(parts)]


SUITE = Suite(
    "mmmu",
    "MMMU val",
    1,
    (
        Task(
            id="mmmu",
            title="college subjects, validation set",
            data="mmmu",
            plain=Asking(lambda sample: with_images(general_choice(sample), sample), GREEDY),
            published=Asking(lambda sample: with_images(step_by_step_choice(sample), sample), THINKING, cut_choice),
            expected=expected_choice,
            facts=columns("category", "l2-category"),
            scorer=choice,
            aggregate=accuracy,
            keep=lambda record: record["split"] == "validation",
            breakdowns=("l2_category", "category"),
            judge=judge_of_choice,
        ),
    ),
)
