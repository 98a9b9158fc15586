"""The model as transformers, PEFT and trainers use it."""

import copy
import json
import re
import threading
import weakref

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, name_seeded_model, small_config, tiny_config, wave_picture
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    TextIteratorStreamer,
    pipeline,
)


GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "max_new_tokens": 6}


@pytest.fixture(scope="module")
def model(small_model):
    return small_model


@pytest.fixture(scope="module")
def processor(nano_processor):
    return nano_processor


@pytest.fixture(scope="module")
def trainable():
    return name_seeded_model(small_config())


@pytest.fixture(scope="module")
def inputs(processor):
    """A batch with two pictures, a sliced one and none; prompts of unequal length that hold exclamation marks."""
    pictures = [wave_picture(300, 200, 0), wave_picture(97, 411, 2), wave_picture(1000, 700, 3)]
    conversations = [
        [{"role": "user", "content": [pictures[0], pictures[1], "Compare! The two!!"]}],
        [{"role": "user", "content": [pictures[2], "And this one?"]}],
        [{"role": "user", "content": "Hello! No picture!"}],
    ]
    return conversations, processor.apply_chat_template(conversations, **encoding())


def encoding(**options):
    return {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True, **options}


def new_ids(model, inputs, **options):
    return model.generate(**inputs, **GREEDY | options)[:, inputs["input_ids"].shape[1] :].tolist()


# ---- configuration and checkpoint ----


def test_published_layout(repository):
    config = AutoConfig.from_pretrained(repository, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    published = json.loads((REPOSITORY / "minicpmv" / "checkpoint_shapes.json").read_text())
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert len(ours) == 849 and ours == published
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_695_895_280


def test_saved_configuration_is_read_by_older_tools(tmp_path, repository):
    config = AutoConfig.from_pretrained(repository, trust_remote_code=True)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["rope_theta"], str(saved["version"]), saved["image_token_id"]) == (1000000, "4.5", 128244)
    assert saved["model_type"] == "minicpmv" and "text_config" not in saved
    again = AutoConfig.from_pretrained(repository, trust_remote_code=True, **{"query_num": 32})
    assert again.query_num == 32 and again.get_text_config() is again


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"patch_size": 16}, ["patch_size", "16", "14"]),
        ({"hidden_size": 200}, ["hidden_size", "200", "128"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "num_key_value_heads", "3"]),
        ({"image_token_id": 151748}, ["image_token_id", "151748", "vocab_size"]),
        ({"vision_config": {"num_attention_heads": 7}}, ["1152", "7"]),
        ({"vision_config": {"image_size": 981}}, ["981", "14"]),
        ({"query_num": 0}, ["query_num", "0"]),
    ],
)
def test_contradicting_fields_are_named(changes, names):
    with pytest.raises(ValueError) as error:
        tiny_config(**changes)
    assert all(name in str(error.value) for name in names)


def test_save_and_load_give_equal_logits(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "tiny v4.5")
    saved = json.loads((tmp_path / "tiny v4.5" / "config.json").read_text())
    assert saved["architectures"] == ["MiniCPMV"] and len(saved["auto_map"]) == 5
    with torch.no_grad():
        expected = model(**inputs[1]).logits
        for auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText):
            loaded, report = auto_class.from_pretrained(
                tmp_path / "tiny v4.5", trust_remote_code=True, dtype=torch.float32, output_loading_info=True
            )
            assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            assert torch.equal(loaded.eval()(**inputs[1]).logits, expected)


# ---- forward ----


def test_left_padded_batch_equals_singles(model, inputs, processor):
    conversations, batch = inputs
    with torch.no_grad():
        together = model(**batch).logits[:, -1]
        for row, conversation in zip(together, conversations, strict=True):
            alone = model(**processor.apply_chat_template(conversation, **encoding())).logits[0, -1]
            torch.testing.assert_close(row, alone, atol=1e-4, rtol=0)


def test_greedy_batch_equals_singles(model, inputs, processor):
    conversations, batch = inputs
    singles = [new_ids(model, processor.apply_chat_template(c, **encoding()))[0] for c in conversations]
    assert new_ids(model, batch) == singles


def test_older_calling_styles_give_the_same(model, inputs):
    batch = inputs[1]
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(data=dict(batch)).logits, expected)
        assert torch.equal(model(batch).logits, expected)
        both = model(data=dict(batch), input_ids=batch["input_ids"], labels=batch["input_ids"])
        assert torch.equal(both.logits, expected) and both.loss is not None
        last = model(data=dict(batch, logits_to_keep=2), logits_to_keep=1).logits
        torch.testing.assert_close(last, expected[:, -1:])
        embeddings, features = model.get_vllm_embedding(dict(batch))
        assert torch.equal(model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits, expected)
        assert [len(sample) for sample in features] == [len(slices) for slices in batch["pixel_values"]]
    ids = model.generate(inputs=batch["input_ids"], input_ids=batch["input_ids"], **_without_ids(batch), **GREEDY)
    assert ids.tolist() == model.generate(**batch, **GREEDY).tolist() == model.generate(batch, **GREEDY).tolist()


def _without_ids(batch):
    return {name: value for name, value in batch.items() if name != "input_ids"}


def test_features_may_be_computed_before(model, inputs):
    batch = inputs[1]
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"], batch["tgt_sizes"])
        rest = {name: batch[name] for name in ("input_ids", "attention_mask")}
        assert torch.equal(model(**rest, mm_encoder_outputs={"image": features}).logits, model(**batch).logits)
    assert new_ids(model, rest, vision_hidden_states=features.pooler_output) == new_ids(model, batch)
    with pytest.raises(ValueError, match="not both"):
        model(**batch, mm_encoder_outputs={"image": features})


def test_slots_and_features_must_agree(model, inputs):
    batch = dict(inputs[1])
    batch["input_ids"] = batch["input_ids"][:, 10:]
    batch["attention_mask"] = batch["attention_mask"][:, 10:]
    with pytest.raises(ValueError, match="image slots.*features"):
        model(**batch)


def test_base_model_returns_hidden_states_without_logits(model, inputs):
    batch = inputs[1]
    with torch.no_grad():
        hidden = model.base_model(**batch, use_cache=False).last_hidden_state
        torch.testing.assert_close(model.get_output_embeddings()(hidden), model(**batch).logits)
    assert model.base_model is model.base_model
    assert model.base_model.get_image_features.__self__ is model


def test_the_base_model_goes_with_its_model(inputs):
    model = name_seeded_model(small_config())
    base = model.base_model
    twin = copy.deepcopy(model)
    assert twin.base_model.get_decoder() is twin.llm.model and copy.deepcopy(base).llm is not model.llm
    model.resampler = torch.nn.Identity()  # as adapters exchange parts
    assert base.resampler is model.resampler
    gone = weakref.ref(model)
    del model, base
    assert gone() is None  # at once, without a search for circles


def test_forward_can_be_traced(model):
    """As compressors do, who see each of the three parts as one step."""

    class OnText(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return name in ("model.llm", "model.vpm", "model.resampler") or super().is_leaf_module(module, name)

    graph = Tracer().trace(OnText())
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called == ["model.llm.model.embed_tokens", "model.llm"]


def test_hooks_of_the_whole_model_see_every_pass(model, inputs):
    """Where weights are unpacked, or brought from a disk, at the first pass."""
    order = []
    hooks = [
        model.register_forward_pre_hook(lambda *_: order.append("model")),
        model.llm.register_forward_pre_hook(lambda *_: order.append("llm")),
    ]
    one = {name: value[:1] for name, value in inputs[1].items()}
    for options in ({}, {"prompt_lookup_num_tokens": 2}, {"num_beams": 2}):
        order.clear()
        model.generate(**one, **GREEDY | options)
        assert order[::2] == ["model"] * (len(order) // 2) and order[1::2] == ["llm"] * (len(order) // 2)
    for hook in hooks:
        hook.remove()


def test_generate_takes_all_that_the_processor_gives(model, inputs, processor):
    one = processor.apply_chat_template(inputs[0][0], **encoding(return_metadata=True))
    assert "video_metadata" in one
    assert new_ids(model, one) == new_ids(model, {name: v for name, v in one.items() if name != "video_metadata"})


def test_logits_to_keep(model, inputs):
    with torch.no_grad():
        last, all_logits = model(**inputs[1], logits_to_keep=1).logits, model(**inputs[1]).logits
    assert last.shape[1] == 1
    torch.testing.assert_close(last, all_logits[:, -1:])


def test_resized_vocabulary_leaves_no_stray_parameter():
    model = name_seeded_model(small_config())
    names = set(model.state_dict())
    model.resize_token_embeddings(1_100)
    assert set(model.state_dict()) == names
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 1_100
    assert model.config.vocab_size == model.llm.config.vocab_size == 1_100


def test_parallel_plans_name_modules_that_exist(model):
    for plan in (model._tp_plan, model._pp_plan):
        assert plan and all(name.startswith("llm.") for name in plan)


# ---- generation ----


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_with_several_pictures_equal_singles(model, inputs, processor, options):
    conversations, batch = inputs
    together = new_ids(model, batch, **options)
    singles = [
        ids for c in conversations for ids in new_ids(model, processor.apply_chat_template(c, **encoding()), **options)
    ]
    width = max(map(len, together))
    assert [ids + [model.generation_config.pad_token_id] * (width - len(ids)) for ids in singles] == together


def test_several_return_sequences_are_sampled_from_the_right_pictures(model, inputs):
    batch = inputs[1]
    torch.manual_seed(0)
    repeated = model.generate(**batch, do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=4)
    greedy = model.generate(**batch, **GREEDY | {"max_new_tokens": 4})
    assert repeated.tolist() == greedy.repeat_interleave(2, dim=0).tolist()


@pytest.mark.parametrize(
    "options", [{"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}]
)
def test_other_ways_of_decoding_equal_the_plain_one(model, processor, options):
    one = processor.apply_chat_template(
        [{"role": "user", "content": [wave_picture(1000, 700, 3), "Hi! And this one?"]}], **encoding()
    )
    assert new_ids(model, one, **options) == new_ids(model, one)


def test_pictures_are_encoded_once_for_an_answer(model, inputs, monkeypatch):
    calls, get_image_features = [], type(model).get_image_features
    monkeypatch.setattr(
        type(model),
        "get_image_features",
        lambda *args, **kwargs: calls.append(1) or get_image_features(*args, **kwargs),
    )
    for options in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        calls.clear()
        model.generate(**inputs[1], **GREEDY | options)
        assert len(calls) == 1


def test_packed_video_goes_through_generate_and_forward(model, processor):
    clip = processor.apply_chat_template(
        [{"role": "user", "content": [REPOSITORY / "assets" / "star.mp4", "?"]}], **encoding(fps=2, force_packing=3)
    )
    assert any(len(unit) > 1 for unit in clip["temporal_ids"][0])
    moved = dict(clip, temporal_ids=[[[frame + 50 for frame in unit] for unit in clip["temporal_ids"][0]]])
    with torch.no_grad():
        assert not torch.allclose(model(**clip).logits, model(**moved).logits)
    assert new_ids(model, clip, num_beams=2) == new_ids(model, clip, num_beams=2, use_cache=False)


def test_pipeline_equals_the_plain_path(model, processor, tmp_path):
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    picture = wave_picture(300, 200, 0)
    message = {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What!"}]}
    ask = pipeline("image-text-to-text", model=str(tmp_path), trust_remote_code=True, device="cpu")
    answer = ask(text=[message], return_full_text=False, max_new_tokens=6, generate_kwargs={"do_sample": False})
    one = processor.apply_chat_template([message], **encoding())
    # Whether control tokens stay in the text differs between versions.
    texts = [answer[0]["generated_text"], processor.decode(new_ids(model, one)[0])]
    assert len({re.sub(r"<\|?\w+\|?>", "", text) for text in texts}) == 1


def test_a_streamer_of_transformers_equals_the_plain_path(model, processor):
    one = processor.apply_chat_template(
        [{"role": "user", "content": [wave_picture(300, 200, 0), "What! 你好"]}], **encoding()
    )
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    thread = threading.Thread(target=lambda: model.generate(**one, **GREEDY, streamer=streamer))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == processor.decode(new_ids(model, one)[0], skip_special_tokens=True)


# ---- training ----


def test_loss_reaches_every_part(trainable, inputs):
    batch = inputs[1]
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    trainable.train().zero_grad()
    trainable(**batch, labels=labels).loss.backward()
    for name in ("vpm.embeddings.patch_embedding.weight", "resampler.query", "resampler.proj", "llm.lm_head.weight"):
        assert trainable.get_parameter(name).grad.abs().sum() > 0
    through_embeddings, _ = trainable.get_vllm_embedding(dict(batch))
    assert through_embeddings.requires_grad


def test_a_batch_without_pictures_touches_every_parameter(trainable, processor):
    batch = processor.apply_chat_template([{"role": "user", "content": "Hello!"}], **encoding())
    trainable.train().zero_grad()
    trainable(**batch, labels=batch["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in trainable.parameters())
    assert not trainable.resampler.query.grad.any()
    trainable.eval()
    with torch.no_grad():
        plain = trainable(**batch).logits
    torch.testing.assert_close(trainable.train()(**batch).logits, plain)


def test_gradient_checkpointing_gives_the_same_loss_and_gradients(inputs):
    batch = inputs[1]

    def loss_and_gradient(model):
        model.train().zero_grad()
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        return loss.item(), model.vpm.encoder.layers[0].mlp.fc1.weight.grad.clone()

    model = name_seeded_model(small_config())
    loss, gradient = loss_and_gradient(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.vpm.encoder.layers[0].gradient_checkpointing
    again, gradient_again = loss_and_gradient(model)
    assert loss == pytest.approx(again, rel=1e-6)
    torch.testing.assert_close(gradient, gradient_again)


def test_device_map_auto_and_bfloat16(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, device_map="auto", dtype=torch.bfloat16)
    with torch.no_grad():
        ours, half = model(**inputs[1]).logits[:, -1], loaded.eval()(**inputs[1]).logits[:, -1].float()
    assert torch.nn.functional.cosine_similarity(ours, half).min() > 0.99


def test_weights_on_disk_are_brought_in_when_needed(model, inputs, tmp_path):
    model.save_pretrained(tmp_path / "model")
    parts = {"llm": "cpu", "vpm": "disk", "resampler": "disk"}
    loaded = AutoModel.from_pretrained(
        tmp_path / "model", trust_remote_code=True, device_map=parts, offload_folder=tmp_path / "offload"
    )
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs[1]).logits, model(**inputs[1]).logits, atol=1e-4, rtol=0)


def test_fused_head_of_trl_gives_the_same_loss(inputs):
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this version of TRL has no fused head")
    batch, model = inputs[1], name_seeded_model(small_config())
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        expected = model(**batch, labels=labels).loss
        utils.add_fused_lm_head(model)
        fused = model(**batch, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(fused.loss, expected, atol=1e-4, rtol=1e-4)


def test_padded_tensors_for_trainers_give_the_same_logits(model, inputs, processor):
    conversations, batch = inputs
    padded = processor.apply_chat_template(conversations, **encoding(pad_pixel_values=True))
    most = max(map(len, batch["pixel_values"]))
    assert padded["pixel_values"].shape[:2] == (3, most) and padded["tgt_sizes"].shape == (3, most, 2)
    assert all(isinstance(padded[name], torch.Tensor) for name in ("pixel_values", "tgt_sizes", "input_ids"))
    with torch.no_grad():
        torch.testing.assert_close(model(**padded).logits, model(**batch).logits)
    clip = [{"role": "user", "content": [REPOSITORY / "assets" / "star.mp4", "?"]}]
    options = encoding(fps=2, force_packing=3)
    with torch.no_grad():
        plain = model(**processor.apply_chat_template(clip, **options)).logits
        tensors = processor.apply_chat_template(clip, pad_pixel_values=True, **options)
        assert isinstance(tensors["temporal_ids"], torch.Tensor)
        torch.testing.assert_close(model(**tensors).logits, plain)


def test_lora_and_resampler_save_and_load(trainable, inputs, tmp_path):
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(
        r=2, target_modules=r"llm\..*\.(q_proj|v_proj)", modules_to_save=["resampler"], task_type="CAUSAL_LM"
    )
    batch = inputs[1]
    tuned = peft.get_peft_model(name_seeded_model(small_config()), settings).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        tuned(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
    tuned.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = tuned(**batch).logits
        base = name_seeded_model(small_config())
        loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
        torch.testing.assert_close(loaded(**batch).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-4, rtol=1e-4)
    assert set(merged.state_dict()) == set(trainable.state_dict())


def test_half_precision_tower_on_a_cpu_is_near_the_exact_one(model):
    pixels = torch.randn(3, 14, 14 * 600, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact = model.vpm([pixels], [(20, 30)]).last_hidden_state
        tower = type(model.vpm)(model.vpm.config).eval()
        tower.load_state_dict(model.vpm.state_dict())
        half = tower.bfloat16()([pixels], [(20, 30)]).last_hidden_state.float()
    assert torch.nn.functional.cosine_similarity(exact, half).min() > 0.999
    assert np.isfinite(half.numpy()).all()
