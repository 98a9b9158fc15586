"""nano in MLX, where it is installed: `make deploy-slow`."""

import re

import numpy as np
import pytest
import torch
from conftest import GREEDY, NANO, REPOSITORY, answers_to_sights
from typer.testing import CliRunner

from minicpmv import checkpoint
from minicpmv.chat import ChatSession
from minicpmv.commands.export import MLXType
from minicpmv.commands.main import app
from minicpmv.deploy import mlx as export_mlx
from minicpmv.deploy import reference
from minicpmv.deploy.parity import cases
from minicpmv.deploy.source import Checkpoint
from minicpmv.errors import MissingPackageError
from minicpmv.evaluate.fingerprint import weights_fingerprint
from minicpmv.runtimes.mlx import FILE, MLXError


ASSETS = REPOSITORY / "assets"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A function (type) -> folder with nano, not compared with anything."""
    pytest.importorskip("mlx.core")
    known = {}

    def write(kind):
        if kind not in known:
            known[kind] = tmp_path_factory.mktemp(kind)
            export_mlx.write(Checkpoint(NANO), export_mlx.TYPES[kind], known[kind])
        return known[kind]

    return write


@pytest.fixture(scope="module")
def loaded(exported):
    """A function (type) -> `(model, processor)`, loaded once."""
    known = {}

    def load(kind):
        if kind not in known:
            known[kind] = checkpoint.load(exported(kind))
        return known[kind]

    return load


def test_features_are_those_of_the_model(nano_model, loaded):
    random = torch.Generator().manual_seed(0)
    units = [((7, 9), [-1]), ((8, 8), [0, 3, 7]), ((1, 64), [-1]), ((55, 58), [71999, 90000])]
    sizes = [size for size, ids in units for _ in ids]
    pixels = [torch.randn(3, 14, 14 * rows * columns, generator=random) for rows, columns in sizes]
    visual = [pixels], [sizes], [[ids for _, ids in units]]
    with torch.inference_mode():
        ours, theirs = (
            model.get_image_features(*visual).pooler_output.numpy() for model in (nano_model, loaded("bf16")[0])
        )
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize("kind", ["bf16", "4bit"])
def test_images_slices_and_packed_videos_are_answered_as_in_pytorch(nano, loaded, kind):
    assert answers_to_sights(*nano) == answers_to_sights(*loaded(kind))


def test_batches_beams_and_sessions_work_as_in_pytorch(nano, loaded):
    asked = [{"role": "user", "content": [ASSETS / "number.jpg", "What does it say?"]}]
    both = [asked, [{"role": "user", "content": [ASSETS / "shapes.jpg", "How many shapes are there?"]}]]
    answers, cached = [], []
    for model, processor in (nano, loaded("bf16")):
        session = ChatSession(model, processor, max_new_tokens=16, **GREEDY)
        turns = [session.send(content) for content in ([ASSETS / "shapes.jpg", "How many?"], "What color are they?")]
        beams = model.chat(msgs=asked, processor=processor, max_new_tokens=16, decoding="beam")
        batch = model.chat(msgs=both, processor=processor, max_new_tokens=16, **GREEDY)
        answers.append(([turn.text for turn in turns], beams, batch))
        cached.append(turns[-1].cached_tokens)
    assert answers[0] == answers[1] and cached[0] == cached[1] > 100


def test_4_bits_are_for_the_layers_of_the_language_model_alone(exported):
    import mlx.core as mx

    weights = mx.load(str(exported("4bit") / FILE))
    bits = {}
    for name, scales in weights.items():
        if name.endswith(".scales"):
            weight = weights[name.replace(".scales", ".weight")]
            bits.setdefault(weight.shape[1] * 32 // (scales.shape[1] * 64), set()).add(name.startswith("llm.layers."))
    assert bits == {4: {True}, 8: {False}}


def test_the_command_leaves_a_folder_and_its_figures(tmp_path, monkeypatch):
    pytest.importorskip("mlx.core")
    monkeypatch.setattr(reference, "cases", lambda processor: cases(processor)[:1])
    options = ["--type", "8bit", "--samples", "0", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["export", "mlx", "--model", str(NANO), *options])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| `nano-8bit` |" in card and "1 of 1" in card and "mlx 0." in card


def test_types_are_told_apart_by_their_fingerprints(loaded):
    assert weights_fingerprint(loaded("bf16")[0]) != weights_fingerprint(loaded("4bit")[0])


def test_what_is_not_whole_or_not_given_is_refused(exported, loaded, tmp_path):
    for file in exported("bf16").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert checkpoint.exported(tmp_path) == tmp_path
    with pytest.raises(MLXError, match=r"computes in float32: leave out dtype=torch\.bfloat16"):
        checkpoint.load(tmp_path, dtype=torch.bfloat16)
    with pytest.raises(MLXError, match="runs in MLX, which gives logits alone.*load the checkpoint itself"):
        loaded("bf16")[0](input_ids=torch.arange(5)[None], output_hidden_states=True)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(re.sub('"num_hidden_layers": 4', '"num_hidden_layers": 3', config))
    with pytest.raises(MLXError, match=r"does not fit its config\.json"):
        checkpoint.load(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(MLXError, match=r"has no tokenizer\.json: export the checkpoint again"):
        checkpoint.load(tmp_path)


# ---- without the library ----


def test_without_the_library_the_command_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"mlx is not installed.*\[mlx\]"):
        export_mlx.export(NANO, tmp_path / "out", "4bit")
    assert not (tmp_path / "out").exists()


def test_the_command_offers_every_type():
    assert [kind.value for kind in MLXType] == list(export_mlx.TYPES)
