"""`minicpmv evaluate BENCHMARK` and `minicpmv evaluate report`."""

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from minicpmv.cli_errors import one_line_errors
from minicpmv.evaluate.benchmarks import BENCHMARKS


DEFAULT_FOLDER = Path("runs")

evaluate_app = typer.Typer(help="Measure a model; compare what was measured.", no_args_is_help=True)


def require(package: str) -> None:
    """End with the remedy where a package of the extra is not installed, before a model is loaded."""
    if importlib.util.find_spec(package) is None:
        print(f"minicpmv: {package} is not installed: pip install '.[evaluate]' in a clone", file=sys.stderr)
        raise typer.Exit(1)


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in names(text)]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers such as 0,1,2") from error


def add_benchmark(name: str, summary: str) -> None:
    @evaluate_app.command(name, help=summary)
    def run(
        checkpoint: Annotated[str, typer.Option(help="Model folder or Hub repository.")] = "nano",
        samples: Annotated[int, typer.Option(min=1, help="Samples for each row and seed.")] = 100,
        seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
        seeds: Annotated[
            str | None, typer.Option(help="Several seeds, such as 0,1,2: mean and spread. In place of --seed.")
        ] = None,
        rows: Annotated[str | None, typer.Option(help="Only these rows, such as count,chart.")] = None,
        thinking: Annotated[
            str, typer.Option(help="on, off, or the rows that think, such as count,chart. Rows that fix it keep it.")
        ] = "off",
        batch_size: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 50,
        output: Annotated[
            Path | None,
            typer.Option(help=f"Folder of answers and results; by default one a setting in {DEFAULT_FOLDER}/."),
        ] = None,
        json_file: Annotated[
            Path | None, typer.Option("--json", help='Also write {row: {metric: value, "n": samples}} to this file.')
        ] = None,
    ):
        import json

        from rich.console import Console

        require("rapidfuzz")
        from minicpmv.evaluate import benchmark as benchmarks
        from minicpmv.evaluate import harness, sample_log
        from minicpmv.evaluate.benchmarks import load_benchmark
        from minicpmv.evaluate.report import as_table

        all_seeds = whole_numbers(seeds) if seeds else [seed]
        with one_line_errors(
            benchmarks.UnknownRowError, harness.CheckpointError, harness.SampleCountError, sample_log.SampleLogError
        ):
            benchmark = load_benchmark(name)
            chosen = names(rows) if rows else None
            benchmark.choose(chosen)  # before the model is loaded
            thinks = thinking == "on" if thinking in ("on", "off") else names(thinking)
            model, processor = harness.load(checkpoint)
            if output is None:
                settings = harness.settings_of(model, processor, benchmark, thinks)
                folder = f"{name}-{Path(checkpoint).resolve().name}-{sample_log.fingerprint(settings)[:8]}"
                output = DEFAULT_FOLDER / folder
            results = harness.run(
                model,
                processor,
                benchmark,
                output,
                checkpoint=checkpoint,
                rows=chosen,
                samples=samples,
                seeds=all_seeds,
                thinking=thinks,
                batch_size=batch_size,
            )
        Console().print(as_table(results))
        typer.echo(f"answers and results: {output}")
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(harness.figures(results), indent=1) + "\n", encoding="utf-8")


for name, (_, summary) in BENCHMARKS.items():
    add_benchmark(name, f"{summary} Run it again after an interruption: it goes on where it stopped.")


@evaluate_app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs: such as runs/nanobench-*.")],
    output: Annotated[
        Path, typer.Option(help="An .html file with everything in it, or an .md file with charts beside it.")
    ] = Path("report.html"),
):
    """Compare runs side by side: checkpoints, models or settings, with charts."""
    require("matplotlib")
    from minicpmv.evaluate import report as reports

    with one_line_errors(reports.ReportError):
        files = reports.write_report(folders, output)
    for file in files:
        typer.echo(str(file))


if __name__ == "__main__":
    evaluate_app()
