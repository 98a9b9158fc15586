"""What `perf/gpu.py` would measure on a GPU runs here with a tiny model."""

import json
import math

import pytest
import torch
from conftest import REPOSITORY


pytestmark = pytest.mark.usefixtures("one_thread")

ON_GPUS_ONLY = {"tower, sdpa, cuDNN", "tower, sdpa, memory-efficient", "tower, flash, all slices at once"}


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "perf"))
    import gpu

    return gpu


def test_without_a_gpu_one_line_says_so(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) is None
    assert capsys.readouterr().out.count("\n") == 1


def test_every_section_that_needs_no_compiler_runs_with_a_tiny_model(gpu, tmp_path):
    file, has_cudnn = tmp_path / "gpu.json", torch.backends.cuda.cudnn_sdp_enabled()
    sections = ["decoding bf16", "first token", "tower", "new size", "decoding nf4", "training with QLoRA"]
    bench = gpu.main(["--tiny", "--json", str(file), "--only", *sections])
    found = json.loads(file.read_text())
    assert found["failed"].keys() == ON_GPUS_ONLY and not found["left out"]
    assert found["machine"]["device"] == "cpu" and found["machine"]["torch"] == torch.__version__
    assert [entry["name"] for entry in found["measured"]] == [measurement.name for measurement in bench.measured]
    figures = {entry["name"]: entry for entry in found["measured"]}
    assert len(figures) == len(found["measured"])
    for name, entry in figures.items():
        assert (math.isfinite(entry["value"]) and entry["value"] > 0) or "from float32" in name, entry
    # Weights are read once for all conversations, and 4-bit ones are fewer bytes.
    limits = {name: entry["limit"] for name, entry in figures.items() if name.startswith("decoding")}
    assert limits["decoding: bf16, batch 8, dynamic cache"] == 8 * limits["decoding: bf16, batch 1, dynamic cache"]
    assert limits["decoding: nf4, batch 1, dynamic cache"] > 2 * limits["decoding: bf16, batch 1, dynamic cache"]
    sizes = [name for name in figures if name.startswith("new size")]
    assert len(sizes) == 4 and torch.backends.cuda.cudnn_sdp_enabled() == has_cudnn
    parts = [figures[f"first token: image in 1 slices, {part}"]["value"] for part in ("processor", "tower", "prompt")]
    assert sum(parts) == pytest.approx(figures["first token: image in 1 slices"]["value"])


def test_a_section_that_fails_is_reported_and_the_others_run(gpu, tmp_path):
    file = tmp_path / "gpu.json"
    bench = gpu.Bench(gpu.TINY, torch.device("cpu"), 1, file)

    def broken() -> None:
        raise RuntimeError("no such kernel")

    bench.run([("broken", 0, broken), ("limits", 0, bench.limits)])
    found = json.loads(file.read_text())
    assert found["failed"] == {"broken": "RuntimeError: no such kernel"}
    assert bench.measured[0].name == "limit: copy"


def test_no_section_begins_that_would_not_end_in_time(gpu):
    bench = gpu.Bench(gpu.TINY, torch.device("cpu"), minutes=1, file=None)
    bench.is_gpu = True
    bench.free = lambda: None
    ran = []
    bench.run([("long", 3600, lambda: ran.append("long")), ("short", 1, lambda: ran.append("short"))])
    assert ran == ["short"] and bench.left_out == ["long"]
