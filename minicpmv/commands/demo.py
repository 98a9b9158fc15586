"""Ask a model about the pictures and the clip in assets/, and show what it saw: `python -m minicpmv.commands.demo [MODEL]`."""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from minicpmv.errors import MiniCPMVError


REPOSITORY = Path(__file__).resolve().parents[2]

# What nano was trained for; the published weights answer these as well.
PICTURES = {
    "shapes.jpg": ("How many shapes are there?", "What color is the circle?", "What shape is on the right?"),
    "number.jpg": ("What does it say?",),
    "receipt.jpg": ("What is the DATE?", "What is the TOTAL?"),
}
SUM = "sum.jpg"
SUM_QUESTION = "What is the result?"
CLIP = "star.mp4"
CLIP_QUESTIONS = ("Which way does the shape move?", "What color is the shape?")
CLIP_OPTIONS = {"fps": 3, "max_num_packing": 6, "force_packing": 3}  # packed, although the clip is short


class DemoError(MiniCPMVError):
    """The demo lacks something: the message says what and how to get it."""


def load(folder):
    """`(model, processor)` of a model folder."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def ask(model, processor, content, question, **options):
    """`(answer, number of visual tokens, number of slices)` for one picture or clip."""
    messages = [{"role": "user", "content": [content, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )
    ids, tokenizer = inputs["input_ids"], processor.tokenizer
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()
    visual_tokens = int((ids == model.config.image_token_id).sum())
    return answer, visual_tokens, int((ids == tokenizer.slice_start_id).sum())


def show_questions(console, model, processor, content, questions, describe, **options):
    """Ask and print; `describe(visual tokens, slices)` is what the model saw, said once, above the answers."""
    for position, question in enumerate(questions):
        begin = time.perf_counter()
        answer, visual_tokens, slices = ask(model, processor, content, question, **options)
        seconds = time.perf_counter() - begin
        if position == 0:
            console.print(f"  [dim]seen as {describe(visual_tokens, slices)}[/dim]")
        console.print(f"  {escape(question):34} [bold green]{escape(answer)}[/bold green]  [dim]{seconds:.2f} s[/dim]")


def show_thought(console, model, processor, picture):
    """The same question answered at once, and after a thought."""
    console.print(f"[bold]assets/{picture.name}[/bold], {SUM_QUESTION}")
    messages = [{"role": "user", "content": [picture, SUM_QUESTION]}]
    greedy = {"sampling": False, "num_beams": 1, "repetition_penalty": 1.0, "max_new_tokens": 128}
    for thinking in (False, True):
        output = model.chat(msgs=messages, processor=processor, enable_thinking=thinking, return_dict=True, **greedy)
        thought = f"  [dim]thought: {escape(' | '.join(output.reasoning.splitlines()))}[/dim]" if thinking else ""
        console.print(
            f"  {'thinking' if thinking else 'at once':34} [bold green]{escape(output.text)}[/bold green]{thought}"
        )
    console.print()


def run(model_folder=None):
    """The whole demo, printed to the terminal."""
    from PIL import Image

    folder = REPOSITORY / "nano" if model_folder is None else Path(model_folder)
    assets = REPOSITORY / "assets"
    if not (assets / CLIP).is_file():
        raise DemoError(f"{assets / CLIP} was not found; run the demo in a clone of the repository")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise DemoError(
            f"{folder} holds no model (config.json and *.safetensors); run the demo in a clone of the repository"
        )
    console = Console(highlight=False, soft_wrap=True)

    console.print(f"Loading {escape(folder.name or str(folder))} ...")
    begin = time.perf_counter()
    model, processor = load(folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    console.print(
        f"\n[bold]{escape(folder.name or str(folder))}[/bold]: {parameters / 1e6:.1f} million parameters on {model.device}, "
        f"loaded in {time.perf_counter() - begin:.1f} s\n"
    )

    for name, questions in PICTURES.items():
        with Image.open(assets / name) as image:
            width, height = image.size
        console.print(f"[bold]assets/{name}[/bold], a picture of {width} x {height}")
        show_questions(
            console,
            model,
            processor,
            {"type": "image", "image": str(assets / name)},
            questions,
            lambda tokens, slices: f"an overview and {slices} slices, {tokens} visual tokens",
        )
        console.print()

    show_thought(console, model, processor, assets / SUM)

    clip = assets / CLIP
    video = processor.video_processor.sample_video(str(clip), **CLIP_OPTIONS).metadata
    console.print(f"[bold]assets/{CLIP}[/bold], a clip of {video.duration:.1f} s at {video.fps:g} frames/s")
    show_questions(
        console,
        model,
        processor,
        {"type": "video", "video": str(clip)},
        CLIP_QUESTIONS,
        lambda tokens, slices: (
            f"{len(video.frames_indices)} frames in {video.num_groups} groups of up to {video.packing}, "
            f"{tokens} visual tokens"
        ),
        **CLIP_OPTIONS,
    )
    console.print("\nAsk your own questions: the quick start in README.md shows how.")


def main(argv=None):
    arguments = sys.argv[1:] if argv is None else argv
    try:
        run(*arguments[:1])
    except DemoError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
