"""The calls that other software makes, as its sources make them: engines, trainers, exporters, evaluation."""

import copy
import json

import pytest
import torch
from conftest import GREEDY, REPOSITORY, wave_picture
from PIL import Image
from transformers import AutoModel, AutoProcessor


PICTURES = [wave_picture(300, 200, 0), wave_picture(1000, 700, 3)]
PLACE = "(<image>./</image>)"


def test_sglang_calls_with_a_flat_list_and_finds_slices_by_their_marks(processor):
    text = f"<|im_start|>user\n{PLACE}\n{PLACE}\nHi<|im_end|>\n"
    inputs = processor.__call__(text=[text], images=PICTURES, padding=True, return_tensors="pt", device="cpu")
    ids, tokenizer = inputs["input_ids"].flatten().tolist(), processor.tokenizer
    starts = sum(ids.count(token) for token in (tokenizer.im_start_id, tokenizer.slice_start_id))
    ends = sum(ids.count(token) for token in (tokenizer.im_end_id, tokenizer.slice_end_id))
    assert starts == ends == len(inputs["pixel_values"][0]) == len(inputs["tgt_sizes"][0])
    assert tokenizer.unk_id == 128244


def test_vllm_asks_the_image_processor_alone(processor):
    images = processor.image_processor
    features = images(images=[[PICTURES[0]], [PICTURES[1]]], do_pad=True, return_tensors="pt")
    assert [len(features[name]) for name in ("pixel_values", "image_sizes", "tgt_sizes")] == [2, 2, 2]
    text = images.get_slice_image_placeholder(features["image_sizes"][1][0])
    assert text.count("<unk>") == 64 * len(features["pixel_values"][1])
    assert images.get_slice_image_placeholder((300, 200), image_idx=3, max_slice_nums=1, use_image_id=False) == (
        "<image>" + "<unk>" * 64 + "</image>"
    )
    assert images.get_sliced_grid((300, 200), max_slice_nums=9) is None
    assert tuple(images.get_sliced_grid((1000, 700))) == (2, 2)
    settings = json.loads((REPOSITORY / "preprocessor_config.json").read_text())
    assert settings["auto_map"]["AutoImageProcessor"] and settings["image_processor_type"]
    assert images.image_feature_size == 64 and str(images.version) == "4.5"


def test_llama_factory_trains_with_a_data_dict_and_positional_placeholders(golden_model, processor):
    model = copy.deepcopy(golden_model).train()
    images = processor.image_processor
    features = images(PICTURES, do_pad=True, max_slice_nums=images.max_slice_nums, return_tensors="pt")
    placeholders = [
        images.get_slice_image_placeholder(size, index, images.max_slice_nums, images.use_image_id)
        for index, size in enumerate(features["image_sizes"][0])
    ]
    ids = processor.tokenizer("\n".join(placeholders) + "Hi", return_tensors="pt")["input_ids"]
    data = {**features, "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    data["position_ids"] = torch.arange(ids.shape[1])[None].int()
    data["image_bound"] = [torch.tensor([[0, 0]])]
    output = model(data=data, input_ids=ids, labels=ids)
    output.loss.backward()
    assert model.resampler.query.grad.any()
    # A batch without pictures comes with empty tensors.
    text_only = data | {"pixel_values": [torch.tensor([])], "tgt_sizes": [torch.tensor([])], "temporal_ids": None}
    text_only["input_ids"] = text_only["labels"] = processor.tokenizer("Hi there", return_tensors="pt")["input_ids"]
    text_only |= {"attention_mask": None, "position_ids": None}
    assert torch.isfinite(model(data=text_only).loss)


def test_ms_swift_embeds_with_the_ids_of_still_pictures(golden_model, processor):
    model = copy.deepcopy(golden_model).train()
    features = processor.image_processor([[PICTURES[0]], []], return_tensors="pt", max_slice_nums=None).to(
        torch.float32
    )
    assert {"pixel_values", "tgt_sizes", "temporal_ids", "image_sizes"} <= set(features)
    ids = torch.tensor([[7] + [128244] * 64, [7] * 65])
    embeddings, _ = model.get_vllm_embedding({"input_ids": ids, "image_bound": [[], []], **features})
    assert embeddings.requires_grad and embeddings.shape == (2, 65, 256)
    nothing = processor.image_processor([[]], return_tensors="pt")
    model.get_vllm_embedding({"input_ids": ids[1:], "image_bound": [[]], **nothing})[0].sum().backward()
    assert model.resampler.query.grad is not None
    assert isinstance(model.get_input_embeddings(), torch.nn.Module)
    assert not hasattr(model.resampler, "pos_embed")  # nothing that DistributedDataParallel would have to ignore


def test_openvino_runs_the_parts_on_padded_batches(golden_model, processor):
    """Its exporter calls embeddings, encoder and the resampler's attention on padded batches with masks."""
    sizes = [(6, 5), (3, 4)]
    slices = [torch.randn(3, 14, 14 * rows * columns) for rows, columns in sizes]
    vpm, resampler = golden_model.vpm, golden_model.resampler
    attention = vpm.encoder.layers[0].self_attn
    assert (attention.num_heads, attention.head_dim, attention.embed_dim) == (4, 16, 64)
    assert (vpm.embeddings.num_patches_per_side, vpm.embeddings.patch_size) == (70, 14)
    with torch.no_grad():
        expected = golden_model.get_image_features([slices], [sizes]).pooler_output
        hidden = torch.zeros(2, 30, 64)
        mask = torch.full((2, 1, 1, 30), torch.finfo(torch.float32).min)
        for row, (pixels, size) in enumerate(zip(slices, sizes, strict=True)):
            patches = size[0] * size[1]
            hidden[row, :patches] = vpm.embeddings(pixels, [size])[0]
            mask[row, ..., :patches] = 0
        hidden = vpm.encoder(
            inputs_embeds=hidden,
            attention_mask=mask.expand(-1, -1, 30, -1),
            output_attentions=False,
            output_hidden_states=False,
            return_dict=True,
        )[0]
        values = resampler.ln_kv(resampler.kv_proj(vpm.post_layernorm(hidden))).permute(1, 0, 2)
        keys = values.clone()
        for row, size in enumerate(sizes):
            keys[: size[0] * size[1], row] += resampler.positions([size], [-1], "cpu")
        queries = resampler.ln_q(resampler.query).unsqueeze(1).repeat(1, 2, 1)
        attended = resampler.attn(queries, keys, values, key_padding_mask=mask[:, 0, 0] < 0)[0].permute(1, 0, 2)
        outputs = resampler.ln_post(attended) @ resampler.proj
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=0)


def test_optimum_gives_messages_that_already_hold_placeholders(processor):
    """Rendering to text leaves placeholders alone; only where messages become ids are they what a user typed."""
    rendered = processor.apply_chat_template(
        [{"role": "user", "content": f"{PLACE}\nWhat?"}], add_generation_prompt=True, enable_thinking=False
    )
    inputs = processor([rendered], [PICTURES[0]], return_tensors="pt")
    assert len(inputs["pixel_values"][0]) == 1 and "temporal_ids" not in inputs


def test_vlmevalkit_calls_chat(golden_model, processor):
    answer = golden_model.chat(
        image=None,
        msgs=[{"role": "user", "content": [Image.new("RGB", (60, 40)), "What?"]}],
        context=None,
        tokenizer=processor.tokenizer,
        processor=processor,
        max_inp_length=8192,
        enable_thinking=True,
        max_new_tokens=4,
        no_repeat_ngram_size=0,
        **GREEDY,
    )
    assert answer.startswith("<think>\n")


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_trl_gives_lists_of_parts_in_every_role(processor, padding_side):
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "Be kind!"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A wave."}]},
    ]
    text = processor.apply_chat_template(messages)
    inputs = processor(
        text=[text, text],
        images=[[PICTURES[0]], [PICTURES[1]]],
        padding=True,
        padding_side=padding_side,
        return_tensors="pt",
        add_special_tokens=False,
    )
    assert inputs["attention_mask"].sum(-1).tolist() != [inputs["input_ids"].shape[1]] * 2
    assert processor(text=[text.replace(PLACE, "")], images=None, padding=True)["input_ids"].shape[0] == 1
    ids = processor.apply_chat_template(messages, tokenize=True, images=[PICTURES[0]])
    assert ids[0] == inputs["input_ids"][0][inputs["attention_mask"][0].bool()].tolist()


@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_trl_trainers_step(trainer, tmp_path):
    trl, datasets, peft = (pytest.importorskip(name) for name in ("trl", "datasets", "peft"))
    model = AutoModel.from_pretrained(REPOSITORY / "nano", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(REPOSITORY / "nano", trust_remote_code=True)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    good, bad = ([{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("47", "12"))
    row = {"images": [PICTURES[0]]}
    row |= (
        {"messages": [question, *good]}
        if trainer == "SFT"
        else {"prompt": [question], "chosen": good, "rejected": bad}
    )
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "max_length": None,
        "logging_steps": 1,
        "report_to": [],
    }
    settings |= {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "learning_rate": 1e-3,
    }
    run = getattr(trl, f"{trainer}Trainer")(
        model=model,
        args=getattr(trl, f"{trainer}Config")(**settings),
        train_dataset=datasets.Dataset.from_list([row] * 4),
        processing_class=processor,
        peft_config=peft.LoraConfig(r=4, target_modules=r"llm\..*\.(q_proj|v_proj)", task_type="CAUSAL_LM"),
    )
    run.train()
    losses = [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]
    assert losses[1] < losses[0]
    if trainer == "DPO":
        assert losses[0] == pytest.approx(0.6931, abs=1e-4)  # ln 2: policy and reference are the same at first
