"""RealWorldQA (xAI 2024): 765 multiple choice questions about places and things as cars and people see them."""

from minicpmv.evaluate.scoring.choice import accuracy, choice, judge_of_choice
from minicpmv.evaluate.suite import Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT_CHOICE, PLAIN_CHOICE, columns, expected_choice


SUITE = Suite(
    "realworldqa",
    "RealWorldQA",
    1,
    (
        Task(
            id="realworldqa",
            title="multiple choice about real places",
            data="realworldqa",
            plain=PLAIN_CHOICE,
            published=DIRECT_CHOICE,
            expected=expected_choice,
            facts=columns("category"),
            scorer=choice,
            aggregate=accuracy,
            judge=judge_of_choice,
        ),
    ),
)
