"""MMBench V1.1 (Liu et al. 2023): multiple choice by ability, in English and Chinese, each question in every rotation of its options.

The published figure (84.2) is the mean of the English and Chinese *test* sets, whose answers only the benchmark's server knows:
`mmbench_test` writes the files to upload. Here the dev sets are scored, which is another figure. The published row bears no mark
of thinking, though the authors' class thinks here.
"""

from minicpmv.evaluate.scoring.choice import choice, circular, judge_of_choice
from minicpmv.evaluate.suite import Record, Suite, Task
from minicpmv.evaluate.suites.asking import PLAIN_CHOICE, THOUGHTFUL_CHOICE, columns, expected_choice


ROTATION = 10**6  # rotation k of question i has the index k * ROTATION + i


def question_and_rotation(record: Record) -> tuple[int, int]:
    rotation, question = divmod(int(record["index"]), ROTATION)
    return question, rotation


def dev(language: str, name: str) -> Task:
    facts = columns("category", "l2-category")
    return Task(
        id=f"mmbench_{language}",
        title=f"multiple choice in {name}, all rotations right; dev set",
        data=f"mmbench_dev_{language}",
        plain=PLAIN_CHOICE,
        published=THOUGHTFUL_CHOICE,
        expected=expected_choice,
        facts=lambda sample: facts(sample) | {"group": str(question_and_rotation(sample.record)[0])},
        scorer=choice,
        aggregate=circular,
        order=question_and_rotation,
        breakdowns=("l2_category", "category"),
        judge=judge_of_choice,
    )


SUITE = Suite("mmbench", "MMBench V1.1 dev", 1, (dev("en", "English"), dev("cn", "Chinese")))
