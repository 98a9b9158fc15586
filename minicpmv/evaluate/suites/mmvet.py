"""MM-Vet (Yu et al. 2024): 218 open questions that take several capabilities at once. A judge grades every answer; without one there is no figure."""

from minicpmv.evaluate.benchmark import Facts
from minicpmv.evaluate.scoring.mmvet import judge_of_mmvet, mmvet, mmvet_score
from minicpmv.evaluate.suite import Asking, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import PLAIN_QUESTION, THINKING


IN_DETAIL = "Answer this question in detail."


def facts(sample: Sample) -> Facts:
    return {"id": str(sample["index"]), "capabilities": sample["category"].split(",")}


SUITE = Suite(
    "mmvet",
    "MM-Vet",
    1,
    (
        Task(
            id="mmvet",
            title="open questions of several capabilities, judged",
            data="mmvet",
            plain=PLAIN_QUESTION,
            published=Asking(lambda sample: [IN_DETAIL, *sample.images, sample["question"]], THINKING),
            expected=lambda sample: {"answer": sample["answer"], "question": sample["question"]},
            facts=facts,
            scorer=mmvet,
            aggregate=mmvet_score,
            breakdowns=("capabilities",),
            judge=judge_of_mmvet,
        ),
    ),
)
