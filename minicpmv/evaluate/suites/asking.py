"""Words and ways to decode that several suites share, quoted word for word.

Sources, if a suite names no other:
- as published: the class MiniCPM_V_4_5 of VLMEvalKit (open-compass/VLMEvalKit, pull request 1237, September 2025), which the
  model's authors wrote: prompts, decoding and answer cuts by data set. It shows the image with the model's own limit of
  9 slices, and keeps the thought; here the thought is cut off before the answer is cut, since a thought may hold "Answer:";
- plain: the prompts that VLMEvalKit (e8e78f0) gives to models without words of their own, with greedy decoding.
"""

from collections.abc import Callable
from string import ascii_uppercase
from typing import Any

from minicpmv.evaluate.benchmark import Facts
from minicpmv.evaluate.scoring.cutting import cut_choice, cut_value
from minicpmv.evaluate.suite import Asking, Decoding, Sample


STEP_BY_STEP_CHOICE = (  # its quotation is never closed
    "Carefully read the following multichoice question, solve it step by step and finally pick the option associated with "
    'the correct answer in the format of "Answer: selected option\n\n'
)
STEP_BY_STEP = (
    "Read the following question carefully, solve it step by step, and then output the final answer in the format of "
    '"Answer: single number or single word or phrase".\n\n'
)
READ_CAREFULLY = "Carefully observe the image and answer the OCR-related questions below. \n\n"
SHORTLY = "Answer the question using a single word or phrase."
LETTER_DIRECTLY = "Answer with the option's letter from the given choices directly."
SELECT_ABOVE = "Please select the correct answer from the options above. \n"

# --- Decoding ---

_BEAMS = {"decoding": "beam", "num_beams": 3, "repetition_penalty": 1.2}
GREEDY = Decoding(max_new_tokens=1024)
THINKING = Decoding(
    max_new_tokens=8192,
    options={
        "decoding": "sample",
        "temperature": 0.7,
        "top_p": 1.0,
        "top_k": 0,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "think_prefix": "I",
    },
    thinking=True,
    enlarge=True,
    runs=3,
)
REASONING = Decoding(max_new_tokens=2048, options=_BEAMS, thinking=False, enlarge=True)
DIRECT = Decoding(max_new_tokens=1024, options=_BEAMS, thinking=False)
DIRECT_ENLARGED = Decoding(max_new_tokens=1024, options=_BEAMS, thinking=False, enlarge=True)

# --- Words ---


def choices(sample: Sample) -> dict[str, str]:
    """Texts of the options by letter, of a question whose options are columns."""
    return {letter: str(sample[letter]) for letter in ascii_uppercase if sample.get(letter) is not None}


def option_lines(options: dict[str, str]) -> str:
    return "".join(f"{letter}. {text}\n" for letter, text in options.items())


def hint(sample: Sample) -> str:
    return f"Hint: {sample['hint']}\n" if sample.get("hint") is not None else ""


def general_choice(sample: Sample) -> str:
    options = choices(sample)
    asked = f"{hint(sample)}Question: {sample['question']}\n"
    return f"{asked}Options:\n{option_lines(options)}{SELECT_ABOVE}" if options else asked


def step_by_step_choice(sample: Sample) -> str:
    options = choices(sample)
    if not options:
        return f"{STEP_BY_STEP}{hint(sample)}{sample['question']}"
    return f"{STEP_BY_STEP_CHOICE}{hint(sample)}{sample['question']}\n{option_lines(options)}"


def direct_choice(sample: Sample) -> str:
    asked = f"{hint(sample)}Question: {sample['question']}\nOptions:\n{option_lines(choices(sample))}"
    return f"{asked}\n{LETTER_DIRECTLY}"


def images_then(words: Callable[[Sample], str]) -> Callable[[Sample], list[Any]]:
    """The content of a message that shows the question's images, then asks."""
    return lambda sample: [*sample.images, words(sample)]


def question(sample: Sample) -> str:
    return sample["question"]


PLAIN_CHOICE = Asking(images_then(general_choice), GREEDY)
PLAIN_QUESTION = Asking(images_then(question), GREEDY)
PLAIN_SHORT = Asking(images_then(lambda sample: f"{sample['question']}\n{SHORTLY}"), GREEDY)
THOUGHTFUL_CHOICE = Asking(images_then(step_by_step_choice), THINKING, cut_choice)
THOUGHTFUL_QUESTION = Asking(images_then(lambda sample: STEP_BY_STEP + sample["question"]), THINKING, cut_value)
DIRECT_CHOICE = Asking(images_then(direct_choice), DIRECT)

# --- What scorers expect, and what is logged ---


def expected_choice(sample: Sample) -> dict[str, Any]:
    return {"answer": sample["answer"], "choices": choices(sample), "question": sample["question"]}


def expected_answers(sample: Sample) -> dict[str, Any]:
    answers = sample["answer"]
    return {"answers": answers if isinstance(answers, list) else [answers]}


def columns(*names: str, id: str = "index") -> Callable[[Sample], Facts]:
    """The facts of a question that stand in these columns of its record; hyphens become underscores."""
    return lambda sample: {
        "id": str(sample[id]),
        **{name.replace("-", "_"): sample[name] for name in names if sample.get(name) is not None},
    }
