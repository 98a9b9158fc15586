"""LongVideoBench, validation set (Wu et al. 2024): 1337 questions about videos of 8 seconds to an hour, without subtitles."""

from typing import Any

from minicpmv.evaluate.scoring.choice import choices_of, judge_of_choice
from minicpmv.evaluate.scoring.video_choice import known_accuracy, longvideobench
from minicpmv.evaluate.suite import Sample, Suite, Task
from minicpmv.evaluate.suites.asking import LETTER_DIRECTLY, columns, option_lines
from minicpmv.evaluate.suites.watching import expected_choice, video_then


def ask(sample: Sample) -> str:
    return f"{sample['question']}\n{option_lines(choices_of(sample['candidates']))}{LETTER_DIRECTLY}"


def expected(sample: Sample) -> dict[str, Any]:
    choices = choices_of(sample["candidates"])
    return expected_choice(list(choices)[sample["correct_choice"]], choices, sample)


SUITE = Suite(
    "longvideobench",
    "LongVideoBench val",
    1,
    (
        Task(
            id="longvideobench",
            title="details of long videos, without subtitles",
            data="longvideobench",
            plain=video_then(ask),
            published=video_then(ask),
            expected=expected,
            facts=columns("video", "duration_group", "question_category", id="id"),
            scorer=longvideobench,
            aggregate=known_accuracy,
            breakdowns=("duration_group", "question_category"),
            judge=judge_of_choice,
            is_video=True,
        ),
    ),
)
