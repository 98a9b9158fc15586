"""HallusionBench (Guan et al. 2024): 951 yes-or-no questions that come in sets, about figures and about what was changed in them.

The figure is the mean of aAcc (all answers), fAcc (figures with every answer right) and qAcc (questions right for every figure).
"""

from typing import Any

from minicpmv.evaluate.benchmark import Facts
from minicpmv.evaluate.scoring.yes_no import hallusion, hallusion_facts, judge_of_yes_no, yes_no
from minicpmv.evaluate.suite import Sample, Suite, Task
from minicpmv.evaluate.suites.asking import PLAIN_QUESTION, THOUGHTFUL_QUESTION, columns


def facts(sample: Sample) -> Facts:
    return columns("category", "l2-category")(sample) | hallusion_facts(sample["index"])


def expected(sample: Sample) -> dict[str, Any]:
    return {"answer": sample["answer"], "question": sample["question"]}


SUITE = Suite(
    "hallusionbench",
    "HallusionBench",
    1,
    (
        Task(
            id="hallusionbench",
            title="yes or no, in sets that catch guesses and illusions",
            data="hallusionbench",
            plain=PLAIN_QUESTION,
            published=THOUGHTFUL_QUESTION,
            expected=expected,
            facts=facts,
            scorer=yes_no,
            aggregate=hallusion,
            breakdowns=("category", "l2_category"),
            judge=judge_of_yes_no,
        ),
    ),
)
