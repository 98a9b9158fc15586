"""MMBench V1.1, test sets: answers to be uploaded to mmbench.opencompass.org.cn, which alone can score them.

A run writes `mmbench_test_en.xlsx` and `mmbench_test_cn.xlsx`: the columns of the data without the pictures, and `prediction`.
"""

from typing import Any

from minicpmv.evaluate.benchmark import Scores
from minicpmv.evaluate.suite import Suite, Task
from minicpmv.evaluate.suites.asking import PLAIN_CHOICE, THOUGHTFUL_CHOICE, choices, columns
from minicpmv.evaluate.suites.mmbench import question_and_rotation


def unknown(answer: str, expected: Any, **rules: Any) -> Scores:
    return {"exact": None, "extracted": answer}


def test_set(language: str, name: str) -> Task:
    return Task(
        id=f"mmbench_test_{language}",
        title=f"multiple choice in {name}, to be uploaded; test set",
        data=f"mmbench_test_{language}",
        plain=PLAIN_CHOICE,
        published=THOUGHTFUL_CHOICE,
        expected=lambda sample: {"choices": choices(sample)},
        facts=columns("question", "hint", *"ABCD", "category", "l2-category", "split", "source"),
        scorer=unknown,
        order=question_and_rotation,
        upload="xlsx",
    )


SUITE = Suite("mmbench_test", "MMBench V1.1 test", 1, (test_set("en", "English"), test_set("cn", "Chinese")))
