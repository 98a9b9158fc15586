"""`minicpmv evaluate BENCHMARK`, `minicpmv evaluate calibrate` and `minicpmv evaluate report`."""

import io
import json
import os
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minicpmv.commands import options, terminal
from minicpmv.commands.evaluate_check import check_scorers
from minicpmv.commands.evaluate_get import get
from minicpmv.errors import MiniCPMVError, one_line_errors, require
from minicpmv.evaluate.suites import BENCHMARKS


if TYPE_CHECKING:
    from rich.table import Table

    from minicpmv.evaluate.endpoint import Endpoint

DEFAULT_FOLDER = Path("runs")
MODES: dict[str, Any] = {"on": True, "off": False, "auto": "auto"}

evaluate_app = typer.Typer(help="Measure a model; compare measurements.", no_args_is_help=True)


class EvaluateError(MiniCPMVError):
    """Options that do not go together, or a key that is not there."""


class Clips(str, Enum):
    """How a video is sent to an endpoint."""

    frames = "frames"
    video_url = "video_url"


Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help="Model folder or Hub repository; this folder by default. With --endpoint, the name that it knows.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Samples for each row and seed; a whole data set by default, and 100 of drawn ones."
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of drawn samples.")]
Seeds = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Several seeds instead of --seed, such as 0,1,2: reports mean and spread."),
]
Rows = Annotated[str | None, typer.Option(metavar="LIST", help="Only these rows, such as count,chart.")]
Thinking = Annotated[
    str,
    typer.Option(
        metavar="WHEN",
        help="on, off, auto, or the rows that think, such as count,chart. Some rows decide it themselves.",
    ),
]
BatchSize = Annotated[int, typer.Option(metavar="N", min=1, help="Questions the model answers at once.")]
Output = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR", help=f"Folder for answers and results; by default one for each setting in {DEFAULT_FOLDER}/."
    ),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help='Also write {row: {metric: value, "n": samples}} to this file.'),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        metavar="URL",
        help="Ask an OpenAI-compatible API, such as http://127.0.0.1:8000/v1, instead of loading a model.",
    ),
]
ApiKeyEnv = Annotated[
    str | None, typer.Option(metavar="NAME", help="With --endpoint: environment variable that holds the API key.")
]
Concurrency = Annotated[int, typer.Option(metavar="N", min=1, help="With --endpoint: requests in flight at once.")]
Retries = Annotated[
    int,
    typer.Option(metavar="N", min=0, help="With --endpoint: further tries after a timeout or an answer 429 or 5xx."),
]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="With --endpoint: limit of each try.")]
ClipsAs = Annotated[Clips, typer.Option(help="With --endpoint: send a video as images, or as a file.")]
Frames = Annotated[int, typer.Option(metavar="N", min=1, help="With --endpoint: images sent for a video.")]
ProcessorOptions = Annotated[
    bool,
    typer.Option(
        "--processor-options",
        help="With --endpoint: send a question's image options as mm_processor_kwargs (vLLM, minicpmv serve).",
    ),
]
NoThinkingSwitch = Annotated[
    bool,
    typer.Option(
        "--no-thinking-switch",
        help="With --endpoint: do not send chat_template_kwargs.enable_thinking, which some APIs refuse.",
    ),
]
ExtraBody = Annotated[
    str | None,
    typer.Option(
        metavar="JSON", help='With --endpoint: more fields for every request, such as \'{"reasoning_effort": "low"}\'.'
    ),
]


def names(text: str | None) -> list[str] | None:
    return [part.strip() for part in text.split(",")] if text else None


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 0,1,2") from error


def json_object(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise typer.BadParameter(f"{text!r} is not a JSON object")
    return value


def add_benchmark(benchmark_name: str, summary: str) -> None:
    @evaluate_app.command(benchmark_name, help=summary)
    def run(
        model: Model = None,
        revision: options.Revision = None,
        trust_remote_code: options.TrustRemoteCode = False,
        samples: Samples = None,
        seed: Seed = 0,
        seeds: Seeds = None,
        rows: Rows = None,
        thinking: Thinking = "off",
        batch_size: BatchSize = 50,
        output: Output = None,
        json_file: Json = None,
        endpoint: EndpointUrl = None,
        api_key_env: ApiKeyEnv = None,
        concurrency: Concurrency = 8,
        retries: Retries = 6,
        timeout: Timeout = 600,
        clips: ClipsAs = Clips.frames,
        frames: Frames = 32,
        processor_options: ProcessorOptions = False,
        no_thinking_switch: NoThinkingSwitch = False,
        extra_body: ExtraBody = None,
    ) -> None:
        all_seeds = whole_numbers(seeds) if seeds else [seed]
        fields = json_object(extra_body)
        with one_line_errors(OSError):
            require("evaluate", "rapidfuzz", "matplotlib")  # scores, and the drawn questions
            if endpoint:
                require("endpoint", "openai")
                if model is None:
                    raise EvaluateError("--endpoint also needs --model NAME: the name that the endpoint knows")
            from minicpmv.evaluate import harness
            from minicpmv.evaluate.answerers import Answerer
            from minicpmv.evaluate.processes import Processes
            from minicpmv.evaluate.sample_log import fingerprint
            from minicpmv.evaluate.suites import load_benchmark
            from minicpmv.files import check_writable

            benchmark, chosen, processes = load_benchmark(benchmark_name), names(rows), Processes()
            benchmark.choose(chosen)  # before the model is loaded
            if json_file is not None and processes.is_main:
                check_writable(json_file)
            answerer: Answerer
            if endpoint and model:
                shown = model
                answerer = ask_endpoint(
                    endpoint,
                    model,
                    api_key_env,
                    concurrency=concurrency,
                    retries=retries,
                    timeout=timeout,
                    clips=clips.value,
                    frames=frames,
                    processor_options=processor_options,
                    thinking_switch=not no_thinking_switch,
                    extra_body=fields,
                )
            else:
                shown = model or "."
                answerer = load_model(shown, revision, trust_remote_code, processes.device, batch_size)
            thinks = MODES[thinking] if thinking in MODES else names(thinking) or []
            if output is None:
                settings = harness.settings_of(answerer, benchmark, thinks)
                name = f"{benchmark_name}-{terminal.shown_name(shown).replace('/', '-')}-{fingerprint(settings)[:8]}"
                output = DEFAULT_FOLDER / name
            results = harness.measure(
                answerer,
                benchmark,
                output,
                name=shown if Path(shown).name else str(Path(shown).resolve()),
                rows=chosen,
                samples=samples,
                seeds=all_seeds,
                thinking=thinks,
            )
            if not processes.is_main:
                return
            if json_file is not None:
                json_file.write_text(json.dumps(harness.figures(results), indent=1) + "\n", encoding="utf-8")
            from rich.console import Console

            table = io.StringIO()
            Console(file=table, force_terminal=sys.stdout.isatty()).print(as_table(results))
            terminal.write(f"{table.getvalue()}answers and results: {output}")


def load_model(name: str, revision: str | None, trust_remote_code: bool, device: Any, batch_size: int) -> Any:
    """The model in this process; where there are several, each has its own accelerator."""
    from minicpmv.checkpoint import load
    from minicpmv.evaluate.answerers import LocalModel

    device_map = "auto" if device is None else {"": device}
    return LocalModel(
        *load(name, revision=revision, trust_remote_code=trust_remote_code, device_map=device_map), batch_size
    )


def ask_endpoint(url: str, model: str, api_key_env: str | None, **settings: Any) -> "Endpoint":
    """An endpoint that is there and knows the model."""
    from minicpmv.evaluate.endpoint import Endpoint

    api_key = os.environ.get(api_key_env or "OPENAI_API_KEY")
    if api_key_env and not api_key:
        raise EvaluateError(f"--api-key-env: the environment has no variable {api_key_env}, or it is empty")
    endpoint = Endpoint(url, model, api_key=api_key, **settings)
    endpoint.check()
    return endpoint


evaluate_app.command()(get)
evaluate_app.command()(check_scorers)
for name, (_, summary) in BENCHMARKS.items():
    add_benchmark(name, f"{summary} To continue after an interruption, run the same command again.")


@evaluate_app.command()
def calibrate(
    model: options.Model = ".",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    benchmark: Annotated[
        str, typer.Option(metavar="NAME", help="Benchmark that provides the questions.")
    ] = "nanobench",
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Questions per row to choose on, and as many again to check.")
    ] = 50,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the questions; the check uses the next one.")] = 1,
    rows: Rows = None,
    keep: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Share of the best accuracy that any threshold reaches, which the choice must keep."
        ),
    ] = 0.95,
    batch_size: BatchSize = 50,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help=f"Folder for answers, curve and result; by default one per model in {DEFAULT_FOLDER}/."
        ),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Store the threshold in the model's config.json.")] = False,
) -> None:
    """Find the threshold of enable_thinking="auto" that generates the fewest tokens and keeps most of the accuracy.

    --keep says how much: 0.95 of the best accuracy that any threshold reaches.
    """
    config = Path(model).expanduser() / "config.json"
    with one_line_errors(OSError):
        require("evaluate", "rapidfuzz", "matplotlib")
        if save and not config.is_file():
            raise EvaluateError(f"--save writes to {config}, which is not there: name the model's folder")
        from minicpmv.evaluate import calibration
        from minicpmv.evaluate.suites import load_benchmark
        from minicpmv.files import write_whole

        asked, chosen = load_benchmark(benchmark), names(rows)
        calibration.questions_in_both_modes(asked, chosen)  # before the model is loaded
        result = calibration.calibrate(
            load_model(model, revision, trust_remote_code, None, batch_size),
            asked,
            output or DEFAULT_FOLDER / f"calibration-{terminal.shown_name(model).replace('/', '-')}",
            name=model,
            rows=chosen,
            samples=samples,
            seed=seed,
            keep=keep,
        )
        for mode, found in result["check"].items():
            terminal.write(
                f"{mode:5} {100 * found['accuracy']:5.1f} % right, {found['tokens']:6.1f} tokens a question"
            )
        terminal.write(f"threshold {result['threshold']:.4f}")
        if save:
            settings = json.loads(config.read_text(encoding="utf-8")) | {"thinking_threshold": result["threshold"]}
            write_whole(config, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            terminal.write(f"{config}: stored")


@evaluate_app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs, such as runs/nanobench-*.")],
    output: Annotated[
        Path,
        typer.Option(help="An .html file that contains everything, or an .md file with its charts as .png files."),
    ] = Path("report.html"),
) -> None:
    """Compare runs side by side, with charts: models, checkpoints or settings."""
    with one_line_errors(OSError):
        require("evaluate", "matplotlib")
        from minicpmv.evaluate.report import write_report

        for file in write_report(folders, output):
            terminal.write(str(file))


def as_table(results: dict[str, Any]) -> "Table":
    """A rich table of one run: a line for each metric of each row."""
    from rich.markup import escape
    from rich.table import Table

    from minicpmv.evaluate.report import percent, sample_counts, title_of

    several = len(results["seeds"]) > 1
    table = Table(
        title=f"{title_of(results)}: {escape(results['model'])}",
        caption=f"{' or '.join(map(str, sample_counts(results)))} samples a row, seed{'s' * several} {', '.join(map(str, results['seeds']))}"
        + "; mean ± standard deviation over seeds" * several,
    )
    for heading in ("row", "metric"):
        table.add_column(heading)
    for heading in ("%", "n"):
        table.add_column(heading, justify="right")
    for row, summary in results["rows"].items():
        name, count = row + " ↓" * summary["lower_is_better"], str(summary["n"])
        for metric, value in summary["mean"].items():
            table.add_row(name, metric, percent(value, summary["std"][metric]), count)
            name = count = ""
    return table


if __name__ == "__main__":
    evaluate_app()
