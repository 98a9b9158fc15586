"""nano in ExecuTorch, where it is installed: `make deploy-slow`, since lowering it takes minutes."""

import json

import numpy as np
import pytest
import torch
from conftest import GREEDY, NANO, REPOSITORY, answers_to_sights
from typer.testing import CliRunner

from minicpmv import checkpoint
from minicpmv.chat import ChatSession
from minicpmv.commands.export import ProgramType
from minicpmv.commands.main import app
from minicpmv.deploy import executorch as export_executorch
from minicpmv.deploy import reference
from minicpmv.deploy.folder import OutputError
from minicpmv.deploy.parity import cases
from minicpmv.deploy.source import Checkpoint, ExportError
from minicpmv.errors import MissingPackageError
from minicpmv.runtimes.executorch import FIGURES, FILE, ExecuTorchError


ASSETS = REPOSITORY / "assets"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with nano in float32, compared by one case, and the model in it."""
    pytest.importorskip("executorch")
    folder = tmp_path_factory.mktemp("fp32")
    options = ["--type", "fp32", "--tokens", "1024", "--samples", "0", "--output", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "cases", lambda processor: cases(processor)[:1])
        result = CliRunner().invoke(app, ["export", "executorch", "--model", str(NANO), *options])
    assert result.exit_code == 0, result.output
    return folder, checkpoint.load(folder)


def test_the_command_leaves_a_folder_and_its_figures(exported):
    card = (exported[0] / "README.md").read_text(encoding="utf-8")
    assert "| `nano-fp32` |" in card and "1 of 1" in card and "executorch 1." in card


def features_of(model):
    """Image features of still images and packed frames."""
    random = torch.Generator().manual_seed(0)
    units = [((7, 9), [-1]), ((8, 8), [0, 3, 7]), ((1, 64), [-1]), ((8, 8), [71999, 90000])]
    sizes = [size for size, ids in units for _ in ids]
    pixels = [torch.randn(3, 14, 14 * rows * columns, generator=random) for rows, columns in sizes]
    with torch.inference_mode():
        return model.get_image_features([pixels], [sizes], [[ids for _, ids in units]]).pooler_output.numpy()


def logits_of(model, ids):
    """Logits of all tokens [1, L]."""
    with torch.inference_mode():
        return model(input_ids=ids).logits.numpy()


def test_features_are_those_of_the_model(nano_model, exported):
    ours, theirs = features_of(nano_model), features_of(exported[1][0])
    assert np.abs(ours - theirs).max() < 1e-3 * np.abs(ours).max()


def test_4_and_8_bits_are_near_the_model(tmp_path):
    pytest.importorskip("executorch")
    # One layer of each part: lowering all of them takes five minutes.
    source, folder = tmp_path / "source", tmp_path / "8da4w"
    source.mkdir()
    folder.mkdir()
    for file in NANO.iterdir():
        (source / file.name).symlink_to(file.resolve())
    config = json.loads((NANO / "config.json").read_text())
    config["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = 1
    (source / "config.json").unlink()
    (source / "config.json").write_text(json.dumps(config))
    export_executorch.write(Checkpoint(source), export_executorch.TYPES["8da4w"], 512, folder)
    (model, _), (program, _) = checkpoint.load(source), checkpoint.load(folder)
    ids = torch.arange(300)[None]  # more than are read in one call
    for look in (features_of, lambda model: logits_of(model, ids)):
        ours, theirs = look(model), look(program)
        # 4 bits of the language model and its head alone cost a tenth.
        assert 1e-4 < np.linalg.norm(ours - theirs) / np.linalg.norm(ours) < 0.15


def test_images_slices_and_packed_videos_are_answered_as_in_pytorch(nano, exported):
    assert answers_to_sights(*nano) == answers_to_sights(*exported[1])


def test_a_session_reads_only_what_is_new_and_may_go_back(nano, exported):
    texts, cached = [], []
    for model, processor in (nano, exported[1]):
        session = ChatSession(model, processor, max_new_tokens=8, **GREEDY)
        turns = [session.send(content) for content in ([ASSETS / "shapes.jpg", "How many shapes?"], "Which color?")]
        asked = [{"role": "user", "content": [ASSETS / "shapes.jpg", "What color is the circle?"]}]
        other = model.chat(msgs=asked, processor=processor, max_new_tokens=8, **GREEDY)
        texts.append(([turn.text for turn in turns], other))
        cached.append(turns[-1].cached_tokens)
    assert texts[0] == texts[1] and cached[0] == cached[1] > 100


def test_more_tokens_than_there_is_room_for_are_refused(exported):
    folder, (model, _) = exported
    assert json.loads((folder / FIGURES).read_text())["tokens"] == 1024
    with pytest.raises(ExecuTorchError, match="has room for 1024 tokens, and a conversation has 1100: .* --tokens"):
        model(input_ids=torch.zeros(1, 1100, dtype=torch.long))


def test_a_damaged_program_is_named(exported, tmp_path):
    for file in exported[0].iterdir():
        if file.name != FILE:
            (tmp_path / file.name).symlink_to(file)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(ExecuTorchError, match=r"model\.pte cannot be loaded .*export the checkpoint again"):
        checkpoint.load(tmp_path)


# ---- without the software ----


def test_wrong_room_and_a_folder_that_is_there_are_refused_before_anything_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(export_executorch, "require", lambda *packages: None)
    for tokens in (1023, 4097):
        with pytest.raises(ExportError, match=f"--tokens {tokens} is out of range: take 1024 to 4096"):
            export_executorch.export(NANO, tmp_path / "out", "8da4w", tokens=tokens)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is there already: name a new folder"):
        export_executorch.export(NANO, tmp_path, "8da4w")


def test_without_the_software_command_and_loader_say_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"executorch, torchao are not installed.*\[executorch\]"):
        export_executorch.export(NANO, tmp_path / "out", "8da4w")
    (tmp_path / FILE).touch()
    with pytest.raises(MissingPackageError, match=r"executorch is not installed.*\[executorch\]"):
        checkpoint.check_name(tmp_path)


def test_the_command_offers_every_type():
    assert [kind.value for kind in ProgramType] == list(export_executorch.TYPES)
