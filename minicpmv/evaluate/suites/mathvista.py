"""MathVista testmini (Lu et al. 2024): 1000 questions of mathematics about figures, charts and photographs.

Its figure needs a judge, which takes the answer out of the reply; without one only replies that are bare answers count.
"""

import ast
from typing import Any

from minicpmv.evaluate.benchmark import Facts
from minicpmv.evaluate.scoring.choice import accuracy
from minicpmv.evaluate.scoring.mathvista import judge_of_mathvista, mathvista
from minicpmv.evaluate.suite import Sample, Suite, Task
from minicpmv.evaluate.suites.asking import PLAIN_QUESTION, THOUGHTFUL_QUESTION, columns


def expected(sample: Sample) -> dict[str, Any]:
    names = ("question_type", "answer_type", "answer", "answer_option", "question")
    return {name: sample[name] for name in names if name in sample.record} | {"choices": sample.get("choices", [])}


def facts(sample: Sample) -> Facts:
    skills = ast.literal_eval(sample.get("skills", "[]"))  # a Python list in the table
    return columns("task", "question_type", "answer_type")(sample) | {"skills": skills}


SUITE = Suite(
    "mathvista",
    "MathVista testmini",
    1,
    (
        Task(
            id="mathvista",
            title="mathematics about what is seen",
            data="mathvista",
            plain=PLAIN_QUESTION,
            published=THOUGHTFUL_QUESTION,
            expected=expected,
            facts=facts,
            scorer=mathvista,
            aggregate=accuracy,
            breakdowns=("task", "skills"),
            judge=judge_of_mathvista,
        ),
    ),
)
