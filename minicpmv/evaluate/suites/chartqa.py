"""ChartQA, test set (Masry et al. 2022): 1250 questions that people wrote about charts and 1250 that were generated; the mean of both halves."""

from minicpmv.evaluate.scoring.cutting import cut_value
from minicpmv.evaluate.scoring.short_answer import mean_of_splits, relaxed_accuracy
from minicpmv.evaluate.suite import Asking, Suite, Task
from minicpmv.evaluate.suites.asking import (
    PLAIN_SHORT,
    REASONING,
    STEP_BY_STEP,
    columns,
    expected_answers,
    images_then,
)


SUITE = Suite(
    "chartqa",
    "ChartQA test",
    1,
    (
        Task(
            id="chartqa",
            title="values and words in charts, within 5 %",
            data="chartqa",
            plain=PLAIN_SHORT,
            published=Asking(images_then(lambda sample: STEP_BY_STEP + sample["question"]), REASONING, cut_value),
            expected=expected_answers,
            facts=columns("split"),
            scorer=relaxed_accuracy,
            aggregate=mean_of_splits,
        ),
    ),
)
