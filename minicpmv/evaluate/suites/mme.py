"""MME (Fu et al. 2023): two yes-or-no questions about each image, in 14 subtasks. Published is the sum of all, 2800 at most.

The subtasks of perception are worth 2000 points, those of cognition 800; each is the share of right answers and of images with both
answers right.
"""

from minicpmv.evaluate.benchmark import Facts
from minicpmv.evaluate.scoring.yes_no import COGNITION, PERCEPTION, judge_of_yes_no, mme, yes_no
from minicpmv.evaluate.suite import Asking, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT, PLAIN_QUESTION, columns, images_then, question


def facts(sample: Sample) -> Facts:
    return columns("category")(sample) | {"picture": sample["image_path"]}


SUITE = Suite(
    "mme",
    "MME",
    1,
    (
        Task(
            id="mme",
            title="yes or no, two questions about each image",
            data="mme",
            plain=PLAIN_QUESTION,
            published=Asking(images_then(question), DIRECT),
            expected=lambda sample: {"answer": sample["answer"], "question": sample["question"]},
            facts=facts,
            scorer=yes_no,
            aggregate=mme,
            points=("total", "perception", "cognition", *PERCEPTION, *COGNITION),
            judge=judge_of_yes_no,
        ),
    ),
)
