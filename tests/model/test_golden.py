"""Parity with the published code: ids, bounds, features, logits and greedy answers measured on it."""

import json

import numpy as np
import pytest
import torch
from conftest import FIXTURES, wave_picture


CASES = json.loads((FIXTURES / "prompts.json").read_text())
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": 8}
STOP = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}


@pytest.fixture(scope="module")
def measured():
    return np.load(FIXTURES / "model.npz")


def conversations_of(case):
    """The messages of a case, with its synthetic pictures drawn."""
    conversations = []
    for conversation in case["conversations"]:
        messages = [{"role": "system", "content": case["system"]}] if case["system"] else []
        for message in conversation:
            content = message["content"]
            if not isinstance(content, str):
                content = [wave_picture(*part["image"]) if isinstance(part, dict) else part for part in content]
            messages.append({"role": message["role"], "content": content})
        conversations.append(messages)
    return conversations


def inputs_of(processor, case):
    names = ("temporal_ids", "max_slice_nums", "use_image_id", "enable_thinking")
    options = {name: case[name] for name in names}
    return processor.apply_chat_template(
        conversations_of(case),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_prompt_ids_bounds_and_sizes_equal_the_published_ones(case, processor):
    rendered = processor.apply_chat_template(
        conversations_of(case), add_generation_prompt=True, enable_thinking=case["enable_thinking"]
    )
    assert rendered == case["templated"]
    inputs = inputs_of(processor, case)
    ids = [row[mask.bool()].tolist() for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
    assert ids == [row[pad:] for row, pad in zip(case["input_ids"], case["pad_left"], strict=True)]
    assert [bounds.tolist() for bounds in inputs["image_bound"]] == case["image_bound"]
    assert [sizes.tolist() for sizes in inputs["tgt_sizes"]] == case["tgt_sizes"]
    if case["temporal_ids"]:
        assert inputs["temporal_ids"] == case["out_temporal_ids"]
    else:
        assert "temporal_ids" not in inputs


# Eager attention has masks of its own: those of padded rows, and of slices and frames that are packed.
@pytest.mark.parametrize(
    ("case", "attention"),
    [(case, "sdpa") for case in CASES]
    + [(case, "eager") for case in CASES if case["name"] in ("batch", "video_pack_sliced")],
    ids=lambda value: value if isinstance(value, str) else value["name"],
)
def test_features_logits_and_greedy_answers_equal_the_published_ones(
    case, attention, processor, measured, golden_model, eager_golden_model
):
    model = golden_model if attention == "sdpa" else eager_golden_model
    inputs = inputs_of(processor, case)
    with torch.no_grad():
        _, features = model.get_vllm_embedding(inputs)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**inputs, position_ids=positions, logits_to_keep=1).logits[:, -1]  # of the whole vocabulary
    for index in range(len(logits)):
        name = f"{case['name']}_{index}"
        assert list(features[index].shape) == case["vision_shape"][index]
        np.testing.assert_allclose(features[index].numpy()[:, ::16, ::8], measured[f"{name}_vision"], atol=1e-4)
        np.testing.assert_allclose(logits[index].numpy()[::500], measured[f"{name}_logits"], atol=1e-3)
    answers = model.generate(**inputs, **GREEDY, **STOP)[:, inputs["input_ids"].shape[1] :]
    assert answers.tolist() == case["greedy"]
