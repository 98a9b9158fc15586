"""The benchmarks, by id: each is a module of this folder with a `BENCHMARK`. A new one is a file and a line here."""

import importlib

from minicpmv.evaluate.benchmark import Benchmark


# id -> (module, what `minicpmv evaluate --help` says)
BENCHMARKS = {
    "nanobench": ("minicpmv.evaluate.suites.nanobench", "What the repository can draw: one row a capability."),
}


def load_benchmark(name: str) -> Benchmark:
    return importlib.import_module(BENCHMARKS[name][0]).BENCHMARK
