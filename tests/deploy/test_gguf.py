"""nano as GGUF: what the files hold, that a real llama.cpp answers from them as PyTorch does, and what is refused."""

import base64
import io
import json
import re
import shutil
import unicodedata

import jinja2
import numpy as np
import pytest
from conftest import GREEDY, NANO, REPOSITORY
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from minicpmv.commands.export import FileType, TowerType
from minicpmv.commands.main import app
from minicpmv.errors import MissingPackageError
from minicpmv.files import DamagedFileError


gguf = pytest.importorskip("gguf")
xllamacpp = pytest.importorskip("xllamacpp")

from minicpmv.deploy import gguf as export_gguf  # noqa: E402
from minicpmv.deploy import reference  # noqa: E402
from minicpmv.deploy.gguf import export, llama_template  # noqa: E402
from minicpmv.deploy.gguf_types import FILE_TYPES, QuantizationError, gets_more_bits, stored, type_of  # noqa: E402
from minicpmv.deploy.source import Checkpoint, ExportError  # noqa: E402


ASSETS = REPOSITORY / "assets"


@pytest.fixture(scope="module")
def head(ggufs):
    return gguf.GGUFReader(ggufs / "nano-Q4_K_M.gguf")


def names_of(folder):
    return {file.name for file in folder.iterdir()}


# ---- the command ----


def test_the_command_writes_a_file_that_ask_answers_from(tmp_path):
    options = ["--output", str(tmp_path / "out"), "--type", "q8_0", "--samples", "1"]
    result = CliRunner().invoke(app, ["export", "gguf", "--model", str(NANO), *options])
    assert result.exit_code == 0, result.output
    file = tmp_path / "out" / "nano-Q8_0.gguf"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ModelCard(card).data.to_dict() == {"library_name": "gguf", "pipeline_tag": "image-text-to-text"}
    assert (
        f"| `nano-Q8_0` | {file.stat().st_size / 1e6:.1f} |" in card
        and "8 of 8" in card
        and "| video_order | exact | 1 |" in card
    )
    result = CliRunner().invoke(
        app, ["ask", str(ASSETS / "star.mp4"), "Which way does the shape move?", "-m", str(file)]
    )
    assert result.exit_code == 0 and result.stdout == "right\n"


def test_an_export_that_answers_otherwise_is_not_done(nano_processor, tmp_path, monkeypatch):
    few = reference.cases(nano_processor)[:2]
    monkeypatch.setattr(reference, "cases", lambda processor: few)
    spoiled = np.random.default_rng(0)
    monkeypatch.setattr(
        export_gguf,
        "stored",
        lambda tensor, kind, threads: stored(
            tensor * spoiled.normal(1, 0.4, tensor.shape).astype(np.float32), kind, threads
        ),
    )
    options = ["--output", str(tmp_path), "--type", "f16", "--samples", "0"]
    result = CliRunner().invoke(app, ["export", "gguf", "--model", str(NANO), *options])
    assert result.exit_code == 1 and "nano-F16 does not answer as PyTorch does" in result.stderr
    assert names_of(tmp_path) == {"unfinished-nano-F16"}
    assert "is not done" in (tmp_path / "unfinished-nano-F16" / "README.md").read_text(encoding="utf-8")


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_gguf, "write_language_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(NANO, tmp_path, ["f16"], is_checked=False)
    assert names_of(tmp_path) == set()


# ---- what is refused ----


def test_rows_that_blocks_do_not_divide_name_the_tensor():
    with pytest.raises(QuantizationError, match=r"blk\.0\.ffn_up\.weight has rows of 384 values.*256 \(Q4_K\)"):
        type_of("blk.0.ffn_up.weight", (512, 384), FILE_TYPES["q4_k_m"], 4, True)


def test_k_types_need_llama_cpp_and_plain_ones_do_not(monkeypatch):
    find_spec = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "xllamacpp" else find_spec(name))
    checkpoint = Checkpoint(NANO)
    for kind in ("q4_k_m", "q4_0"):  # the latter stores its head as Q6_K
        with pytest.raises(MissingPackageError, match=r"xllamacpp is not installed.*\[gguf\]"):
            export_gguf.check(checkpoint, kind)
    export_gguf.check(checkpoint, "q8_0")


def test_what_is_no_whole_checkpoint_is_refused_before_anything_is_written(tmp_path):
    quantized = tmp_path / "quantized"
    shutil.copytree(NANO, quantized, symlinks=False)
    config = json.loads((quantized / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "awq"}}))
    cases = {
        "openbmb/MiniCPM-V-4_5": "is no folder here.*minicpmv fetch",
        str(quantized): "is quantized already",
    }
    for name, message in cases.items():
        with pytest.raises(ExportError, match=message):
            export(name, tmp_path / "out", ["f16"])
    (quantized / "config.json").write_text(json.dumps(config | {"hidden_size": 320}))
    with pytest.raises(ExportError, match=r"hidden_size \(320\) is no multiple of 128"):
        export(quantized, tmp_path / "out", ["f16"])
    assert not (tmp_path / "out").exists()


def test_damaged_files_of_a_checkpoint_are_named(tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(NANO, folder, symlinks=False)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ExportError, match=r"model\.safetensors is damaged"):
        Checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(DamagedFileError, match=r"config\.json is not JSON"):
        Checkpoint(folder)


def test_the_command_offers_every_type():
    assert [kind.value for kind in FileType] == list(FILE_TYPES)
    assert [kind.value for kind in TowerType] == list(export_gguf.FEATURE_MARGINS)


def test_a_checkpoint_is_not_written_over():
    with pytest.raises(ValueError, match="holds a checkpoint: name another folder"):
        export(NANO, NANO, ["f16"], is_checked=False)


def test_a_weight_that_f16_cannot_hold_is_refused():
    with pytest.raises(QuantizationError, match="65504.*choose bf16 or f32"):
        list(stored(np.full((1, 32), 1e5, np.float32), "F16", 1))


# ---- what the files hold ----


def test_the_head_describes_the_model(head, nano_model):
    fields = {name: head.get_field(name).contents() for name in head.fields if not name.startswith("GGUF.")}
    assert fields["general.architecture"] == "qwen3" and fields["general.file_type"] == 15
    assert (
        fields["qwen3.block_count"] == nano_model.config.num_hidden_layers and fields["qwen3.rope.freq_base"] == 10000
    )
    assert fields["qwen3.attention.head_count_kv"] == 2 and fields["qwen3.attention.key_length"] == 64
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == 1024 and tokens[889] == "<|im_end|>" and tokens[1023] == "[PAD1023]"
    assert [types[place] for place in (0, 886, 911, 1023)] == [1, 3, 4, 5]  # text, a slot, <think>, no token at all


def test_a_mix_stores_layers_better_in_which_errors_cost_more(head):
    kinds = {tensor.name: tensor.tensor_type.name for tensor in head.tensors}
    assert kinds["token_embd.weight"] == "Q6_K" and kinds["blk.0.attn_q.weight"] == "Q4_K"
    layers = head.get_field("qwen3.block_count").contents()
    better = [layer for layer in range(layers) if kinds[f"blk.{layer}.ffn_down.weight"] == "Q6_K"]
    assert better == [layer for layer in range(layers) if gets_more_bits(layer, layers)] and 0 < len(better) < layers
    assert kinds["blk.0.attn_norm.weight"] == "F32" and "output.weight" not in kinds


def test_the_mix_of_36_layers_is_that_of_llama_cpp():
    better = [layer for layer in range(36) if gets_more_bits(layer, 36)]
    assert better == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 31, 32, 33, 34, 35]
    kinds = [type_of(f"blk.{layer}.attn_v.weight", (256, 256), FILE_TYPES["q5_k_m"], 36, False) for layer in (3, 4)]
    assert kinds == ["Q6_K", "Q5_K"]
    assert type_of("token_embd.weight", (9, 256), FILE_TYPES["q5_k_m"], 36, False) == "Q5_K"
    assert type_of("output.weight", (9, 256), FILE_TYPES["q5_k_m"], 36, False) == "Q6_K"


def test_f16_holds_the_checkpoint_bit_for_bit(ggufs):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(ggufs / "nano-F16.gguf").tensors}
    source = Checkpoint(NANO)
    for theirs, ours in export_gguf.names.language_names(source.config["num_hidden_layers"], True).items():
        expected = source.tensor(ours)
        stored_values = tensors[theirs].data.astype(np.float32)
        assert np.array_equal(stored_values, expected.astype(np.float16) if expected.ndim > 1 else expected), theirs


# ---- answers ----


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_k_m"])
def test_images_slices_and_packed_videos_are_answered_as_in_pytorch(nano, llamacpp, kind):
    ours, theirs = nano, llamacpp(kind)
    packed = {"fps": 3, "max_num_packing": 6, "force_packing": 6}
    for name, question, options in (
        ("number.jpg", "What does it say?", {}),
        ("receipt.jpg", "What is the TOTAL?", {"max_slice_nums": 4}),
        ("star.mp4", "Which way does the shape move?", packed),
    ):
        asked = [{"role": "user", "content": [ASSETS / name, question]}]
        answers = [
            model.chat(msgs=asked, processor=processor, return_dict=True, max_new_tokens=24, **GREEDY | options)
            for model, processor in (ours, theirs)
        ]
        assert answers[0].raw_text == answers[1].raw_text and answers[0].prompt_tokens == answers[1].prompt_tokens


def test_an_unmodified_llama_server_gets_our_prompt_and_answers_as_pytorch_does(llama_server, ggufs, nano):
    model, processor = nano
    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(ggufs / "nano-Q8_0.gguf"), str(ggufs / "mmproj-nano-F16.gguf")
    params.n_ctx = 2048
    post = llama_server(params)

    def part(image):
        data = io.BytesIO()
        image.save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        return {"type": "image_url", "image_url": {"url": url}}

    messages, asked = [], []
    for name, question in (("shapes.jpg", "What color is the circle?"), ("number.jpg", "What does it say?")):
        image = Image.open(ASSETS / name).convert("RGB").resize((112, 112))  # which neither of them slices
        messages.append({"role": "user", "content": [part(image), {"type": "text", "text": question}]})
        asked.append({"role": "user", "content": [image, question]})
        ours = model.chat(msgs=asked, processor=processor, max_new_tokens=16, **GREEDY)
        body = {"messages": messages, "temperature": 0, "max_tokens": 16}
        body["chat_template_kwargs"] = {"enable_thinking": False}
        assert post("/v1/chat/completions", body)["choices"][0]["message"]["content"] == ours
        inputs = processor.apply_chat_template(
            asked,
            add_generation_prompt=True,
            enable_thinking=False,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        prompt = processor.tokenizer.decode(inputs["input_ids"][0])
        theirs = re.sub("<__media_.*?__>", "<image></image>", post("/apply-template", body)["prompt"])
        assert theirs == prompt.replace("<unk>", "")
        messages.append({"role": "assistant", "content": ours})
        asked.append({"role": "assistant", "content": ours})


def rendered(template, content):
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=[{"role": "user", "content": content}])


def test_the_template_numbers_images_in_texts_and_in_lists(nano_processor):
    template = llama_template(nano_processor.tokenizer.chat_template)
    expected = (
        "<|im_start|>user\n<image_id>0</image_id><__media__>\nA\n<image_id>1</image_id><__media__>\nB<|im_end|>\n"
    )
    assert rendered(template, "<__media__>A<__media__>B") == expected
    parts = [{"type": "text", "text": text} for text in ("<__media__>", "A", "<__media__>", "B")]
    assert rendered(template, parts) == expected
    assert "media" not in rendered(template, "no image")


def test_another_chat_template_is_refused():
    with pytest.raises(ExportError, match="not this repository's"):
        llama_template("{{ messages }}")


# ---- the tokenizer ----


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=("Cs", "Mn"), exclude_characters="\0"), max_size=40))
def test_llama_cpp_reads_text_as_our_tokenizer_does(llamacpp, text):
    model, processor = llamacpp("f16")
    text = unicodedata.normalize("NFC", text)  # which llama.cpp leaves to its caller
    assert model.llm.tokenize(text) == processor.tokenizer(text)["input_ids"]
