"""MMHal-Bench (Sun et al. 2023): 96 questions of eight kinds that tempt to invent. A judge rates each answer from 0 to 6.

Decoding as published is that of RLAIF-V (83d917b), which made the figures of the model's family: three beams, 1024 tokens. The published
row bears the mark of thinking.
"""

from typing import Any

from minicpmv.evaluate.scoring.mmhal import judge_of_mmhal, mmhal, mmhal_score
from minicpmv.evaluate.suite import Asking, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import DIRECT, PLAIN_QUESTION, columns, images_then, question


def expected(sample: Sample) -> dict[str, Any]:
    return {"question": sample["question"], "answer": sample["gt_answer"], "contents": sample["image_content"]}


SUITE = Suite(
    "mmhal",
    "MMHal-Bench",
    1,
    (
        Task(
            id="mmhal",
            title="questions that tempt to invent, judged (0 to 6)",
            data="mmhal",
            plain=PLAIN_QUESTION,
            published=Asking(images_then(question), DIRECT),
            expected=expected,
            facts=columns("question_type", "question_topic", id="image_id"),
            scorer=mmhal,
            aggregate=mmhal_score,
            breakdowns=("question_type",),
            points=("score",),
            judge=judge_of_mmhal,
        ),
    ),
)
