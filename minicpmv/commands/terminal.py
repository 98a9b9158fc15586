"""What the commands that talk with a model share: their options, what they show while they work, and how answers appear.

What is special:
- stdout gets answers alone. What else there is to see goes to stderr, and moves only where that is a terminal.
- A thought runs by in a few dim lines, and is folded when the answer begins.
- What the model writes cannot steer the terminal: a picture may tell it to.
"""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from minicpmv.errors import MiniCPMVError


# What the model's own code takes for a clip where it is given a path.
VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".gif"}
THOUGHT_LINES = 6  # of a thought that runs by
UNSEEN = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}

Model = Annotated[str, typer.Option("--model", "-m", help="Model folder or Hub repository.")]
System = Annotated[str, typer.Option("--system", help="Stands in front of the conversation.")]
Think = Annotated[bool, typer.Option("--think", help="Think before answering.")]
AutoThink = Annotated[bool, typer.Option("--auto-think", help="Think where the model is not sure.")]
ThinkingBudget = Annotated[int | None, typer.Option(help="Most tokens of a thought.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of thought and answer together.")]
Temperature = Annotated[
    float | None, typer.Option(min=0, help="0 takes the likeliest token each time; 0.7 by default.")
]
Seed = Annotated[int | None, typer.Option(help="Makes answers repeatable.")]
Fps = Annotated[float | None, typer.Option(help="Frames of a clip to look at in a second; 3 by default.")]
MaxSliceNums = Annotated[int | None, typer.Option(help="Most slices of a picture; 9 by default.")]
Revision = Annotated[str | None, typer.Option(help="Commit or tag of a Hub repository.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that a Hub repository brings.")
]


class MediaError(MiniCPMVError):
    """A picture or clip that is not there."""


class OutputError(MiniCPMVError):
    """A file that cannot be written where it should go."""


class DeviceMemoryError(MiniCPMVError):
    """The accelerator is too small for what was asked."""


@contextmanager
def device_memory():
    """The accelerator's lack of memory becomes an error with the remedy.

    Raises:
        DeviceMemoryError: in its place.
    """
    try:
        yield
    except RuntimeError as error:
        import torch  # only now: it takes seconds

        if not isinstance(error, torch.cuda.OutOfMemoryError):
            raise
        reason = str(error).partition("\n")[0].partition(". ")[0]
        raise DeviceMemoryError(
            f"the accelerator has too little memory for this ({reason}): ask about fewer pictures at once, with fewer slices "
            "(--max-slice-nums) or frames (--fps), write less (--max-new-tokens), or end what else runs there"
        ) from error


def answer_options(think, auto_think, thinking_budget, max_new_tokens, temperature, seed, fps, max_slice_nums) -> dict:
    """Options of the commands as those of `model.start_chat`."""
    if think and auto_think:
        raise typer.BadParameter("give --think or --auto-think, not both")
    options = {
        "enable_thinking": "auto" if auto_think else think,
        "thinking_budget": thinking_budget,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    if max_slice_nums is not None:
        options["images_kwargs"] = {"max_slice_nums": max_slice_nums}  # of pictures alone: frames stay whole
    if temperature == 0:
        options |= {"sampling": False, "num_beams": 1, "repetition_penalty": 1.0}
    elif temperature is not None:
        options["temperature"] = temperature
    return options | ({} if fps is None else {"fps": fps})


def load_shown(console, name: str, revision: str | None, trust_remote_code: bool):
    """`(model, processor)`; meanwhile a terminal shows that something happens, and how far the weights are."""
    with console.status("Starting"):
        from transformers import AutoModel, AutoProcessor  # noqa: F401 (imported here because it takes seconds)
        from transformers.utils import logging

        from minicpmv.checkpoint import load
    if not console.is_terminal:
        logging.disable_progress_bar()
    return load(name, revision=revision, trust_remote_code=trust_remote_code)


def shown_name(model: str) -> str:
    """What a model is called: the name of its folder, or its name on the Hub."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def is_address(source: str) -> bool:
    return source.startswith(("http://", "https://"))


def is_file(source: str) -> bool:
    source = os.path.expanduser(source)
    return os.path.exists(source) and not os.path.isdir(source)


def has_media_suffix(source: str) -> bool:
    from PIL import Image

    suffix = Path(source).suffix.lower()
    return suffix in VIDEO_SUFFIXES or suffix in Image.registered_extensions()


def kind_of_path(source: str) -> str:
    """ "image" or "video", by the suffix."""
    return "video" if Path(source).suffix.lower() in VIDEO_SUFFIXES else "image"


def check_media(sources, hint: str = "") -> None:
    """Refuse files that are not there, before anything expensive happens.

    Raises:
        MediaError: names the first.
    """
    for source in sources:
        if not is_address(source) and not is_file(source):
            raise MediaError(f"{source}: no such file; give a picture, a clip, or the address of a picture{hint}")


def check_output(file: Path | None) -> None:
    """Refuse a file that could not be written, before anything expensive happens.

    Raises:
        OutputError: names it.
    """
    if file is not None and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise OutputError(f"{file} cannot be written; give the name of a file in a folder that is there")


def media_part(model, processor, source, max_slice_nums=None, kind=None):
    """A picture, already encoded, or a clip, as a part of a message.

    Args:
        source: path or address, or the bytes of a file.
        kind: "image" or "video"; by the suffix of a path where it is not given.

    Raises:
        MediaError: it is not there.
        ValueError: it is damaged, or of another kind.
    """
    if isinstance(source, str):
        check_media([source])
        source = source if is_address(source) else os.path.expanduser(source)
        kind = kind or kind_of_path(source)
    if kind != "video":
        return model.encode_images(source, processor, max_slice_nums)
    from minicpmv.apps.clips import duration_of

    try:
        duration_of(processor, source)  # a damaged clip is refused here, not with the question
    except OSError as error:
        raise MediaError(f"the clip cannot be read: {error}") from error
    return {"type": "video", "video": source}


def show_answer(stream, console, fold: bool = True) -> None:
    """Write an answer to stdout as it comes. Thoughts are seen only where `console` is a terminal: while they come, and
    then whole, or with `fold` as one line."""
    import sys
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
                thought += piece.replace("<think>", "").replace("</think>", "").translate(UNSEEN)
                lines = Text(thought.strip(), style="dim").wrap(console, console.width)
                live.update(Text("\n").join(lines[-THOUGHT_LINES:]))
                continue
            if not last:
                piece = piece.lstrip("\n") if begun else piece
                if not piece:
                    continue
                live.stop()
                if begun and console.is_terminal:
                    seconds = time.perf_counter() - begun
                    console.print(Text(f"Thought for {seconds:.1f} s" if fold else thought.strip(), style="dim"))
            typer.echo(piece.translate(controls), nl=False)
            last = piece
    if not last.endswith("\n"):
        typer.echo()


def note_limit(output, max_new_tokens: int) -> None:
    """Say on stderr where the limit cut an answer."""
    if output.finish_reason == "length":
        what = "thought" if output.reasoning and not output.text else "answer"
        note(f"the {what} ended at {max_new_tokens} tokens (--max-new-tokens)")


def note(text: str) -> None:
    typer.echo(f"minicpmv: note: {text}", err=True)
