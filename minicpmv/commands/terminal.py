"""What the commands show: that something happens, answers as they come, and notes.

What is special:
- stdout gets answers alone. What else there is to see goes to stderr, and moves only where that is a terminal.
- A thought runs by in a few dim lines, and is folded when the answer begins.
- What the model writes cannot steer the terminal: an image may tell it to.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError


THOUGHT_LINES = 6  # of a thought that runs by
UNSEEN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class OutputError(MiniCPMVError):
    """What a command writes cannot go where it should go."""


class DeviceMemoryError(MiniCPMVError):
    """The accelerator is too small for what was asked."""


@contextmanager
def device_memory() -> Iterator[None]:
    """The accelerator's lack of memory becomes an error with the remedy.

    Raises:
        DeviceMemoryError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        import torch  # only now: it takes a second

        if not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise DeviceMemoryError(
            f"the accelerator has too little memory for this ({reason}): ask about fewer images at once, with fewer slices "
            "(--max-slice-nums) or frames (--fps), write less (--max-new-tokens), or end what else runs there"
        ) from error


def write(text: str, end: str = "\n") -> None:
    """Write to stdout at once.

    Raises:
        OutputError: it cannot be written, as on a full disk.
        SystemExit: nobody reads it any more, as behind `| head`.
    """
    try:
        sys.stdout.write(text + end)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would fail once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise SystemExit(1) from error
        raise OutputError(f"the output cannot be written: {error.strerror}") from error


def note(text: str) -> None:
    print(f"minicpmv: note: {text}", file=sys.stderr)


def check_output(file: Path | None) -> None:
    """Refuse a file that could not be written, before anything expensive happens.

    Raises:
        OutputError: names it.
    """
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise OutputError(f"{file} cannot be written; give the name of a file in a folder that is there")


def load_shown(console: Any, name: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """`(model, processor)`; meanwhile a terminal shows that something happens, and how far the weights are."""
    import gc

    from minicpmv import checkpoint

    checkpoint.check_name(name, revision, trust_remote_code)
    # The imports leave a million objects that stay. To look through them again and again, and once more at the end, takes a
    # quarter of the time of a short answer.
    gc.disable()
    with console.status("Starting"):
        import transformers
        from transformers import AutoModel, AutoProcessor  # noqa: F401 (here, since they take seconds)
    gc.freeze()
    gc.enable()
    if not console.is_terminal:
        transformers.utils.logging.disable_progress_bar()
    checkpoint.attend_without_plans()
    return checkpoint.load(name, revision=revision, trust_remote_code=trust_remote_code)


def write_model(
    module: str, function: str, model: str, output: Path, kind: Any, samples: int, no_check: bool, **settings: Any
) -> Any:
    """What a function of a module in `minicpmv.deploy` returns; meanwhile the terminal shows what happens."""
    from importlib import import_module

    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with console.status("Starting"):
        from transformers.utils import logging

        write = getattr(import_module(f"minicpmv.deploy.{module}"), function)
    if not console.is_terminal:
        logging.disable_progress_bar()

    def note(what: str) -> None:
        console.print(what, style="dim")

    return write(model, output, kind, samples=samples, is_checked=not no_check, note=note, **settings)


def shown_name(model: str) -> str:
    """What a model is called: the name of its folder or file, or its name on the Hub."""
    place = Path(model).expanduser()
    return place.resolve().name if place.exists() else model


def show_answer(stream: Any, processor: Any, console: Any, fold: bool = True) -> None:
    """Write an answer to stdout as it comes. Thoughts are seen only where `console` is a terminal: while they come, and
    then whole, or with `fold` as one line."""
    import time

    from rich.live import Live
    from rich.spinner import Spinner
    from rich.text import Text

    controls = UNSEEN if sys.stdout.isatty() else {}
    thought, begun, last = "", None, ""
    spinner = Spinner("dots", "Looking")
    with Live(spinner, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as live:
        for piece in stream:
            if stream.is_thought:
                begun = begun or time.perf_counter()
                thought += piece
                shown = (processor.split_thought(thought)[0] or "").strip().translate(UNSEEN)
                lines = Text(shown, style="dim").wrap(console, console.width)
                live.update(Text("\n").join(lines[-THOUGHT_LINES:]))
                continue
            if not last:
                piece = piece.lstrip("\n") if begun else piece
                if not piece:
                    continue
                live.stop()
                if begun and console.is_terminal:
                    seconds = time.perf_counter() - begun
                    console.print(Text(f"Thought for {seconds:.1f} s" if fold else shown, style="dim"))
            write(piece.translate(controls), end="")
            last = piece
    if not last.endswith("\n"):
        write("")


def note_limit(output: Any, max_new_tokens: int) -> None:
    """Say where the limit cut an answer."""
    if output.finish_reason == "length":
        what = "thought" if output.reasoning and not output.text else "answer"
        note(f"the {what} ended at {max_new_tokens} tokens (--max-new-tokens)")


def note_knowledge(model: Any, name: str) -> None:
    """Say what a checkpoint knows where its config.json names it, as that of a miniature does."""
    if knows := getattr(model.config, "knows", None):
        note(f"{shown_name(name)} knows {knows}: anything else it guesses")
