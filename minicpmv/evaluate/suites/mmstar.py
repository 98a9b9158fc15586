"""MMStar (Chen et al. 2024): 1500 multiple choice questions that cannot be answered without the image."""

from minicpmv.evaluate.scoring.choice import accuracy, choice, judge_of_choice
from minicpmv.evaluate.suite import Suite, Task
from minicpmv.evaluate.suites.asking import PLAIN_CHOICE, THOUGHTFUL_CHOICE, columns, expected_choice


SUITE = Suite(
    "mmstar",
    "MMStar",
    1,
    (
        Task(
            id="mmstar",
            title="multiple choice that needs the image",
            data="mmstar",
            plain=PLAIN_CHOICE,
            published=THOUGHTFUL_CHOICE,
            expected=expected_choice,
            facts=columns("category", "l2_category"),
            scorer=choice,
            aggregate=accuracy,
            breakdowns=("category", "l2_category"),
            judge=judge_of_choice,
        ),
    ),
)
