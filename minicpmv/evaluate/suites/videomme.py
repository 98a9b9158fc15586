"""Video-MME (Fu et al. 2024): 900 videos of eleven seconds to an hour, three questions each; without subtitles and with.

Prompt and subtitles (those on screen in the frames that are shown) are those of the benchmark's authors; the reply is read as in
VLMEvalKit.
"""

from typing import Any

from minicpmv.evaluate.benchmark import Subtitles
from minicpmv.evaluate.data_sets import MissingDataError, read_subtitles
from minicpmv.evaluate.scoring.choice import judge_of_choice
from minicpmv.evaluate.scoring.video_choice import known_accuracy, videomme
from minicpmv.evaluate.suite import Asking, Sample, Suite, Task
from minicpmv.evaluate.suites.asking import columns
from minicpmv.evaluate.suites.watching import GREEDY, expected_choice, video_then


SUBTITLES = "This video's subtitles are listed below:\n"
SELECT_BEST = (
    "Select the best answer to the following multiple-choice question based on the video. Respond with only the letter "
    "(A, B, C, or D) of the correct option.\n"
)


def ask(sample: Sample) -> str:
    options = "\n".join(sample["options"])
    return f"{SELECT_BEST}{sample['question']}\n{options}\nThe best answer is:"


def with_subtitles(sample: Sample) -> list[Any]:
    words = Subtitles(tuple(subtitles(sample)), before=SUBTITLES, after="\n")
    return [sample.video(sample["video"]), words, ask(sample)]


def subtitles(sample: Sample) -> list[tuple[float, float, str]]:
    """Those of the video; some videos have none.

    Raises:
        MissingDataError: there are no subtitles of any video.
    """
    try:
        return read_subtitles(sample.data.media(sample["subtitle"]))
    except MissingDataError:
        if not (sample.data.folder / "subtitle").is_dir():
            raise
        return []


def expected(sample: Sample) -> dict[str, Any]:
    choices = {option[0]: option[2:].strip() for option in sample["options"]}
    return expected_choice(sample["answer"], choices, sample)


def task(id: str, title: str, asking: Asking) -> Task:
    return Task(
        id=id,
        title=title,
        data="videomme",
        plain=asking,
        published=asking,
        expected=expected,
        facts=columns("video", "duration", "domain", "sub_category", "task_type", id="question_id"),
        scorer=videomme,
        aggregate=known_accuracy,
        breakdowns=("duration", "domain", "task_type"),
        judge=judge_of_choice,
        is_video=True,
    )


SUITE = Suite(
    "videomme",
    "Video-MME",
    1,
    (
        task("videomme", "short, medium and long videos, without subtitles", video_then(ask)),
        task("videomme_subtitles", "the same questions with subtitles", Asking(with_subtitles, GREEDY)),
    ),
)
