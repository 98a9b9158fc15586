"""MMT-Bench, validation set (Ying et al. 2024): multiple choice over 32 fields and 162 tasks."""

from minicpmv.evaluate.scoring.choice import accuracy, choice, judge_of_choice
from minicpmv.evaluate.suite import Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT_CHOICE, PLAIN_CHOICE, columns, expected_choice


SUITE = Suite(
    "mmtbench",
    "MMT-Bench val",
    1,
    (
        Task(
            id="mmtbench",
            title="multiple choice over many tasks, validation set",
            data="mmtbench",
            plain=PLAIN_CHOICE,
            published=DIRECT_CHOICE,
            expected=expected_choice,
            facts=columns("category", "l2-category"),
            scorer=choice,
            aggregate=accuracy,
            breakdowns=("l2_category",),
            judge=judge_of_choice,
        ),
    ),
)
