"""AI2D, test set (Kembhavi et al. 2016): multiple choice about diagrams of school books, their labels masked by letters."""

from dataclasses import replace

from minicpmv.evaluate.scoring.choice import accuracy, choice, judge_of_choice
from minicpmv.evaluate.suite import Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT_CHOICE, DIRECT_ENLARGED, PLAIN_CHOICE, columns, expected_choice


SUITE = Suite(
    "ai2d",
    "AI2D test",
    1,
    (
        Task(
            id="ai2d",
            title="multiple choice about diagrams",
            data="ai2d",
            plain=PLAIN_CHOICE,
            published=replace(DIRECT_CHOICE, decoding=DIRECT_ENLARGED),
            expected=expected_choice,
            facts=columns("category"),
            scorer=choice,
            aggregate=accuracy,
            judge=judge_of_choice,
        ),
    ),
)
