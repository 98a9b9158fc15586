"""`minicpmv evaluate SUITE` and `minicpmv evaluate GROUP`: public benchmarks, one or several."""

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from minicpmv.commands import evaluate_options as shared
from minicpmv.commands import options, terminal
from minicpmv.errors import one_line_errors, require


if TYPE_CHECKING:
    from minicpmv.evaluate.benchmark import Benchmark
    from minicpmv.evaluate.suite import Setting

FIXTURE_TOKENS = 32  # of an answer about fixtures, unless it is said
RULE_PACKAGES = ("apted", "jieba", "lxml", "nltk", "pyarrow", "pylatexenc", "rapidfuzz", "scipy", "tqdm")


def add_public(app: typer.Typer, name: str, summary: str, is_group: bool) -> None:
    @app.command(name, help=summary)
    @shared.with_endpoint
    def run(
        model: shared.Model = None,
        revision: options.Revision = None,
        trust_remote_code: options.TrustRemoteCode = False,
        as_published: shared.AsPublished = False,
        data: shared.Data = None,
        fixtures: shared.Fixtures = False,
        samples: shared.PublicSamples = None,
        seeds: shared.PublicSeeds = None,
        rows: shared.Rows = None,
        thinking: shared.Thinking = "off",
        max_new_tokens: shared.MaxNewTokens = None,
        batch_size: shared.BatchSize = 16,
        keep_going: shared.KeepGoing = False,
        output: shared.Output = None,
        json_file: shared.Json = None,
        scoring: shared.PublicRules = None,
        strict: shared.Strict = False,
        judge_endpoint: shared.JudgeEndpoint = None,
        judge_model: shared.JudgeModelName = None,
        judge_key_env: shared.JudgeKeyEnv = None,
        judge_prices: shared.JudgePrices = None,
        judge_cache: shared.JudgeCache = None,
        judge_options: shared.JudgeOptions = None,
        judge_yes: shared.JudgeYes = False,
        fps: shared.Fps = 5,
        max_num_frames: shared.MaxNumFrames = 180,
        max_num_packing: shared.MaxNumPacking = 3,
        packing: shared.Packing = None,
        *,
        asked: shared.EndpointOptions,
    ) -> None:
        all_seeds = shared.whole_numbers(seeds) if seeds else None
        packings = tuple(shared.whole_numbers(packing)) if packing else ()
        with one_line_errors(OSError):
            require("evaluate", "matplotlib", *RULE_PACKAGES)
            if fixtures and data is not None:
                raise shared.EvaluateError(
                    "--fixtures takes drawn questions instead of the data: leave --data or --fixtures out"
                )
            asked.check(model)
            from minicpmv.evaluate.processes import Processes
            from minicpmv.evaluate.suite import Setting, VideoSetting, check_videos
            from minicpmv.files import check_writable

            processes = Processes()
            judge = None
            if processes.is_main:
                if json_file is not None:
                    check_writable(json_file)
                judge = shared.open_judge(
                    judge_endpoint,
                    judge_model,
                    judge_key_env,
                    judge_prices,
                    judge_cache,
                    shared.json_object(judge_options),
                    judge_yes,
                )
            setting = Setting(
                as_published=as_published,
                scoring=scoring.value if scoring else None,
                strict=strict,
                video=VideoSetting(fps, max_num_frames, max_num_packing, packings),
                max_new_tokens=max_new_tokens or (FIXTURE_TOKENS if fixtures else None),
            )
            benchmarks = open_benchmarks(name, is_group, setting, data, fixtures, shared.names(rows))
            for benchmark in () if keep_going else benchmarks.values():
                check_videos(benchmark, samples)
            if processes.is_main and not fixtures:
                tell_of_other_files(benchmarks.values())
            shown, answerer = shared.open_answerer(
                model, revision, trust_remote_code, batch_size, processes.device, asked
            )
            from minicpmv.evaluate import harness
            from minicpmv.evaluate.groups import measure_group

            thinks = shared.thinking_of(thinking)
            if output is None:
                settings = {key: harness.settings_of(answerer, each, thinks) for key, each in benchmarks.items()}
                output = shared.DEFAULT_FOLDER / shared.run_name(name, shown, settings)
            given: dict[str, Any] = {
                "samples": samples,
                "seeds": all_seeds,
                "thinking": thinks,
                "judge": judge,
                "keep_going": keep_going,
            }
            if is_group:
                results = measure_group(answerer, name, benchmarks, output, model=shared.full_name(shown), **given)
            else:
                results = harness.measure(answerer, benchmarks[name], output, name=shared.full_name(shown), **given)
            if not processes.is_main:
                return
            if json_file is not None:
                json_file.write_text(json.dumps(harness.figures(results), indent=1) + "\n", encoding="utf-8")
            written = f"answers and results: {output}"
            if is_group:
                from minicpmv.evaluate.report import write_report

                for kind in ("html", "md", "csv"):
                    written += f"\n{write_report([output], output / f'report.{kind}')[0]}"
            terminal.write(f"{shared.show_results(results)}{written}")
            if judge is not None:
                judge.refuse_if_owing()


def tell_of_other_files(benchmarks: "Iterable[Benchmark]") -> None:
    """One line on stderr for each data file that is not the one of published figures."""
    from minicpmv.evaluate.data_sets import DATA_SETS, other_file

    digests = {id: digest for benchmark in benchmarks for id, digest in benchmark.settings["data"].items()}
    for id, digest in digests.items():
        if note := other_file(DATA_SETS[id], digest):
            print(f"minicpmv: {note}", file=sys.stderr)


def open_benchmarks(
    name: str, is_group: bool, setting: "Setting", data: Any, fixtures: bool, rows: list[str] | None
) -> dict[str, Any]:
    """The benchmarks by id, with their data; what lacks is told before a model is loaded."""
    from minicpmv.evaluate.groups import open_group
    from minicpmv.evaluate.suites import load_suite

    if is_group:
        return open_group(name, setting, folder=data, fixtures=fixtures, rows=rows)
    return {name: load_suite(name).open(setting, folder=data, fixtures=fixtures, rows=rows)}
