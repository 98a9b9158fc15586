"""Many answers at the same time: rows join and leave a running batch between its steps.

What is special:
- One thread runs the model. Each of its rounds does one bounded piece of reading (some slices, or some tokens of a prompt)
  and writes one token of each answer, so a short question does not wait for a long one, nor an answer for a prompt.
- Prompts that are read take turns. A prompt that begins like an earlier one goes on from its states.
- What goes wrong in a request ends that request, not the others.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from minicpmv.serving.prompts import Prompt
from minicpmv.serving.sampling import Sampler, log_probabilities
from minicpmv.serving.states import Batch, PrefixMemory, of_cache, to_cache
from minicpmv.serving.writing import AnswerWriter, Piece, TokenFact


READ_TOKENS = 512  # of a prompt in one round while others wait; a quiet model reads more at once
QUIET_READ_TOKENS = 4096
# Of torch, of the model, of llama.cpp; they end some requests, not all.
FAILURES = (RuntimeError, ValueError, MemoryError)


@dataclass
class Finish:
    """The end of an answer, and what it took."""

    reason: str  # "stop", "length", "tool_calls" or "cancelled"
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    thought_tokens: int
    seconds_to_first: float
    seconds: float


Event = tuple[int, Piece | Finish | BaseException]  # which of the answers to a job; what came


@dataclass(eq=False)
class Job:
    """A prompt to be answered, once or several times.

    Attributes:
        send: takes the events, in the thread of the model; it must not wait.
        make_sampler: of one of the answers, for a prompt that begins a thought or not.
        deep: the prompt to answer instead where a draft of the answer shows that thinking is needed.
    """

    prompt: Prompt
    send: Callable[[Event], None]
    make_sampler: Callable[[int, Prompt, bool], Sampler]
    make_writer: Callable[[bool], AnswerWriter]
    room: int  # most tokens of an answer
    choices: int = 1
    thinking: bool = False
    deep: Prompt | None = None
    submitted: float = field(default_factory=time.perf_counter)
    is_cancelled: bool = False

    def cancel(self) -> None:
        """Stop: nobody reads on. Between two tokens its rows go."""
        self.is_cancelled = True


@dataclass(eq=False)
class Reading:
    """A prompt on its way into states. `answers` are those that it is for."""

    job: Job
    prompt: Prompt
    thinking: bool
    answers: list[int]
    room: int
    cache: Any
    done: int  # tokens whose states are there
    cached: int  # of them, found in the memory
    units_left: list[Any]  # to be encoded


@dataclass(eq=False)
class Row:
    """One answer on its way."""

    job: Job
    index: int
    prompt: Prompt
    thinking: bool
    room: int
    cached: int
    sampler: Sampler
    writer: AnswerWriter
    ids: list[int] = field(default_factory=list)
    needs: list[float] | None = None  # to think, of each token of a draft; None: it is no draft
    held: list[Piece] = field(default_factory=list)  # of a draft
    first: float = 0.0  # seconds


class Scheduler:
    """Answers jobs. `submit` may be called by any thread.

    Args:
        max_rows: most answers at the same time.
        max_tokens: most tokens of all rows of the batch together, each counted as the longest; a row alone may have more.
        memory: of earlier states.
        after_round: called when the events of a round have been sent.
    """

    def __init__(
        self, model: Any, max_rows: int, max_tokens: int, memory: PrefixMemory, after_round: Callable[[], None]
    ) -> None:
        self.model, self.max_rows, self.max_tokens, self.memory = model, max_rows, max_tokens, memory
        self._after_round = after_round
        stops = model.generation_config.eos_token_id
        self.stop_ids = tuple(stops) if isinstance(stops, (list, tuple)) else (stops,)
        self.slot, self.query_num = model.config.image_token_id, model.config.query_num
        self._waiting: deque[Job] = deque()
        self._readings: deque[Reading] = deque()
        self._rows: list[Row] = []
        self._batch = Batch()
        self._wake = threading.Condition()
        self._is_closed = False
        self.failure: BaseException | None = None  # what ended the thread
        self._thread = threading.Thread(target=self._run, name="minicpmv-scheduler", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are written or whose prompts are read."""
        return len(self._rows) + sum(len(reading.answers) for reading in list(self._readings))

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, job: Job) -> None:
        """Take a job. Its events come from now on; the last one of each answer is its `Finish` or an error."""
        with self._wake:
            if self._is_closed or self.failure is not None:
                raise RuntimeError("the scheduler has ended") from self.failure
            self._waiting.append(job)
            self._wake.notify()

    def close(self) -> None:
        """End the thread; what is not answered by then is cancelled."""
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        self._thread.join()

    # ---- the thread of the model ----

    def _run(self) -> None:
        try:
            with torch.no_grad():
                while self._wait():
                    self._round()
        except BaseException as error:
            self.failure = error
            self._fail_all(error)
            raise
        self._fail_all(RuntimeError("the server is closing"))

    def _wait(self) -> bool:
        """Wait for something to do; False where it is time to end."""
        with self._wake:
            while not (self._is_closed or self._waiting or self._readings or self._rows):
                self._wake.wait()
            return not self._is_closed

    def _round(self) -> None:
        self._drop_cancelled()
        self._admit()
        if self._readings:
            self._read_on(self._readings[0])
            self._readings.rotate(-1)
        if self._rows:
            self._write_on()
        self._after_round()

    def _drop_cancelled(self) -> None:
        with self._wake:
            self._waiting = deque(job for job in self._waiting if not job.is_cancelled)
        for reading in [reading for reading in self._readings if reading.job.is_cancelled]:
            self._readings.remove(reading)
        while row := next((row for row in self._rows if row.job.is_cancelled), None):
            self._end(row, "cancelled")

    def _admit(self) -> None:
        """Begin to read what waits, as far as there is room, in the order of coming."""
        while self._waiting:
            job = self._waiting[0]
            rows = self.running
            longest = max(
                [len(job.prompt.ids) + job.room]
                + [len(row.prompt.ids) + row.room for row in self._rows]
                + [len(reading.prompt.ids) + reading.room for reading in self._readings]
            )
            fits = rows + job.choices <= self.max_rows and (rows + job.choices) * longest <= self.max_tokens
            if rows and not fits:
                return
            self._waiting.popleft()
            answers = list(range(job.choices))
            try:
                self._begin(job, job.prompt, job.thinking, answers, job.room)
            except FAILURES as error:  # such as no memory for the states that are known
                _fail(job, answers, error)

    def _begin(self, job: Job, prompt: Prompt, thinking: bool, answers: list[int], room: int) -> None:
        states, cached = self.memory.find(prompt.keys)
        first_slot = prompt.ids[:cached].count(self.slot)
        units = prompt.units[first_slot // self.query_num :] if prompt.units else []
        new = [unit for unit in units if self.model not in unit.features]
        self._readings.append(
            Reading(job, prompt, thinking, answers, room, to_cache(states), cached, cached, list(_distinct(new)))
        )

    # ---- reading ----

    def _read_on(self, reading: Reading) -> None:
        """One piece of a prompt: some of its slices, or some of its tokens."""
        try:
            if reading.units_left:
                self._encode(reading)
                return
            logits = self._read_tokens(reading)
            if logits is not None:
                self._readings.remove(reading)
                self._start_rows(reading, logits)
        except FAILURES as error:
            if reading in self._readings:
                self._readings.remove(reading)
            _fail(reading.job, reading.answers, error)

    def _encode(self, reading: Reading) -> None:
        units: list[Any] = []
        slices = 0
        while reading.units_left and (not units or slices < self.model.config.vision_batch_size):
            units.append(reading.units_left.pop(0))
            slices += len(units[-1].slices)
        self.model.read_units(units, [self.model])

    def _read_tokens(self, reading: Reading) -> torch.Tensor | None:
        """The logits [V] behind the prompt, once it is read to its end."""
        prompt, start = reading.prompt, reading.done
        is_quiet = not self._rows and len(self._readings) == 1 and not self._waiting
        stop = min(len(prompt.ids), start + (QUIET_READ_TOKENS if is_quiet else READ_TOKENS))
        ids = torch.tensor([prompt.ids[start:stop]], device=self.model.device)
        images: dict[str, Any] = {}
        if slots := prompt.ids[start:stop].count(self.slot) if prompt.units else 0:
            before = prompt.ids[:start].count(self.slot)
            first, last = before // self.query_num, -(-(before + slots) // self.query_num)
            rows = torch.cat(self.model.read_units(prompt.units[first:last], [self.model])).flatten(0, -2)
            offset = before - first * self.query_num
            images["mm_encoder_outputs"] = {"image": rows[offset : offset + slots]}
        output = self.model(
            input_ids=ids,
            attention_mask=torch.ones(1, stop, dtype=torch.long, device=ids.device),
            position_ids=torch.arange(start, stop, device=ids.device)[None],
            cache=reading.cache,
            use_cache=True,
            logits_to_keep=1,
            **images,
        )
        reading.done = stop
        return output.logits[0, -1] if stop == len(prompt.ids) else None

    def _start_rows(self, reading: Reading, logits: torch.Tensor) -> None:
        job, prompt = reading.job, reading.prompt
        states = of_cache(reading.cache)
        for index in reading.answers:
            row = Row(
                job,
                index,
                prompt,
                reading.thinking,
                reading.room,
                reading.cached,
                job.make_sampler(index, prompt, reading.thinking),
                job.make_writer(reading.thinking),
                needs=[] if job.deep is not None and not reading.thinking else None,
            )
            token = row.sampler.choose(logits) if not row.sampler.is_plain else int(logits.argmax())
            row.first = time.perf_counter() - job.submitted
            self._batch.join(states, len(prompt.ids))
            self._rows.append(row)
            self._take(row, token, logits)

    # ---- writing ----

    def _write_on(self) -> None:
        """One token of each answer."""
        rows = list(self._rows)
        try:
            inputs = self._batch.inputs([row.ids[-1] for row in rows], self.model.device)
            logits = self.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
            likeliest = logits.argmax(-1).tolist()
        except FAILURES as error:
            self._give_up(error)
            return
        for place, row in enumerate(rows):
            if row not in self._rows:  # given up with the others
                continue
            try:
                token = likeliest[place] if row.sampler.is_plain else row.sampler.choose(logits[place])
                self._take(row, token, logits[place])
            except FAILURES as error:  # such as of a grammar
                _fail(row.job, [row.index], error)

    def _give_up(self, error: BaseException) -> None:
        """End all answers with an error, where the states of the batch are lost, and make room for others."""
        rows, self._rows, self._batch = self._rows, [], Batch()
        for row in rows:
            _fail(row.job, [row.index], error)
        self.memory.clear()

    def _take(self, row: Row, token: int, logits: torch.Tensor) -> None:
        """Add a token to an answer, and end it where that was its last."""
        row.ids.append(token)
        told = row.sampler.settings.logprobs
        pieces: list[Piece] = []
        is_stop = token in self.stop_ids
        if not is_stop:
            row.sampler.take(token)
            fact = None if told is None else TokenFact(token, *log_probabilities(logits, token, told))
            pieces = row.writer.take(token, fact)
        is_over = is_stop or row.writer.is_stopped or len(row.ids) >= row.room
        if row.needs is not None:
            row.needs.append(self.model.need_to_think([logits]))
            row.held += pieces
            if not (is_over or len(row.needs) >= self.model.draft_tokens):
                return
            if self._must_think(row):
                return
            pieces, row.needs, row.held = row.held, None, []
        for piece in pieces:
            row.job.send((row.index, piece))
        if is_over:
            reason = "stop" if is_stop or row.writer.is_stopped else "length"
            self._end(row, reason)

    def _must_think(self, row: Row) -> bool:
        """Whether a draft shows that thinking is needed; then it is thrown away, and the deep prompt is read instead."""
        job, deep = row.job, row.job.deep
        assert deep is not None and row.needs is not None
        if max(row.needs) < self.model.thinking_threshold:
            return False
        self._remove(row)
        self._begin(job, deep, True, [row.index], row.room)
        return True

    def _end(self, row: Row, reason: str) -> None:
        for piece in row.writer.finish() if reason != "cancelled" else []:
            row.job.send((row.index, piece))
        self._remove(row)
        reason = "tool_calls" if reason == "stop" and row.writer.calls else reason
        seconds = time.perf_counter() - row.job.submitted
        finish = Finish(
            reason, len(row.prompt.ids), row.cached, len(row.ids), row.writer.thought_tokens, row.first, seconds
        )
        row.job.send((row.index, finish))

    def _remove(self, row: Row) -> None:
        """Take a row out of the batch, and remember its states. Where there is no memory for the others', these end."""
        place = self._rows.index(row)
        del self._rows[place]
        try:
            states = self._batch.leave(place)
        except FAILURES as error:
            self._give_up(error)
            return
        keys = [*row.prompt.keys, *row.ids][: states[0][0].shape[2]]  # the last token was not read
        self.memory.keep(keys, states, row.prompt.units)

    def _fail_all(self, error: BaseException) -> None:
        with self._wake:
            waiting, self._waiting = list(self._waiting), deque()
        for job in waiting:
            for index in range(job.choices):
                job.send((index, error))
        for reading in self._readings:
            for index in reading.answers:
                reading.job.send((index, error))
        for row in self._rows:
            row.job.send((row.index, error))
        self._readings.clear()
        self._rows.clear()
        self._after_round()


def _fail(job: Job, answers: Iterable[int], error: BaseException) -> None:
    """End answers to a job with an error; nobody reads on, so that the others are cancelled."""
    for index in answers:
        job.send((index, error))
    job.cancel()


def _distinct(units: list[Any]) -> list[Any]:
    """Units without those that stand there twice."""
    return list({id(unit.slices[0]): unit for unit in units}.values())
