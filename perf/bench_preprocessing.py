"""Time of the whole image preprocessing next to the time of its Pillow resizes alone.

Both are measured in the same run, alternately, and medians are compared: the ratio says what loading, cutting and
normalizing cost besides the bicubic resizes that no implementation can leave out.

    python perf/bench_preprocessing.py [--repeats 15] [--threads N]
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measurement import Measurement, heading
from PIL import Image
from transformers import AutoImageProcessor


REPOSITORY = Path(__file__).resolve().parents[1]


def synthetic_image(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def resize_only(image_processor: Any, images: Sequence[Image.Image], max_slice_nums: int | None) -> None:
    for image in images:
        layout = image_processor.get_slice_layout(image.size, max_slice_nums)
        image.resize(layout.source, Image.Resampling.BICUBIC)
        if layout.refined is not None:
            image.resize(layout.refined, Image.Resampling.BICUBIC)


def compare(
    image_processor: Any, name: str, images: Sequence[Image.Image], max_slice_nums: int | None, repeats: int
) -> list[Measurement]:
    """Wall and CPU time of preprocessing, each next to that of the resizes."""
    resizes, everything = [], []
    for _ in range(repeats):
        resizes.append(seconds(lambda: resize_only(image_processor, images, max_slice_nums)))
        everything.append(seconds(lambda: image_processor(images, max_slice_nums=max_slice_nums)))
    limits, values = ([median(times) * 1e3 for times in zip(*pairs, strict=True)] for pairs in (resizes, everything))
    return [
        Measurement(f"{name}, {clock}", value, "ms", limit, "resizes")
        for clock, value, limit in zip(("wall", "CPU"), values, limits, strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, help="most threads of torch; resizes use one")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    image_processor = AutoImageProcessor.from_pretrained(REPOSITORY, trust_remote_code=True)
    cases: dict[str, tuple[list[Image.Image], int | None]] = {
        "image 1920x1440": ([synthetic_image(1920, 1440, 0)], None),
        "36 frames 640x360": ([synthetic_image(640, 360, seed) for seed in range(36)], 1),
    }
    print(f"medians of {options.repeats} runs, {torch.get_num_threads()} threads")
    print(heading())
    measured = []
    for name, (images, max_slice_nums) in cases.items():
        for measurement in compare(image_processor, name, images, max_slice_nums, options.repeats):
            print(measurement, flush=True)
            measured.append(measurement)
    return measured


if __name__ == "__main__":
    main()
