"""MLVU dev, multiple choice (Zhou et al. 2024): seven tasks about videos of minutes to hours. Prompt: VLMEvalKit.

The figure M-Avg is the mean of the seven tasks' accuracies; VLMEvalKit's share of all questions is given beside it.
"""

from typing import Any

from minicpmv.evaluate.scoring.choice import choices_of, judge_of_choice
from minicpmv.evaluate.scoring.video_choice import mean_of_tasks, mlvu
from minicpmv.evaluate.suite import Asking, Sample, Suite, SuiteError, Task
from minicpmv.evaluate.suites.watching import GREEDY, expected_choice


WATCH = (
    "Carefully watch this video and pay attention to every detail. Based on your observations, select the best option that "
    "accurately addresses the question."
)
BEST_OPTION = "\nOnly give the best option."


def ask(sample: Sample) -> list[Any]:
    options = "".join(f"({letter}) {text}\n" for letter, text in choices_of(sample["candidates"]).items())
    words = f"Question: {sample['question']}\nOptions:\n{options}".rstrip()
    return [WATCH, sample.video(sample["video"]), words, BEST_OPTION]


def expected(sample: Sample) -> dict[str, Any]:
    choices = choices_of(sample["candidates"])
    letters = [letter for letter, text in choices.items() if text == sample["answer"]]
    if not letters:
        raise SuiteError(
            f"mlvu: the answer {sample['answer']!r} to {sample['question']!r} about {sample['video']} is none of its "
            "candidates: fetch the file anew"
        )
    return expected_choice(letters[0], choices, sample)


SUITE = Suite(
    "mlvu",
    "MLVU dev",
    1,
    (
        Task(
            id="mlvu",
            title="seven tasks about long videos (M-Avg)",
            data="mlvu",
            plain=Asking(ask, GREEDY),
            published=Asking(ask, GREEDY),
            expected=expected,
            facts=lambda sample: {"id": f"{sample['video']}: {sample['question']}", "task": sample["task"]},
            scorer=mlvu,
            aggregate=mean_of_tasks,
            breakdowns=("task",),
            judge=judge_of_choice,
            is_video=True,
        ),
    ),
)
