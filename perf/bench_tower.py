"""Rate of the vision tower next to the rate of one large matrix product.

The tower at full size (27 layers of 1152, random weights) reads 4 slices of 1024 patches. Its arithmetic is counted from
its shapes: projections, MLP and attention. The limit is a product of 2048 x 1152 by 1152 x 4304, measured in the same run,
in turns with the tower; medians are compared.

    python perf/bench_tower.py [--repeats 5] [--layers 27] [--threads N] [--cpu-time]

`--cpu-time` counts processor time, for a machine that has other work to do; use it with `--threads 1`.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measurement import Measurement, heading
from transformers import AutoConfig, AutoModel


REPOSITORY = Path(__file__).resolve().parents[1]
GRID, SLICES = (32, 32), 4
PRODUCT_ROWS = 2048
Clock = Callable[[], float]


def build_tower(dtype: torch.dtype, layers: int) -> torch.nn.Module:
    config = AutoConfig.from_pretrained(REPOSITORY, trust_remote_code=True)
    fields = config.to_dict() | {"num_hidden_layers": 1, "vocab_size": 1000, "hidden_size": 128, "image_token_id": 5}
    fields.pop("layer_types", None)
    fields["vision_config"]["num_hidden_layers"] = layers
    return AutoModel.from_config(type(config)(**fields), trust_remote_code=True, dtype=dtype).vpm.eval()


def tower_flops(config: Any, patches: int, slices: int) -> int:
    """Floating-point operations for slices of equally many patches; `config` is the vision config."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    per_patch = 2 * (4 * hidden * hidden + 2 * hidden * mlp) + 2 * 2 * patches * hidden
    return config.num_hidden_layers * per_patch * patches * slices


def seconds(function: Callable[[], object], clock: Clock) -> float:
    start = clock()
    function()
    return clock() - start


def product_rate(left: torch.Tensor, right: torch.Tensor, clock: Clock) -> float:
    """Floating-point operations a second over about a fifth of a second."""
    flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    calls = max(1, int(0.2 / seconds(lambda: left @ right, clock)))
    return flops * calls / seconds(lambda: [left @ right for _ in range(calls)], clock)


def compare(dtype: torch.dtype, layers: int, repeats: int, clock: Clock) -> Measurement:
    tower = build_tower(dtype, layers)
    rows, columns = GRID
    pixels = [torch.randn(3, 14, 14 * rows * columns, dtype=dtype) for _ in range(SLICES)]
    left, right = torch.randn(PRODUCT_ROWS, 1152, dtype=dtype), torch.randn(1152, 4304, dtype=dtype)
    flops = tower_flops(tower.config, rows * columns, SLICES)
    rates, limits = [], []
    tower(pixels, [GRID] * SLICES), product_rate(left, right, clock)
    for _ in range(repeats):
        before = product_rate(left, right, clock)
        rates.append(flops / seconds(lambda: tower(pixels, [GRID] * SLICES), clock))
        limits.append((before + product_rate(left, right, clock)) / 2)
    ratios = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
    name = f"tower, {SLICES} slices of {rows * columns} patches, {str(dtype).removeprefix('torch.')}"
    note = f"range {min(ratios):.0%} to {max(ratios):.0%}"
    return Measurement(name, median(rates) / 1e9, "GFLOP/s", median(limits) / 1e9, "product", note)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> list[Measurement]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--cpu-time", action="store_true")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    print(heading())
    measured = []
    for dtype in (torch.float32, torch.bfloat16):
        measured.append(compare(dtype, options.layers, options.repeats, clock))
        print(measured[-1], flush=True)
    return measured


if __name__ == "__main__":
    main()
