"""Time of the whole picture preprocessing over the time of its Pillow resizes alone.

Both are measured in the same run, alternately, and medians are compared: the ratio says what loading, cutting and
normalising cost beside the bicubic resizes that no implementation can leave out.

    python perf/bench_preprocessing.py [--repeats 15] [--threads N]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor


def synthetic_picture(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """(wall, CPU) time of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def resize_only(processor, pictures: list[Image.Image], max_slice_nums: int | None) -> None:
    for picture in pictures:
        layout = processor.get_slice_layout(picture.size, max_slice_nums)
        picture.resize(layout.source, Image.Resampling.BICUBIC)
        if layout.refined is not None:
            picture.resize(layout.refined, Image.Resampling.BICUBIC)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--threads", type=int, help="most threads of the preprocessing (torch's number); resizes use one"
    )
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)

    processor = AutoImageProcessor.from_pretrained(Path(__file__).resolve().parents[1], trust_remote_code=True)
    cases = {
        "picture 1920x1440": ([synthetic_picture(1920, 1440, 0)], None),
        "36 frames 640x360": ([synthetic_picture(640, 360, seed) for seed in range(36)], 1),
    }
    print(f"medians of {arguments.repeats} runs in ms, {torch.get_num_threads()} threads")
    print(f"{'case':20}{'resizes':>10}{'all':>10}{'ratio':>8}{'CPU resizes':>14}{'CPU all':>10}{'ratio':>8}")
    for name, (pictures, max_slice_nums) in cases.items():
        resizes, everything = [], []
        for _ in range(arguments.repeats):
            resizes.append(seconds(lambda: resize_only(processor, pictures, max_slice_nums)))  # noqa: B023
            everything.append(seconds(lambda: processor(pictures, max_slice_nums=max_slice_nums)))  # noqa: B023
        wall_resizes, cpu_resizes = (median(times) * 1e3 for times in zip(*resizes, strict=True))
        wall_all, cpu_all = (median(times) * 1e3 for times in zip(*everything, strict=True))
        print(
            f"{name:20}{wall_resizes:10.1f}{wall_all:10.1f}{wall_all / wall_resizes:8.2f}"
            f"{cpu_resizes:14.1f}{cpu_all:10.1f}{cpu_all / cpu_resizes:8.2f}"
        )


if __name__ == "__main__":
    main()
