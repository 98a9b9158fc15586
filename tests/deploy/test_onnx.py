"""nano as ONNX graphs: what the files hold, what the command leaves, and what is refused."""

import json
import shutil
import sys

import numpy as np
import pytest
from conftest import NANO, REPOSITORY
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from minicpmv.commands.export import GraphType
from minicpmv.commands.main import app
from minicpmv.deploy import onnx as export_onnx
from minicpmv.deploy import reference
from minicpmv.deploy.parity import cases
from minicpmv.deploy.source import Checkpoint, ExportError
from minicpmv.errors import MissingPackageError
from minicpmv.runtimes.graphs import NAMES, Graphs


onnx = pytest.importorskip("onnx")

ASSETS = REPOSITORY / "assets"


@pytest.fixture
def quick(monkeypatch, traced_nano):
    """Exports that take the traced graphs, and are held against PyTorch in two conversations."""
    monkeypatch.setattr(export_onnx, "trace", lambda checkpoint, name: traced_nano[name].clone())
    monkeypatch.setattr(reference, "cases", lambda processor: cases(processor)[:2])


def export(output, *options):
    return CliRunner().invoke(app, ["export", "onnx", "--model", str(NANO), "--output", str(output), *options])


def test_the_command_writes_a_folder_that_ask_loads(quick, tmp_path):
    folder = tmp_path / "out"
    result = export(folder, "--type", "int8", "--samples", "0")
    assert result.exit_code == 0, result.output
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.to_dict() == {"library_name": "onnx", "pipeline_tag": "image-text-to-text"}
    size = sum(path.stat().st_size for path in folder.glob("*.onnx")) / 1e6
    assert f"| `nano-int8` | {size:.1f} |" in card and "2 of 2" in card and "onnxruntime" in card
    result = CliRunner().invoke(
        app, ["ask", str(ASSETS / "star.mp4"), "Which way does the shape move?", "-m", str(folder)]
    )
    assert result.exit_code == 0 and result.stdout == "right\n"


def test_an_export_that_answers_otherwise_is_not_done(quick, tmp_path, monkeypatch):
    spoiled, tensor = np.random.default_rng(0), Checkpoint.tensor

    def spoil(self, name):
        values = tensor(self, name)
        return values * spoiled.normal(1, 0.4, values.shape).astype(np.float32)

    monkeypatch.setattr(Checkpoint, "tensor", spoil)
    result = export(tmp_path / "out", "--type", "fp32", "--samples", "0")
    assert result.exit_code == 1 and "nano-fp32 does not answer as PyTorch does" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["unfinished-out"]
    assert "is not done" in (tmp_path / "unfinished-out" / "README.md").read_text(encoding="utf-8")


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_onnx, "trace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_onnx.export(NANO, tmp_path / "out", "fp32", is_checked=False)
    assert not list(tmp_path.iterdir())


# ---- what is refused ----


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    result = export(tmp_path / "there")
    assert result.exit_code == 1 and "is there already: name a new folder" in result.stderr
    scaled = tmp_path / "scaled"
    shutil.copytree(NANO, scaled, symlinks=False, ignore=shutil.ignore_patterns("training"))
    config = json.loads((scaled / "config.json").read_text())
    (scaled / "config.json").write_text(json.dumps(config | {"rope_scaling": {"type": "dynamic", "factor": 2}}))
    with pytest.raises(ExportError, match="rope_scaling .* is not written"):
        export_onnx.export(scaled, tmp_path / "out", "fp32")
    find_spec = sys.modules["importlib.util"].find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(MissingPackageError, match=r"onnxscript is not installed.*\[onnx\]"):
        export_onnx.export(NANO, tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()


def test_the_command_offers_every_type():
    assert [kind.value for kind in GraphType] == list(export_onnx.TYPES)


# ---- what the files hold ----


def test_files_hold_no_paths_of_the_machine_that_wrote_them(onnx_nano):
    for name in NAMES:
        graph = onnx.load(onnx_nano("int8") / f"{name}.onnx")
        for weights in graph.graph.initializer:  # which may hold any bytes
            weights.ClearField("raw_data")
        data = graph.SerializeToString()
        for trace in (b"site-packages", str(REPOSITORY).encode(), b"modeling_", b".py", b"stack_trace"):
            assert trace not in data, (name, trace)


def test_inputs_and_outputs_have_names_and_free_dimensions(onnx_nano):
    def shapes(values):
        return {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in values
        }

    graphs = {name: onnx.load(onnx_nano("fp32") / f"{name}.onnx") for name in NAMES}
    assert {entry.domain: entry.version for entry in graphs["decoder_model"].opset_import} == {"": 18}
    assert shapes(graphs["vision_encoder"].graph.input) == {
        "pixel_values": ["units", "frames", 3, "14*rows", "14*columns"],
        "temporal_ids": ["units", "frames"],
    }
    assert shapes(graphs["vision_encoder"].graph.output) == {"image_features": ["units", 36, 256]}
    inputs, outputs = shapes(graphs["decoder_model"].graph.input), shapes(graphs["decoder_model"].graph.output)
    assert list(inputs)[:5] == [
        "inputs_embeds",
        "attention_mask",
        "position_ids",
        "logit_places",
        "past_key_values.0.key",
    ]
    assert inputs["attention_mask"] == ["batch", "past + length"]
    assert inputs["past_key_values.3.value"] == ["batch", 2, "past", 64]
    assert list(outputs)[:2] == ["logits", "present.0.key"] and outputs["logits"] == ["batch", "kept", 1024]
    for graph in graphs.values():
        onnx.checker.check_model(graph)


def test_4_bits_are_for_the_layers_of_the_language_model_alone(onnx_nano, nano_model):
    def bits(name):
        nodes = onnx.load(onnx_nano("int4") / f"{name}.onnx").graph.node
        found = [attribute.i for node in nodes for attribute in node.attribute if attribute.name == "bits"]
        return {number: found.count(number) for number in set(found)}

    assert bits("decoder_model") == {4: 7 * nano_model.config.num_hidden_layers, 8: 1} and set(
        bits("vision_encoder")
    ) == {8}


def test_what_follows_from_weights_alone_is_not_quantized(onnx_nano):
    """OpenVINO computes it while it loads, and knows whole weights only there."""
    graph = onnx.load(onnx_nano("int8") / "vision_encoder.onnx").graph
    moving = {value.name for value in graph.input}
    for node in graph.node:
        if not moving.isdisjoint(node.input):
            moving.update(node.output)
    quantized = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert quantized and all(node.input[0] in moving for node in quantized)


def test_large_weights_stand_in_a_file_of_their_own(onnx_nano, traced_nano, tmp_path, monkeypatch):
    monkeypatch.setattr("minicpmv.deploy.onnx_weights.LARGEST_FILE", 2_000_000)
    graphs = {name: graph.clone() for name, graph in traced_nano.items()}
    export_onnx.write(Checkpoint(NANO), graphs, export_onnx.TYPES["int8"], tmp_path)
    assert {path.name for path in tmp_path.glob("*.data")} == {
        "vision_encoder.onnx.data",
        "decoder_model.onnx.data",
    }
    assert (tmp_path / "decoder_model.onnx").stat().st_size < 100_000
    ids = np.arange(9)[None]
    answers = []
    for folder in (tmp_path, onnx_nano("int8")):
        found = Graphs(folder, 1)
        states = found.no_states()
        answers.append(found.decode(found.embed(ids), np.ones_like(ids), ids, np.arange(9), states)[0])
    assert np.array_equal(*answers)
