"""Long answers: a page may hold more text than one call writes, and a model that loops would never end.

What is special:
- an answer that reached `max_new_tokens` goes on exactly where it stopped, as if the limit had not been there;
- a loop is noticed while it is written, and stops the model; its first round is kept, the others are cut;
- whatever is cut or left out is said in `notices`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteria


# A text loops when its end repeats itself so often and for so long. Rows of dots and empty table cells stay below.
LOOP_ROUNDS = 4
LOOP_CHARACTERS = 400
WINDOW = 4000  # characters at the end in which a loop is looked for
CHECK_EVERY = 32  # tokens
CALL_TOKENS = 2048  # most of one call


@dataclass
class Written:
    """An answer in full length. `is_complete` tells whether the model ended it itself."""

    text: str
    tokens: int = 0
    notices: list[str] = field(default_factory=list)
    is_complete: bool = True


def find_loop(text: str) -> tuple[int, int] | None:
    """(start, period) in characters of the loop that `text` ends with, or None.

    The period is the least with which at least `LOOP_ROUNDS` rounds fill `LOOP_CHARACTERS` or more.
    """
    # borders[i]: length of the longest proper prefix of the reversed end that is also a suffix of its first i + 1
    # characters (Knuth, Morris and Pratt); these characters then repeat every i + 1 - borders[i].
    end = text[-WINDOW:][::-1]
    borders, best = [0] * len(end), None
    for i in range(1, len(end)):
        length = borders[i - 1]
        while length and end[i] != end[length]:
            length = borders[length - 1]
        borders[i] = length + (end[i] == end[length])
        period = i + 1 - borders[i]
        if i + 1 >= max(LOOP_CHARACTERS, LOOP_ROUNDS * period) and (best is None or period <= best):
            best = period
    if best is None:
        return None
    start = len(text) - best
    while start and text[start - 1] == text[start - 1 + best]:
        start -= 1
    return start, best


def cut_loop(text: str) -> tuple[str, str | None]:
    """The text up to the end of the first round of the loop that it ends with, and a notice; without a loop the text."""
    loop = find_loop(text)
    if loop is None:
        return text, None
    start, period = loop
    phrase = " ".join(text[start : start + period].split())
    if len(phrase) > 40:
        phrase = f"{phrase[:37]}..."
    return text[: start + period], (
        f"the answer looped ({phrase!r}, {(len(text) - start) // period} times) and was cut after the first round; what "
        "would have followed is missing"
    )


class LoopStop(StoppingCriteria):
    """Stops the model when the text before this call, and what it writes now, end in a loop."""

    def __init__(self, tokenizer: Any, before: str = "") -> None:
        self.tokenizer, self.before = tokenizer, before
        self.prompt_length: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor | None, **kwargs: Any) -> torch.Tensor:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1] - 1  # the first token is there already
        written = input_ids[0, self.prompt_length :]
        is_loop = False
        if len(written) % CHECK_EVERY == 0:
            is_loop = find_loop(self.before + self.tokenizer.decode(written[-WINDOW:])) is not None
        return torch.full((len(input_ids),), is_loop, dtype=torch.bool, device=input_ids.device)


def write(
    model: Any,
    processor: Any,
    messages: Sequence[dict],
    max_page_tokens: int = 8192,
    max_new_tokens: int = CALL_TOKENS,
    first_output: Any = None,
    **options: Any,
) -> Written:
    """Let the model answer to the end.

    Args:
        messages: a conversation for `model.chat`, which ends with the question.
        max_page_tokens: most tokens of the whole answer.
        max_new_tokens: most tokens of one call.
        first_output: the `ChatOutput` of the first call, where that was made elsewhere, such as in a session.
        options: others of `model.chat`; greedy decoding where they say nothing else.
    """
    answer, question = Written(""), messages
    while True:
        if answer.text:  # whoever has begun to answer has thought already
            messages = [*question, {"role": "assistant", "content": answer.text}]
            options |= {"enable_thinking": False}
        output = first_output or model.chat(
            msgs=messages,
            processor=processor,
            return_dict=True,
            max_new_tokens=min(max_new_tokens, max_page_tokens - answer.tokens),
            stopping_criteria=[LoopStop(processor.tokenizer, answer.text)],
            **{"decoding": "greedy"} | options,
        )
        first_output = None
        answer.text += output.text
        answer.tokens += output.generated_tokens
        answer.text, notice = cut_loop(answer.text)
        if notice:
            answer.notices.append(notice)
        elif output.finish_reason == "length" and answer.tokens < max_page_tokens and output.generated_tokens:
            # A character of several tokens may be cut in two: the model writes it again.
            answer.text = answer.text.rstrip("\ufffd")
            continue
        elif output.finish_reason == "length":
            answer.notices.append(
                f"the answer ended after {answer.tokens} tokens; raise max_page_tokens={max_page_tokens} for the rest"
            )
        else:
            return answer
        answer.is_complete = False
        return answer
