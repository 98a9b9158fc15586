"""Several suites in one run: one folder each, one table over all, and the averages that are made of them.

What is special:
- all data are opened before the model is asked anything, so that what is missing is told at once;
- each suite is a run of its own in its own folder: it goes on after an interruption, and can be asked alone into the same one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpmv.evaluate import harness
from minicpmv.evaluate.answerers import Answerer
from minicpmv.evaluate.benchmark import Benchmark
from minicpmv.evaluate.data_sets import MissingDataError
from minicpmv.evaluate.processes import Processes
from minicpmv.evaluate.scoring.averages import OPENCOMPASS, opencompass_average
from minicpmv.evaluate.suite import Setting, SuiteError
from minicpmv.evaluate.suites import GROUPS, load_suite
from minicpmv.files import write_whole


if TYPE_CHECKING:
    from minicpmv.evaluate.judging import JudgeModel


OF_A_SUITE = ("benchmark", "version", "data", "video")  # settings that differ from suite to suite


def open_group(
    name: str,
    setting: Setting,
    *,
    folder: Path | None = None,
    fixtures: bool = False,
    rows: Sequence[str] | None = None,
) -> dict[str, Benchmark]:
    """The benchmarks of a group by id, ready to be asked; with `rows` only those that have one of them.

    Raises:
        SuiteError: a row that no suite of the group has, or packings where none has videos.
        MiniCPMVError: data are not there; the message names all that lack.
    """
    suites = [load_suite(suite) for suite in GROUPS[name][0]]
    if setting.video.packings and not any(suite.has_videos for suite in suites):
        raise SuiteError(f"{name} has no videos to be packed")
    without_packings = replace(setting, video=replace(setting.video, packings=()))
    known = {suite.id: [row for row, _, _ in suite.plan(setting)] for suite in suites}
    if unknown := set(rows or ()) - {row for ids in known.values() for row in ids}:
        raise SuiteError(f"{name} has no row {', '.join(sorted(unknown))}")
    opened, missing = {}, []
    for suite in suites:
        chosen = None if rows is None else [row for row in rows if row in known[suite.id]]
        if chosen == []:
            continue
        try:
            own = setting if suite.has_videos else without_packings
            opened[suite.id] = suite.open(own, folder=folder, fixtures=fixtures, rows=chosen)
        except MissingDataError as error:
            missing.append(str(error))
    if missing:
        raise MissingDataError("; ".join(missing))
    return opened


def measure_group(
    answerer: Answerer,
    name: str,
    benchmarks: Mapping[str, Benchmark],
    output: Path,
    *,
    model: str,
    samples: int | None = None,
    seeds: Sequence[int] | None = None,
    thinking: harness.Thinking = False,
    judge: "JudgeModel | None" = None,
    keep_going: bool = False,
) -> dict[str, Any]:
    """Evaluate suite by suite; returns what `results.json` of the folder `output` holds.

    Args:
        samples: of each row, all of them where it has fewer; see [`minicpmv.evaluate.harness.measure`] for the others.

    Returns:
        As of a single run, with the rows of all suites; `suites` says for each where its folder is and its settings, and
        `averages` holds those that the group has.
    """
    version = sum(load_suite(suite).version for suite in GROUPS[name][0])  # counted up with each of them
    results: dict[str, Any] = {"model": model, "settings": {"benchmark": name, "version": version}, "samples": samples}
    rows: dict[str, Any] = {}
    suites: dict[str, Any] = {}
    seen: set[int] = set()
    for suite, benchmark in benchmarks.items():
        found = harness.measure(
            answerer,
            benchmark if samples is None else first_samples(benchmark, samples),
            output / suite,
            name=model,
            seeds=seeds,
            thinking=thinking,
            judge=judge,
            keep_going=keep_going,
        )
        suites[suite] = {"title": benchmark.title, "folder": suite, "settings": found["settings"]}
        rows |= found["rows"]
        seen.update(found["seeds"])
        results["settings"] |= {name: value for name, value in found["settings"].items() if name not in OF_A_SUITE}
        results |= {"versions": found["versions"], "scoring": found["scoring"]}
    results |= {"seeds": sorted(seen), "rows": rows, "suites": suites, "averages": averages(rows)}
    if Processes().is_main:
        write_whole(output / harness.RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return results


def first_samples(benchmark: Benchmark, samples: int) -> Benchmark:
    """The benchmark with at most so many questions a row."""
    rows = tuple(replace(row, length=min(samples, row.length or samples)) for row in benchmark.rows)
    return replace(benchmark, rows=rows)


def averages(rows: Mapping[str, Any]) -> dict[str, float | None]:
    """The averages whose parts are among the rows: None where a part has no figure."""
    shares = {row: next(iter(summary["mean"].values())) for row, summary in rows.items()}
    parts = {"mmbench_en", "mmbench_cn", *OPENCOMPASS} - {"mmbench"}
    return {"opencompass": opencompass_average(shares)} if parts <= shares.keys() else {}
