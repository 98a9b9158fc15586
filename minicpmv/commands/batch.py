"""`minicpmv batch`: a file of requests or a folder of images, documents or videos -> a file of answers."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from minicpmv.commands import options, terminal
from minicpmv.commands.evaluate_options import json_object
from minicpmv.errors import one_line_errors


class Task(str, Enum):
    caption = "caption"
    read = "read"
    describe = "describe"


def batch(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="INPUT", help="JSON lines, a Parquet file, or a folder of images, PDF files or videos."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="A .jsonl or .parquet file.")],
    model: options.Model = ".",
    engine: Annotated[
        options.Engine,
        typer.Option(help="auto: llama.cpp for a GGUF file, vllm where it and a GPU are, else transformers."),
    ] = options.Engine.AUTO,
    task: Annotated[
        Task | None, typer.Option(help="Caption images, read documents as Markdown, or describe videos.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What to ask about each image, page, segment or video.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(metavar="N", help="About how long each described segment of a video lasts.")
    ] = 10,
    think: options.Think = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Most tokens of a reply, where a row does not say.")
    ] = None,
    temperature: options.Temperature = None,
    extra_body: Annotated[
        str | None, typer.Option(metavar="JSON", help="More fields for every request, where a row does not say.")
    ] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="Rows under way at once, of each worker.")] = 16,
    ordered: Annotated[bool, typer.Option("--ordered", help="Write rows in the order of the input.")] = False,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="Ask again about rows with an error.")] = False,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Processes of Ray, each with a model, and a GPU if there are some."),
    ] = None,
    ray_address: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A cluster of Ray, such as auto or ray://head:10001.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Ask this API, which knows the model by --model.")
    ] = None,
    api_key_env: Annotated[
        str, typer.Option(metavar="NAME", help="Environment variable with the API's key.")
    ] = "OPENAI_API_KEY",
    media_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Also fetch images from this host, which is not public; repeatable."),
    ] = None,
    max_megabytes: Annotated[
        float,
        typer.Option(metavar="N", min=1, help="Most megabytes of a row's images and videos that are sent or fetched."),
    ] = 64,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Answer a whole file: one row of output for each row of input, with an answer or an error.

    Rows are OpenAI's batch lines (custom_id, body), or have a column messages, or image, video or document. After an
    interruption, run the same command again: what is answered stays.

    Examples:

    \b
      minicpmv batch requests.jsonl answers.jsonl -m nano
      minicpmv batch photos/ captions.parquet --task caption
      minicpmv batch scans/ pages.jsonl --task read --ordered
      minicpmv batch videos.parquet told.jsonl --task describe --workers 8
    """
    import os

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    with one_line_errors(OSError), terminal.device_memory():
        fields: dict[str, Any] = {"max_tokens": max_new_tokens, "temperature": temperature}
        fields = {name: value for name, value in fields.items() if value is not None}
        if think:
            fields["chat_template_kwargs"] = {"enable_thinking": True}
        fields |= json_object(extra_body)
        from minicpmv.batch.answerers import AnswererOptions
        from minicpmv.batch.jobs import Asked
        from minicpmv.batch.run import Workers, open_batch
        from minicpmv.checkpoint import attend_without_plans

        who = AnswererOptions(
            model,
            engine.value,
            revision=revision,
            trust_remote_code=trust_remote_code,
            concurrency=concurrency,
            endpoint=endpoint,
            api_key=os.environ.get(api_key_env),
            media_hosts=tuple(media_host or ()),
            max_megabytes=max_megabytes,
        )
        ready: Any = task and task.value
        asked = Asked(ready, prompt, seconds, fields, max_megabytes)
        of_ray = Workers(workers, ray_address) if workers or ray_address else None
        bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        answered = errors = 0
        with (
            open_batch(
                source, output, who, asked, ordered=ordered, retry_errors=retry_errors, workers=of_ray
            ) as opened,
            bar,
        ):
            if opened.done:
                terminal.note(f"{opened.done} of {opened.total} rows were answered before")
            if opened.done < opened.total and endpoint is None and of_ray is None:
                attend_without_plans()
            shown = bar.add_task("", total=opened.total, completed=opened.done, rate="")
            for row in opened.rows:
                answered += 1
                errors += row["error"] is not None
                speed = bar.tasks[0].speed
                bar.update(shown, advance=1, rate=f"{speed:.1f} rows/s" if speed else "")
        terminal.write(f"{output}: {opened.total} rows, {answered} of them new, {errors} of these with an error")
