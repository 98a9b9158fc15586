"""Distillation: a step brings the student nearer, whatever the widths; a cache replaces the teacher; thoughts stay."""

import os
import subprocess

import pytest
import torch
from conftest import REPOSITORY
from test_sft import NANO, NUMBER, SHAPES, STAR, conversation, flags, load, logged

from minicpmv.compress.run import Settings, compress
from minicpmv.train import distill
from minicpmv.train.common import arguments
from minicpmv.train.common.errors import ArgumentsError, TrainingError


THINKING = conversation("<think>\nTwo more than two.\n</think>\n\n4", "How much is 2 and 2?")
CLIP = STAR | {"max_num_packing": 6, "force_packing": 3}
LEARNING_RATE = 1e-4


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """nano with narrower MLPs and half the queries."""
    folder = tmp_path_factory.mktemp("student") / "small"
    sizes = {"mlp": 256, "tower_mlp": 288, "tower_heads": 2, "queries": 18}
    compress(NANO, folder, Settings(sizes=sizes, conversations=2))
    return folder


def run(tmp_path, rows, model, **options):
    options = {"teacher": NANO, "max_steps": 4, "learning_rate": LEARNING_RATE, "model_name_or_path": model} | options
    options.setdefault("per_device_train_batch_size", len(rows))
    return distill.train(*arguments.parse(distill.GROUPS, flags(tmp_path, rows, **options)))


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd"])
def test_a_divergence_is_zero_for_equals_and_positive_for_others(kind):
    torch.manual_seed(0)
    one, other = torch.randn(2, 5, 9).log_softmax(-1)
    assert distill.divergence(one, one, kind).item() == pytest.approx(0, abs=1e-6)
    assert distill.divergence(one, other, kind) > 0.01
    expected = (other.exp() * (other - one)).sum(-1).mean()
    if kind == "forward":
        torch.testing.assert_close(distill.divergence(one, other, kind), expected)
    if kind == "reverse":
        torch.testing.assert_close(distill.divergence(other, one, kind), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"divergence": "forward"},
        {"divergence": "reverse", "label_weight": 0.1},
        {"divergence": "jsd", "temperature": 2},
        {"tower_weight": 1},
    ],
    ids=str,
)
def test_steps_lower_the_divergence_of_pictures_clips_and_thoughts(tmp_path, student, options):
    run(tmp_path, [SHAPES, CLIP, THINKING], student, **options)
    losses = logged(tmp_path / "output", "loss")
    assert losses[4] < losses[1]


@pytest.mark.parametrize("answers", ["teacher", "own"])
def test_generated_answers_teach_too(tmp_path, student, answers):
    trainer = run(tmp_path, [NUMBER, THINKING], student, answers=answers, max_new_tokens=8, max_steps=2)
    assert trainer.state.global_step == 2
    assert all(torch.isfinite(torch.tensor(loss)) for loss in logged(tmp_path / "output", "loss").values())
    model, _ = load(tmp_path / "output")
    assert model.config.query_num == 18


def test_a_model_is_no_distance_from_itself(tmp_path):
    run(tmp_path, [SHAPES, CLIP, THINKING], NANO, max_steps=1, tower_weight=1, resampler_weight=1)
    assert logged(tmp_path / "output", "loss")[1] == pytest.approx(0, abs=1e-4)


def test_what_the_teacher_said_is_kept_and_it_can_be_gone(tmp_path, student):
    cache = tmp_path / "cache"
    first = run(tmp_path, [SHAPES, CLIP], student, teacher_cache=cache, output_dir=tmp_path / "with")
    assert len(list(cache.glob("*.safetensors"))) == 2
    assert first.teacher is not None
    # Another batch pads images otherwise; rows are found all the same.
    rows = {"teacher": None, "teacher_cache": cache, "output_dir": tmp_path / "without"}
    second = run(tmp_path, [SHAPES, CLIP], student, **rows)
    assert second.teacher is None
    losses = [logged(tmp_path / name, "loss") for name in ("with", "without")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    run(tmp_path, [SHAPES, CLIP], student, **rows | {"output_dir": tmp_path / "one", "per_device_train_batch_size": 1})
    with pytest.raises(TrainingError, match="lacks a row"):
        run(tmp_path, [NUMBER], student, **rows)


def test_all_cached_tokens_give_the_divergence_of_the_whole_vocabulary(tmp_path, student):
    options = {"max_steps": 1, "output_dir": tmp_path / "all"}
    run(tmp_path, [SHAPES], student, teacher_cache=tmp_path / "cache", teacher_top_k=1023, **options)
    run(tmp_path, [SHAPES], student, **options | {"output_dir": tmp_path / "live"})
    cached, live = (logged(tmp_path / name, "loss")[1] for name in ("all", "live"))
    assert cached == pytest.approx(live, rel=1e-2)


@pytest.mark.slow
def test_two_processes_one_without_pictures_take_the_steps_of_one(tmp_path, student, warm_python):
    # The answers have one length: both processes count alike.
    rows = [SHAPES, conversation("4", "How much is 2 and 2?")]
    run(tmp_path, rows, student, output_dir=tmp_path / "one", max_steps=2)
    options = {"teacher": NANO, "learning_rate": LEARNING_RATE, "model_name_or_path": student, "max_steps": 2}
    options["per_device_train_batch_size"] = 1
    launch = [
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "recipes/accelerate/ddp.yaml",
        "--num_processes",
        "2",
    ]
    launch += ["--mixed_precision", "no", "--main_process_port", "0", "-m", "minicpmv.train.distill"]
    done = subprocess.run(
        [warm_python, *launch, *flags(tmp_path, rows, output_dir=tmp_path / "two", **options)],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHON_EXEC": warm_python},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for measure in ("loss", "grad_norm"):
        one, two = (logged(tmp_path / name, measure) for name in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-3), measure
    one, two = (load(tmp_path / name)[0] for name in ("one", "two"))
    for (name, expected), parameter in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, atol=1e-3, rtol=0, msg=name)


def test_a_thought_is_opened_for_rows_that_think():
    opening = [7, 8]
    batch = {
        "input_ids": torch.tensor([[1, 2, 7, 8, 9, 10], [1, 2, 3, 9, 10, 0]]),
        "labels": torch.tensor([[-100, -100, 7, 8, 9, 10], [-100, -100, -100, 9, 10, -100]]),
    }
    prompts = distill.prompts_of(batch, opening)
    assert [prompt.tolist() for prompt in prompts] == [[1, 2, 7, 8], [1, 2, 3]]


def test_slots_follow_the_number_of_queries():
    batch = {
        "input_ids": torch.tensor([[1, 5, 5, 2, 5, 5, 3], [1, 2, 3, 0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 0, 0]]),
        "labels": torch.tensor([[-100] * 6 + [3], [-100, -100, 3] + [-100] * 4]),
    }
    wide = distill.with_slots(batch, slot=5, own=2, other=3, padding=0)
    assert wide["input_ids"].tolist() == [[1, 5, 5, 5, 2, 5, 5, 5, 3], [1, 2, 3] + [0] * 6]
    assert wide["labels"][0].tolist() == [-100] * 8 + [3]
    assert wide["attention_mask"].sum(1).tolist() == [9, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": None}, "teacher is missing"),
        ({"temperature": 0}, "temperature"),
        ({"answers": "own", "teacher_cache": "cache"}, "new ones each time"),
        ({"tower_weight": 1, "teacher_cache": "cache"}, "not features"),
    ],
)
def test_options_that_contradict_each_other_are_refused(tmp_path, options, message):
    with pytest.raises(ArgumentsError, match=message):
        run(tmp_path, [SHAPES], NANO, **options)


def test_resamplers_of_unequal_queries_are_not_compared(tmp_path, student):
    with pytest.raises(ArgumentsError, match="36 of a slice and the student 18"):
        run(tmp_path, [SHAPES], student, resampler_weight=1)
