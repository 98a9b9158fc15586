"""The computed memory of training is what a loaded 4-bit model takes, and what the page on training says."""

import re

import pytest
from conftest import REPOSITORY


pytest.importorskip("trl")
pytest.importorskip("bitsandbytes")

from minicpmv.train.common import memory
from minicpmv.train.common.arguments import AdapterArguments, ModelArguments
from minicpmv.train.common.loading import load_model_and_processor, part_of


def test_computed_bytes_are_those_of_a_loaded_4bit_model():
    nano = ModelArguments(str(REPOSITORY / "nano"), dtype="bfloat16")
    model, _ = load_model_and_processor(nano, AdapterArguments("qlora"))
    found = dict.fromkeys(("quantized", "adapter", "tower", "resampler", "llm"), 0)
    for name, parameter in model.named_parameters():
        if state := getattr(parameter, "quant_state", None):
            found["quantized"] += parameter.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        else:
            found["adapter" if parameter.requires_grad else part_of(name)] += parameter.nbytes
    computed = memory.bytes_of_weights(memory.qlora_model(REPOSITORY / "nano", 16))
    assert list(computed.values()) == [found[name] for name in ("quantized", "llm", "tower", "resampler", "adapter")]


def test_a_step_takes_more_with_more_tokens_and_holds_gradients_and_optimizer_states():
    few, many = (memory.qlora_model(REPOSITORY / "nano", 16) for _ in range(2))
    adapter = memory.bytes_of_weights(few)["adapter"]
    assert 3 * adapter < memory.peak_of_step(few, 32, 1) < memory.peak_of_step(many, 256, 1)


def test_the_command_prints_a_table_that_adds_up_and_refuses_a_folder_without_a_model(tmp_path, capsys):
    memory.main(["-m", str(REPOSITORY / "nano"), "--tokens", "32"])
    sizes = [float(size) for size in re.findall(r"([\d.]+) GiB$", capsys.readouterr().out, re.MULTILINE)]
    assert len(sizes) == 8 and sizes[-1] == pytest.approx(sum(sizes[:-1]), abs=0.05)
    for flags, message in ((["-m", str(tmp_path)], "no config.json"), (["--tokens", "0"], "at least 1")):
        with pytest.raises(SystemExit):
            memory.main(flags)
        assert message in capsys.readouterr().err


def test_the_page_on_training_states_the_computed_weights():
    page = (REPOSITORY / "docs/training.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| ([^|]+?) \| ([\d.]+) GiB \|$", page, re.MULTILINE))
    for name, size in memory.bytes_of_weights(memory.qlora_model(REPOSITORY, 16)).items():
        assert stated[name] == f"{size / memory.GIB:.2f}"
    *parts, whole = map(float, stated.values())
    assert len(parts) == 7 and whole == pytest.approx(sum(parts), abs=0.05)
