"""DocVQA (Mathew et al. 2021): questions about scanned pages, scored by ANLS on the validation set.

Of the published figure (94.7) it is not known which set it is of; the test set's answers are known to rrc.cvc.uab.es alone. It bears the
mark of thinking, though the authors' class does not think here.
"""

from minicpmv.evaluate.scoring.short_answer import anls, mean_score
from minicpmv.evaluate.suite import Asking, Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT, PLAIN_SHORT, SHORTLY, columns, expected_answers


SUITE = Suite(
    "docvqa",
    "DocVQA val",
    1,
    (
        Task(
            id="docvqa",
            title="questions about scanned pages (ANLS)",
            data="docvqa",
            plain=PLAIN_SHORT,
            published=Asking(lambda sample: [SHORTLY, *sample.images, sample["question"]], DIRECT),
            expected=expected_answers,
            facts=columns(),
            scorer=anls,
            aggregate=mean_score,
        ),
    ),
)
