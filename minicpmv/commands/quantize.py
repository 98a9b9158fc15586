"""`minicpmv quantize`: a checkpoint in fewer bits, held against the whole one."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from minicpmv.commands import terminal
from minicpmv.errors import one_line_errors


class Method(str, Enum):
    """How weights are stored."""

    nf4 = "nf4"
    int8 = "int8"
    torchao_int8 = "torchao-int8"
    torchao_8da8w = "torchao-8da8w"
    w8a8 = "w8a8"
    w4a16 = "w4a16"


class Algorithm(str, Enum):
    """How integers are chosen."""

    nearest = "nearest"
    gptq = "gptq"
    awq = "awq"


class Part(str, Enum):
    """What stays whole unless asked for."""

    vpm = "vpm"
    resampler = "resampler"
    lm_head = "lm_head"


def quantize(
    method: Annotated[Method, typer.Option(help="How weights are stored.")],
    model: Annotated[str, typer.Option("--model", "-m", metavar="FOLDER", help="Folder of the checkpoint.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="New folder for the quantized checkpoint.")],
    group_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="w4a16: weights that share a scale. 128 by default.")
    ] = None,
    algorithm: Annotated[
        Algorithm,
        typer.Option(help="w4a16, w8a8: to the nearest integer, or by conversations (needs make quantize-env)."),
    ] = Algorithm.nearest,
    also: Annotated[
        list[Part] | None, typer.Option(help="Quantize the vision tower, resampler or head too; repeatable.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="ROWS", help="Conversations that gptq and awq look at; drawn ones by default."),
    ] = None,
    conversations: Annotated[int, typer.Option(metavar="N", min=1, help="How many of them.")] = 48,
    samples: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Questions of each row of NanoBench, before and after; 0 asks none."),
    ] = 10,
    no_check: Annotated[
        bool,
        typer.Option("--no-check", help="Do not compare with the whole checkpoint, where memory is too short for it."),
    ] = False,
) -> None:
    """Write a checkpoint in 4 or 8 bits that loads as any other.

    Examples:

    \b
      minicpmv quantize --method nf4 --model nano --output nano-nf4
      minicpmv quantize --method w4a16 --group-size 64 -m nano --output nano-w4a16
      minicpmv quantize --method w4a16 --algorithm gptq --data rows.jsonl -m nano --output nano-gptq
      minicpmv ask cat.jpg "What is this?" -m nano-nf4
    """
    with one_line_errors(OSError):
        folder = terminal.write_model(
            "quantize",
            "quantize",
            model,
            output,
            method.value,
            samples,
            no_check,
            group_size=group_size,
            algorithm=algorithm.value,
            also=[part.value for part in also or []],
            data=data,
            conversations=conversations,
        )
        terminal.write(str(folder))
        terminal.write(f"figures: {folder / 'README.md'}")
