"""`minicpmv ask`: one question about images and videos, for people and for pipes.

What is special:
- stdin is read where it is asked for (`-`), where the question is missing, and where no file was given. Else it is left
  alone, so that the command can stand in a loop over lines.
- What comes from stdin is told by its content: text belongs to the question, anything else is an image or a video.
"""

from typing import Annotated, Any

import typer

from minicpmv.commands import media, options, terminal
from minicpmv.errors import MiniCPMVError, one_line_errors


class QuestionError(MiniCPMVError):
    """The arguments do not make a question."""


def ask(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|QUESTION", help="Images and videos, then the question. - is stdin."),
    ] = None,
    model: options.Model = ".",
    as_json: Annotated[bool, typer.Option("--json", help="Write answer, thought and figures as JSON.")] = False,
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
        data, kind = b"", None
        if "-" in files or ((not files or question is None) and not sys.stdin.isatty()):
            data = sys.stdin.buffer.read()
            kind = kind_of(data)
            if "-" in files and not data:
                raise QuestionError("- stands for stdin, which is empty; pipe an image, a video or text to it")
        if kind == "text":
            files = [file for file in files if file != "-"]
            question = "\n\n".join(part for part in (data.decode().strip(), question) if part)
        elif kind and "-" not in files:
            files = ["-", *files]
        if not question:
            raise QuestionError('there is no question: give it last, as in: minicpmv ask cat.jpg "What is this?"')

        loaded, processor = terminal.load_shown(console, model, revision, trust_remote_code)
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
