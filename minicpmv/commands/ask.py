"""`minicpmv ask`: one question about images and videos, or where something is in an image, for people and for pipes.

What is special:
- stdin is read where it is asked for (`-`), where the question is missing, and where no file was given. Else it is left
  alone, so that the command can stand in a loop over lines.
- What comes from stdin is told by its content: text belongs to the question, anything else is an image or a video.
"""

import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpmv.commands import media, options, terminal
from minicpmv.errors import MiniCPMVError, one_line_errors


if TYPE_CHECKING:
    from minicpmv.apps.grounding import Grounding


class QuestionError(MiniCPMVError):
    """The arguments do not make a question."""


def ask(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|QUESTION", help="Images and videos, then the question. - is stdin."),
    ] = None,
    model: options.Model = ".",
    as_json: Annotated[bool, typer.Option("--json", help="Write answer, thought and figures as JSON.")] = False,
    find: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="In place of a question: where in the image this is, as boxes in pixels."),
    ] = None,
    draw: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the image with the boxes of --find on it.")
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option("--stream/--no-stream", help="Write the answer as it comes; on a terminal by default."),
    ] = None,
    think: options.Think = False,
    auto_think: options.AutoThink = False,
    thinking_budget: options.ThinkingBudget = None,
    system: options.System = "",
    max_new_tokens: options.MaxNewTokens = 2048,
    temperature: options.Temperature = None,
    seed: options.Seed = None,
    fps: options.Fps = None,
    max_slice_nums: options.MaxSliceNums = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Ask one question, about images and videos or about nothing but text.

    Examples:

    \b
      minicpmv ask cat.jpg "What is on the table?" -m nano
      minicpmv ask before.jpg after.jpg "What changed?" --think
      minicpmv ask holiday.mp4 "Where is this?" --fps 1 --json | jq -r .text
      minicpmv ask cat.jpg --find "the cat on the left" --draw found.png
      cat cat.jpg | minicpmv ask "What is this?"
      echo "What is this?" | minicpmv ask cat.jpg
      cat letter.txt | minicpmv ask scan.jpg - "Does the scan say the same?"
    """
    import json
    import sys
    from dataclasses import asdict

    from rich.console import Console

    if thinking_budget is not None and not (think or auto_think):
        raise typer.BadParameter("--thinking-budget needs --think or --auto-think")
    settings = options.answer_options(
        think, auto_think, thinking_budget, max_new_tokens, temperature, seed, fps, max_slice_nums
    )
    console = Console(stderr=True, highlight=False)
    with one_line_errors(), terminal.device_memory():
        if as_json and stream:
            raise QuestionError("--json is written when the answer is complete: leave out --stream")
        files, question = split_inputs(inputs or [])
        media.check_media((file for file in files if file != "-"), "; the question comes last, in quotes")
        if draw is not None:
            check_drawing(draw, find)
        data, kind = b"", None
        if "-" in files or ((not files or (question is None and find is None)) and not sys.stdin.isatty()):
            data = sys.stdin.buffer.read()
            kind = kind_of(data)
            if "-" in files and not data:
                raise QuestionError("- stands for stdin, which is empty; pipe an image, a video or text to it")
        if kind == "text":
            files = [file for file in files if file != "-"]
            question = "\n\n".join(part for part in (data.decode().strip(), question) if part)
        elif kind and "-" not in files:
            files = ["-", *files]
        if find is not None:
            check_search(find, files, question, kind, bool(stream))
        elif not question:
            raise QuestionError('there is no question: give it last, as in: minicpmv ask cat.jpg "What is this?"')

        loaded, processor = terminal.load_shown(console, model, revision, trust_remote_code)
        if find is not None:
            from minicpmv.apps.grounding import locate

            image = processor.load_image(data if files == ["-"] else media.source_of(files[0]))
            with console.status(f"Looking for {find}"):
                found = locate(loaded, processor, image, find, system_prompt=system, **settings)
            if draw is not None:
                write_drawing(draw, image, found)
            show_boxes(found, {"model": model, "files": files, "find": find} if as_json else None)
            terminal.note_knowledge(loaded, model)
            return
        from minicpmv.chat import ChatSession  # imports torch, as loading did

        session = ChatSession(
            loaded,
            processor,
            system_prompt=system,
            max_tokens=loaded.config.max_position_embeddings,
            max_media=len(files),
            **settings,
        )
        content: list[Any] = []
        for file in files:
            with console.status(f"Looking at {'stdin' if file == '-' else file}"):
                source = data if file == "-" else file
                content.append(
                    media.media_part(loaded, processor, source, max_slice_nums, kind if file == "-" else None)
                )
        content.append({"type": "text", "text": question})

        if not as_json and (sys.stdout.isatty() if stream is None else stream):
            with session.send(content, stream=True) as pieces:
                terminal.show_answer(pieces, processor, console, fold=False)
            output = pieces.output
        else:
            with console.status("Answering"):
                output = session.send(content)
            if as_json:
                record = {"model": model, "files": files, "question": question} | asdict(output)
                terminal.write(json.dumps(record, ensure_ascii=False, indent=2))
            else:
                terminal.write(output.text)
        terminal.note_limit(output, max_new_tokens)
        if files:
            terminal.note_knowledge(loaded, model)


def check_drawing(file: Path, find: str | None) -> None:
    """Refuse a file that could not be written with boxes, before anything expensive happens.

    Raises:
        QuestionError: there will be no boxes, or no images are written under such a name.
        OutputError: the file has no place.
    """
    from PIL import Image

    if find is None:
        raise QuestionError("--draw draws the boxes of --find: say what to find")
    terminal.check_output(file)
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise QuestionError(f"--draw {file}: no image is written under such a name; let it end in .png or .jpg")


def check_search(find: str, files: list[str], question: str | None, kind: str | None, streams: bool) -> None:
    """Refuse what --find cannot answer.

    Raises:
        QuestionError: there is more to ask than where one thing is in one image.
    """
    if not find.strip():
        raise QuestionError("--find is empty: name what to find")
    if question:
        raise QuestionError(f"--find asks by itself: leave out the question {question!r}")
    if len(files) != 1:
        raise QuestionError(f"--find looks at one image, not at {len(files)}: run it once for each")
    if kind == "video" or (mimetypes.guess_type(files[0])[0] or "").startswith("video/"):
        raise QuestionError("--find looks at one image, not at a video: cut a frame out of it first")
    if streams:
        raise QuestionError("--find writes boxes when the answer is complete: leave out --stream")


def write_drawing(file: Path, image: Any, found: "Grounding") -> None:
    """Write an image with the boxes on it.

    Raises:
        OutputError: it cannot be written, as on a full disk.
    """
    from minicpmv.apps.grounding import draw_boxes

    drawn = draw_boxes(image, found.boxes)
    try:
        drawn.save(file)
    except OSError as error:
        raise terminal.OutputError(f"{file} cannot be written: {error.strerror}") from error


def show_boxes(found: "Grounding", record: dict[str, Any] | None) -> None:
    """The boxes on stdout, a line each (left, top, right, bottom), or as JSON behind the fields of `record`; on stderr
    what the model wrote beside them."""
    import json
    from dataclasses import asdict

    if record is not None:
        terminal.write(json.dumps(record | asdict(found), ensure_ascii=False, indent=2))
        return
    for box in found.boxes:
        place = " ".join(f"{corner:.0f}" for corner in box.corners)
        terminal.write(f"{' '.join(str(box.label).split())}: {place}")
    for piece in found.malformed:
        terminal.note(f"no box: {piece}")
    if not (found.boxes or found.malformed):
        terminal.note(f"no box: the model answers {found.answer!r}")


def split_inputs(inputs: list[str]) -> tuple[list[str], str | None]:
    """(files, question) of the arguments; the question is the last one, unless that is a file.

    Raises:
        QuestionError: stdin is named twice.
        MediaError: the last one is the name of an image that is not there.
    """
    if inputs.count("-") > 1:
        raise QuestionError(f"- stands for stdin, which can be read once, not {inputs.count('-')} times")
    if not inputs:
        return [], None
    *files, last = inputs
    if last == "-" or media.is_address(last) or media.is_file(last):
        return inputs, None
    if len(last.split()) == 1 and media.looks_like_media(last):
        raise media.MediaError(f"{last}: no such file; the question comes last, in quotes")
    return files, last


def kind_of(data: bytes) -> str | None:
    """What stdin holds: "text", "image" for what Pillow knows and what does not move, else "video"; None for nothing.

    Raises:
        QuestionError: it is a PDF, or text in another encoding than UTF-8.
    """
    from io import BytesIO

    from PIL import Image

    if not data:
        return None
    if data.startswith(b"%PDF-"):
        raise QuestionError("stdin is a PDF, and minicpmv read reads documents: minicpmv read FILE.pdf -q QUESTION")
    try:
        with Image.open(BytesIO(data)) as image:
            return "video" if getattr(image, "is_animated", False) else "image"
    except (OSError, Image.DecompressionBombError):
        pass
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if b"\0" in data and not is_utf16:
        return "video"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise QuestionError(
            "stdin is text that is not UTF-8, or a damaged file; convert text first, as in: iconv -f latin1 -t utf-8"
        ) from error
    return "text"
