"""nano: its tokenizer, its training batches, its recipe, its training loop and its scores."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from minicpmv.data.collate import IGNORED, ConversationEncoder, collate, training_batch
from minicpmv.data.drawing import COLOR_CLASSES, KIND_CLASSES
from minicpmv.data.synthetic import Mixture, Sample, Turn, make_sample
from minicpmv.evaluate.nano import CheckpointError, answer, exact_match, load, questions
from minicpmv.train.nano import Recipe, RecipeError, Stage, Trainee, optimizers_of, spread_queries, train
from minicpmv.train.nano_tokenizer import train_merges


REPOSITORY = Path(__file__).resolve().parents[1]
NANO = REPOSITORY / "nano"
EVERYTHING = Mixture(text=0.35, video=0.3, sliced=0.5)


@pytest.fixture(autouse=True)
def one_thread():
    """Nets this small lose time to threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True)


@pytest.fixture(scope="module")
def encoder(processor):
    return ConversationEncoder(processor.image_processor, processor.tokenizer)


def tiny_trainee():
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(NANO, trust_remote_code=True)
    config.num_hidden_layers = config.max_window_layers = 1
    config.layer_types = config.layer_types[:1]
    config.vision_config.num_hidden_layers = 1
    model = AutoModel.from_config(config, trust_remote_code=True, dtype=torch.float32)
    spread_queries(model.resampler)
    return Trainee(model).train()


# --- Tokenizer ---


def test_the_tokenizer_has_the_added_tokens_of_the_full_model_by_name():
    full = json.loads((REPOSITORY / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    own = json.loads((NANO / "tokenizer_config.json").read_text(encoding="utf-8"))["added_tokens_decoder"]
    assert list(own.values()) == [full[token_id] for token_id in sorted(full, key=int)]


def test_print_is_read_character_by_character_and_id_0_is_an_exclamation_mark():
    tokenizer = AutoTokenizer.from_pretrained(NANO, trust_remote_code=True)
    assert tokenizer.tokenize("OPEN") == list("OPEN") and tokenizer.tokenize("4071") == list("4071")
    assert tokenizer("!").input_ids == [0]
    text = "What color is the star? naïve 你好\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_committed_tokenizer_is_the_one_that_the_recipe_builds():
    model = json.loads((NANO / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary, merges = train_merges()
    assert model["vocab"] == vocabulary and [tuple(merge) for merge in model["merges"]] == merges


def test_the_ids_in_the_config_are_those_of_the_tokenizer():
    config = AutoConfig.from_pretrained(NANO, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(NANO, trust_remote_code=True)
    assert config.image_token_id == tokenizer.unk_token_id
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len(tokenizer) <= config.vocab_size


# --- Batches ---


@pytest.mark.parametrize("index", range(12))
def test_training_sees_what_inference_sees(processor, encoder, index):
    sample = make_sample("train", 5, index, EVERYTHING)
    example = encoder.encode(sample)
    messages = []
    for turn in sample.turns:
        messages.append({"role": "user", "content": [{"type": "text", "text": turn.question}]})
        messages.append({"role": "assistant", "content": turn.answer})
    messages[0]["content"] = [{"type": "image", "image": image} for image in sample.images] + messages[0]["content"]
    options = {"max_slice_nums": sample.max_slice_nums}
    if sample.temporal_ids is not None:
        options |= {"temporal_ids": sample.temporal_ids, "use_image_id": False}
    options |= {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True, enable_thinking=False, **options)
    whole = processor.apply_chat_template(messages, **options)
    assert whole["input_ids"][0].tolist() == example.input_ids
    start = prompt["input_ids"].shape[1]
    assert prompt["input_ids"][0].tolist() == example.input_ids[:start]
    last = [label for label in example.labels[start:] if label != IGNORED]
    assert processor.tokenizer.decode(last) == sample.turns[-1].answer + "<|im_end|>"
    assert all(torch.equal(a, b) for a, b in zip(prompt["pixel_values"][0], example.pixel_values, strict=True))


def test_every_patch_has_a_label(encoder):
    for index in range(20):
        example = encoder.encode(make_sample("train", 6, index, EVERYTHING))
        patches = sum(rows * cols for rows, cols in example.tgt_sizes.tolist())
        assert len(example.kind_labels) == len(example.color_labels) == patches
        assert example.kind_labels.max() < len(KIND_CLASSES) and example.color_labels.max() < len(COLOR_CLASSES)


def test_a_training_batch_follows_from_its_number_and_has_one_layout(encoder):
    layouts = set()
    for number in range(12):
        batch = training_batch(encoder, EVERYTHING, 3, seed=0, number=number)
        again = training_batch(encoder, EVERYTHING, 3, seed=0, number=number)
        assert torch.equal(batch["input_ids"], again["input_ids"])
        clips = {units != [[-1]] * len(units) for units in batch["temporal_ids"]}
        sliced = {len(sizes) > 1 for sizes in batch["tgt_sizes"]}
        assert len(clips) == len(sliced) == 1
        layouts.add((clips.pop(), sliced.pop()))
    assert layouts == {(False, False), (False, True), (True, True)}


# --- Training ---


def test_a_tiny_net_learns_one_picture_by_heart(encoder):
    trainee = tiny_trainee()
    sample = make_sample("train", 0, 0, Mixture(text=0, video=0, sliced=0))
    single = Sample(sample.drawings, [Turn("color", "What color is the shape?", "purple")])
    batch = collate([encoder.encode(single)], encoder.tokenizer.pad_token_id)
    optimizers = optimizers_of(trainee, 0.0)
    losses = []
    for _ in range(40):
        dense_loss, answer_loss, _, _ = trainee(batch)
        trainee.zero_grad()
        (dense_loss + answer_loss).backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 3e-3
            optimizer.step()
        losses.append((dense_loss.item(), answer_loss.item()))
    assert losses[-1][0] < 0.5 * losses[0][0] and losses[-1][1] < 0.1


def test_queries_start_at_different_spots_of_the_picture():
    resampler = tiny_trainee().model.resampler
    with torch.no_grad():
        query, key = (
            torch.nn.functional.linear(states, weight)[:, : resampler.attn.head_dim]
            for states, weight in zip(
                (resampler.ln_q(resampler.query), resampler.positions([(8, 8)], [-1], "cpu")),
                resampler.attn.in_proj_weight.chunk(3),
                strict=False,
            )
        )
        nearest = (query @ key.T).argmax(-1).tolist()
    assert len(set(nearest)) == len(nearest)


def test_a_run_goes_on_from_its_state_and_leaves_a_model_that_loads(tmp_path):
    stages = [
        Stage("tower", 2, 2, 1e-3, Mixture(0.5, 0, 0), batches=1, answers=False),
        Stage("answers", 2, 2, 1e-3, Mixture(0.5, 0.2, 0.2), batches=1),
    ]
    recipe = Recipe(stages[:1], model=str(NANO), processes=1, validation_samples=2)
    train(0, recipe, tmp_path)
    recipe.stages = stages
    train(0, recipe, tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["samples"]) for entry in entries] == [(0, 4), (1, 8)]
    model, processor = load(str(tmp_path / "model"))
    given = answer(model, processor, questions("clip", "move", 2, seed=0))
    assert len(given) == 2 and all(isinstance(text, str) for text in given)


def test_the_recipe_of_nano_is_valid_and_a_misspelt_field_is_named(tmp_path):
    assert Recipe.load(REPOSITORY / "recipes" / "nano.yaml").stages
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("stages: [{name: a, steps: 1, batch_size: 1, learning_rat: 0.1}]")
    with pytest.raises(RecipeError, match="learning_rat"):
        Recipe.load(wrong)


# --- Scores ---


def test_an_answer_counts_only_as_a_whole():
    assert exact_match(" red\n", "red")
    assert not exact_match("red circle", "red") and not exact_match("Red", "red")


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="safetensors"):
        load(str(tmp_path))


def test_the_shipped_weights_are_small_and_answer_what_they_were_taught():
    assert (NANO / "model.safetensors").stat().st_size < 16 * 2**20
    model, processor = load(str(NANO))
    for condition, task in (("picture", "shape"), ("slices", "number"), ("clip", "only_shape")):
        asked = questions(condition, task, 12, seed=1)
        right = [
            exact_match(a, s.turns[0].answer) for a, s in zip(answer(model, processor, asked), asked, strict=True)
        ]
        assert sum(right) >= 10, f"{task}: {sum(right)} of {len(right)}"
