"""How an answer is written: streams, seeds, thoughts with a budget, and when to think at all.

What is special:
- An error in the writing thread reaches the reader of a stream; closing or dropping the stream stops the model.
- A seed belongs to one call: other threads and the global random state neither see nor disturb it.
- A budget closes the thought, not the answer.
- "auto" looks before it thinks. The model begins to answer fast; where one of its first tokens was a guess, the draft is
  thrown away and it thinks. Else the draft is the beginning of the answer.
"""

import random
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from transformers import LogitsProcessor, PreTrainedTokenizerBase, StoppingCriteria, TextIteratorStreamer

from .messages_minicpmv import THINK_END, THINK_START


OPENING = f"{THINK_START}\n"  # as the template opens a thought
CLOSING = f"\n{THINK_END}\n\n"  # and closes it
DRAFT_TOKENS = 8  # tokens of the fast answer that "auto" looks at
DEFAULT_THRESHOLD = 0.5  # not calibrated: what pays differs between checkpoints and uses


# ---- when to think ----


def need_to_think(logits: Iterable[torch.Tensor]) -> float:
    """Need from 0 to 1: what the likeliest token of a draft lacked to certainty where it lacked most, since an answer is as
    certain as its weakest token. `logits`: one tensor [1, V], or [V], a step.

    Nothing else counts: with the length of the question beside it, fewer answers were right at equal tokens.
    """
    return 1 - torch.cat(list(logits)).float().softmax(-1).amax(-1).min().item()


# ---- which token comes next ----


@dataclass(eq=False)
class ThoughtBudget(LogitsProcessor):
    """Closes a thought that is still open after `budget` tokens, in each row of a batch by itself."""

    budget: int
    prompt_length: int  # in tokens (with padding); then the thought begins
    think_end: int  # id of "</think>"
    closing: Sequence[int]  # ids that close the thought, `think_end` among them

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length - self.budget
        if not 0 <= step < len(self.closing):
            return scores
        thought = input_ids[:, self.prompt_length : self.prompt_length + self.budget]
        is_open = (thought != self.think_end).all(-1, keepdim=True)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.closing[step]] = 0
        return torch.where(is_open, forced, scores)


class SeededChoice(LogitsProcessor):
    """Chooses each token by numbers of its own and leaves it alone, so that whatever draws has nothing to decide.

    The token is the one where the cumulated probability passes the number. `MiniCPMV` puts this processor behind the
    ones of temperature, top_p and the like. There is one seed a row of the batch: a row depends on its seed and its
    scores, not on the rows beside it. `prompt_length` counts the tokens (with padding) before the first step.
    """

    def __init__(self, seeds: Sequence[int | str], prompt_length: int):
        self.sources = [random.Random(seed) for seed in seeds]
        self.prompt_length = prompt_length
        self.numbers = torch.empty(len(self.sources), 0, dtype=torch.float64)  # [rows, steps], uniform in [0, 1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        step = input_ids.shape[1] - self.prompt_length
        while step >= self.numbers.shape[1]:
            block = torch.tensor([[source.random() for _ in range(256)] for source in self.sources]).double()
            self.numbers = torch.cat([self.numbers.to(scores.device), block.to(scores.device)], dim=1)
        cumulated = scores.double().softmax(-1).cumsum(-1)  # [rows, V]
        # The last entry is 1 but for rounding: a number beyond it must not fall off the vocabulary.
        numbers = self.numbers[:, step, None] * cumulated[:, -1:]
        chosen = torch.searchsorted(cumulated, numbers, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


# ---- while it is written ----


class Watch(StoppingCriteria):
    """Seconds from the beginning of a call to its stages, and whether its reader has had enough.

    With `exact`, a stage ends when the device has computed it; else when it was told to.
    """

    def __init__(self, exact: bool = False):
        self.start, self.cancelled, self.exact = time.perf_counter(), threading.Event(), exact
        self.timings: dict[str, float] = {}

    def note(self, stage: str, computed: torch.Tensor | None = None) -> None:
        """Note the time of a stage, the first time; `computed` is what the stage computes."""
        if stage not in self.timings:
            if self.exact and computed is not None:
                computed.flatten()[-1].item()
            self.timings[stage] = time.perf_counter() - self.start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs) -> torch.BoolTensor:
        self.note("first_token", input_ids)
        return torch.full((len(input_ids),), self.cancelled.is_set(), dtype=torch.bool, device=input_ids.device)


class AnswerStreamer(TextIteratorStreamer):
    """Text of the generated tokens without prompt and closing token; other control tokens, such as boxes, belong to it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_special_tokens=False)
        self.next_tokens_are_prompt, self.thinking = True, False

    def expect(self, thinking: bool, draft: list[int], max_new_tokens: int, stop_ids: Collection[int]) -> None:
        """Tell whether the prompt opens a thought, the answer's first ids, its most tokens, and those that end it."""
        self.thinking, self.left, self.stop_ids = thinking, max_new_tokens, stop_ids
        if thinking:
            self.text_queue.put(OPENING)
        self._write(draft)

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
        else:
            self._write(value.flatten().tolist())

    def _write(self, tokens: list[int]) -> None:
        tokens = tokens[: self.left]  # several at a time, and perhaps too many, where tokens are guessed
        self.left -= len(tokens)
        for token in tokens:
            if token not in self.stop_ids:
                super().put(torch.tensor([token]))


class AnswerStream(Iterator[str], AbstractContextManager):
    """Pieces of text as the model writes them: an iterator. The model never waits for its reader.

    `is_thought` tells whether the piece that came last belongs to the thought; a piece is thought or answer, never both.
    `output` ([`ChatOutput`]) is there once the last piece has been read or the stream closed.

    `close()`, the end of a `with` block and the last reference going away stop the model. An error of the model is raised
    where the pieces are read.
    """

    def __init__(self, turn, finish: Callable = lambda output: None):
        """`turn.run(streamer)` runs in its own thread; `finish(output)` is called once, with None where nothing came of it."""
        self.output, self.is_thought = None, False
        self._split_thought, self._watch = turn.processor.split_thought, turn.watch
        self._streamer, self._finish = AnswerStreamer(turn.processor.tokenizer), finish
        self._seen, self._rest = "", ""
        self._result: Future = Future()
        self._over, self._lock = False, threading.Lock()
        # The thread knows nothing of this object, so that dropping the stream ends it.
        self._thread = threading.Thread(
            target=_run_into, args=(self._result, turn, self._streamer), name="minicpmv-chat", daemon=True
        )

    def __next__(self) -> str:
        if self._over:
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        try:
            piece = self._rest
            while not piece:
                piece = next(self._streamer)
        except StopIteration:
            self._end(complete=True)
            if error := self._result.exception():
                raise error from None
            raise
        except BaseException:  # the reader was interrupted
            self.close()
            raise
        self.is_thought, self._rest = False, ""
        if self._streamer.thinking and THINK_END not in self._seen:
            head, tag, self._rest = piece.partition(THINK_END)
            piece, self.is_thought = head + tag, True
        self._seen += piece
        return piece

    def close(self) -> None:
        """Stop the model. What has been read so far is the answer."""
        self._watch.cancelled.set()
        self._end(complete=False)

    def _end(self, complete: bool) -> None:
        with self._lock:
            if self._over:
                return
            output = None
            if self._thread.ident is not None:
                # The result, since an interrupted join() takes the thread for dead (before Python 3.13). Whoever is
                # interrupted here can close the stream again.
                output = None if self._result.exception() else self._result.result()
                self._thread.join()
            self._over = True
            if output is not None and not complete:
                thought, text = self._split_thought(self._seen) if self._streamer.thinking else (None, self._seen)
                output = replace(output, text=text, reasoning=thought, raw_text=self._seen, finish_reason="cancelled")
            self.output = output if self._seen or complete else None
            self._finish(self.output)

    def __exit__(self, *exception) -> None:
        self.close()

    def __del__(self):
        if not sys.is_finalizing():  # then the thread is frozen, and waiting for it would never end
            self.close()


def _run_into(result: Future, turn, streamer: AnswerStreamer) -> None:
    try:
        (output,) = turn.run(streamer)
        result.set_result(output)
    except BaseException as error:  # handed to the reader, who raises it
        result.set_exception(error)
        streamer.text_queue.put(streamer.stop_signal)
