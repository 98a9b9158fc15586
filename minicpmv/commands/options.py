"""The options that several commands share, declared once."""

import math
from enum import Enum
from typing import Annotated, Any

import typer


def finite(value: float | None) -> float | None:
    """A number as it is.

    Raises:
        typer.BadParameter: it is infinite, or no number.
    """
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number")
    return value


class Engine(str, Enum):
    """What runs the model."""

    AUTO, TRANSFORMERS, LLAMA_CPP, VLLM = "auto", "transformers", "llama.cpp", "vllm"


Model = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help="Model folder or Hub repository.")]
Revision = Annotated[str | None, typer.Option(metavar="NAME", help="Commit, tag or branch of the Hub repository.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code that the Hub repository brings.")
]
System = Annotated[str, typer.Option("--system", metavar="TEXT", help="System prompt.")]
Think = Annotated[bool, typer.Option("--think", help="Think before answering.")]
AutoThink = Annotated[bool, typer.Option("--auto-think", help="Think only when the model is unsure.")]
ThinkingBudget = Annotated[int | None, typer.Option(metavar="N", min=0, help="Most tokens of a thought.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Most tokens of thought and answer together.")]
Temperature = Annotated[
    float | None,
    typer.Option(
        metavar="T",
        min=0,
        callback=finite,
        help="0 always takes the most likely token; the checkpoint's own setting by default.",
    ),
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Makes sampled answers repeatable.")]
Fps = Annotated[
    float | None, typer.Option(metavar="N", callback=finite, help="Frames per second to look at; 3 by default.")
]
MaxSliceNums = Annotated[
    int | None, typer.Option(metavar="N", help="Most slices of an image; the checkpoint's setting by default.")
]


def decoding_options(temperature: float | None) -> dict[str, Any]:
    """How to choose tokens; without a temperature the checkpoint's generation_config decides."""
    if temperature is None:
        return {}
    if temperature == 0:
        return {"decoding": "greedy", "temperature": None}
    return {"decoding": "sample", "temperature": temperature}


def answer_options(
    think: bool,
    auto_think: bool,
    thinking_budget: int | None,
    max_new_tokens: int,
    temperature: float | None,
    seed: int | None,
    fps: float | None,
    max_slice_nums: int | None,
) -> dict[str, Any]:
    """The options of a command as those of a session.

    Raises:
        typer.BadParameter: two of them exclude each other.
    """
    if think and auto_think:
        raise typer.BadParameter("give --think or --auto-think, not both")
    options: dict[str, Any] = {
        "enable_thinking": "auto" if auto_think else think,
        "thinking_budget": thinking_budget,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
    }
    if max_slice_nums is not None:
        options["images_kwargs"] = {"max_slice_nums": max_slice_nums}  # of images alone: frames stay whole
    if fps is not None:
        options["fps"] = fps
    return options | decoding_options(temperature)
