"""One loader, one rule of trust."""

import shutil

import pytest
import torch
from conftest import REPOSITORY

from minicpmv import checkpoint
from minicpmv.checkpoint import CheckpointError, load, source_of


NANO = REPOSITORY / "nano"


def test_a_folder_is_trusted_and_named_by_its_whole_path(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    expected = {"pretrained_model_name_or_path": str(NANO.resolve()), "trust_remote_code": True}
    assert source_of("nano") == source_of(NANO) == expected


def test_a_revision_of_a_folder_is_refused():
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'abc'"):
        load(NANO, revision="abc")


def test_code_of_the_hub_has_to_be_trusted():
    with pytest.raises(CheckpointError, match=r"openbmb/MiniCPM-V-4_5 is not a folder.*--trust-remote-code"):
        source_of("openbmb/MiniCPM-V-4_5")
    found = source_of("openbmb/MiniCPM-V-4_5", "abc", trust_remote_code=True)
    assert found["revision"] == "abc" and found["trust_remote_code"] is True


def test_a_model_that_transformers_knows_may_come_without_trust_but_its_code_does_not_run():
    assert source_of("someone/llama", needs_code=False)["trust_remote_code"] is False


def test_a_model_is_loaded_in_the_type_asked_for():
    model, processor = load(NANO, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.chat(msgs=[{"role": "user", "content": ["Hi"]}], processor=processor, max_new_tokens=2) is not None


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_without_a_model_is_named_before_anything_is_imported(tmp_path, monkeypatch, missing):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    for name in {"config.json", "model.safetensors"} - {missing}:
        shutil.copy(NANO / name, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds no model .no (config|weights).*-m nano"):
        load(tmp_path)


def test_cut_weights_are_an_error_with_the_remedy(tmp_path):
    for file in NANO.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file.resolve())
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes((NANO / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cannot be loaded.*minicpmv fetch"):
        load(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 8}
    config = Qwen3Config(vocab_size=1024, num_key_value_heads=1, **small)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(NANO / name, tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot chat|cannot be loaded"):
        checkpoint.load(tmp_path)
