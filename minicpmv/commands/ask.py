"""`minicpmv ask`: one question about pictures and clips, for people and for pipes.

What is special:
- stdin is read where it is asked for (`-`), where the question is missing, and where no file was given. Else it is left
  alone, so that the command can stand in a loop over lines.
- What comes from stdin is told by its content: text belongs to the question, anything else is a picture or a clip.
"""

from typing import Annotated

import typer

from minicpmv.commands import terminal
from minicpmv.errors import MiniCPMVError, one_line_errors


class QuestionError(MiniCPMVError):
    """The arguments do not make a question."""


def ask(
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILE|QUESTION", help="Pictures and clips, then the question. - is stdin."),
    ] = None,
    model: terminal.Model = ".",
    as_json: Annotated[bool, typer.Option("--json", help="Write answer, thought and figures as JSON.")] = False,
    stream: Annotated[
        bool | None, typer.Option("--stream/--no-stream", help="Write the answer as it comes; so on a terminal.")
    ] = None,
    think: terminal.Think = False,
    auto_think: terminal.AutoThink = False,
    thinking_budget: terminal.ThinkingBudget = None,
    system: terminal.System = "",
    max_new_tokens: terminal.MaxNewTokens = 2048,
    temperature: terminal.Temperature = None,
    seed: terminal.Seed = None,
    fps: terminal.Fps = None,
    max_slice_nums: terminal.MaxSliceNums = None,
    revision: terminal.Revision = None,
    trust_remote_code: terminal.TrustRemoteCode = False,
):
    """Ask one question, about pictures and clips or about nothing but text.

    Examples:

      minicpmv ask cat.jpg "What is on the table?"

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

    console = Console(stderr=True, highlight=False)
    with one_line_errors(ValueError), terminal.device_memory():
        if as_json and stream:
            raise QuestionError("--json is written when the answer is complete: leave out --stream")
        files, question = split_inputs(inputs or [])
        terminal.check_media((file for file in files if file != "-"), "; the question comes last, in quotes")
        data = b""
        if "-" in files or ((not files or question is None) and not sys.stdin.isatty()):
            data = sys.stdin.buffer.read()
        text = as_text(data)
        if "-" in files and not data:
            raise QuestionError("- stands for stdin, which is empty; pipe a picture, a clip or text to it")
        if text is None and "-" not in files:
            files = ["-", *files]
        elif text is not None:
            files = [file for file in files if file != "-"]
            question = "\n\n".join(part for part in (text.strip(), question) if part)
        if not question:
            raise QuestionError('there is no question: give it last, as in: minicpmv ask cat.jpg "What is this?"')

        options = terminal.answer_options(
            think, auto_think, thinking_budget, max_new_tokens, temperature, seed, fps, max_slice_nums
        )
        loaded, processor = terminal.load_shown(console, model, revision, trust_remote_code)
        session = loaded.start_chat(
            processor,
            system_prompt=system,
            max_tokens=loaded.config.max_position_embeddings,
            max_pictures=len(files),
            **options,
        )
        content = []
        for file in files:
            source, kind = (data, kind_of(data)) if file == "-" else (file, None)
            with console.status(f"Looking at {'stdin' if file == '-' else file}"):
                content.append(terminal.media_part(loaded, processor, source, max_slice_nums, kind))
        content.append({"type": "text", "text": question})

        if not as_json and (sys.stdout.isatty() if stream is None else stream):
            with session.send(content, stream=True) as pieces:
                terminal.show_answer(pieces, console, fold=False)
            output = pieces.output
        else:
            with console.status("Answering"):
                output = session.send(content)
            if as_json:
                record = {"model": model, "files": files, "question": question} | asdict(output)
                typer.echo(json.dumps(record, ensure_ascii=False, indent=2))
            else:
                typer.echo(output.text)
        terminal.note_limit(output, max_new_tokens)


def split_inputs(inputs: list[str]) -> tuple[list[str], str | None]:
    """(files, question) of the arguments; the question is the last one, unless that is a file.

    Raises:
        QuestionError: the last one is the name of a picture that is not there, or stdin is named twice.
    """
    if inputs.count("-") > 1:
        raise QuestionError(f"- stands for stdin, which can be read once, not {inputs.count('-')} times")
    if not inputs:
        return [], None
    *files, last = inputs
    if last == "-" or terminal.is_address(last) or terminal.is_file(last):
        return inputs, None
    if len(last.split()) == 1 and terminal.has_media_suffix(last):
        raise terminal.MediaError(f"{last}: no such file; the question comes last, in quotes")
    return files, last


def as_text(data: bytes) -> str | None:
    """The text that `data` is; None for anything else."""
    try:
        return None if b"\0" in data else data.decode()
    except UnicodeDecodeError:
        return None


def kind_of(data: bytes) -> str:
    """ "image" for what Pillow knows and what does not move; else "video"."""
    from io import BytesIO

    from PIL import Image

    try:
        with Image.open(BytesIO(data)) as picture:
            return "video" if getattr(picture, "is_animated", False) else "image"
    except OSError:
        return "video"
