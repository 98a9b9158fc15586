"""`minicpmv evaluate BENCHMARK`, `minicpmv evaluate calibrate` and `minicpmv evaluate report`."""

from pathlib import Path
from typing import Annotated

import typer

from minicpmv.commands import terminal
from minicpmv.errors import MissingPackageError, one_line_errors, require
from minicpmv.evaluate.suites import BENCHMARKS


DEFAULT_FOLDER = Path("runs")
MODES = {"on": True, "off": False, "auto": "auto"}

evaluate_app = typer.Typer(help="Measure a model; compare what was measured.", no_args_is_help=True)


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
        revision: terminal.Revision = None,
        trust_remote_code: terminal.TrustRemoteCode = False,
        samples: Annotated[int, typer.Option(min=1, help="Samples for each row and seed.")] = 100,
        seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
        seeds: Annotated[
            str | None, typer.Option(help="Several seeds, such as 0,1,2: mean and spread. In place of --seed.")
        ] = None,
        rows: Annotated[str | None, typer.Option(help="Only these rows, such as count,chart.")] = None,
        thinking: Annotated[
            str,
            typer.Option(help="on, off, auto, or the rows that think, such as count,chart. Rows that fix it keep it."),
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

        with one_line_errors(MissingPackageError):
            require("evaluate", "rapidfuzz", "matplotlib")  # scores, and the drawn questions
        from minicpmv.checkpoint import CheckpointError, load
        from minicpmv.evaluate import benchmark as benchmarks
        from minicpmv.evaluate import harness, sample_log
        from minicpmv.evaluate.report import as_table
        from minicpmv.evaluate.suites import load_benchmark

        all_seeds = whole_numbers(seeds) if seeds else [seed]
        with one_line_errors(
            benchmarks.UnknownRowError, CheckpointError, harness.SampleCountError, sample_log.SampleLogError
        ):
            benchmark = load_benchmark(name)
            chosen = names(rows) if rows else None
            benchmark.choose(chosen)  # before the model is loaded
            thinks = MODES[thinking] if thinking in MODES else names(thinking)
            model, processor = load(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
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
def calibrate(
    checkpoint: Annotated[str, typer.Option(help="Model folder or Hub repository.")] = "nano",
    revision: terminal.Revision = None,
    trust_remote_code: terminal.TrustRemoteCode = False,
    benchmark: Annotated[str, typer.Option(help="Whose questions to ask.")] = "nanobench",
    samples: Annotated[int, typer.Option(min=1, help="Questions of each row, and as many again for the check.")] = 50,
    seed: Annotated[int, typer.Option(help="Seed of the questions; the check takes the next one.")] = 1,
    rows: Annotated[str | None, typer.Option(help="Only these rows, such as count,chart.")] = None,
    keep: Annotated[float, typer.Option(help="Share of the best accuracy of any threshold that has to stay.")] = 0.95,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions asked at once.")] = 50,
    output: Annotated[
        Path | None, typer.Option(help="Folder of answers, curve and result; by default one a checkpoint in runs/.")
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Store the threshold in the checkpoint's config.json.")] = False,
):
    """Find the threshold of enable_thinking="auto": fewest tokens for (nearly) the accuracy of always thinking."""
    import json

    with one_line_errors(MissingPackageError):
        require("evaluate", "rapidfuzz", "matplotlib")
    from minicpmv.checkpoint import CheckpointError, load
    from minicpmv.evaluate import benchmark as benchmarks
    from minicpmv.evaluate import calibration, harness, sample_log
    from minicpmv.evaluate.suites import load_benchmark

    if benchmark not in BENCHMARKS:
        raise typer.BadParameter(f"{benchmark!r} is none of {', '.join(BENCHMARKS)}")
    config = Path(checkpoint) / "config.json"
    if save and not config.is_file():
        raise typer.BadParameter(f"--save writes to {config}, which is not there: give the folder of the checkpoint")
    with one_line_errors(
        benchmarks.UnknownRowError,
        calibration.CalibrationError,
        CheckpointError,
        harness.SampleCountError,
        sample_log.SampleLogError,
    ):
        asked = load_benchmark(benchmark)
        chosen = names(rows) if rows else None
        calibration.questions_in_both_modes(asked, chosen)  # before the model is loaded
        model, processor = load(checkpoint, revision=revision, trust_remote_code=trust_remote_code)
        result = calibration.calibrate(
            model,
            processor,
            asked,
            output or DEFAULT_FOLDER / f"calibration-{Path(checkpoint).resolve().name}",
            checkpoint=checkpoint,
            rows=chosen,
            samples=samples,
            seed=seed,
            keep=keep,
            batch_size=batch_size,
        )
    for mode, found in result["check"].items():
        typer.echo(f"{mode:5} {100 * found['accuracy']:5.1f} % right, {found['tokens']:6.1f} tokens a question")
    typer.echo(f"threshold {result['threshold']:.4f}")
    if save:
        settings = json.loads(config.read_text(encoding="utf-8")) | {"thinking_threshold": result["threshold"]}
        sample_log.write_whole(config, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        typer.echo(f"{config}: stored")


@evaluate_app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs: such as runs/nanobench-*.")],
    output: Annotated[
        Path, typer.Option(help="An .html file with everything in it, or an .md file with charts beside it.")
    ] = Path("report.html"),
):
    """Compare runs side by side: checkpoints, models or settings, with charts."""
    with one_line_errors(MissingPackageError):
        require("evaluate", "matplotlib")
    from minicpmv.evaluate import report as reports

    with one_line_errors(reports.ReportError):
        files = reports.write_report(folders, output)
    for file in files:
        typer.echo(str(file))


if __name__ == "__main__":
    evaluate_app()
