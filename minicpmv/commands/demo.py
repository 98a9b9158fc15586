"""`minicpmv demo`: a model answers questions about the images and the video in assets/, and what it saw is shown."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv import examples
from minicpmv.commands import terminal
from minicpmv.errors import one_line_errors


CLIP_OPTIONS = {"fps": 3, "max_num_packing": 6, "force_packing": 3}  # packed, although the video is short


def demo(
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="Model folder; the clone's nano by default.")
    ] = None,
) -> None:
    """Ask a model about the images and the video that come with the repository.

    Examples:

    \b
      minicpmv demo
      minicpmv demo -m ~/MiniCPM-V-4_5
    """
    from rich.console import Console
    from rich.markup import escape

    console = Console(highlight=False, soft_wrap=True)
    with one_line_errors():
        clone = examples.find_clone()
        name = str(clone / "nano") if model is None else model
        begin = time.perf_counter()
        loaded, processor = terminal.load_shown(Console(stderr=True), name, None, False)
        parameters = sum(parameter.numel() for parameter in loaded.parameters())
        console.print(
            f"[bold]{escape(terminal.shown_name(name))}[/bold]: {parameters / 1e6:.1f} million parameters on "
            f"{loaded.device}, loaded in {time.perf_counter() - begin:.1f} s\n"
        )
        show(console, loaded, processor, clone / "assets")
        console.print("\nNow ask your own: minicpmv ask FILE QUESTION, or minicpmv chat.")


def show(console: Any, model: Any, processor: Any, assets: Path) -> None:
    """All questions, with answers."""
    from PIL import Image

    for name, questions in examples.IMAGES.items():
        with Image.open(assets / name) as image:
            width, height = image.size
        console.print(f"[bold]assets/{name}[/bold], an image of {width} x {height}")
        show_answers(
            console,
            model,
            processor,
            [image_part(assets / name)],
            questions,
            lambda tokens, slices: f"an overview and {slices} slices, {tokens} visual tokens",
        )
        console.print()
    console.print(f"[bold]{' and '.join(f'assets/{name}' for name in examples.PAIR)}[/bold], in one question")
    show_answers(
        console,
        model,
        processor,
        [image_part(assets / name) for name in examples.PAIR],
        examples.PAIR_QUESTIONS,
        lambda tokens, slices: f"{tokens} visual tokens",
    )
    console.print()
    show_boxes(console, model, processor, assets / examples.FIND[0], examples.FIND[1])
    show_page(console, model, processor, assets / examples.PAGE)
    show_thought(console, model, processor, assets / examples.SUM[0], examples.SUM[1])

    clip = str(assets / examples.CLIP)
    video = processor.video_processor.sample_video(clip, **CLIP_OPTIONS).metadata
    console.print(f"[bold]assets/{examples.CLIP}[/bold], a video of {video.duration:.1f} s at {video.fps:g} frames/s")
    show_answers(
        console,
        model,
        processor,
        [{"type": "video", "video": clip}],
        examples.CLIP_QUESTIONS,
        lambda tokens, slices: (
            f"{len(video.frames_indices)} frames in {video.num_groups} groups of up to {video.packing}, "
            f"{tokens} visual tokens"
        ),
        **CLIP_OPTIONS,
    )


def image_part(file: Path) -> dict[str, str]:
    return {"type": "image", "image": str(file)}


def answer(model: Any, processor: Any, media: Sequence[dict], question: str, **options: Any) -> tuple[str, int, int]:
    """`(answer, number of visual tokens, number of slices)` for images or a video."""
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    ).to(model.device)
    ids, tokenizer = inputs["input_ids"], processor.tokenizer
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    text = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    visual_tokens = int((ids == model.config.image_token_id).sum())
    return text, visual_tokens, int((ids == tokenizer.slice_start_id).sum())


def show_answers(
    console: Any,
    model: Any,
    processor: Any,
    media: Sequence[dict],
    questions: Sequence[str],
    describe: Callable[[int, int], str],
    **options: Any,
) -> None:
    """Ask and print; `describe(visual tokens, slices)` is what the model saw, said once, above the answers."""
    from rich.markup import escape

    for position, question in enumerate(questions):
        begin = time.perf_counter()
        text, visual_tokens, slices = answer(model, processor, media, question, **options)
        seconds = time.perf_counter() - begin
        if position == 0:
            console.print(f"  [dim]seen as {describe(visual_tokens, slices)}[/dim]")
        console.print(f"  {escape(question):48} [bold green]{escape(text)}[/bold green]  [dim]{seconds:.2f} s[/dim]")


def show_boxes(console: Any, model: Any, processor: Any, image: Path, names: Sequence[str]) -> None:
    """What `minicpmv ask --find` gives: pixels of the first box, or the model's words where there is none."""
    from rich.markup import escape

    from minicpmv.apps.grounding import locate

    console.print(f"[bold]assets/{image.name}[/bold], where things are: left, top, right, bottom in pixels")
    for name in names:
        found = locate(model, processor, image, name, max_new_tokens=64)
        place = ", ".join(f"{corner:.0f}" for corner in found.boxes[0].corners) if found.boxes else found.answer
        console.print(f"  {escape(name):48} [bold green]{escape(place)}[/bold green]")
    console.print()


def show_page(console: Any, model: Any, processor: Any, page: Path) -> None:
    """What `minicpmv read` writes."""
    from rich.markup import escape

    from minicpmv.apps.documents.prompts import Prompts

    text, _, _ = answer(model, processor, [image_part(page)], Prompts().markdown)
    console.print(f"[bold]assets/{page.name}[/bold], all of it, as Markdown")
    for line in text.splitlines():
        console.print(f"  [bold green]{escape(line)}[/bold green]")
    console.print()


def show_thought(console: Any, model: Any, processor: Any, image: Path, question: str) -> None:
    """The same question answered at once, and after a thought."""
    from rich.markup import escape

    from minicpmv.commands.options import decoding_options

    console.print(f"[bold]assets/{image.name}[/bold], {question}")
    messages = [{"role": "user", "content": [image, question]}]
    options = {"max_new_tokens": 128, "return_dict": True} | decoding_options(temperature=0)
    for thinking in (False, True):
        output = model.chat(msgs=messages, processor=processor, enable_thinking=thinking, **options)
        thought = f"  [dim]thought: {escape(' | '.join(output.reasoning.splitlines()))}[/dim]" if thinking else ""
        console.print(
            f"  {'thinking' if thinking else 'at once':48} [bold green]{escape(output.text)}[/bold green]{thought}"
        )
    console.print()
