"""Reinforcement learning: modes, rollouts with pictures and clips, log-probabilities, rewards, and that it learns."""

import csv
import json
import math
import os
import random
import subprocess

import pytest
import torch
from conftest import REPOSITORY, name_seeded_model, tiny_config
from PIL import Image
from transformers import AutoModel, AutoProcessor


trl = pytest.importorskip("trl")
from datasets import Dataset, IterableDataset  # noqa: E402

from minicpmv.data.formats import BadRowError  # noqa: E402
from minicpmv.train import grpo  # noqa: E402
from minicpmv.train.common.arguments import parse  # noqa: E402
from minicpmv.train.common.errors import ArgumentsError  # noqa: E402
from minicpmv.train.grpo import HybridGRPOTrainer, question_row, reward_model_term  # noqa: E402
from minicpmv.train.reward_model import load_reward_model, score_answers  # noqa: E402
from minicpmv.train.reward_terms import accuracy_reward, format_reward  # noqa: E402


NANO = str(REPOSITORY / "nano")
PICTURES = {color: Image.new("RGB", (100, 100), color) for color in ("red", "blue")}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(NANO, trust_remote_code=True)


def nano():
    return AutoModel.from_pretrained(NANO, trust_remote_code=True)


def ask(*parts, text="What color is it?"):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def color_rows(count):
    """Rows in TRL's form: the pictures stand in a column of their own."""
    colors = list(PICTURES) * (count // 2)
    rows = [{"prompt": ask({"type": "image"}), "images": [PICTURES[color]], "answer": color} for color in colors]
    return Dataset.from_list(rows)


def mixed_row(index):
    """A picture, two of which one is cut into slices, a packed clip, and text alone."""
    clip = {"type": "video", "video": str(REPOSITORY / "assets/star.mp4")}
    wide = PICTURES["blue"].resize((300, 200))
    rows = [
        {"prompt": ask({"type": "image"}), "images": [PICTURES["red"]]},
        {"prompt": ask({"type": "image"}, {"type": "image"}), "images": [wide, PICTURES["red"]], "max_slice_nums": 4},
        {"prompt": ask(clip, text="Which way does it move?"), "fps": 3.0, "force_packing": 3},
        {"prompt": ask(text="Hi!")},
    ]
    return rows[index]


def mixed_rows():
    """As a stream, where each row has columns of its own."""
    return IterableDataset.from_generator(lambda: (mixed_row(index) for index in range(4)))


def trainer(
    model,
    processor,
    rows,
    output,
    reward_funcs=(accuracy_reward, format_reward),
    thinking_share=0.5,
    eval_dataset=None,
    **settings,
):
    defaults = {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return HybridGRPOTrainer(
        model,
        list(reward_funcs),
        trl.GRPOConfig(**defaults | settings),
        thinking_share=thinking_share,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=processor,
    )


class Recorder:
    """A reward function that keeps what it is given, and gives its rewards in turn."""

    __name__ = "recorder"

    def __init__(self, *rewards):
        self.rewards, self.batches = rewards or (0.0,), []

    def __call__(self, prompts, **columns):
        self.batches.append(columns | {"prompts": prompts})
        return [self.rewards[place % len(self.rewards)] for place in range(len(prompts))]


def asked(model):
    """The prompts that a model is asked to complete from now on: a list that grows by one tensor a batch."""
    prompts, generate = [], model.generate

    def watched(**inputs):
        prompts.append(inputs["input_ids"])
        return generate(**inputs)

    model.generate = watched
    return prompts


def scripted(model, processor, texts):
    """Let a model complete the prompts of a batch with `texts`."""

    def generate(input_ids, **inputs):
        written = processor.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, written], 1)

    model.generate = generate
    return model


def completions_table(folder, step=1):
    return Dataset.from_parquet(str(folder / f"completions/completions_{step:05d}.parquet"))


def inputs_of(processor, row, enable_thinking):
    """What the model is asked outside of training."""
    pictures = iter(row.get("images", []))
    prompt = [
        {
            **message,
            "content": [
                part | ({"image": next(pictures)} if part == {"type": "image"} else {}) for part in message["content"]
            ],
        }
        for message in row["prompt"]
    ]
    options = {name: row[name] for name in ("max_slice_nums", "fps", "force_packing") if row.get(name) is not None}
    return processor.apply_chat_template(
        prompt,
        add_generation_prompt=True,
        enable_thinking=enable_thinking,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **options,
    )


# --- Modes and rollouts ---


def test_half_of_the_groups_think_all_rollouts_of_a_group_alike(processor, tmp_path):
    seen, model = Recorder(), nano()
    prompts = asked(model)
    trainer(model, processor, color_rows(4), tmp_path, [seen], num_generations=2, log_completions=True).train()
    ((batch,), (ids,)) = seen.batches, prompts
    assert batch["enable_thinking"] == [False, False, True, True] * 2
    for text, thinks in zip(processor.batch_decode(ids[:, -4:]), batch["enable_thinking"], strict=True):
        assert text.endswith("<think>\n" if thinks else "</think>\n\n")
    assert completions_table(tmp_path)["enable_thinking"][:] == batch["enable_thinking"]


@pytest.mark.parametrize(("share", "expected"), [(0, 0), (1, 12), (1 / 3, 4), (0.5, 6)])
def test_the_share_of_thinking_groups_is_kept_over_batches(processor, tmp_path, share, expected):
    seen, rows = (
        Recorder(),
        Dataset.from_list([{"prompt": ask(text=word)} for word in ("Hi!", "Who?", "Why?", "How?")]),
    )
    settings = {"per_device_train_batch_size": 12, "max_completion_length": 1, "max_steps": 4}
    trainer(nano(), processor, rows, tmp_path, [seen], thinking_share=share, **settings).train()
    modes = [mode for batch in seen.batches for mode in batch["enable_thinking"]]  # three groups of four a batch
    groups = [modes[first : first + 4] for first in range(0, 48, 4)]
    assert all(len(set(group)) == 1 for group in groups)
    assert sum(group[0] for group in groups) == expected


# The second group thinks, and so does the fourth.
IN_ORDER = {"num_generations": 2, "shuffle_dataset": False, "learning_rate": 0.0}


def test_rollouts_of_images_videos_and_text_are_what_the_model_answers_alone(processor, tmp_path):
    seen, model = Recorder(), nano()
    greedy = {"do_sample": False}
    run = trainer(model, processor, mixed_rows(), tmp_path, [seen], generation_kwargs=greedy, **IN_ORDER)
    run.train()
    model.eval()
    (batch,) = seen.batches
    for place, written in enumerate(batch["completion_ids"]):
        inputs = inputs_of(processor, mixed_row(place // 2), enable_thinking=place // 2 % 2 == 1)
        expected = model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.0)
        expected = expected[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(written) == expected[: len(written)]
        assert len(written) == len(expected) or written[-1] == processor.tokenizer.eos_token_id


def test_probabilities_are_those_of_the_model_and_the_first_importance_ratio_is_1(processor, tmp_path):
    """The trainer shuffles rollouts before it splits them into steps: images have to go along."""
    seen, model = Recorder(0.0, 1.0), nano()
    # Two updates from the same rollouts: only then are the old log-probabilities kept. All that leaves 1 +- 1e-4 is clipped.
    twice = {"num_iterations": 2, "max_steps": 2, "epsilon": 1e-4}
    split = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = {"generation_kwargs": {"min_new_tokens": 12}}  # so that the mean of the parts is that of all tokens
    run = trainer(model, processor, mixed_rows(), tmp_path, [seen], **IN_ORDER, **twice, **split, **whole)
    run.train()
    steps = [entry for entry in run.state.log_history if "entropy" in entry]
    assert len(steps) == 2 and all(entry["clip_ratio/region_mean"] == 0 for entry in steps)

    model.eval()
    (batch,) = seen.batches
    entropies = []
    for place, written in enumerate(batch["completion_ids"]):
        inputs = inputs_of(processor, mixed_row(place // 2), enable_thinking=place // 2 % 2 == 1)
        prompt_length = inputs["input_ids"].shape[1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([written])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, prompt_length - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    expected = torch.cat(entropies).mean().item()
    assert [entry["entropy"] for entry in steps] == pytest.approx([expected] * 2, rel=1e-3)


def test_a_batch_of_text_alone_trains(processor, tmp_path):
    rows = Dataset.from_list([{"prompt": ask(text=text)} for text in ("Hi!", "Good day.")])

    def by_length(completion_ids, **kwargs):
        return [float(place) for place, _ in enumerate(completion_ids)]

    model = nano()
    before = model.llm.model.layers[0].mlp.up_proj.weight.detach().clone()
    run = trainer(model, processor, rows, tmp_path, [by_length])
    run.train()
    assert not torch.equal(before, model.llm.model.layers[0].mlp.up_proj.weight)


def test_vllm_rollouts_are_refused_before_anything_starts(processor, tmp_path):
    with pytest.raises(ArgumentsError, match="own generate"):
        trainer(nano(), processor, color_rows(4), tmp_path, use_vllm=True)


# --- Rewards ---


def test_rewards_judge_the_whole_text_though_the_full_tokenizer_parses_thoughts_out(repository, tmp_path):
    processor = AutoProcessor.from_pretrained(repository, trust_remote_code=True)
    narrow = tiny_config(hidden_size=128, num_hidden_layers=1, tie_word_embeddings=True)  # most of it is vocabulary
    assert processor.tokenizer.response_template  # TRL would hand over thought and answer apart
    texts = ["<box>1 2 3 4</box>", "red!", "see\n</think>\n\nred", "see"]
    model = scripted(name_seeded_model(narrow), processor, [f"{text}<|im_end|>" for text in texts])
    rows = [{"prompt": ask(text=answer), "answer": answer} for answer in ("<box>1 2 3 4</box>", "red")]
    settings = IN_ORDER | {"per_device_train_batch_size": 4, "log_completions": True}
    seen = Recorder()
    terms = [accuracy_reward, format_reward, seen]
    trainer(model, processor, Dataset.from_list(rows), tmp_path, terms, **settings).train()
    assert [completion[0]["content"] for completion in seen.batches[0]["completions"]] == texts
    table = completions_table(tmp_path)
    assert table["enable_thinking"][:] == [False, False, True, True]
    assert table["accuracy_reward"][:] == [1, 0, 1, 0]
    assert table["format_reward"][:] == [1, 1, 1, 0]


def test_the_score_of_a_reward_model_is_standardized_and_sees_final_answers_only(processor, tmp_path):
    torch.manual_seed(0)
    reward_model = load_reward_model(NANO, new_head=True, trust_remote_code=True)
    term = reward_model_term(reward_model, processor)
    texts = [
        "red",
        "blue",
        "see\n</think>\n\nred",
        "other words\n</think>\n\nred",
        "red",
        "red",
        "never closed",
        "red",
    ]
    model = scripted(nano(), processor, [f"{text}<|im_end|>" for text in texts])
    colors = ["red", "red", "blue", "blue"]
    rows = [{"prompt": ask({"type": "image"}), "images": [PICTURES[color]]} for color in colors]
    settings = IN_ORDER | {"reward_weights": [1.0, 0.5], "log_completions": True}
    trainer(model, processor, Dataset.from_list(rows), tmp_path, [format_reward, term], **settings).train()
    scores = torch.tensor(completions_table(tmp_path)["reward_model_score"][:])
    answered = [0, 1, 2, 3, 4, 5]  # the thoughts of the last two were never closed
    prompts = [ask({"type": "image", "image": PICTURES[colors[place // 2]]}) for place in answered]
    raw = score_answers(reward_model, processor, prompts, ["red", "blue", "red", "red", "red", "red"])
    torch.testing.assert_close(scores[:6], (raw - raw.mean()) / raw.std(), atol=1e-4, rtol=1e-4)
    assert scores[6:].tolist() == [0, 0]  # no answer, no score


def test_a_run_with_a_reward_model_logs_every_term_and_each_mode(processor, tmp_path):
    torch.manual_seed(0)
    term = reward_model_term(load_reward_model(NANO, new_head=True, trust_remote_code=True), processor)
    run = trainer(nano(), processor, color_rows(4), tmp_path, [accuracy_reward, format_reward, term], beta=0.0)
    run.train()
    (logged,) = [entry for entry in run.state.log_history if "reward" in entry]
    assert logged["thinking_share"] == 0.5 and {"accuracy/deep", "accuracy/fast"} <= logged.keys()
    assert abs(logged["rewards/reward_model_score/mean"]) < 1e-5
    assert math.isfinite(logged["reward_model_score/raw"]) and "kl" not in logged


# --- The command ---


def flags(folder, rows, **options):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    quick = {
        "model_name_or_path": NANO,
        "dataset_name": path,
        "image_folder": REPOSITORY / "assets",
        "output_dir": folder / "output",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return [f"--{name}={value}" for name, value in (quick | options).items()]


CONVERSATION = {
    "image": "shapes.jpg",
    "conversations": [
        {"role": "user", "content": "<image>\nHow many shapes are there?"},
        {"role": "assistant", "content": "<think>\nOne, two.\n</think>\n\n2"},
    ],
}
QUESTION = {"prompt": ask({"type": "image"}, text="Which number is it?"), "images": ["number.jpg"], "answer": "47"}


def test_a_conversation_becomes_a_question_whose_answer_is_its_last_without_the_thought():
    row = question_row(CONVERSATION | {"max_slice_nums": 2})
    assert row["answer"] == "2" and row["max_slice_nums"] == 2
    assert [message["role"] for message in row["prompt"]] == ["user"]
    assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
    row = question_row(QUESTION)
    assert row["answer"] == "47" and row["prompt"][0]["content"][0]["image"]["path"] == "number.jpg"
    assert question_row({"prompt": "Hi"})["answer"] is None
    with pytest.raises(BadRowError, match="not a question"):
        question_row({"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"})
    with pytest.raises(BadRowError, match="'answer' is text"):
        question_row(QUESTION | {"answer": 47})


def test_the_command_trains_an_adapter_with_all_terms_and_leaves_card_log_and_curves(processor, tmp_path):
    torch.manual_seed(0)
    load_reward_model(NANO, new_head=True, trust_remote_code=True).save_pretrained(tmp_path / "judge")
    processor.save_pretrained(tmp_path / "judge")
    grpo.main(flags(tmp_path, [CONVERSATION] * 2, adapter="lora", reward_model=tmp_path / "judge", max_steps=2))
    output = tmp_path / "output"
    names = {row["name"] for row in csv.DictReader((output / "log.csv").open())}
    terms = ("accuracy_reward", "format_reward", "repetition_penalty_reward", "reward_model_score")
    assert {f"rewards/{term}/mean" for term in terms} <= names
    assert {"README.md", "curves.png", "adapter_model.safetensors", "processing_minicpmv.py"} <= {
        path.name for path in output.iterdir()
    }
    model = AutoModel.from_pretrained(output, trust_remote_code=True)
    assert any("lora_B" in name for name, _ in model.named_parameters())


def test_a_picture_that_breaks_off_ends_the_command_by_the_name_of_its_row(tmp_path, capsys):
    whole = (REPOSITORY / "assets/number.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SystemExit):
        grpo.main(flags(tmp_path, [QUESTION | {"images": [str(tmp_path / "half.jpg")]}] * 2))
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("minicpmv: Row rows.jsonl[")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prompt": "Hi"}], {}, "Nothing says what a good answer is"),
        ([{"prompt": "Hi", "chosen": "Hello", "rejected": "Bye"}], {}, "minicpmv train reward"),
        ([QUESTION], {"thinking_share": 2}, "thinking_share"),
        ([QUESTION], {"use_vllm": True}, "own generate"),
        ([QUESTION], {"reward_model": "nowhere/at/all"}, "nowhere/at/all"),
        ([QUESTION], {"reward_model": NANO}, "no value head"),
        ([QUESTION], {"on_too_long": "drop"}, "on_too_long"),
    ],
)
def test_what_cannot_work_ends_the_command_in_one_line(rows, options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        grpo.main(flags(tmp_path, rows, **options))
    assert end.value.code == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("minicpmv: ") and message in last


def test_the_recipe_is_that_of_the_paper(tmp_path):
    (tmp_path / "questions.jsonl").write_text("")
    recipe = ["--config", str(REPOSITORY / "recipes/rl.yaml"), "--model_name_or_path", NANO]
    *_, args = parse(
        grpo.GROUPS, [*recipe, "--dataset_name", str(tmp_path / "questions.jsonl"), "--use_cpu", "--bf16=False"]
    )
    rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert (rollouts // args.num_generations, args.num_generations) == (128, 8)
    assert (args.max_completion_length, args.temperature, args.learning_rate) == (8192, 1.0, 1e-6)
    assert (args.thinking_share, args.beta, args.entropy_coef) == (0.5, 0.0, 0.0)
    # Every rollout of a step comes from the same policy.
    assert args.gradient_accumulation_steps % args.steps_per_generation == 0


# --- Learning ---


def taught_two_ways(model, processor, steps=24):
    """The model after a little supervised tuning: with and without a thought, most of its answers are longer than asked."""
    rng = random.Random(0)
    model.vpm.requires_grad_(False)  # half of a step's time
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(steps):
        conversations = []
        for thought in ("", "<think>\nlook\n</think>\n\n"):
            for color in PICTURES:
                answer = {"role": "assistant", "content": thought + rng.choice((color, *[f"the {color} shape"] * 2))}
                conversations.append([*ask({"type": "image", "image": PICTURES[color]}), answer])
        inputs = processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", return_assistant_tokens_mask=True
        )
        mask = torch.as_tensor(inputs.pop("assistant_masks")).bool()
        loss = model(**inputs, labels=inputs["input_ids"].masked_fill(~mask, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.slow
def test_grpo_learns_what_the_reward_wants_about_pictures_in_both_modes(processor, tmp_path):
    torch.manual_seed(0)
    run = trainer(
        taught_two_ways(nano(), processor),
        processor,
        color_rows(8),
        tmp_path,
        eval_dataset=color_rows(8),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=32,
        learning_rate=1e-4,
        max_steps=15,
    )
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    for mode in ("deep", "fast"):
        name = f"eval_accuracy/{mode}"
        assert after[name] > before[name] + 0.3, (name, before[name], after[name])
    assert all(entry.get("thinking_share", 0.5) == 0.5 for entry in run.state.log_history)


TWO_RANKS = """
import json, sys
sys.path[:0] = {tests!r}
from test_grpo import *

torch.set_num_threads(1)
output = sys.argv[1]
modes = []

def by_place(enable_thinking, **kwargs):
    modes.extend(enable_thinking)
    return [float(place % 2) for place in range(len(enable_thinking))]

rows = Dataset.from_list(
    [{{"prompt": ask({{"type": "image"}}), "images": [PICTURES["red"]]}}, {{"prompt": ask(text="Hi!"), "images": []}}] * 2
)
model = nano()
pictures = []
generate = model.generate
model.generate = lambda **inputs: pictures.append("pixel_values" in inputs) or generate(**inputs)
before = sum(p.double().sum() for p in model.parameters()).item()
processor = AutoProcessor.from_pretrained(NANO, trust_remote_code=True)
run = trainer(model, processor, rows, output, [by_place], per_device_train_batch_size=4, max_steps=2,
              shuffle_dataset=False, ddp_find_unused_parameters=False)
run.train()
after = sum(p.double().sum() for p in model.parameters()).item()
with open(f"{{output}}/rank{{run.accelerator.process_index}}.json", "w") as file:
    json.dump({{"before": before, "after": after, "modes": modes, "pictures": any(pictures)}}, file)
"""


@pytest.mark.slow
def test_two_processes_train_the_same_model_though_one_has_no_pictures(tmp_path, warm_python):
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS.format(tests=[str(REPOSITORY / "tests"), str(REPOSITORY / "tests/train")]))
    launch = [warm_python, "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/ddp.yaml"]
    launch += ["--num_processes=2", "--mixed_precision=no", "--main_process_port=0", str(script), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": warm_python}
    done = subprocess.run(launch, capture_output=True, text=True, timeout=300, env=environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first["pictures"] and not second["pictures"]
    assert first["modes"] == [False] * 8 and second["modes"] == [True] * 8  # groups 0 and 2; 1 and 3
    assert first["after"] == second["after"] != first["before"]
