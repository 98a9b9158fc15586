"""`minicpmv video`: what happens in a video, with time stamps."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from minicpmv.commands import media, options, terminal
from minicpmv.errors import one_line_errors


class VideoFormat(str, Enum):
    text = "text"
    json = "json"
    srt = "srt"


def video(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A video.")],
    model: options.Model = ".",
    seconds: Annotated[float, typer.Option(metavar="N", help="About how long each described segment lasts.")] = 10,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to ask about each segment, in place of what happens.")
    ] = None,
    fps: options.Fps = None,
    format: Annotated[VideoFormat, typer.Option("--format", "-f", help="srt: subtitles.")] = VideoFormat.text,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write to this file.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens about a segment.")] = 256,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Describe what happens in a video, with time stamps.

    Examples:

    \b
      minicpmv video holiday.mp4
      minicpmv video lecture.mp4 --seconds 60 --format srt -o lecture.srt
    """
    import sys

    from rich.console import Console
    from rich.progress import Progress

    from minicpmv.apps import clips

    console = Console(stderr=True)
    # Where both are the terminal, what is told stands above the bar; else it must not end up in stderr.
    progress = Progress(
        console=console, redirect_stdout=sys.stdout.isatty(), transient=True, disable=not console.is_terminal
    )
    settings = {"max_new_tokens": max_new_tokens} | ({} if fps is None else {"fps": fps})
    told = []
    with one_line_errors(OSError), terminal.device_memory():
        if not file.is_file():
            raise media.MediaError(f"{file}: no such file; give a video")
        terminal.check_output(output)
        loaded, processor = terminal.load_shown(console, model, revision, trust_remote_code)
        total = len(clips.segment_times(clips.duration_of(processor, file), seconds))
        stream = clips.describe(loaded, processor, file, seconds, prompt or clips.PROMPT, **settings)
        try:
            with progress:
                for segment in progress.track(stream, total=total, description="Looking"):
                    told.append(segment)
                    if format is VideoFormat.text and output is None:
                        terminal.write(line(segment))
        finally:  # after an error or Ctrl-C too: hours of looking are not thrown away
            write_told(told, format, output, max_new_tokens)
        terminal.note_knowledge(loaded, model)


def write_told(told: list, format: VideoFormat, output: Path | None, max_new_tokens: int) -> None:
    """Write what was described, unless it was written as it came; on stderr what was cut."""
    import json
    from dataclasses import asdict

    from minicpmv.apps.clips import as_subtitles, as_time

    if not told:
        return
    for segment in told:
        if not segment.is_complete:
            terminal.note(f"the text at {as_time(segment.start)} ended at --max-new-tokens {max_new_tokens}")
    if format is VideoFormat.json:
        text = json.dumps([asdict(segment) for segment in told], ensure_ascii=False, indent=2)
    elif format is VideoFormat.srt:
        text = as_subtitles(told)
    else:
        text = "\n".join(map(line, told))
    if output is not None:
        output.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    elif format is not VideoFormat.text:
        terminal.write(text)


def line(segment) -> str:
    from minicpmv.apps.clips import as_time

    return f"[{as_time(segment.start)} - {as_time(segment.end)}] {' '.join(segment.text.split())}"
