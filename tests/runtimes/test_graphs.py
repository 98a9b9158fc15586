"""nano in ONNX Runtime: the graphs compute what the model does, and everything above them answers as it does."""

import re

import numpy as np
import pytest
import torch
from conftest import GREEDY, NANO, REPOSITORY, SIGHTS

from minicpmv import checkpoint
from minicpmv.chat import ChatSession
from minicpmv.drawn.samples import BENCH_TASKS, bench_sample
from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.fingerprint import weights_fingerprint
from minicpmv.runtimes.graph_engines import GraphError
from minicpmv.runtimes.graphs import Graphs, Unit


pytest.importorskip("onnxruntime")

ASSETS = REPOSITORY / "assets"


@pytest.fixture(scope="module")
def graphs(onnx_nano):
    return Graphs(onnx_nano("fp32"), 1)


@pytest.fixture(scope="module")
def loaded(onnx_nano):
    """A function (type) -> `(model, processor)`, loaded once."""
    known = {}

    def load(kind):
        if kind not in known:
            known[kind] = checkpoint.load(onnx_nano(kind))
        return known[kind]

    return load


# ---- the graphs ----


def units_of(shapes, seed=0):
    random = np.random.default_rng(seed)
    return [
        Unit([random.normal(size=(3, 14, 14 * rows * columns)).astype(np.float32) for _ in ids], (rows, columns), ids)
        for rows, columns, ids in shapes
    ]


@pytest.mark.parametrize(
    "shapes",
    [
        [(8, 8, [-1])],
        [(1, 1, [-1]), (1, 64, [-1]), (64, 1, [-1])],  # sides of one patch, and as long as a slice can be
        [(55, 58, [-1])],  # sides whose positions a plain division puts elsewhere
        [(7, 9, [-1]), (8, 8, [0, 3, 7]), (7, 9, [-1]), (8, 8, [71999, 90000, 90003]), (8, 8, [10])],
    ],
)
def test_features_are_those_of_the_model_in_the_order_of_the_units(nano_model, graphs, shapes):
    units = units_of(shapes)
    pixels = [torch.from_numpy(strip) for unit in units for strip in unit.strips]
    sizes, ids = [unit.size for unit in units for _ in unit.strips], [unit.temporal_ids for unit in units]
    with torch.inference_mode():
        expected = nano_model.get_image_features([pixels], [sizes], [ids]).pooler_output.numpy()
    assert np.abs(graphs.encode(units, most=2) - expected).max() < 2e-4


def test_a_slice_longer_than_any_image_makes_is_an_error_with_its_shape(graphs):
    with pytest.raises(GraphError, match=r"cannot read .*\(1, 1, 3, 14, 4200\)"):
        graphs.encode(units_of([(1, 300, [-1])]))


def test_features_of_fewer_units_than_were_given_are_an_error_that_names_the_software(onnx_nano, tmp_path):
    onnx = pytest.importorskip("onnx")
    for file in onnx_nano("fp32").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (vision := tmp_path / "vision_encoder.onnx").unlink()
    none = onnx.numpy_helper.from_array(np.zeros((0, 36, 256), np.float32))
    inputs = [("pixel_values", onnx.TensorProto.FLOAT, 5), ("temporal_ids", onnx.TensorProto.INT64, 2)]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Constant", [], ["features"], value=none)],
        "broken",
        [onnx.helper.make_tensor_value_info(name, kind, [None] * sides) for name, kind, sides in inputs],
        [onnx.helper.make_tensor_value_info("features", onnx.TensorProto.FLOAT, [0, 36, 256])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), vision)
    with pytest.raises(GraphError, match=r"vision_encoder\.onnx gave features of 0 images for 1: onnxruntime \d"):
        Graphs(tmp_path, 1).encode(units_of([(8, 8, [-1])]))


@pytest.mark.parametrize("batch, length, past", [(1, 1, 0), (1, 6, 0), (1, 1, 7), (2, 3, 5)])
def test_logits_are_those_of_the_model_behind_what_was_read_before(nano_model, graphs, batch, length, past):
    ids = torch.randint(0, 800, (batch, past + length), generator=torch.Generator().manual_seed(batch + past))
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[0, :2] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = nano_model(input_ids=ids, attention_mask=mask, position_ids=places).logits[:, past:].numpy()
    embeddings, mask, places = graphs.embed(ids.numpy()), mask.numpy(), places.numpy()
    states = graphs.no_states(batch)
    if past:
        _, states = graphs.decode(embeddings[:, :past], mask[:, :past], places[:, :past], np.array([past - 1]), states)
    kept = np.arange(length)[::-1]  # in an order of the caller's
    logits, states = graphs.decode(embeddings[:, past:], mask, places[:, past:], kept, states)
    assert np.abs(logits[:, ::-1] - expected).max() < 2e-3 and states[0].shape[2] == past + length


# ---- the model ----


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_images_slices_and_packed_videos_are_answered_as_in_pytorch(nano, loaded, kind):
    for asked, options in SIGHTS:
        answers = [
            model.chat(msgs=asked, processor=processor, return_dict=True, max_new_tokens=24, **GREEDY | options)
            for model, processor in (nano, loaded(kind))
        ]
        assert answers[0].raw_text == answers[1].raw_text and answers[0].prompt_tokens == answers[1].prompt_tokens


def test_twenty_questions_of_nanobench_are_answered_as_in_pytorch(nano, loaded):
    asked = []
    for task in [task for task in BENCH_TASKS if bench_sample(task).images][:20]:
        sample = bench_sample(task)
        asked.append([{"role": "user", "content": [*sample.images, sample.turns[0].question]}])
    answers = [
        model.chat(msgs=asked, processor=processor, max_new_tokens=8, **GREEDY)
        for model, processor in (nano, loaded("fp32"))
    ]
    assert len(asked) >= 15 and answers[0] == answers[1]


def test_beams_streams_thoughts_and_guesses_work_as_in_pytorch(nano, loaded):
    asked = [{"role": "user", "content": [ASSETS / "number.jpg", "What does it say?"]}]
    for options in (
        {"decoding": "beam"},
        {**GREEDY, "enable_thinking": True},
        {**GREEDY, "prompt_lookup_num_tokens": 3},
        {"decoding": "sample", "seed": 5},
    ):
        ours, theirs = (
            model.chat(msgs=asked, processor=processor, max_new_tokens=16, **options)
            for model, processor in (nano, loaded("fp32"))
        )
        assert ours == theirs, options
    model, processor = loaded("fp32")
    pieces = model.chat(msgs=asked, processor=processor, max_new_tokens=16, stream=True, **GREEDY)
    assert "".join(pieces) == model.chat(msgs=asked, processor=processor, max_new_tokens=16, **GREEDY)


def test_a_session_reads_only_what_is_new(nano, loaded):
    sessions = [
        ChatSession(model, processor, max_new_tokens=16, **GREEDY) for model, processor in (nano, loaded("fp32"))
    ]
    for content in ([ASSETS / "shapes.jpg", "What color is the circle?"], "How many shapes are there?"):
        ours, theirs = (session.send(content) for session in sessions)
        assert ours.text == theirs.text and ours.cached_tokens == theirs.cached_tokens
    assert theirs.cached_tokens > 100


def test_what_graphs_do_not_give_is_refused_with_the_remedy(loaded):
    model, _ = loaded("fp32")
    ids = torch.arange(5)[None]
    for options in ({"labels": ids}, {"output_hidden_states": True}):
        with pytest.raises(GraphError, match="an exported model gives logits alone.*load the checkpoint itself"):
            model(input_ids=ids, **options)


def test_types_are_told_apart_by_their_fingerprints(loaded):
    prints = [weights_fingerprint(loaded(kind)[0]) for kind in ("fp32", "int8")]
    assert prints[0] != prints[1] and prints[0] == weights_fingerprint(loaded("fp32")[0])


# ---- the folder ----


def test_folders_that_are_not_whole_are_refused(onnx_nano, tmp_path):
    for file in onnx_nano("int8").iterdir():
        (tmp_path / file.name).symlink_to(file)
    assert checkpoint.exported(tmp_path) == tmp_path
    with pytest.raises(MiniCPMVError, match="which has no revision"):
        checkpoint.load(tmp_path, revision="main")
    with pytest.raises(MiniCPMVError, match="is quantized as it is"):
        checkpoint.load(tmp_path, quantization_config=object())
    with pytest.raises(GraphError, match=r"computes in float32: leave out dtype=torch\.bfloat16"):
        checkpoint.load(tmp_path, dtype=torch.bfloat16)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(config.replace('"vocab_size": 1024', '"vocab_size": 1000'))
    with pytest.raises(GraphError, match=re.escape("1024 tokens of width 256, but its config.json says 1000")):
        checkpoint.load(tmp_path)
    (tmp_path / "vision_encoder.onnx").unlink()
    with pytest.raises(GraphError, match=r"has no vision_encoder\.onnx: export the checkpoint again"):
        checkpoint.load(tmp_path)
    (tmp_path / "vision_encoder.onnx").write_bytes(b"nothing")
    with pytest.raises(GraphError, match=r"vision_encoder\.onnx cannot be loaded"):
        checkpoint.load(tmp_path)


def test_weights_win_over_graphs_beside_them(onnx_nano, tmp_path):
    (tmp_path / "decoder_model.onnx").symlink_to(onnx_nano("int8") / "decoder_model.onnx")
    assert checkpoint.exported(tmp_path) == tmp_path
    (tmp_path / "model.safetensors").symlink_to(NANO / "model.safetensors")
    assert checkpoint.exported(tmp_path) is None
