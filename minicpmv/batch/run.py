"""Rows to an answerer and answers back: in this process, or with Ray Data in many, on this machine or a cluster.

What is special:
- `concurrency` rows are under way at once, so that an engine which batches has something to batch.
- Of Ray's workers each opens an answerer of its own, with a GPU where there are some, and is given pieces of the input; rows
  come back here and are written here.
- A row that cannot be answered has an error. Only an engine that is gone ends a run, and the next one goes on from there.
"""

import json
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, TypeVar

from minicpmv.batch.answerers import AnswererOptions
from minicpmv.batch.jobs import Asked, answer_row
from minicpmv.batch.results import OutputError, Results
from minicpmv.batch.rows import Piece, open_input
from minicpmv.checkpoint import attend_without_plans
from minicpmv.errors import MiniCPMVError, is_expected, one_line, require


Item = TypeVar("Item")
Result = TypeVar("Result")
OBJECT_STORE = 200_000_000  # bytes; only rows of text pass through it
SHOWN = 300  # characters of what Ray says
AHEAD = 4  # times `concurrency`: rows that may be ready before the one whose turn it is


@dataclass(frozen=True)
class Workers:
    """Processes of Ray.

    Args:
        count: how many; None: one for each GPU there is, else one.
        address: of a cluster, such as "auto" or "ray://head:10001"; None: this machine alone.
    """

    count: int | None = None
    address: str | None = None


@dataclass
class Batch:
    """A batch that is about to run: `total` rows, of which `done` were answered by an earlier run."""

    total: int
    done: int
    rows: Iterator[dict[str, Any]]  # the others, each written to the output before it comes out here


@contextmanager
def open_batch(
    source: Path,
    output: Path,
    options: AnswererOptions,
    asked: Asked,
    *,
    ordered: bool = False,
    retry_errors: bool = False,
    workers: Workers | None = None,
) -> Iterator[Batch]:
    """Look at the input and at what an earlier run has done; then iterate over `rows` to have the others answered.

    Args:
        source: see [`minicpmv.batch.rows.open_input`].
        output: a `.jsonl` or `.parquet` file. A run that was stopped goes on when it is called again.
        options: who answers. Nothing is loaded where nothing is left to do.
        asked: what is asked.
        ordered: rows are written in the order of the input.
        retry_errors: rows with an error are asked again.
        workers: processes of Ray; None: this one.

    Raises:
        InputError, OutputError: the input or the output cannot be used.
        MiniCPMVError: the answerer cannot be opened, or has stopped.
        MissingPackageError: Ray, which several processes need, is not installed.
    """
    if workers is not None:
        require("batch", "ray")
    pieces = open_input(source)
    with Results(output, retry_errors) as results:
        left = _left(pieces, results, ordered)
        total, waiting = sum(len(piece.ids) for piece in pieces), sum(piece.left for piece in left)

        def rows():
            if left:
                answers = _answers_here(left, options, asked, ordered) if workers is None else None
                with closing(answers or _answers_of_ray(left, options, asked, ordered, workers)) as stream:
                    for row in stream:
                        results.add(row)
                        yield row
            results.finish()

        with closing(rows()) as stream:
            yield Batch(total, total - waiting, stream)


def _left(pieces: list[Piece], results: Results, ordered: bool) -> list[Piece]:
    """The pieces with rows that have no answer yet.

    Raises:
        OutputError: what is there belongs to another input; or it is not in order, as it should be.
    """
    done = set(results.ids)
    known = [str(identity) for piece in pieces for identity in piece.ids]
    if strangers := done.difference(known):
        raise OutputError(
            f"{results.path} is there, with the id {min(strangers)[:80]!r} that the input does not have: give another output"
        )
    if ordered and results.ids != known[: len(results.ids)]:
        raise OutputError(
            f"{results.path} is there, and its rows are not the first of the input in their order: go on without --ordered, "
            "or give another output"
        )
    return [piece for piece in (piece.without(done) for piece in pieces) if piece.left]


def _answers_here(pieces, options, asked, ordered):
    answerer = options.open()
    try:
        rows = (row for piece in pieces for row in piece)
        yield from side_by_side(lambda row: answer_row(row, asked, answerer), rows, options.concurrency, ordered)
    finally:
        answerer.close()


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], lanes: int, ordered: bool = False
) -> Iterator[Result]:
    """What `work` makes of each item, `lanes` at a time; items are taken as they are needed.

    Raises:
        BaseException: the first one that `work` raised, after what was under way is done.
    """
    todo: SimpleQueue[Any] = SimpleQueue()
    done: SimpleQueue[Any] = SimpleQueue()
    stop = Event()

    def lane() -> None:
        while (entry := todo.get()) is not None:
            place, item = entry
            try:
                done.put((place, None if stop.is_set() else work(item), None))
            except BaseException as error:  # raised again below, in the thread that waits
                stop.set()
                done.put((place, None, error))

    # Not a pool: Python would wait for its threads at the end of an interrupted run.
    for _ in range(lanes):
        Thread(target=lane, daemon=True).start()
    ready: dict[int, Any] = {}  # out of turn
    places, under_way, turn, failure = enumerate(items), 0, 0, None
    window = lanes * (AHEAD if ordered else 2)
    try:
        while True:
            if failure is None:
                for entry in islice(places, window - under_way - len(ready)):
                    todo.put(entry)
                    under_way += 1
            if not under_way:
                break
            place, result, error = done.get()
            under_way -= 1
            if error is not None or (stop.is_set() and result is None):
                failure = failure or error
            elif not ordered:
                yield result
            else:
                ready[place] = result
                while turn in ready:
                    yield ready.pop(turn)
                    turn += 1
    finally:
        stop.set()
        for _ in range(lanes):
            todo.put(None)
    if failure is not None:  # not before: what was under way has been answered, and paid for
        raise failure


# ---- Ray ----


class Worker:
    """What a process of Ray does with pieces of the input."""

    def __init__(self, options: AnswererOptions, asked: Asked) -> None:
        self.options, self.asked = options, asked
        self._answerer: Any = None
        self._opening = Lock()

    def answerer(self) -> Any:
        """Opened when it is first needed: an error of a call reaches who waits for it as it is, one of `__init__` does not."""
        with self._opening:
            if self._answerer is None:
                if self.options.endpoint is None:
                    attend_without_plans()
                self._answerer = self.options.open()
            return self._answerer

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        answerer = self.answerer()
        for packed in batch["piece"]:
            # In order: where a worker dies, Ray lets another do the piece again, and leaves out as many rows as it has.
            rows = side_by_side(
                lambda row: answer_row(row, self.asked, answerer),
                pickle.loads(packed),
                self.options.concurrency,
                ordered=True,
            )
            while some := list(islice(rows, self.options.concurrency)):
                yield {"rows": [json.dumps(some, ensure_ascii=False)]}

    def __del__(self) -> None:
        if self._answerer is not None:
            self._answerer.close()


def _answers_of_ray(pieces, options, asked, ordered, workers):
    import ray

    started = not ray.is_initialized()
    if started:
        local = {} if workers.address else {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
        ray.init(address=workers.address or "local", log_to_driver=False, logging_level="WARNING", **local)
    try:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context.execution_options.preserve_order = ordered
        context.target_max_block_size = 1  # what a worker yields comes at once: a kill loses little
        there = ray.cluster_resources()
        gpus, cores = 0 if options.endpoint else int(there.get("GPU", 0)), int(there.get("CPU", 0))
        count = workers.count or max(1, gpus)
        if count > (most := gpus or cores):
            raise MiniCPMVError(
                f"{count} workers are more than the {most} {'GPUs' if gpus else 'CPU cores'} that Ray has"
            )
        answers = ray.data.from_items([{"piece": pickle.dumps(piece)} for piece in pieces]).map_batches(
            Worker,
            fn_constructor_args=(options, asked),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=min(count, len(pieces)),
                max_concurrent_calls_per_actor=2,  # the next piece is begun when the last rows of one are under way
                enable_true_multi_threading=True,
            ),
            num_gpus=1 if gpus else 0,
            num_cpus=1 if gpus or workers.address else cores // count,  # threads of PyTorch are as many
        )
        for block in answers.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0):
            for rows in block["rows"]:
                yield from json.loads(rows)
    except ray.exceptions.RayTaskError as error:
        if error.cause is None or not is_expected(error.cause):
            raise
        raise error.cause from None
    except (ray.exceptions.RayError, ray.data.exceptions.SystemException) as error:
        reason = one_line(error.__cause__ or error)[-SHOWN:]
        raise MiniCPMVError(f"a worker of Ray died: run the same command again. {reason}") from error
    finally:
        if started:
            ray.shutdown()
