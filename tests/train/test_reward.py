"""The reward terms, and the visual reward model: its head, its files, its training."""

import csv
import json
import random

import pytest
import torch
from conftest import REPOSITORY, name_seeded_model, small_config
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoProcessor

from minicpmv.train.reward_terms import accuracy_reward, final_answer, format_reward, standardized


pytest.importorskip("trl")
from peft import LoraConfig, get_peft_model

from minicpmv.data.formats import conversation_row, text_of
from minicpmv.data.load import load_conversations
from minicpmv.train import reward
from minicpmv.train.common.arguments import parse
from minicpmv.train.common.errors import TrainingError
from minicpmv.train.common.loading import trained_parameters
from minicpmv.train.reward_model import load_reward_model, reward_inputs, score_answers


NANO = str(REPOSITORY / "nano")
COLORS = ("red", "green", "blue", "yellow")


def told(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


# --- Terms ---


@pytest.mark.parametrize(
    ("text", "enable_thinking", "answer"),
    [
        (" 47\n", False, "47"),
        ("count\n</think>\n\n47", True, "47"),
        ("<think>\ncount\n</think>\n\n47", False, "47"),
        ("a</think>b</think>47", True, "47"),
        ("it is 47", True, None),  # the thought was never closed
        ("<think>\nit is 47", False, None),
        ("47<think>again", False, None),
        ("count\n</think>\n\n", True, ""),
        ("", False, ""),
        ("a < b", False, "a < b"),
    ],
)
def test_the_final_answer_is_what_follows_the_last_closed_thought(text, enable_thinking, answer):
    assert final_answer(text, enable_thinking) == answer


def test_accuracy_takes_the_whole_final_answer_to_the_letter_and_nothing_from_the_thought():
    texts = ["47", " 47 ", "47.", "it is 47", "47\n</think>\n\n12", "12\n</think>\n\n47", "47", "47"]
    thinks = [False, False, False, False, True, True, True, False]
    answers = ["47"] * 7 + [None]
    assert accuracy_reward(told(*texts), thinks, answers) == [1, 1, 0, 0, 0, 1, 0, None]


def test_format_is_one_closed_thought_and_an_answer_in_deep_mode_and_an_answer_alone_in_fast_mode():
    deep = {
        "see\n</think>\n\n47": 1,
        "see\n</think>\n\n": 0,
        "\n</think>\n\n47": 0,
        "see 47": 0,
        "see\n</think>\n\n47</think>": 0,
        "<think>\nsee\n</think>\n\n47": 0,  # the prompt has opened the thought already
        "see\n</think>\n\n<think>47": 0,
    }
    fast = {"47": 1, " \n": 0, "": 0, "see\n</think>\n\n47": 0, "<think>\nsee\n</think>\n\n47": 0, "<think>47": 0}
    assert format_reward(told(*deep), [True] * len(deep)) == list(deep.values())
    assert format_reward(told(*fast), [False] * len(fast)) == list(fast.values())


def test_standardized_scores_have_mean_0_and_deviation_1_and_a_missing_score_is_the_mean():
    scores = standardized(torch.tensor([3.0, 5.0, torch.nan, 10.0]))
    assert scores[2] == 0
    known = scores[[0, 1, 3]]
    assert known.mean().abs() < 1e-6 and (known.std() - 1).abs() < 1e-6
    assert standardized(torch.tensor([4.0, 4.0])).tolist() == [0, 0]
    assert standardized(torch.tensor([torch.nan, 4.0])).tolist() == [0, 0]


# --- The model ---


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True)


@pytest.fixture(scope="module")
def reward_model():
    """nano with a random head."""
    torch.manual_seed(0)
    return load_reward_model(NANO, new_head=True, trust_remote_code=True).eval()


def disc(color, rng):
    """A disc somewhere in a white picture."""
    image = Image.new("RGB", (112, 112), "white")
    radius = rng.randint(20, 40)
    x, y = (rng.randint(radius, 112 - radius) for _ in range(2))
    ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return image


def question(*pictures, text="What color is the shape?"):
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def mixed_prompts():
    """Conversations with a picture, a sliced one, a clip, several turns, and text alone."""
    rng = random.Random(0)
    clip = {"type": "video", "video": str(REPOSITORY / "assets/star.mp4")}
    return [
        [question(disc("red", rng))],
        [question(disc("blue", rng).resize((300, 200)), disc("red", rng))],
        [{"role": "user", "content": [clip, {"type": "text", "text": "Which way does the shape move?"}]}],
        [question(disc("red", rng)), {"role": "assistant", "content": "red"}, question(text="And now?")],
        [question(text="Hi!")],
    ]


def test_a_score_is_the_same_alone_and_in_a_batch_of_pictures_clips_and_text(reward_model, processor):
    prompts = mixed_prompts()
    answers = ["red", "blue", "left", "a red disc", "Hello!"]
    together = score_answers(reward_model, processor, prompts, answers, batch_size=3)
    alone = [score_answers(reward_model, processor, [p], [a]) for p, a in zip(prompts, answers, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)
    assert together.shape == (5,) and len(set(together.tolist())) == 5


def test_a_score_depends_on_picture_and_answer_but_not_on_any_thought(reward_model, processor):
    rng = random.Random(0)
    red, blue = [question(disc("red", rng))], [question(disc("blue", rng))]
    thoughts = ["", "<think>\nred!\n</think>\n\n", "other words\n</think>\n\n"]
    by_thought = score_answers(reward_model, processor, [red] * 3, [f"{thought}red" for thought in thoughts])
    torch.testing.assert_close(by_thought, by_thought[:1].expand(3), atol=1e-5, rtol=0)
    others = score_answers(reward_model, processor, [red, blue, red], ["red", "red", "a circle"])
    assert torch.pdist(others[:, None]).min() > 1e-3
    # Thoughts of earlier turns do not count either.
    earlier = [
        [red[0], {"role": "assistant", "content": f"{thought}red"}, question(text="And now?")]
        for thought in thoughts[:2]
    ]
    ids = reward_inputs(processor, earlier, ["red", "red"])["input_ids"]
    assert torch.equal(ids[0], ids[1])


def test_an_answer_that_is_an_open_thought_cannot_be_scored(reward_model, processor):
    with pytest.raises(TrainingError, match="no answer after the thought"):
        score_answers(reward_model, processor, [[question(text="Hi")]], ["<think>\nhm"])


def test_a_folder_without_head_is_refused_unless_a_new_head_is_asked_for():
    with pytest.raises(TrainingError, match="no value head"):
        load_reward_model(NANO, trust_remote_code=True)


def test_a_saved_reward_model_gives_the_same_scores_from_its_own_folder(reward_model, processor, tmp_path):
    reward_model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "modeling_minicpmv.py", "processing_minicpmv.py", "chat_template.jinja"} <= names
    assert not any(name.endswith((".bin", ".pt")) for name in names)
    again = load_reward_model(str(tmp_path), trust_remote_code=True).eval()
    assert str(tmp_path.name) in type(again.model).__module__  # its own code
    own_processor = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    saved = reward_model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in again.state_dict().items())
    prompts, answers = mixed_prompts(), ["red"] * 5
    expected = score_answers(reward_model, processor, prompts, answers)
    torch.testing.assert_close(score_answers(again, own_processor, prompts, answers), expected, atol=1e-5, rtol=0)


def test_the_head_stands_on_the_published_backbone_unchanged(reward_model):
    backbone = AutoModel.from_pretrained(NANO, trust_remote_code=True).state_dict()
    own = reward_model.model.state_dict()
    assert own.keys() == backbone.keys() and all(torch.equal(own[name], backbone[name]) for name in own)


def test_reward_inputs_are_padded_on_the_right_and_end_with_the_answer(processor):
    inputs = reward_inputs(
        processor, [[question(text="Hi")]] * 2, ["a", "<think>\nlong thought\n</think>\n\nblue and red"]
    )
    assert inputs["attention_mask"][0].tolist() == sorted(inputs["attention_mask"][0].tolist(), reverse=True)
    text = processor.decode(inputs["input_ids"][1])
    assert text.endswith("assistant\n<think>\n\n</think>\n\nblue and red<|im_end|>\n")


def test_an_output_head_that_no_loss_reaches_is_left_out(tmp_path):
    name_seeded_model(small_config()).save_pretrained(tmp_path)  # its head is not tied to its embeddings
    model = load_reward_model(str(tmp_path), new_head=True, trust_remote_code=True)
    assert not any("lm_head" in name for name in model.state_dict())


# --- Training ---


def pairs(folder, count, seed):
    """A file of pairs about drawn discs: the answer that names the color is preferred, whatever the color is."""
    rng, path = random.Random(seed), folder / f"pairs{seed}.jsonl"
    with path.open("w") as file:
        for index in range(count):
            color, other = rng.sample(COLORS, 2)
            name = f"{seed}-{index}.png"
            disc(color, rng).save(folder / name)
            thought = "<think>\nlook\n</think>\n\n" if index % 2 else ""
            row = {"images": [name], "prompt": "<image>What color is the shape?", "chosen": thought + color}
            file.write(json.dumps(row | {"rejected": other}) + "\n")
    return path


def flags(folder, rows, **options):
    quick = {
        "model_name_or_path": NANO,
        "dataset_name": rows,
        "output_dir": folder / "output",
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return [f"--{name}={value}" for name, value in (quick | options).items()]


def test_pairs_lose_their_thoughts_and_chosen_answers_come_first(processor, tmp_path):
    rows = [json.loads(line) for line in pairs(tmp_path, 2, seed=0).read_text().splitlines()]
    rows = [conversation_row(row, tmp_path) for row in rows]
    batch = reward.FinalAnswerCollator(processor)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "tgt_sizes"}
    texts = [
        processor.decode(ids[mask.bool()])
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    answers = [text_of(row[name][0]).split("\n")[-1] for name in ("chosen", "rejected") for row in rows]
    assert [text.split("</think>\n\n")[-1] for text in texts] == [f"{answer}<|im_end|>\n" for answer in answers]
    assert not any("look" in text for text in texts)


@pytest.mark.slow
def test_after_a_short_training_held_out_pairs_are_told_apart_by_the_picture(tmp_path):
    held_out = pairs(tmp_path, 24, seed=1)
    reward.main(flags(tmp_path, pairs(tmp_path, 160, seed=0), max_steps=20, eval_dataset_name=held_out))
    (accuracy,) = [
        float(row["value"])
        for row in csv.DictReader((tmp_path / "output/log.csv").open())
        if row["name"] == "eval_accuracy"
    ]
    assert accuracy >= 0.9
    model = load_reward_model(str(tmp_path / "output"), trust_remote_code=True)
    own_processor = AutoProcessor.from_pretrained(tmp_path / "output", trust_remote_code=True)
    rng = random.Random(2)
    prompts = [[question(disc(color, rng))] for color in COLORS for _ in COLORS]
    scores = score_answers(model, own_processor, prompts, list(COLORS) * 4).view(4, 4)
    assert scores.argmax(1).tolist() == [0, 1, 2, 3]  # the same four answers: only the picture decides
    assert "score_answers" in (tmp_path / "output/README.md").read_text()


def test_an_adapter_with_its_head_is_saved_and_loads_merged(processor, tmp_path):
    options = {"adapter": "lora", "max_steps": 2, "per_device_train_batch_size": 2, "gradient_checkpointing": True}
    trainer = reward.train(*parse(reward.GROUPS, flags(tmp_path, pairs(tmp_path, 4, seed=0), **options)))
    assert {name for name, _ in trained_parameters(trainer.model)[None]} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    prompts, answers = mixed_prompts(), ["red"] * 5
    expected = score_answers(trainer.model, processor, prompts, answers)
    merged = load_reward_model(str(tmp_path / "output"), trust_remote_code=True)
    torch.testing.assert_close(score_answers(merged, processor, prompts, answers), expected, atol=1e-4, rtol=0)


def test_an_adapter_of_another_kind_of_model_is_no_reward_model(tmp_path):
    backbone = AutoModel.from_pretrained(NANO, trust_remote_code=True)
    get_peft_model(backbone, LoraConfig(r=2, target_modules=r"llm\..*q_proj")).save_pretrained(tmp_path)
    with pytest.raises(TrainingError, match="no value head"):
        load_reward_model(str(tmp_path), trust_remote_code=True)


def test_rows_that_are_no_pairs_end_the_command_in_one_line(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"query": "Hi", "response": "Hello"}) + "\n")
    with pytest.raises(SystemExit) as end:
        reward.main(flags(tmp_path, path))
    assert end.value.code == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("minicpmv: ") and "chosen" in message and "align feedback" in message


def test_the_recipe_and_the_example_pairs_fit_the_command(processor):
    recipe = ["--config", str(REPOSITORY / "recipes/reward.yaml"), "--model_name_or_path", NANO]
    pairs_file = str(REPOSITORY / "assets/pairs.jsonl")
    groups = parse(reward.GROUPS, [*recipe, "--dataset_name", pairs_file, "--use_cpu", "--bf16=False"])
    assert groups[1].adapter == "lora"
    rows = list(load_conversations(pairs_file))
    batch = reward.FinalAnswerCollator(processor)(rows)
    assert len(batch["input_ids"]) == 2 * len(rows) and "temporal_ids" in batch
