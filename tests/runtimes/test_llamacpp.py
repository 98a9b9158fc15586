"""A model whose language model runs in llama.cpp does all that the model in PyTorch does, from the same cache objects."""

import base64
import re
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GREEDY, NANO, REPOSITORY, ground_floor
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from minicpmv import checkpoint
from minicpmv.chat import ChatSession
from minicpmv.checkpoint import CheckpointError
from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.fingerprint import weights_fingerprint
from minicpmv.runtimes import llamacpp as binding
from minicpmv.runtimes.gguf import (
    TABLE_SIDE,
    cells_to_buckets,
    find_mmproj,
    gathered_positions,
    spread_positions,
    tower_tensors,
)
from minicpmv.runtimes.gguf_file import GGUFError, GGUFFile
from minicpmv.runtimes.llamacpp import CONTEXT_DEFAULTS, MODEL_DEFAULTS, LlamaCppError, check_layout, dequantized
from minicpmv.runtimes.llamacpp import library as load_library


gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ASSETS = REPOSITORY / "assets"
STAR = [ASSETS / "star.mp4", "Which way does the shape move?"]
NUMBER = [ASSETS / "number.jpg", "What does it say?"]
RECEIPT = [ASSETS / "receipt.jpg", "What is the TOTAL?"]


@pytest.fixture(scope="module")
def pair(nano, llamacpp):
    """`(model, processor)` in PyTorch and in llama.cpp."""
    return nano, llamacpp("f16")


def asked(content):
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    "options",
    [
        {"msgs": [asked(STAR), asked(NUMBER), asked(RECEIPT)], **GREEDY},
        {"msgs": asked(RECEIPT), "decoding": "beam"},
        {"msgs": asked(NUMBER), "decoding": "sample", "seed": 3, "temperature": 1.5},
        {"msgs": asked(NUMBER), "enable_thinking": True},
        {"msgs": asked(RECEIPT), "enable_thinking": "auto"},
        {"msgs": asked(RECEIPT), "prompt_lookup_num_tokens": 3},
    ],
    ids=["batch", "beams", "sampling", "thinking", "auto", "guessed tokens"],
)
def test_every_way_to_answer_gives_what_pytorch_gives(pair, options):
    ours, theirs = (model.chat(processor=processor, max_new_tokens=40, **options) for model, processor in pair)
    assert ours == theirs


def test_a_conversation_about_a_video_and_an_image_goes_on_forks_and_is_taken_back_as_in_pytorch(pair):
    def talk(model, processor):
        session = ChatSession(model, processor, max_new_tokens=12, **GREEDY)
        outputs = [session.send(STAR), session.send(NUMBER)]
        fork = session.fork()
        outputs += [session.send(STAR[1]), fork.send(RECEIPT)]
        session.undo()
        with session.send("What color is the shape?", stream=True) as stream:
            text = "".join(stream)
        return [(output.text, output.prompt_tokens, output.cached_tokens) for output in outputs], text

    ours, theirs = (talk(*each) for each in pair)
    assert ours == theirs
    assert ours[0][1][2] > 200  # the video was not read again


def test_sessions_in_several_threads_share_one_llama_cpp(pair):
    def talk(model, processor, content):
        session = ChatSession(model, processor, max_new_tokens=8, **GREEDY)
        return [session.send(content).text, session.send("What color is the shape?").text]

    contents = [STAR, NUMBER, RECEIPT]
    with ThreadPoolExecutor(3) as pool:
        theirs = list(pool.map(partial(talk, *pair[1]), contents))
    assert theirs == [talk(*pair[0], content) for content in contents]


def test_logits_of_float32_weights_are_those_of_pytorch(nano, llamacpp):
    ids = torch.tensor([[888, 5, 17, 300, 42, 886, 9]])
    with torch.inference_mode():
        ours, theirs = (model(ids).logits for model in (nano[0], llamacpp("f32")[0]))
    assert (ours - theirs).norm() / ours.norm() < 1e-3  # llama.cpp keeps states in 16 bits


def test_a_padded_batch_reads_each_row_alone(llamacpp):
    model, _ = llamacpp("f32")
    ids, mask = torch.tensor([[887, 887, 5, 17], [3, 9, 5, 17]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    with torch.inference_mode():
        both = model(ids, attention_mask=mask).logits
        alone = model(ids[:1, 2:]).logits
    assert torch.allclose(both[:1, 2:], alone, atol=1e-2, rtol=0)


def test_a_cache_that_was_cropped_is_believed(llamacpp):
    from transformers import DynamicCache

    model, _ = llamacpp("f32")
    name = ground_floor("compat_minicpmv").CACHE_NAME
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([[888, 5, 17, 300]])
    with torch.inference_mode():
        model(ids, **{name: cache})
        cache.crop(-2)
        model(torch.tensor([[7, 8, 9]]))  # something else takes the states in between
        behind = model(torch.tensor([[17, 300]]), **{name: cache}).logits
        whole = model(ids).logits[:, 2:]
    assert cache.get_seq_length() == 4 and torch.allclose(behind, whole, atol=1e-2, rtol=0)


def test_files_of_other_types_are_other_weights(llamacpp):
    digits = {kind: weights_fingerprint(llamacpp(kind)[0]) for kind in ("f32", "f16", "q8_0")}
    assert len(set(digits.values())) == 3


def test_what_llama_cpp_cannot_do_is_refused(llamacpp):
    model, _ = llamacpp("f16")
    ids = torch.tensor([[5, 17]])
    with pytest.raises(LlamaCppError, match="for a loss load the checkpoint itself"):
        model(ids, labels=ids)
    with pytest.raises(LlamaCppError, match="load the checkpoint itself"):
        model.generate(ids, cache_implementation="static", max_new_tokens=2)
    with pytest.raises(LlamaCppError, match="there is room for 256 of 4096"):
        model(torch.zeros(1, 4097, dtype=torch.long))
    with pytest.raises(LlamaCppError, match="for the hidden states load the checkpoint itself"):
        model.base_model(ids)


@pytest.mark.parametrize("name", [*MODEL_DEFAULTS, *CONTEXT_DEFAULTS])
def test_a_library_with_another_layout_is_refused(name):
    found = MODEL_DEFAULTS | CONTEXT_DEFAULTS
    check_layout(found)
    with pytest.raises(LlamaCppError, match=f"another C interface.*{name} is 99"):
        check_layout(found | {name: 99})


def test_the_layout_is_looked_at_before_the_library_is_used(monkeypatch):
    monkeypatch.setattr(binding, "found_defaults", lambda lib: {"n_gpu_layers": 5})
    with pytest.raises(LlamaCppError, match="pip install -c constraints.txt xllamacpp"):
        load_library.__wrapped__()


# ---- files ----


def test_a_folder_with_one_language_model_is_a_model(copied):
    model, _ = checkpoint.load(copied)
    assert model.llm.file.name == "nano-F16.gguf"


def test_a_folder_with_several_names_them(ggufs):
    with pytest.raises(GGUFError, match=r"holds 4 models: name one of .*nano-F16\.gguf.*nano-Q8_0\.gguf"):
        checkpoint.load(ggufs)


@pytest.mark.parametrize(
    "missing, message",
    [
        ("mmproj-nano-F16.gguf", "there is no mmproj-.*same folder"),
        ("config.json", r"there is no config\.json"),
        ("tokenizer.json", r"there is no tokenizer\.json"),
    ],
)
def test_what_has_to_lie_beside_the_file_is_named_before_anything_is_imported(copied, monkeypatch, missing, message):
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    (copied / missing).unlink()
    with pytest.raises(GGUFError, match=message):
        checkpoint.load(copied / "nano-F16.gguf")


def test_the_file_of_the_tower_is_no_model(ggufs):
    with pytest.raises(GGUFError, match="is the vision tower of a model: name the file beside it"):
        checkpoint.load(ggufs / "mmproj-nano-F16.gguf")


def test_the_most_exact_tower_of_the_same_model_is_taken(tmp_path):
    for name in ("mmproj-other-F32", "mmproj-nano-Q8_0", "mmproj-nano-F16", "mmproj-nano-BF16", "nano-Q4_K_M"):
        (tmp_path / f"{name}.gguf").touch()
    assert find_mmproj(tmp_path / "nano-Q4_K_M.gguf").name == "mmproj-nano-F16.gguf"


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(CheckpointError, match=r"nowhere/x\.gguf: no such file"):
        checkpoint.load("nowhere/x.gguf")


def test_a_tower_of_an_older_converter_is_read_as_llama_cpp_reads_it(ggufs):
    tensors = dict(tower_tensors(ggufs / "mmproj-nano-F16.gguf", 6, 16))
    swapped = ggufs.parent / "mmproj-swapped.gguf"
    swap = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    reader = gguf.GGUFReader(ggufs / "mmproj-nano-F16.gguf")
    writer = gguf.GGUFWriter(swapped, "clip")
    writer.add_array("minicpmv.position_cells", reader.get_field("minicpmv.position_cells").contents())
    for tensor in reader.tensors:
        writer.add_tensor(re.sub("ffn_(up|down)", lambda found: swap[found[0]], tensor.name), np.array(tensor.data))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    found = dict(tower_tensors(swapped, 6, 16))
    assert found.keys() == tensors.keys() and all(np.array_equal(found[name], tensors[name]) for name in tensors)


def test_a_file_is_read_as_the_package_gguf_reads_it(ggufs):
    for file in ggufs.glob("*.gguf"):
        ours, theirs = GGUFFile(file), gguf.GGUFReader(file)
        assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
        for tensor in theirs.tensors:
            found = ours.tensors[tensor.name]
            assert found.kind == tensor.tensor_type and np.array_equal(found.data, tensor.data)
        texts_in_lists = {"tokenizer.ggml.tokens", "tokenizer.ggml.merges"}
        names = [name for name in theirs.fields if not name.startswith("GGUF.")]
        assert list(ours.fields) == names
        for name in set(names) - texts_in_lists:
            assert ours.fields[name] == theirs.get_field(name).contents(), name


def test_rows_of_a_table_are_those_that_the_package_gguf_reads(ggufs):
    kinds = set()
    for file in ggufs.glob("nano-*.gguf"):
        for tensor in GGUFFile(file).tensors.values():
            if tensor.data.ndim == 2 and tensor.kind not in kinds:
                kinds.add(tensor.kind)
                places = np.array([3, 0, 3, len(tensor.data) - 1])
                np.testing.assert_allclose(dequantized(tensor, places), tensor.rows(places), rtol=1e-6)
    assert {gguf.GGMLQuantizationType[name] for name in ("F16", "Q8_0", "Q4_K", "Q6_K")} <= kinds


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.9, 0.9999])
def test_a_file_that_is_cut_anywhere_is_no_whole_one(copied, share):
    file = copied / "nano-F16.gguf"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data[: int(share * len(data))])
    with pytest.raises(GGUFError, match=r"nano-F16\.gguf is no whole GGUF file"):
        GGUFFile(file)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 2000), byte=st.integers(0, 255))
@example(place=8, byte=0)  # no tensors, so that none is cut
def test_a_damaged_head_is_no_traceback(ggufs, place, byte):
    data = bytearray((ggufs / "mmproj-nano-F16.gguf").read_bytes()[:20000])
    data[place] = byte
    file = ggufs.parent / "damaged.gguf"
    file.write_bytes(data)
    with pytest.raises(GGUFError):  # if for nothing else, since it is cut
        GGUFFile(file)


@pytest.mark.parametrize("kind", [0, 8])
def test_a_tensor_without_dimensions_is_no_traceback(tmp_path, kind):
    file = tmp_path / "scalar.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 0, kind, 0)
    file.write_bytes(head.ljust(4096, b"\0"))
    with pytest.raises(GGUFError, match="no whole GGUF file"):
        GGUFFile(file)


def test_a_model_beside_files_of_another_one_is_refused(copied):
    config = (copied / "config.json").read_text()
    (copied / "config.json").unlink()
    (copied / "config.json").write_text(config.replace('"vocab_size": 1024', '"vocab_size": 1000'))
    with pytest.raises(GGUFError, match="1024 tokens of width 256, but the config.json beside it says 1000"):
        checkpoint.load(copied)


def test_revisions_and_quantization_are_not_for_files(ggufs):
    with pytest.raises(MiniCPMVError, match="which has no revision"):
        checkpoint.load(ggufs / "nano-F16.gguf", revision="main")
    with pytest.raises(MiniCPMVError, match="is quantized as it is"):
        checkpoint.load(ggufs / "nano-F16.gguf", quantization_config=object())


def test_weights_win_over_a_file_beside_them(copied):
    shutil.copy(NANO / "model.safetensors", copied)
    assert checkpoint.exported(copied) is None
    assert checkpoint.exported(copied / "nano-F16.gguf") == copied / "nano-F16.gguf"


# ---- the position table ----


def buckets_of(side):
    buckets = ground_floor("vision_minicpmv").position_buckets
    return lambda count: buckets(count, side)


@given(side=st.integers(2, TABLE_SIDE), seed=st.integers(0, 99))
def test_a_table_that_was_spread_is_found_again(side, seed):
    cells = cells_to_buckets(side, side // 2, buckets_of(side))
    table = np.random.default_rng(seed).normal(size=(side * side, 2))
    if set(cells) == set(range(side)):
        assert np.array_equal(gathered_positions(spread_positions(table, cells), cells, side), table)
    else:
        with pytest.raises(GGUFError, match="cannot stand for one of"):
            gathered_positions(spread_positions(table, cells), cells, side)


def test_llama_cpp_reads_the_rows_of_a_small_table_that_we_read():
    cells = cells_to_buckets(16, 8, buckets_of(16))
    for count in range(1, 13):
        theirs = cells[TABLE_SIDE * np.arange(count) // count]
        assert np.array_equal(theirs, buckets_of(16)(count)), count


def test_a_table_of_the_published_size_stays_as_it_is():
    assert np.array_equal(cells_to_buckets(TABLE_SIDE, 32, buckets_of(TABLE_SIDE)), np.arange(TABLE_SIDE))


def test_the_server_answers_about_images_and_videos_from_a_file(llamacpp):
    pytest.importorskip("pydantic")
    from minicpmv.serving.engine import LocalEngine

    with LocalEngine(*llamacpp("f16"), "nano", max_rows=2) as engine:
        for (file, question), kind, answer in ((NUMBER, "image", "47"), (STAR, "video", "right")):
            data = base64.b64encode(file.read_bytes()).decode()
            part = {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{kind}/any;base64,{data}"}}
            content = [part, {"type": "text", "text": question}]
            body = {"model": "nano", "messages": [{"role": "user", "content": content}], "temperature": 0}
            reply = engine.answer(body)
            assert reply["choices"][0]["message"]["content"] == answer, reply


def test_a_server_writes_many_answers_at_once_and_keeps_their_states_apart(llamacpp):
    pytest.importorskip("pydantic")
    from minicpmv.serving.engine import LocalEngine

    model, processor = llamacpp("f16")
    questions = [f"What is {number}?" for number in range(6)]
    bodies = [
        {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8} for text in questions
    ]
    bodies = [body | {"logit_bias": {"887": -100, "889": -100}} for body in bodies]
    with LocalEngine(model, processor, "nano", max_rows=4) as engine:
        alone = [engine.answer(body)["choices"][0]["message"]["content"] for body in bodies]
        with ThreadPoolExecutor(6) as pool:
            together = [answer["choices"][0]["message"]["content"] for answer in pool.map(engine.answer, bodies)]
        assert together == alone
        reads = []
        read = binding.LlamaCpp.read
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(binding.LlamaCpp, "read", lambda self, parts: reads.append(parts) or read(self, parts))
            with ThreadPoolExecutor(4) as pool:
                list(pool.map(engine.answer, bodies[:4]))
        # Once a row is in the batch, each of its tokens is read alone: nobody takes its states.
        assert sum(len(part.rows) for parts in reads for part in parts) < 4 * (8 + 2 * 24)
