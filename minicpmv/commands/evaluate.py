"""`minicpmv evaluate`: NanoBench, calibration and reports here; public benchmarks and their tools in the modules beside it."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from minicpmv.commands import evaluate_options as shared
from minicpmv.commands import options, terminal
from minicpmv.commands.evaluate_check import check_scorers
from minicpmv.commands.evaluate_compare import diff, leaderboard, report
from minicpmv.commands.evaluate_cost import cost
from minicpmv.commands.evaluate_get import get
from minicpmv.commands.evaluate_public import FIXTURE_TOKENS, add_public
from minicpmv.errors import one_line_errors, require
from minicpmv.evaluate.suites import BENCHMARKS, GROUPS, SUITES, spelled


AGAIN = "To continue after an interruption, run the same command again."


class AnySpelling(TyperGroup):
    """Takes Video-MME for videomme."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or super().get_command(ctx, spelled(cmd_name))


evaluate_app = typer.Typer(cls=AnySpelling, help="Measure a model; compare measurements.", no_args_is_help=True)


def add_benchmark(benchmark_name: str, summary: str) -> None:
    @evaluate_app.command(benchmark_name, help=summary)
    @shared.with_endpoint
    def run(
        model: shared.Model = None,
        revision: options.Revision = None,
        trust_remote_code: options.TrustRemoteCode = False,
        samples: shared.Samples = None,
        seed: shared.Seed = 0,
        seeds: shared.Seeds = None,
        rows: shared.Rows = None,
        thinking: shared.Thinking = "off",
        batch_size: shared.BatchSize = 50,
        output: shared.Output = None,
        json_file: shared.Json = None,
        *,
        asked: shared.EndpointOptions,
    ) -> None:
        all_seeds = shared.whole_numbers(seeds) if seeds else [seed]
        with one_line_errors(OSError):
            require("evaluate", "rapidfuzz", "matplotlib")  # scores, and the drawn questions
            asked.check(model)
            from minicpmv.evaluate import harness
            from minicpmv.evaluate.processes import Processes
            from minicpmv.evaluate.suites import load_benchmark
            from minicpmv.files import check_writable

            benchmark, chosen, processes = load_benchmark(benchmark_name), shared.names(rows), Processes()
            benchmark.choose(chosen)  # before the model is loaded
            if json_file is not None and processes.is_main:
                check_writable(json_file)
            shown, answerer = shared.open_answerer(
                model, revision, trust_remote_code, batch_size, processes.device, asked
            )
            thinks = shared.thinking_of(thinking)
            if output is None:
                settings = harness.settings_of(answerer, benchmark, thinks)
                output = shared.DEFAULT_FOLDER / shared.run_name(benchmark_name, shown, settings)
            results = harness.measure(
                answerer,
                benchmark,
                output,
                name=shared.full_name(shown),
                rows=chosen,
                samples=samples,
                seeds=all_seeds,
                thinking=thinks,
            )
            if not processes.is_main:
                return
            if json_file is not None:
                json_file.write_text(json.dumps(harness.figures(results), indent=1) + "\n", encoding="utf-8")
            terminal.write(f"{shared.show_results(results)}answers and results: {output}")


evaluate_app.command()(get)
evaluate_app.command()(check_scorers)
evaluate_app.command()(report)
evaluate_app.command()(diff)
evaluate_app.command()(leaderboard)
evaluate_app.command()(cost)
for name, (_module, summary) in BENCHMARKS.items():
    add_benchmark(name, f"{summary} {AGAIN}")
for name, (_suites, summary) in GROUPS.items():
    add_public(evaluate_app, name, f"{summary} {AGAIN}", is_group=True)
for name, summary in SUITES.items():
    add_public(evaluate_app, name, f"{summary} {AGAIN}", is_group=False)


@evaluate_app.command()
def calibrate(
    model: options.Model = ".",
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    benchmark: Annotated[
        str, typer.Option(metavar="NAME", help="Benchmark that provides the questions: nanobench or a public one.")
    ] = "nanobench",
    data: shared.Data = None,
    fixtures: shared.Fixtures = False,
    max_new_tokens: shared.MaxNewTokens = None,
    samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Questions per row to choose on, and as many again to check.")
    ] = 50,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the questions; the check uses the next one.")] = 1,
    rows: shared.Rows = None,
    keep: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Share of the best accuracy that any threshold reaches, which the choice must keep."
        ),
    ] = 0.95,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Also try bounds on the tokens of a thought, such as 256,1024,4096."),
    ] = None,
    batch_size: shared.BatchSize = 50,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help=f"Folder for answers, curve and result; by default one per model in {shared.DEFAULT_FOLDER}/.",
        ),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Store the threshold in the model's config.json.")] = False,
) -> None:
    """Find the threshold of enable_thinking="auto" that generates the fewest tokens and keeps most of the accuracy.

    --keep says how much: 0.95 of the best accuracy that any threshold reaches.
    """
    config = Path(model).expanduser() / "config.json"
    bounds = shared.whole_numbers(budgets) if budgets else []
    with one_line_errors(OSError):
        require("evaluate", "rapidfuzz", "matplotlib")
        if save and not config.is_file():
            raise shared.EvaluateError(f"--save writes to {config}, which is not there: name the model's folder")
        from minicpmv.evaluate import calibration
        from minicpmv.evaluate.suite import Setting
        from minicpmv.evaluate.suites import load_benchmark, load_suite
        from minicpmv.files import write_whole

        if benchmark in SUITES:
            setting = Setting(max_new_tokens=max_new_tokens or (FIXTURE_TOKENS if fixtures else None))
            asked = load_suite(benchmark).open(setting, folder=data, fixtures=fixtures)
        else:
            asked = load_benchmark(benchmark)
        chosen = shared.names(rows)
        calibration.questions_in_both_modes(asked, chosen)  # before the model is loaded
        result = calibration.calibrate(
            shared.open_answerer(model, revision, trust_remote_code, batch_size)[1],
            asked,
            output or shared.DEFAULT_FOLDER / f"calibration-{terminal.shown_name(model).replace('/', '-')}",
            name=model,
            rows=chosen,
            samples=samples,
            seed=seed,
            keep=keep,
            budgets=bounds,
        )
        for mode, found in result["check"].items():
            terminal.write(
                f"{mode:5} {100 * found['accuracy']:5.1f} % right, {found['tokens']:6.1f} tokens a question"
            )
        terminal.write(f"threshold {result['threshold']:.4f}")
        if bounds:
            terminal.write(f"thinking_budget {result['budget'] or 'without bound'}")
        if save:
            settings = json.loads(config.read_text(encoding="utf-8")) | {"thinking_threshold": result["threshold"]}
            write_whole(config, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
            terminal.write(f"{config}: stored")


if __name__ == "__main__":
    evaluate_app()
