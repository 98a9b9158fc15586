"""nano in 4 and 8 bits: what is converted and what stays whole, that it answers after it was loaded, and what is refused."""

import json
from collections import Counter

import pytest
import torch
from conftest import GREEDY, NANO, REPOSITORY, ground_floor
from typer.testing import CliRunner

from minicpmv.checkpoint import CheckpointError, load
from minicpmv.commands.main import app
from minicpmv.data.formats import DataError
from minicpmv.deploy import quantize as engine
from minicpmv.deploy.folder import OutputError
from minicpmv.deploy.quantize import QuantizeError, check, check_groups, linear_layers, quantize
from minicpmv.deploy.source import Checkpoint, ExportError
from minicpmv.errors import MissingPackageError


for package in ("bitsandbytes", "compressed_tensors"):
    pytest.importorskip(package)

ASSETS = REPOSITORY / "assets"
CONFIG = json.loads((NANO / "config.json").read_text(encoding="utf-8"))
LAYERS = 7 * CONFIG["num_hidden_layers"]  # linear ones of the language model
TOWER_LAYERS = CONFIG["vision_config"]["num_hidden_layers"]  # with six linear ones each


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """(method) -> folder of nano in it, written once."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def make(method):
        if method not in made:
            size = 64 if method == "w4a16" else None
            made[method] = quantize(NANO, folder / method, method, group_size=size, is_checked=False)
        return made[method]

    return make


def answers(model, processor, **options):
    return [
        model.chat(
            msgs=[{"role": "user", "content": [ASSETS / name, question]}],
            processor=processor,
            max_new_tokens=16,
            **GREEDY | options,
        )
        for name, question in (("number.jpg", "What does it say?"), ("shapes.jpg", "What color is the circle?"))
    ] + [
        model.chat(
            msgs=[{"role": "user", "content": [ASSETS / "star.mp4", "Which way does the shape move?"]}],
            processor=processor,
            max_new_tokens=16,
            **GREEDY | options | {"fps": 3, "max_num_packing": 6, "force_packing": 6},
        )
    ]


def converted(model):
    """Parts of the model -> how many of their linear layers are quantized."""
    kinds = ("Linear4bit", "Linear8bitLt")
    found = Counter()
    for name, module in model.named_modules():
        is_converted = type(module).__name__ in kinds
        if isinstance(module, torch.nn.Linear) and not is_converted:
            is_converted = type(module.weight.data) is not torch.Tensor
        found[name.split(".")[0]] += is_converted
    return {part: count for part, count in found.items() if count}


def test_the_command_writes_a_checkpoint_with_its_card_that_ask_answers_from(tmp_path):
    options = ["--model", str(NANO), "--output", str(tmp_path / "small"), "--samples", "0"]
    result = CliRunner().invoke(app, ["quantize", "--method", "w8a8", *options])
    assert result.exit_code == 0, result.output
    assert {file.name for file in tmp_path.iterdir()} == {"small"}
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    size = sum(file.stat().st_size for file in (tmp_path / "small").glob("*.safetensors"))
    assert f"| `nano-w8a8` | {size / 1e6:.1f} |" in card and "8 of 8" in card
    question = [str(ASSETS / "star.mp4"), "Which way does the shape move?", "-m", str(tmp_path / "small")]
    result = CliRunner().invoke(app, ["ask", *question])
    assert result.exit_code == 0 and result.stdout.strip()


@pytest.mark.parametrize("method", ["nf4", "int8", "torchao-int8", "torchao-8da8w"])
def test_a_reload_has_the_same_layers_quantized_and_answers_as_before_saving(method, tmp_path, monkeypatch):
    pytest.importorskip(engine.METHODS[method].package, reason="make torchao runs it")
    before = []

    def load_and_keep(*arguments, **options):
        before.append(load(*arguments, **options))
        return before[-1]

    monkeypatch.setattr(engine, "load", load_and_keep)
    folder = quantize(NANO, tmp_path / "small", method, is_checked=False)
    model, processor = load(folder)
    assert converted(model) == converted(before[0][0]) == {"llm": LAYERS}
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head.data_ptr() == embeddings.data_ptr()
    assert answers(model, processor) == answers(*before[0])


@pytest.mark.parametrize("method", ["w8a8", "w4a16"])
def test_compressed_weights_are_whole_for_whoever_calls_first(quantized, method):
    model, processor = load(quantized(method))
    asked = [{"role": "user", "content": [ASSETS / "number.jpg", "What does it say?"]}]
    inputs = processor.apply_chat_template(asked, tokenize=True, return_dict=True, return_tensors="pt")
    assert model.base_model(**inputs).last_hidden_state.isfinite().all()
    guessed = answers(load(quantized(method))[0], processor, prompt_lookup_num_tokens=3)
    assert guessed == answers(model, processor)


def test_rounded_weights_are_within_half_a_step_of_the_whole_ones(quantized, nano_model):
    for method, steps in (("w8a8", 255), ("w4a16", 15)):
        model, _ = load(quantized(method))
        whole = dict(nano_model.named_parameters())
        for name, weight in model.named_parameters():
            if ".layers." not in name or not name.startswith("llm.") or not name.endswith("_proj.weight"):
                assert torch.equal(weight, whole[name]), name
                continue
            # The largest of a group lies at the end of the range, and may be cut off by half a step.
            step = 2 * whole[name].abs().amax() / steps
            assert (weight - whole[name]).abs().amax() <= 1.05 * step, name


def test_compressed_checkpoints_keep_whole_parts_by_patterns(quantized):
    config = json.loads((quantized("w4a16") / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["re:.*vpm.*", "re:.*resampler.*", "re:.*lm_head.*"]
    assert config["format"] == "pack-quantized" and config["config_groups"]["group_0"]["weights"]["group_size"] == 64


def test_the_tower_is_quantized_where_it_is_asked_for(tmp_path):
    folder = quantize(NANO, tmp_path / "small", "nf4", also=["vpm", "resampler"], is_checked=False)
    model, processor = load(folder)
    assert converted(model) == {"llm": LAYERS, "vpm": 6 * TOWER_LAYERS, "resampler": 1}
    assert len(answers(model, processor)) == 3


def test_the_published_4_bit_recipe_reloads_with_equal_answers(tmp_path, nano_model):
    from transformers import BitsAndBytesConfig

    recipe = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="float16",
        bnb_4bit_quant_storage="uint8",
        llm_int8_skip_modules=["out_proj", "kv_proj", "lm_head"],
    )
    model, processor = load(NANO, quantization_config=recipe)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, processor = load(tmp_path)
    assert converted(again) == converted(model) == {"llm": LAYERS, "vpm": 5 * TOWER_LAYERS}
    assert answers(again, processor) == answers(model, processor) == answers(nano_model, processor)


def test_awq_and_gptq_checkpoints_without_a_list_keep_tower_resampler_and_head_whole():
    make = ground_floor("configuration_minicpmv").MiniCPMVConfig
    for method in ("awq", "gptq"):
        config = make(quantization_config={"quant_method": method, "bits": 4, "modules_to_not_convert": None})
        assert config.quantization_config["modules_to_not_convert"] == ["vpm", "resampler", "lm_head"]
    assert config.quantization_config["block_name_to_quantize"] == "llm.model.layers"
    named = {"quant_method": "awq", "modules_to_not_convert": ["vpm"]}
    assert make(quantization_config=named).quantization_config == named


# ---- what is refused ----


def test_group_sizes_that_do_not_divide_name_the_layer_and_those_that_do():
    layers = linear_layers(Checkpoint(NANO), ["vpm"])
    with pytest.raises(QuantizeError, match=r"vpm\.\S+ has rows of 192 weights.*groups of 128.*choose 32 or 64"):
        check_groups(layers, 128)
    with pytest.raises(QuantizeError, match=r"fc2 has rows of 4304 weights.*leave vpm whole"):
        check_groups({"vpm.encoder.layers.0.mlp.fc2": 4304}, 128)
    with pytest.raises(QuantizeError, match="groups of 96"):
        quantize(NANO, NANO, "w4a16", group_size=96)


def test_settings_that_do_not_go_together_are_refused():
    with pytest.raises(QuantizeError, match="nf4 has no groups"):
        check("nf4", 64, "nearest", [])
    with pytest.raises(QuantizeError, match="awq does not know w8a8.*take w4a16"):
        check("w8a8", None, "awq", [])
    with pytest.raises(QuantizeError, match="rows.jsonl was given.*take gptq or awq"):
        check("w4a16", None, "nearest", [], "rows.jsonl")
    with pytest.raises(QuantizeError, match="torchao under transformers keeps lm_head whole"):
        check("torchao-int8", None, "nearest", ["lm_head"])
    with pytest.raises(QuantizeError, match="shares its weights with the embeddings"):
        linear_layers(Checkpoint(NANO), ["lm_head"])


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    absent = ("torchao", "llmcompressor")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name in absent else find_spec(name))
    with pytest.raises(MissingPackageError, match=r"torchao is not installed.*\[torchao\]"):
        check("torchao-int8", None, "nearest", [])
    with pytest.raises(MissingPackageError, match=r"llmcompressor is not installed.*\[calibrate\]"):
        check("w4a16", None, "gptq", [])


def test_a_method_that_does_not_run_here_is_refused_before_the_checkpoint_is_read(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise NotImplementedError("the kernel needs CUDA\nand so on")

    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", refuse)
    with pytest.raises(
        QuantizeError, match=r"nf4 does not run.*\(cpu\): bitsandbytes says: the kernel needs CUDA\. Take w8"
    ):
        quantize(NANO, tmp_path / "small", "nf4")
    assert list(tmp_path.iterdir()) == []


def test_wrong_conversations_are_refused_before_anything_else(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "require", lambda *packages: None)
    row = {"messages": [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "a star"}]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(row | {"images": name}) for name in (str(ASSETS / "shapes.jpg"), "lost.jpg")))
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: there is no image.*lost\.jpg"):
        quantize(NANO, tmp_path / "small", "w4a16", algorithm="gptq", data=str(rows), conversations=1)
    rows.write_text(rows.read_text().splitlines()[0])
    with pytest.raises(DataError, match=r"rows\.jsonl has 1 conversations, and 48 are wanted"):
        quantize(NANO, tmp_path / "small", "w8a8", algorithm="gptq", data=str(rows))
    assert list(tmp_path.iterdir()) == [rows]


@pytest.mark.parametrize("method, package", [("torchao", "torchao is not installed"), ("awq", "requires gptqmodel")])
def test_a_checkpoint_whose_package_is_missing_says_which(method, package, tmp_path, monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else find_spec(name))
    for file in NANO.iterdir():
        if file.is_file():
            (tmp_path / file.name).symlink_to(file.resolve())
    (tmp_path / "config.json").unlink()
    config = json.loads((NANO / "config.json").read_text()) | {
        "quantization_config": {"quant_method": method, "bits": 4}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, MissingPackageError), match=package):
        load(tmp_path)


def test_a_folder_that_is_there_or_quantized_already_is_refused(quantized, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        quantize(NANO, tmp_path, "w8a8")
    with pytest.raises(ExportError, match="is quantized already"):
        quantize(quantized("w8a8"), tmp_path / "again", "w8a8")


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "finish", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(NANO, tmp_path / "small", "w8a8", is_checked=False)
    assert list(tmp_path.iterdir()) == []
