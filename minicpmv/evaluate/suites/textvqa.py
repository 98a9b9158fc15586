"""TextVQA, validation set (Singh et al. 2019): 5000 questions about text in photographs, scored by agreement with ten people."""

from minicpmv.evaluate.scoring.short_answer import mean_score, vqa_accuracy
from minicpmv.evaluate.suite import Asking, Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT_ENLARGED, PLAIN_SHORT, SHORTLY, columns, expected_answers


SUITE = Suite(
    "textvqa",
    "TextVQA val",
    1,
    (
        Task(
            id="textvqa",
            title="text in photographs (VQA accuracy)",
            data="textvqa",
            plain=PLAIN_SHORT,
            published=Asking(lambda sample: [SHORTLY, *sample.images, sample["question"]], DIRECT_ENLARGED),
            expected=expected_answers,
            facts=columns(),
            scorer=vqa_accuracy,
            aggregate=mean_score,
        ),
    ),
)
