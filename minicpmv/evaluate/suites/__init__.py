"""The benchmarks, by id: each is a module of this folder with a `BENCHMARK`. A new one is a file and a line here.

A public benchmark quotes its prompt word for word and names where that comes from, and its rows state their `length`: a run
then takes all samples unless it is told otherwise.
"""

import importlib

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.benchmark import Benchmark


class UnknownBenchmarkError(MiniCPMVError):
    """There is no benchmark of this name."""


# id -> (module, what `minicpmv evaluate --help` says)
BENCHMARKS = {
    "nanobench": (
        "minicpmv.evaluate.suites.nanobench",
        "Read, count and compare what the repository draws: one row for each capability.",
    ),
}


def load_benchmark(name: str) -> Benchmark:
    """The benchmark with this id.

    Raises:
        UnknownBenchmarkError: there is none.
    """
    if name not in BENCHMARKS:
        raise UnknownBenchmarkError(f"there is no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return importlib.import_module(BENCHMARKS[name][0]).BENCHMARK
