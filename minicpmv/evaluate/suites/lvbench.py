"""LVBench (Wang et al. 2024): 103 videos of about an hour, 1549 questions. Prompt: lmms-eval; scoring: the benchmark's authors."""

from typing import Any

from minicpmv.evaluate.scoring.video_choice import known_accuracy, lvbench
from minicpmv.evaluate.suite import Sample, Suite, Task
from minicpmv.evaluate.suites.asking import columns
from minicpmv.evaluate.suites.watching import expected_choice, listed_choices, question_then


ASKING = question_then("Answer the question with the option letter")


def expected(sample: Sample) -> dict[str, Any]:
    return expected_choice(sample["answer"], listed_choices(sample["question"], r"^\(([A-D])\)(.*)$"), sample)


SUITE = Suite(
    "lvbench",
    "LVBench",
    1,
    (
        Task(
            id="lvbench",
            title="videos of an hour",
            data="lvbench",
            plain=ASKING,
            published=ASKING,
            expected=expected,
            facts=columns("video", "question_type", id="uid"),
            scorer=lvbench,
            aggregate=known_accuracy,
            breakdowns=("question_type",),
            is_video=True,
        ),
    ),
)
