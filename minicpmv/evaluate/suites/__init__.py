"""The benchmarks, by id: each is a module of this folder with a `BENCHMARK` or, over public data, a `SUITE`.

A new one is a file and a line here. A suite quotes its prompt word for word and names where that comes from.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.benchmark import Benchmark
from minicpmv.evaluate.data_sets.catalog import squeezed


if TYPE_CHECKING:
    from minicpmv.evaluate.suite import Suite


class UnknownBenchmarkError(MiniCPMVError):
    """There is no benchmark of this name."""


# id -> (module, what `minicpmv evaluate --help` says)
BENCHMARKS = {
    "nanobench": (
        "minicpmv.evaluate.suites.nanobench",
        "Read, count and compare what the repository draws: one row for each capability.",
    ),
}
# id, which is also the module -> what `minicpmv evaluate --help` says
SUITES = {
    "mmbench": "MMBench V1.1: multiple choice in all rotations, English and Chinese, dev sets.",
    "mmbench_test": "MMBench V1.1, test sets: writes the files to upload.",
    "mmstar": "MMStar: multiple choice that needs the image.",
    "mmmu": "MMMU val: questions of college subjects.",
    "mathvista": "MathVista testmini: mathematics about what is seen (judged).",
    "hallusionbench": "HallusionBench: yes or no, in sets that catch guesses and illusions.",
    "ai2d": "AI2D test: multiple choice about diagrams.",
    "ocrbench": "OCRBench: reading text, ten kinds of questions.",
    "mmvet": "MM-Vet: open questions of several capabilities (judged).",
    "mme": "MME: yes or no, two questions about each image.",
    "realworldqa": "RealWorldQA: multiple choice about real places.",
    "mmtbench": "MMT-Bench val: multiple choice over many tasks.",
    "chartqa": "ChartQA test: values and words in charts.",
    "docvqa": "DocVQA val: questions about scanned pages.",
    "textvqa": "TextVQA val: text in photographs.",
    "ocrbench_v2": "OCRBench v2: reading, finding and parsing text, English and Chinese.",
    "omnidocbench": "OmniDocBench V1.0: pages to Markdown, English and Chinese.",
    "videomme": "Video-MME: short, medium and long videos, without and with subtitles.",
    "lvbench": "LVBench: videos of an hour.",
    "mlvu": "MLVU dev: seven tasks about long videos.",
    "longvideobench": "LongVideoBench val: details of long videos.",
    "motionbench": "MotionBench dev: fine motion.",
    "favorbench": "FAVOR-Bench: fine motion, the text of an option.",
    "mmhal": "MMHal-Bench: questions that tempt to invent (judged).",
    "objhal": "Object HalBench: objects in descriptions that are not in the image (judged).",
    "refcoco": "RefCOCO, RefCOCO+, RefCOCOg: the box of what is described.",
}
# id -> (suites, what `minicpmv evaluate --help` says)
GROUPS: dict[str, tuple[tuple[str, ...], str]] = {
    "opencompass": (
        ("mmbench", "mmstar", "mmmu", "mathvista", "hallusionbench", "ai2d", "ocrbench", "mmvet"),
        "The eight suites of the OpenCompass average, and the average.",
    ),
    "ocr": (
        ("ocrbench", "ocrbench_v2", "chartqa", "docvqa", "textvqa", "omnidocbench"),
        "The suites about text, charts and documents.",
    ),
    "video": (
        ("videomme", "lvbench", "mlvu", "longvideobench", "motionbench", "favorbench"),
        "The suites about videos.",
    ),
    "hallucination": (("hallusionbench", "mmhal", "objhal"), "The suites about what is not there."),
    "published": (
        tuple(suite for suite in SUITES if suite != "mmbench_test"),
        "All suites: every row of the published table whose data can be had, and more.",
    ),
}


def load_benchmark(name: str, *, folder: Path | None = None, fixtures: bool = False) -> Benchmark:
    """The benchmark with this id; a public one as it is asked in the plain way.

    Args:
        folder: where the data of a public one are; the cache by default.
        fixtures: take its few drawn questions instead.

    Raises:
        UnknownBenchmarkError: there is none.
        MiniCPMVError: its data are not there.
    """
    if name in BENCHMARKS:
        return importlib.import_module(BENCHMARKS[name][0]).BENCHMARK
    return load_suite(name).open(folder=folder, fixtures=fixtures)


def spelled(name: str) -> str:
    """The id of the benchmark or group of this name; case, hyphens and blanks do not matter. A name that is none stays."""
    for known in (*BENCHMARKS, *SUITES, *GROUPS):
        title = SUITES[known].partition(":")[0] if known in SUITES else known
        if squeezed(name) in (squeezed(known), squeezed(title)):
            return known
    return name


def load_suite(name: str) -> "Suite":
    """The public benchmark with this id or name, not yet opened.

    Raises:
        UnknownBenchmarkError: there is none.
    """
    name = spelled(name)
    if name not in SUITES:
        known = [*BENCHMARKS, *SUITES]
        raise UnknownBenchmarkError(f"there is no benchmark {name!r}; there are {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{name}").SUITE
