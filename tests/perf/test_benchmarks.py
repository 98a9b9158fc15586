"""The measurements of perf/ run, and what they state can be true."""

import contextlib
import io
import json
import math
import re
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import SimpleNamespace

import pytest
from conftest import REPOSITORY
from typer.testing import CliRunner

from minicpmv.commands.main import app


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def perf(monkeypatch):
    """The folder from which its scripts import each other."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "perf"))


def check(measured, names):
    """Every part is measured once; figures, limits and ratios are finite, and above zero."""
    assert [measurement.name for measurement in measured] == names
    for measurement in measured:
        assert math.isfinite(measurement.value) and measurement.value > 0, measurement
        if measurement.limit is not None:
            assert measurement.ratio == pytest.approx(measurement.value / measurement.limit), measurement
            assert 0 < measurement.ratio < math.inf and measurement.limit_name, measurement
        assert f"{measurement.value:,.1f} {measurement.unit}" in str(measurement)


@pytest.mark.slow
def test_a_conversation_is_measured_part_by_part(tmp_path, capsys):
    import bench_chat

    measured = bench_chat.main(["--repeats", "1", "--new-tokens", "4", "--json", str(tmp_path / "figures.json")])
    names = ["limit: large matrix product", "limit: large copy", "preprocessing 336x336", "tower, 10 slices"]
    names += ["resampler, 640 patches", *(f"first token, turn {turn}" for turn in range(1, 6))]
    names += [
        "decoding, batch 1",
        "decoding, batch 8",
        "decoding, batch 1, static",
        "decoding, batch 8, static",
        "video: decode, cut, encode",
    ]
    check(measured, [*names, "peak memory"])
    found = {measurement.name: measurement for measurement in measured}
    # Neither an early end nor a cut makes decoding look fast.
    tokens = [found[name].note for name in names if name.startswith("decoding")]
    assert tokens == ["4 tokens", "32 tokens", "4 tokens", "32 tokens"]
    # A batch reads the weights once for all its rows; a process is larger than the weights in it.
    assert found["decoding, batch 8"].limit == pytest.approx(8 * found["decoding, batch 1"].limit)
    assert found["peak memory"].ratio > 1 and found["preprocessing 336x336"].limit_name == "Pillow resizes"
    assert re.fullmatch(r"[1-9]\d* frames in, [1-9]\d* tokens out", found["video: decode, cut, encode"].note)
    stored = json.loads((tmp_path / "figures.json").read_text())
    assert [entry["value"] for entry in stored] == [measurement.value for measurement in measured]
    assert capsys.readouterr().out.count("\n") == len(measured) + 2


@pytest.mark.slow
def test_the_tower_is_measured_in_both_types(monkeypatch):
    import bench_tower

    monkeypatch.setattr(bench_tower, "GRID", (2, 2))
    monkeypatch.setattr(bench_tower, "PRODUCT_ROWS", 16)  # bfloat16 takes seconds more where the CPU lacks it
    names = [f"tower, 4 slices of 4 patches, {dtype}" for dtype in ("float32", "bfloat16")]
    check(bench_tower.main(["--repeats", "1", "--layers", "1"]), names)


def test_the_arithmetic_of_a_tower_is_that_of_its_matrix_products():
    import bench_tower

    hidden, mlp, patches, layers, slices = 8, 16, 10, 3, 2
    config = SimpleNamespace(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers)
    products = [(patches, hidden, hidden)] * 4 + [(patches, hidden, mlp), (patches, mlp, hidden)]
    products += [(patches, hidden, patches), (patches, patches, hidden)]
    expected = layers * slices * sum(2 * rows * inner * columns for rows, inner, columns in products)
    assert bench_tower.tower_flops(config, patches, slices) == expected


def test_preprocessing_is_measured_beside_its_resizes():
    import bench_preprocessing

    names = [f"{case}, {clock}" for case in ("image 1920x1440", "36 frames 640x360") for clock in ("wall", "CPU")]
    check(bench_preprocessing.main(["--repeats", "1"]), names)


class Slow(BaseHTTPRequestHandler):
    """Streams four tokens, two of them at a time, and refuses the third request."""

    asked = []

    def do_POST(self):
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(400 if len(self.asked) == 3 else 200)
        self.end_headers()
        pieces = [{"choices": [{"delta": {"content": text}}]} for text in ("", "ab", "cd")]
        for piece in [*pieces, {"choices": [], "usage": {"completion_tokens": 4}}]:
            time.sleep(0.01)
            self.wfile.write(b"data: " + json.dumps(piece).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *words):
        pass


def test_a_server_is_measured_at_each_concurrency(tmp_path, capsys):
    import bench_serving

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"slow=http://127.0.0.1:{server.server_port}/v1"
    file = tmp_path / "figures.json"
    measured = bench_serving.main(
        ["--servers", address, "--concurrency", "1", "3", "--rounds", "1", "--json", str(file)]
    )
    server.shutdown()
    assert [(load.server, load.concurrency, load.failed) for load in measured] == [("slow", 1, 1), ("slow", 3, 0)]
    for load in measured:
        assert load.tokens_per_second == pytest.approx(4 * load.requests_per_second)
        assert 0 < load.first_token_ms <= load.first_token_p95_ms and load.between_tokens_ms > 0
    assert [entry["concurrency"] for entry in json.loads(file.read_text())["loads"]] == [1, 3]
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in Slow.asked]
    assert len(set(urls)) == len(urls) == 9
    assert capsys.readouterr().out.count("slow") == 2


def test_load_is_sent_to_this_machine_alone():
    import bench_serving

    with pytest.raises(SystemExit):
        bench_serving.main(["--servers", "far=http://192.0.2.1:8000/v1"])


@pytest.fixture
def runtimes(monkeypatch):
    """The module, whose roads run in this process."""
    import bench_runtimes

    def run(arguments):
        words = [str(argument) for argument in arguments]
        if words[:2] == ["-m", "minicpmv"]:
            result = CliRunner().invoke(app, words[2:])
            if result.exit_code:
                raise RuntimeError(result.stderr)
            return result.stdout
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            bench_runtimes.main(words[1:])
        return out.getvalue()

    monkeypatch.setattr(bench_runtimes, "run", run)
    return bench_runtimes


@pytest.mark.slow
def test_runtimes_are_measured_on_the_same_weights_beside_the_read_rate(runtimes, tmp_path, capsys):
    absent = runtimes.Road("no_such_package", 1, runtimes.in_graphs, ("onnx", "int8"))
    names = ["pytorch, eager, float32", "gguf, q8_0", "llama.cpp, stock, q8_0"]
    runtimes.ROADS["absent"] = absent
    try:
        measured = runtimes.main(
            [
                "--size",
                "nano",
                "--prompt-tokens",
                "8",
                "--new-tokens",
                "6",
                "--repeats",
                "1",
                "--roads",
                *names,
                "absent",
            ]
            + ["--folder", str(tmp_path), "--json", str(tmp_path / "figures.json")]
        )
    finally:
        del runtimes.ROADS["absent"]
    assert [figures.road for figures in measured] == names
    for figures in measured:
        assert min(figures.first_token_ms, figures.tokens_per_second, figures.share) > 0
        assert figures.peak_gib * 2**30 > figures.weights_gb * 1e9  # a process is larger than the weights in it
    whole, ours, stock = measured
    assert ours.weights_gb == stock.weights_gb < whole.weights_gb / 3
    found = json.loads((tmp_path / "figures.json").read_text())
    assert [entry["road"] for entry in found["measured"]] == names
    assert found["left out"] == {"absent": "left out: no_such_package is not installed"}
    assert "1.0 x" in capsys.readouterr().out


def test_a_road_for_which_memory_is_short_is_left_out(runtimes, tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "free_memory", lambda: 0)
    options = ["--size", "nano", "--roads", "pytorch, eager", "--json", str(tmp_path / "figures.json")]
    assert runtimes.main(options) == []
    reasons = json.loads((tmp_path / "figures.json").read_text())["left out"]
    assert "0 are free" in reasons["pytorch, eager, float32"]
