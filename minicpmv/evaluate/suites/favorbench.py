"""FAVOR-Bench, multiple choice (Tu et al. 2025): 8184 questions of six tasks about fine motion. Prompt and scoring: its authors.

The answer is the text of an option, not a letter.
"""

from typing import Any

from minicpmv.evaluate.scoring.video_choice import favorbench, known_accuracy
from minicpmv.evaluate.suite import Sample, Suite, Task
from minicpmv.evaluate.suites.asking import columns
from minicpmv.evaluate.suites.watching import video_then


WATCH = (
    "Carefully watch the video and pay attention to temporal dynamics in this video, focusing on the camera motions, actions, "
    "activities, and interactions. Based on your observations, select the best option that accurately addresses the "
    "question.\n"
)


def ask(sample: Sample) -> str:
    return f"{WATCH}{sample['question']}\nYou can only response with the answer among {sample['options']}"


def expected(sample: Sample) -> dict[str, Any]:
    return {"answer": sample["correct_answer"], "options": sample["options"], "question": sample["question"]}


SUITE = Suite(
    "favorbench",
    "FAVOR-Bench",
    1,
    (
        Task(
            id="favorbench",
            title="fine motion, the text of an option",
            data="favorbench",
            plain=video_then(ask),
            published=video_then(ask),
            expected=expected,
            facts=lambda sample: columns("task_type", id="video")(sample) | {"question": sample["question"]},
            scorer=favorbench,
            aggregate=known_accuracy,
            breakdowns=("task_type",),
            is_video=True,
        ),
    ),
)
