"""`minicpmv evaluate cost`: what benchmarks of full size take, before they are run."""

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from minicpmv.commands import evaluate_options as shared
from minicpmv.commands import terminal
from minicpmv.errors import one_line_errors
from minicpmv.evaluate.suites import GROUPS, SUITES


def cost(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A group, such as opencompass, or a suite.")
    ] = "published",
    as_published: shared.AsPublished = False,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Questions answered at once.")] = 32,
    pilot: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of a short run, whose tokens are taken instead of assumed ones."),
    ] = None,
    max_num_frames: shared.MaxNumFrames = 180,
    max_num_packing: shared.MaxNumPacking = 3,
) -> None:
    """Compute time and memory of the published model on one H100, before anything is run."""
    with one_line_errors(OSError):
        from minicpmv.evaluate.cost import estimate, workloads
        from minicpmv.evaluate.report import read_run
        from minicpmv.evaluate.suite import Setting, VideoSetting

        if name not in GROUPS and name not in SUITES:
            raise shared.EvaluateError(f"there is no benchmark {name!r}; there are {', '.join([*GROUPS, *SUITES])}")
        suites = list(GROUPS[name][0]) if name in GROUPS else [name]
        video = VideoSetting(max_num_frames=max_num_frames, max_num_packing=max_num_packing)
        measured = read_run(pilot) if pilot is not None else None
        rows = workloads(suites, Setting(as_published=as_published, video=video), measured)
        found = [estimate(row, batch_size) for row in rows]

        from rich.console import Console
        from rich.table import Table

        table = Table(
            title=f"one H100, bfloat16, {batch_size} at once: computed, not measured",
            caption="read, written: tokens a question; tower, prompt, answer: hours; assumptions: docs/evaluation.md",
        )
        for heading in ("row", "questions", "read", "written", "tower", "prompt", "answer", "hours", "GB"):
            table.add_column(heading, justify="left" if heading == "row" else "right", no_wrap=heading != "row")
        for row, each in zip(rows, found, strict=True):
            parts = [f"{seconds / 3600:.2f}" for seconds in (each.tower, each.prompt, each.generation, each.seconds)]
            asked = f"{row.questions}" + (f" x {row.runs}" if row.runs > 1 else "")
            table.add_row(
                row.row, asked, f"{row.prompt_tokens:.0f}", f"{row.tokens:.0f}", *parts, f"{each.memory / 1e9:.0f}"
            )
        total = sum(each.seconds for each in found) / 3600
        table.add_row("all", "", "", "", "", "", "", f"{total:.1f}", f"{max(each.memory for each in found) / 1e9:.0f}")
        text = io.StringIO()
        Console(file=text, force_terminal=sys.stdout.isatty()).print(table)
        terminal.write(text.getvalue().rstrip("\n"))
