"""Streams: an answer as the model writes it, read in one thread while it is written in another.

What is special:
- An error in the writing thread reaches the reader; closing or dropping the stream stops the model.
- A piece is thought or answer, never both, and the stream tells which.
- The writer never waits for the reader.
"""

import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import torch
from transformers import StoppingCriteria, TextIteratorStreamer

from .thinking_minicpmv import OPENING, THINK_END, split_thought


STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")


class Watch(StoppingCriteria):
    """Seconds from the beginning of a call to its stages, and whether its reader has had enough."""

    def __init__(self):
        self.start, self.timings, self.cancelled = time.perf_counter(), {}, threading.Event()

    def note(self, stage, computed=None):
        """Note the time of a stage, the first time; `computed` is a tensor to wait for."""
        if stage not in self.timings:
            if computed is not None:
                computed.flatten()[-1].item()
            self.timings[stage] = time.perf_counter() - self.start

    def __call__(self, input_ids, scores, **kwargs):
        self.note("first_token", input_ids)
        return torch.full((len(input_ids),), self.cancelled.is_set(), dtype=torch.bool, device=input_ids.device)


class AnswerStreamer(TextIteratorStreamer):
    """Text of the generated tokens without the prompt and the closing token; other control tokens, such as boxes,
    belong to the answer."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)
        self.stop_ids = set(stop_ids_of(tokenizer))
        self.prompt_length, self.left, self.thinking = 0, 0, False

    def expect(self, prompt_length, thinking, max_new_tokens):
        """Tell the length of the prompt, behind which a draft may stand, whether it opens a thought, and how many tokens
        may follow."""
        self.prompt_length, self.thinking, self.left = prompt_length, thinking, max_new_tokens
        if thinking:
            self.text_queue.put(OPENING)

    def put(self, value):
        tokens = value.flatten().tolist()
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            tokens = tokens[self.prompt_length :]
        tokens = tokens[: self.left]  # several at a time, and perhaps too many, where tokens are guessed
        self.left -= len(tokens)
        for token in tokens:
            if token not in self.stop_ids:
                super().put(torch.tensor([token]))


class AnswerStream:
    """Pieces of text as the model writes them: an iterator.

    Attributes:
        is_thought (`bool`): whether the piece that came last belongs to the thought.
        output ([`ChatOutput`]): what is known about the answer, once the last piece has been read or the stream closed.

    `close()`, the end of a `with` block and the last reference going away stop the model. An error of the model is raised
    where the pieces are read.
    """

    def __init__(self, answer, watch, tokenizer, finish=None):
        """`answer(watch, streamer)` runs in a thread of its own and returns a list of one output; `finish(output)` is
        called once, with None where nothing came of it."""
        self.output, self.is_thought = None, False
        self._streamer, self._watch, self._finish = AnswerStreamer(tokenizer), watch, finish or (lambda output: None)
        self._seen, self._rest = "", ""
        self._result, self._over, self._lock = Future(), False, threading.Lock()
        # The thread knows nothing of this object, so that dropping the stream ends it.
        self._thread = threading.Thread(
            target=_answer_into, args=(self._result, answer, watch, self._streamer), name="minicpmv-chat", daemon=True
        )

    def __iter__(self):
        return self

    def __next__(self):
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

    def close(self):
        """Stop the model. What has been read so far is the answer."""
        self._watch.cancelled.set()
        self._end(complete=False)

    def _end(self, complete):
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
                thought, text = split_thought(self._seen) if self._streamer.thinking else (None, self._seen)
                output = replace(output, text=text, reasoning=thought, raw_text=self._seen, finish_reason="cancelled")
            self.output = output if self._seen or complete else None
            self._finish(self.output)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if not sys.is_finalizing():  # then the thread is frozen, and waiting for it would never end
            self.close()


def _answer_into(result, answer, watch, streamer):
    try:
        (output,) = answer(watch, streamer)
        result.set_result(output)
    except BaseException as error:  # handed to the reader, who raises it
        result.set_exception(error)
        streamer.text_queue.put(streamer.stop_signal)


def stop_ids_of(tokenizer):
    """Ids that end an answer."""
    return [tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]
