"""What the suites about videos share.

Which frames, rates and packing the published figures were made with is not known: the authors' class cannot be run on videos, and
their own code is not public. So there is one way to ask, in both settings: the prompt of the benchmark's authors or of the kit that is
named, greedy, with the model card's frames (5 a second, up to 180 groups of up to 3). Each answer logs the frames that were shown.
"""

import re
from collections.abc import Callable
from typing import Any

from minicpmv.evaluate.suite import Asking, Decoding, Sample


GREEDY = Decoding(max_new_tokens=128)


def video_then(words: Callable[[Sample], str]) -> Asking:
    """Shows the question's video, then asks."""
    return Asking(lambda sample: [sample.video(sample["video"]), words(sample)], GREEDY)


def question_then(instruction: str) -> Asking:
    """Shows the video, then the question, which lists its options, and on a line of its own what to answer."""
    return video_then(lambda sample: f"{sample['question']}\n{instruction}")


def expected_choice(answer: str, choices: dict[str, str], sample: Sample) -> dict[str, Any]:
    return {"answer": answer, "choices": choices, "question": sample["question"]}


def listed_choices(text: str, form: str) -> dict[str, str]:
    """The options that stand in a text, a line each; `form` finds a line's letter and words."""
    return {letter: words.strip() for letter, words in re.findall(form, text, re.MULTILINE)}
