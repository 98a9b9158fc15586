"""Nano in ONNX Runtime without PyTorch: it answers as sessions do, and imports no torch."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GREEDY, PACKED, REPOSITORY
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minicpmv.chat import ChatSession
from minicpmv.chat.runner import Choice, Runner
from minicpmv.runtimes.graph_engines import GraphError


pytest.importorskip("onnxruntime")

ASSETS = REPOSITORY / "assets"


@pytest.fixture(scope="module")
def runner(onnx_nano):
    return Runner(onnx_nano("fp32"), 1)


def test_conversations_answer_and_remember_as_sessions_do(nano, runner):
    model, processor = nano
    turns = (
        [ASSETS / "shapes.jpg", "What color is the circle?"],
        "How many shapes are there?",
        [ASSETS / "star.mp4", ASSETS / "number.jpg", "What does it say?"],
    )
    session = ChatSession(model, processor, max_new_tokens=16, **GREEDY | PACKED)
    conversation = runner.conversation(max_new_tokens=16, **PACKED)
    for content in turns:
        ours, theirs = session.send(content), conversation.send(content)
        assert (theirs.text, theirs.reasoning, theirs.finish_reason) == (ours.text, None, ours.finish_reason)
        assert (theirs.prompt_tokens, theirs.generated_tokens) == (ours.prompt_tokens, ours.generated_tokens)
        assert theirs.cached_tokens == ours.cached_tokens
    assert theirs.cached_tokens > 200


def test_slices_thoughts_and_equal_slices_are_read_as_by_the_model(nano, runner):
    model, processor = nano
    for content, options in (
        ([ASSETS / "receipt.jpg", "What is the TOTAL?"], {"max_slice_nums": 4}),
        ([Image.new("RGB", (224, 224), "white"), "What color is it?"], {}),  # all of its slices are the same
        (["7 + 5 = ?"], {"enable_thinking": True}),
    ):
        asked = [{"role": "user", "content": content}]
        ours = model.chat(msgs=asked, processor=processor, return_dict=True, max_new_tokens=24, **GREEDY | options)
        theirs = runner.chat(asked, max_new_tokens=24, **options)
        assert (theirs.text, theirs.reasoning) == (ours.text, ours.reasoning)
        pieces = runner.conversation(max_new_tokens=24, **options).stream(content)
        assert "".join(pieces) == ours.raw_text.removeprefix("<think>\n").join(
            ["<think>\n" if options.get("enable_thinking") else "", ""]
        )


def test_a_turn_that_was_stopped_leaves_no_trace(runner):
    conversation = runner.conversation(max_new_tokens=16)
    content = [ASSETS / "number.jpg", "What does it say?"]
    stream = conversation.stream(content)
    next(stream)
    stream.close()
    assert conversation.messages == []
    answer = conversation.send(content)
    assert answer.text == runner.chat([{"role": "user", "content": content}], max_new_tokens=16).text
    assert answer.cached_tokens == answer.prompt_tokens - 1


def test_settings_that_do_not_exist_are_refused(runner):
    conversation = runner.conversation()
    with pytest.raises(TypeError, match="there is no option 'num_beams'"):
        conversation.send("Hello", num_beams=3)
    for options in ({"top_p": 0}, {"temperature": -1}, {"max_new_tokens": 0}):
        with pytest.raises(GraphError, match=f"{next(iter(options))}="):
            conversation.send("Hello", **options)


def test_the_positions_of_the_model_bound_prompt_and_answer(runner, monkeypatch):
    monkeypatch.setattr(runner, "max_tokens", 24)
    answer = runner.chat([{"role": "user", "content": "What is it?"}], enable_thinking=True)
    assert answer.prompt_tokens + answer.generated_tokens <= 24
    with pytest.raises(GraphError, match="the prompt has .* tokens, and the model reads 24"):
        runner.chat([{"role": "user", "content": "What is it? " * 9}])


class Dice:
    """In place of a random generator: notes what it chooses from."""

    def choice(self, tokens, p):
        self.shares = dict(zip(tokens.tolist(), p.tolist(), strict=True))
        return tokens[0]


@given(
    seed=st.integers(0, 99),
    temperature=st.floats(0.2, 2),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.1, 1),
    penalty=st.floats(0.8, 1.5),
)
def test_tokens_are_drawn_with_the_shares_that_transformers_gives_them(seed, temperature, top_k, top_p, penalty):
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(seed)) * 3
    ids = [1, 4, 4]
    steps = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = LogitsProcessorList(steps)(torch.tensor([ids]), logits).softmax(-1)[0]
    dice = Dice()
    Choice(temperature, top_p, top_k, penalty).token(logits[0].numpy(), ids, dice)
    found = np.array([dice.shares.get(token, 0.0) for token in range(10)])
    kept, theirs = found > 0, expected.numpy() > 0
    if (kept == theirs).all():  # rounding may decide about the last token that is kept
        assert np.allclose(found, expected.numpy(), atol=1e-4)
    else:
        assert (kept != theirs).sum() == 1


def test_seeds_make_samples_repeatable(runner):
    asked = [{"role": "user", "content": "What is it?"}]
    sampled = [runner.chat(asked, temperature=3.0, seed=seed, max_new_tokens=8).text for seed in (1, 1, 2, 3, 4)]
    assert sampled[0] == sampled[1] and len(set(sampled)) > 1


WITHOUT_TORCH = """
import sys

class Hiding:  # an environment in which torch and what needs it are not installed
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("torch", "torchao", "torchvision", "accelerate", "bitsandbytes", "deepspeed", "peft")
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
from pathlib import Path
from minicpmv.chat.runner import Runner

folder, assets = map(Path, sys.argv[1:])
conversation = Runner(folder, 1).conversation(max_new_tokens=16, fps=3, max_num_packing=6, force_packing=6)
print(conversation.send([assets / "star.mp4", "Which way does the shape move?"]).text)
print(conversation.send([assets / "number.jpg", "What does it say?"]).text)
assert "torch" not in sys.modules
"""


def test_nothing_imports_torch_where_it_is_not_installed(onnx_nano, runner):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(onnx_nano("fp32")), str(ASSETS)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    conversation = runner.conversation(max_new_tokens=16, **PACKED)
    expected = [
        conversation.send([ASSETS / name, question]).text
        for name, question in (("star.mp4", "Which way does the shape move?"), ("number.jpg", "What does it say?"))
    ]
    assert result.stdout.split() == expected
