"""Evaluation: benchmarks, whoever answers them, figures, and reports that compare runs.

    from minicpmv import load
    from minicpmv.evaluate import LocalModel, load_benchmark, measure

    results = measure(LocalModel(*load("nano")), load_benchmark("nanobench"), Path("runs/nano"), name="nano", samples=20)

`benchmark` says what a benchmark is and `suite` what a public one is; `suites/` holds them (one file each), `data_sets/` their
data, `scoring/` their rules. `answerers` and `endpoint` answer, `harness` asks and `groups` asks several, `judging` has
answers judged, `sample_log` keeps every answer. `comparison`, `pairing` and `leaderboard` set runs beside each other and
beside what is `published`, `report` writes that down. `adapters/` bring the model to the harnesses of others.
"""

import importlib


# Where the public names live. They are imported when they are asked for: some need torch or another package.
_PLACES = {
    "Answer": "answerers",
    "Answerer": "answerers",
    "Benchmark": "benchmark",
    "ChatClient": "client",
    "Endpoint": "endpoint",
    "JudgeModel": "judging",
    "LocalModel": "answerers",
    "Prompt": "benchmark",
    "Question": "answerers",
    "Row": "benchmark",
    "Setting": "suite",
    "calibrate": "calibration",
    "figures": "harness",
    "load_benchmark": "suites",
    "load_suite": "suites",
    "measure": "harness",
    "measure_group": "groups",
    "open_group": "groups",
    "pair_runs": "pairing",
    "threshold_curve": "calibration",
    "write_leaderboard": "leaderboard",
    "write_report": "report",
}
__all__ = list(_PLACES)


def __getattr__(name: str):
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
