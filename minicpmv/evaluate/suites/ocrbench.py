"""OCRBench (Liu et al. 2023): 1000 questions about text in images, of ten kinds. Published are points of 1000, or a tenth of them."""

from minicpmv.evaluate.scoring.ocrbench import ocrbench, ocrbench_points
from minicpmv.evaluate.suite import Asking, Suite, Task
from minicpmv.evaluate.suites.asking import (
    PLAIN_QUESTION,
    READ_CAREFULLY,
    REASONING,
    columns,
    expected_answers,
    images_then,
)


SUITE = Suite(
    "ocrbench",
    "OCRBench",
    1,
    (
        Task(
            id="ocrbench",
            title="reading text, ten kinds of questions",
            data="ocrbench",
            plain=PLAIN_QUESTION,
            published=Asking(images_then(lambda sample: READ_CAREFULLY + sample["question"]), REASONING),
            expected=lambda sample: expected_answers(sample) | {"category": sample["category"]},
            facts=columns("category"),
            scorer=ocrbench,
            aggregate=ocrbench_points,
            breakdowns=("category",),
            points=("points",),
        ),
    ),
)
