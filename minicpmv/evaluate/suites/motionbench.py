"""MotionBench (Hong et al. 2025): fine motion in short videos, six kinds of questions. Prompt and scoring: lmms-eval.

Only questions whose answers are published are asked, about half of the 8052. The script of the benchmark's authors divides by all of
them, which gives another figure.
"""

from typing import Any

from minicpmv.evaluate.scoring.video_choice import HIDDEN, known_accuracy, motionbench
from minicpmv.evaluate.suite import Sample, Suite, Task
from minicpmv.evaluate.suites.asking import columns
from minicpmv.evaluate.suites.watching import expected_choice, listed_choices, question_then


ASKING = question_then("Answer with only the option letter (A, B, C, D, E, or F).")


def expected(sample: Sample) -> dict[str, Any]:
    return expected_choice(sample["answer"], listed_choices(sample["question"], r"^([A-F])\.(.*)$"), sample)


SUITE = Suite(
    "motionbench",
    "MotionBench dev",
    1,
    (
        Task(
            id="motionbench",
            title="fine motion, questions with published answers",
            data="motionbench",
            plain=ASKING,
            published=ASKING,
            expected=expected,
            facts=columns("video", "question_type", "video_type", id="uid"),
            scorer=motionbench,
            aggregate=known_accuracy,
            keep=lambda record: record["answer"] != HIDDEN,
            breakdowns=("question_type",),
            is_video=True,
        ),
    ),
)
