"""GPTQ and AWQ over given conversations: what the library sees is what the model computes, and what it writes answers. Where
llm-compressor is not installed, `make deploy-slow` runs it."""

import json

import pytest
import torch
from conftest import GREEDY, NANO, REPOSITORY
from safetensors import safe_open

from minicpmv.checkpoint import load
from minicpmv.data.collator import ConversationCollator
from minicpmv.data.load import some_conversations
from minicpmv.deploy.quantize import quantize, weights_bytes


pytest.importorskip("llmcompressor", reason="make deploy-slow runs it in an environment of its own")

ASSETS = REPOSITORY / "assets"
CLIP = {"fps": 3, "max_num_packing": 6, "force_packing": 6}
ASKED = (
    ("number.jpg", "What does it say?", "47", {}),
    ("shapes.jpg", "What color is the circle?", "red", {}),
    ("star.mp4", "Which way does the shape move?", "right", CLIP),
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file with conversations about images, about a packed video, and about nothing to be seen."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    found = [
        {"query": question, "response": answer, "videos" if options else "images": [str(ASSETS / name)]} | options
        for name, question, answer, options in ASKED
    ]
    found.append({"query": "What is one and one?", "response": "2"})
    file.write_text("\n".join(map(json.dumps, found)))
    return file


def answers(folder):
    model, processor = load(folder)
    return [
        model.chat(
            msgs=[{"role": "user", "content": [ASSETS / name, question]}],
            processor=processor,
            max_new_tokens=16,
            **GREEDY | options,
        )
        for name, question, _, options in ASKED
    ]


def test_what_is_traced_computes_what_the_model_does(rows):
    from minicpmv.deploy.calibrate import encode, forward

    model, processor = load(NANO)
    conversations = some_conversations(str(rows), 4)
    for row, batch in zip(conversations, encode(processor, conversations), strict=True):
        expected = ConversationCollator(processor)([row])
        expected.pop("labels")
        with torch.no_grad():
            assert torch.equal(forward(model, **batch).logits, model(**expected).logits)


@pytest.mark.parametrize(
    "method, algorithm, group_size", [("w4a16", "gptq", 64), ("w4a16", "awq", 64), ("w8a8", "gptq", None)]
)
def test_calibrated_checkpoints_keep_the_same_parts_whole_and_answer(rows, method, algorithm, group_size, tmp_path):
    options = {"algorithm": algorithm, "data": str(rows), "conversations": 4, "group_size": group_size}
    folder = quantize(NANO, tmp_path / "small", method, samples=0, **options)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["re:.*vpm.*", "re:.*resampler.*", "re:.*lm_head.*"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        kept = {name for name in file.keys() if name.endswith("_scale")}  # noqa: SIM118
    assert len(kept) == 28 and all(name.startswith("llm.") for name in kept)
    assert weights_bytes(folder) < weights_bytes(NANO)
    assert answers(folder) == answers(NANO)
    assert f"chosen by {algorithm} over 4 conversations (rows.jsonl)" in (folder / "README.md").read_text()
