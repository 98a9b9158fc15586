"""nano in OpenVINO answers as it does in PyTorch."""

import numpy as np
import pytest
from conftest import NANO, SIGHTS, answers_to_sights
from typer.testing import CliRunner

from minicpmv import checkpoint
from minicpmv.chat.runner import Runner
from minicpmv.commands.export import OpenVINOType
from minicpmv.commands.main import app
from minicpmv.deploy import onnx, openvino, reference
from minicpmv.deploy.parity import cases
from minicpmv.runtimes.graph_engines import GraphError
from minicpmv.runtimes.graphs import Graphs, Unit


pytest.importorskip("openvino")


def test_both_run_the_same_graphs(onnx_nano, openvino_nano):
    random = np.random.default_rng(0)
    units = [
        Unit([random.normal(size=(3, 14, 14 * rows * columns)).astype(np.float32) for _ in ids], (rows, columns), ids)
        for rows, columns, ids in ((7, 9, [-1]), (8, 8, [0, 3, 7]), (1, 64, [-1]), (7, 9, [-1]))
    ]
    ours, theirs = (Graphs(folder, 1) for folder in (onnx_nano("fp32"), openvino_nano))
    features = ours.encode(units)
    assert np.linalg.norm(theirs.encode(units) - features) < 2e-3 * np.linalg.norm(features)  # weights of 16 bits
    ids = np.arange(40, 52)[None]
    found = []
    for graphs in (ours, theirs):
        states, rows = graphs.no_states(), graphs.embed(ids)
        for part in (slice(0, 8), slice(8, 12)):
            mask = np.ones((1, part.stop), np.int64)
            logits, states = graphs.decode(rows[:, part], mask, ids[:, part] - 40, np.array([0, 3]), states)
        found.append(logits)
    assert np.abs(found[0] - found[1]).max() < 0.05 and found[0].shape == (1, 2, 1024)


def test_images_slices_and_packed_videos_are_answered_as_in_pytorch(nano, openvino_nano):
    loaded = checkpoint.load(openvino_nano)
    runner = Runner(openvino_nano, 1)
    expected = answers_to_sights(*nano)
    assert answers_to_sights(*loaded) == expected
    assert [runner.chat(asked, max_new_tokens=24, **options).text for asked, options in SIGHTS] == expected


def test_the_command_leaves_files_of_openvino_and_their_figures(traced_nano, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "trace", lambda checkpoint, name: traced_nano[name].clone())
    monkeypatch.setattr(reference, "cases", lambda processor: cases(processor)[:1])
    options = ["--type", "int8", "--samples", "0", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["export", "openvino", "--model", str(NANO), *options])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| `nano-int8` |" in card and "1 of 1" in card and "openvino 20" in card
    assert not list((tmp_path / "out").glob("*.onnx*"))


def test_the_command_offers_every_type():
    assert [kind.value for kind in OpenVINOType] == list(openvino.TYPES)


def test_damaged_files_are_named(openvino_nano, tmp_path):
    for file in openvino_nano.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "decoder_model.bin").unlink()
    (tmp_path / "decoder_model.bin").write_bytes(b"nothing")
    with pytest.raises(GraphError, match=r"decoder_model\.xml cannot be loaded"):
        Graphs(tmp_path)
