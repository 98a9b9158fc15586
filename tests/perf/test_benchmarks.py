"""The measurements run, and print a line for everything that they promise."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_conversation_is_measured_part_by_part():
    command = [sys.executable, "perf/bench_chat.py", "--repeats", "1", "--new-tokens", "4", "--threads", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for part in (
        "preprocessing 336x336",
        "tower, 10 slices",
        "resampler",
        *(f"first token, turn {turn}" for turn in range(1, 6)),
        "decoding, batch 1 ",
        "decoding, batch 8",
        "decoding, batch 1, static",
        "video: decode, cut, encode",
        "peak memory",
    ):
        assert f"\n{part}" in done.stdout, part
