"""What the full sizes of public benchmarks take on one GPU: time and memory, computed before anything is run.

What is special:
- a roofline: the tower and the prompt are bound by arithmetic, each generated token by reading the weights and the cache;
  both limits are the GPU's data sheet, times a share of them that is assumed (`Share`);
- how many tokens answers have is assumed too (`ASSUMED`), unless a run tells: a pilot of twenty questions makes the estimate;
- a batch is taken to be always full, as by a server with continuous batching. Loading, decoding of videos and scoring are
  left out.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from typing import Any

from minicpmv.evaluate.data_sets.catalog import DATA_SETS
from minicpmv.evaluate.suite import Asking, Setting, Task
from minicpmv.evaluate.suites import load_suite


LAYERS, KEY_VALUE_SIZE = 36, 8 * 128  # of the language model
HEADS_SIZE = 32 * 128
TOWER_LAYERS, TOWER_SIZE = 27, 1152
PATCHES, QUERIES = 1024, 64  # of a slice or frame of 448 x 448
BYTES = 2  # bfloat16
TOWER_UNITS = 16  # slices at once
TOWER_COPIES = 8  # of the tower's widest activation that live at once, roughly

MOST_SLICES = 10  # nine and the overview
TEXT_TOKENS = 150  # of a question with its options and the template
# Rows of data sets whose size the catalog does not state, as they are commonly counted; MMBench's are those of V1.0.
COMMON_COUNTS = {
    "mmbench_dev_en": 4329,
    "mmbench_dev_cn": 4329,
    "mmbench_test_en": 6666,
    "mmbench_test_cn": 6666,
    "mme": 2374,
    "realworldqa": 765,
    "mmtbench": 3127,
    "refcoco": 57457,
}
# Generated tokens of an answer: of a thought; step by step without one; of a page; of a description; of anything else.
ASSUMED = {"thought": 1500, "steps": 200, "page": 1500, "description": 250, "short": 10}
PAGES, DESCRIPTIONS = ("omnidocbench_en", "omnidocbench_zh"), ("mmvet", "mmhal", "objhal")


@dataclass(frozen=True)
class Gpu:
    """Limits by its data sheet: bfloat16 without sparsity."""

    name: str
    flops: float  # a second
    bandwidth: float  # bytes a second
    memory: float  # bytes


H100 = Gpu("H100 SXM", 989e12, 3.35e12, 80e9)


@dataclass(frozen=True)
class Share:
    """How much of the limits is reached."""

    flops: float = 0.5
    bandwidth: float = 0.6


@dataclass(frozen=True)
class Workload:
    """A row of a benchmark."""

    row: str
    questions: int
    units: float  # slices or frames, each 448 x 448 pixels
    prompt_tokens: float
    tokens: float  # generated
    runs: int = 1
    beams: int = 1


@dataclass(frozen=True)
class Estimate:
    """Seconds of a row in all, and the most bytes at a time."""

    tower: float
    prompt: float
    generation: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.tower + self.prompt + self.generation


@cache
def parameters() -> dict[str, int]:
    """How many the published checkpoint has, by part: "tower", "resampler", "layers" of the language model, and "head" (with
    as many again in its embeddings)."""
    shapes = json.loads(files("minicpmv").joinpath("checkpoint_shapes.json").read_text(encoding="utf-8"))
    parts = {"tower": "vpm.", "resampler": "resampler.", "layers": "llm.model.layers.", "head": "llm.lm_head."}
    return {
        part: sum(prod(shape) for name, shape in shapes.items() if name.startswith(prefix))
        for part, prefix in parts.items()
    }


def estimate(work: Workload, batch: int, gpu: Gpu = H100, share: Share | None = None) -> Estimate:
    """Time and memory of a row with `batch` questions at once."""
    share = share or Share()
    sizes = parameters()
    asked = work.questions * work.runs
    # Two operations a parameter and patch; attention reads every patch of the unit twice.
    unit = PATCHES * (2 * sizes["tower"] + 4 * TOWER_LAYERS * TOWER_SIZE * PATCHES) + 2 * QUERIES * sizes["resampler"]
    # Causal attention reads half of the prompt twice.
    prompt = work.prompt_tokens * (2 * sizes["layers"] + 2 * LAYERS * HEADS_SIZE * work.prompt_tokens)
    sequences = batch * work.beams
    cache_row = 2 * LAYERS * KEY_VALUE_SIZE * BYTES
    weights = BYTES * (sizes["layers"] + sizes["head"])
    # Each step reads all weights once, and of every sequence the cache as it is midway.
    step = (weights + sequences * cache_row * (work.prompt_tokens + work.tokens / 2)) / (
        gpu.bandwidth * share.bandwidth
    )
    activations = TOWER_UNITS * PATCHES * 4304 * BYTES * TOWER_COPIES
    everything = BYTES * (sizes["tower"] + sizes["resampler"] + sizes["layers"] + 2 * sizes["head"])
    return Estimate(
        tower=asked * work.units * unit / (gpu.flops * share.flops),
        prompt=asked * prompt / (gpu.flops * share.flops),
        generation=asked * work.tokens * step / batch,
        memory=everything + activations + sequences * cache_row * (work.prompt_tokens + work.tokens),
    )


def workloads(suites: list[str], setting: Setting, pilot: Mapping[str, Any] | None = None) -> list[Workload]:
    """The rows of these suites at their full sizes.

    Args:
        pilot: what `results.json` of a run holds, whose rows tell how many tokens they read and write.
    """
    measured = (pilot or {}).get("rows", {})
    found = []
    for suite in suites:
        for row, task, packing in load_suite(suite).plan(setting):
            asking = task.published if setting.as_published else task.plain
            units, tokens = looked_at(task, setting, packing), generated(task, asking)
            prompt = TEXT_TOKENS + units * QUERIES / (packing or setting.video.max_num_packing if task.is_video else 1)
            told = measured.get(row, {})
            found.append(
                Workload(
                    row,
                    DATA_SETS[task.data].rows or COMMON_COUNTS[task.data],
                    units,
                    told.get("prompt_tokens") or prompt,
                    told.get("tokens") or tokens,
                    asking.decoding.runs,
                    int(asking.decoding.options.get("num_beams", 1)),
                )
            )
    return found


def looked_at(task: Task, setting: Setting, packing: int | None) -> float:
    """The most slices or frames of a question."""
    if not task.is_video:
        return MOST_SLICES
    return setting.video.max_num_frames * (1 if packing else setting.video.max_num_packing)


def generated(task: Task, asking: Asking) -> float:
    """How many tokens an answer is assumed to have."""
    if asking.decoding.thinking:
        return ASSUMED["thought"]
    if task.id in PAGES:
        return ASSUMED["page"]
    if task.id in DESCRIPTIONS:
        return ASSUMED["description"]
    return ASSUMED["steps"] if asking.decoding.max_new_tokens == 2048 and asking.cut else ASSUMED["short"]
