"""nano: its tokenizer, its training batches, its recipe, its training loop and its scores."""

import json
import shutil
import subprocess
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

from minicpmv.drawn.samples import SCENES, Mixture, Sample, Turn, bench_sample, make_sample
from minicpmv.drawn.wording import ENGLISH
from minicpmv.train import dpo, sft
from minicpmv.train.common.errors import ArgumentsError, TrainingError
from minicpmv.train.feedback import run as feedback
from minicpmv.train.nano import card, muon, pretrain
from minicpmv.train.nano.batches import LAYOUTS, SampleEncoder, single_turns, training_batch, training_examples
from minicpmv.train.nano.growth import deepened, layer_counts
from minicpmv.train.nano.packed import Tables, bundled, cheapest_groups, packed_losses, packed_step, unbundled
from minicpmv.train.nano.pretrain import Recipe, Stage, is_trained, main, optimizers_of, train
from minicpmv.train.nano.release import release
from minicpmv.train.nano.tokenizer import build, train_merges
from minicpmv.train.nano.trainee import HEADS, Trainee, spread_queries


REPOSITORY = Path(__file__).resolve().parents[2]
NANO = REPOSITORY / "nano"
EVERYTHING = Mixture(sliced=0.5, thinking=0.5)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def encoder(nano_processor):
    return SampleEncoder(nano_processor)


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


def test_every_patch_has_a_label(encoder):
    for index in range(20):
        example = encoder.encode(make_sample("train", 6, index, EVERYTHING))
        patches = sum(rows * cols for rows, cols in example.tgt_sizes.tolist())
        for name, (classes, choices) in HEADS.items():
            labels = example.patch_labels[name]
            assert labels.numel() == patches * choices and labels.max() < classes


def test_a_training_batch_follows_from_its_number_and_has_one_layout(encoder):
    alike = replace(EVERYTHING, thinking=0.0)
    layouts = set()
    for number in range(24):
        batch = training_batch(encoder, alike, 4, seed=0, number=number)
        again = training_batch(encoder, alike, 4, seed=0, number=number)
        assert torch.equal(batch["input_ids"], again["input_ids"])
        clips = {units != [[-1]] * len(units) for units in batch["temporal_ids"]}
        assert len(clips) == 1
        layouts.add((clips.pop(), any(len(sizes) > 1 for sizes in batch["tgt_sizes"])))
    assert layouts == {(False, False), (False, True), (True, True)}


def test_every_scene_has_a_layout():
    assert sorted(scene for scenes in LAYOUTS for scene in scenes) == sorted(SCENES)


def test_a_question_alone_is_about_what_was_shown_by_then():
    sample = next(
        sample
        for sample in (make_sample("train", 0, i, Mixture({"pair": 1}, turns=(2, 3))) for i in range(80))
        if sample.shown
    )
    singles = single_turns(sample)
    assert [len(single.turns) for single in singles] == [1] * len(sample.turns)
    assert [len(single.drawings) for single in singles] == [1, *[len(sample.drawings)] * (len(singles) - 1)]


def test_who_is_asked_for_a_box_is_told_of_what(encoder):
    sample = make_sample("train", 0, 0, Mixture(scenes={"shapes": 1}, sliced=0, tasks=["grounding"], turns=(2, 2)))
    shown = encoder.collator.processor.tokenizer.decode(encoder.encode(sample).input_ids)
    assert [f"<ref>{turn.ref}</ref>" in shown for turn in sample.turns] == [True, True]


# --- Growth ---


def test_new_layers_change_nothing_until_they_learn(encoder):
    model = tiny_trainee().model.eval()
    batch = encoder.batch([encoder.encode(make_sample("train", 0, i, EVERYTHING)) for i in (0, 1)])
    options = {"trust_remote_code": True, "dtype": torch.float32}
    grown = deepened(model, {"llm": 3, "tower": 2}, **options).eval()
    assert layer_counts(grown) == {"llm": 3, "tower": 2}
    for one, other in ((model, grown), (grown, deepened(grown, {"llm": 5}, **options).eval())):
        torch.manual_seed(0)
        heads = Trainee(one).eval(), Trainee(other).eval()
        heads[1].load_state_dict(heads[0].state_dict() | other_weights(other))
        with torch.no_grad():
            before, after = (trainee(batch) for trainee in heads)
        assert torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    _, loss, _, _ = Trainee(grown).train()(batch)
    loss.backward()
    assert all(layer.self_attn.o_proj.weight.grad.any() for layer in grown.llm.model.layers)


def other_weights(model):
    return {f"model.{name}": weight for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("layers", [{"llm": 0}, {"tower": 0}, {"resampler": 2}])
def test_a_model_only_grows_and_only_where_it_has_layers(layers):
    with pytest.raises(ArgumentsError, match="is not possible; the model has"):
        deepened(tiny_trainee().model, layers)


# --- Training ---


def test_a_tiny_net_learns_one_picture_by_heart(encoder):
    trainee = tiny_trainee()
    sample = make_sample("train", 0, 0, Mixture(scenes={"shapes": 1}, sliced=0))
    single = Sample(sample.drawings, [Turn("colour", "What color is the shape?", "purple")])
    batch = encoder.batch([encoder.encode(single)])
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


def test_heads_of_queries_start_spread_over_the_picture():
    resampler = tiny_trainee().model.resampler
    with torch.no_grad():
        states = resampler.ln_q(resampler.query), resampler.positions([(8, 10)], [-1], "cpu")
        weights = resampler.attn.in_proj_weight.chunk(3)
        query, key = (
            torch.nn.functional.linear(state, weight).unflatten(-1, (-1, resampler.attn.head_dim))
            for state, weight in zip(states, weights, strict=False)
        )
        nearest = torch.einsum("qhd,khd->qhk", query, key).argmax(-1).flatten().tolist()
    assert len(nearest) == 36 * 2 and len(set(nearest)) > 50  # of 80 patches


def small_nano(folder):
    """A folder like nano's, of a model with one layer in tower and language model."""
    folder.mkdir()
    for file in NANO.iterdir():
        if file.suffix in (".json", ".jinja", ".py"):
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = config["max_window_layers"] = config["vision_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def two_stages(folder):
    stages = [
        Stage("tower", 2, 2, 1e-3, Mixture({"shapes": 1, "line": 1}), batches=2, answers=False),
        Stage("answers", 2, 2, 1e-3, Mixture({"paper_form": 1, "mixed": 1}), batches=2, layers={"llm": 2}),
    ]
    return Recipe(stages, model=small_nano(folder), processes=1, validation_samples=2)


def weights_of(output):
    return torch.load(output / "state.pt", weights_only=True)["trainee"]


def test_a_run_that_is_stopped_after_every_step_ends_with_the_same_weights_and_a_model_that_loads(tmp_path):
    recipe = two_stages(tmp_path / "small")
    train(0, recipe, prepared(tmp_path / "whole"))
    stopped, calls = prepared(tmp_path / "stopped"), 1
    while train(0, recipe, stopped, minutes=0) is None:
        calls += 1
        with (stopped / "log.jsonl").open("a") as log:  # as a run leaves it that was killed after its last save
            log.write('{"stage": 1, "step": 1, "samples": 99}\n')
    assert calls == 5  # four steps, and the end
    whole, pieces = weights_of(tmp_path / "whole"), weights_of(stopped)
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)
    assert any("layers.1." in name for name in whole)
    entries = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    assert [(entry["stage"], entry["name"], entry["samples"]) for entry in entries] == [
        (0, "tower", 8),
        (1, "answers", 16),
    ]
    assert (stopped / "curves.png").is_file()
    model = AutoModel.from_pretrained(stopped / "model", trust_remote_code=True)
    assert layer_counts(model) == {"llm": 2, "tower": 1}
    processor = AutoProcessor.from_pretrained(stopped / "model", trust_remote_code=True)
    sample = bench_sample("colour")
    asked = [{"role": "user", "content": sample.turns[0].question}]
    text = model.chat(sample.images[0], asked, processor=processor, max_new_tokens=8)  # untaught, it would not end
    assert isinstance(text, str)
    release(stopped / "model", [stopped], tmp_path / "release", Path(recipe.model))
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "release" / name).read_bytes() == (stopped / "model" / name).read_bytes()
    assert {file.name for file in (tmp_path / "release" / "training").iterdir()} == {"stopped.jsonl", "stopped.png"}
    further = Recipe(recipe.stages[1:], model=recipe.model, weights=str(stopped / "model"), validation_samples=2)
    trained = train(0, further, prepared(tmp_path / "further"))
    assert layer_counts(trained.model) == {"llm": 2, "tower": 1}


def prepared(folder):
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_two_processes_make_the_weights_that_one_makes(tmp_path, monkeypatch):
    # Each would import torch anew; that the processes start so is seen below, where a run is out of time.
    fork = partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", fork)
    recipe = two_stages(tmp_path / "small")
    for processes in (1, 2):
        settings = tmp_path / f"{processes}.yaml"
        described = asdict(replace(recipe, processes=processes))
        for stage in described["stages"]:
            stage["mixture"]["turns"] = list(stage["mixture"]["turns"])
            stage["mixture"]["characters"] = list(stage["mixture"]["characters"])
        settings.write_text(yaml.safe_dump(described))
        main(["--config", str(settings), "--output", str(tmp_path / str(processes))])
    one, two = (weights_of(tmp_path / name) for name in ("1", "2"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_is_out_of_time_says_how_it_goes_on(tmp_path):
    settings = tmp_path / "recipe.yaml"
    stage = {"name": "tower", "steps": 2, "batch_size": 1, "learning_rate": 1e-3, "batches": 1, "answers": False}
    recipe = {"model": small_nano(tmp_path / "small"), "processes": 1, "validation_samples": 1, "stages": [stage]}
    recipe["weights"] = "nowhere"
    settings.write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit, match=r"0 minutes are over; .* the same command goes on"):
        options = ["--weights", str(NANO), "--minutes", "0"]
        main(["--config", str(settings), "--output", str(tmp_path / "run"), *options])
    assert (tmp_path / "run" / "state.pt").is_file() and not (tmp_path / "run" / "model").exists()


# --- All batches of a step at once, as on a GPU ---


def numbered_batches(encoder):
    """Two pictures and a form, cut into slices; a clip; a pair: their layouts have their own lengths."""
    mixtures = [{"shapes": 1}, {"paper_form": 1}, {"mixed": 1}, {"pair": 1}]
    return [
        training_examples(encoder, replace(EVERYTHING, scenes=scenes), 2, seed=0, number=number)
        for number, scenes in enumerate(mixtures)
    ]


def test_a_packed_step_gives_the_losses_and_gradients_of_its_batches_one_by_one(encoder):
    trainee, batches = tiny_trainee(), numbered_batches(encoder)
    trainee.model.set_attn_implementation("sdpa")
    few_views = 10  # the clips do not teach the tower
    tables = Tables(trainee, encoder.collator.processor.image_processor, torch.device("cpu"))
    buffer, layout = bundled(packed_step(encoder, batches, few_views))
    packed = torch.stack(packed_losses(trainee, unbundled(buffer, layout), tables))
    packed.sum().backward()
    gradients = {name: parameter.grad for name, parameter in trainee.named_parameters()}
    trainee.zero_grad()
    losses = []
    for batch in map(encoder.batch, batches):
        views = sum(map(len, batch["tgt_sizes"]))
        losses.append(torch.stack(trainee(batch, True, views <= few_views)[:2]))
        (losses[-1].sum() / len(batches)).backward()
    assert {sum(len(example.tgt_sizes) for example in batch) <= few_views for batch in batches} == {True, False}
    torch.testing.assert_close(packed, torch.stack(losses).mean(0))
    for name, parameter in trainee.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 100))
def test_groups_hold_every_sequence_once_and_cost_no_more_than_one_group_or_one_each(lengths, group_cost):
    groups = cheapest_groups(lengths, group_cost)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))

    def cost(groups):
        return sum(len(group) * max(lengths[index] for index in group) + group_cost for group in groups)

    assert cost(groups) <= min(cost([range(len(lengths))]), cost([[index] for index in range(len(lengths))]))


def packed_run_that_goes_on(folder):
    """Whether a run that packs its steps ends with the same bits, stopped after each step or not."""
    torch.set_num_threads(1)
    recipe = two_stages(folder / "small")
    recipe.stages[1].steps, recipe.stages[1].again = 4, 1
    start = prepared(folder / "start")
    while torch.load(start / "state.pt")["progress"]["stage"] < 1 if (start / "state.pt").exists() else True:
        train(0, recipe, start, minutes=0)
    pretrain.packs_steps = lambda device: True
    whole = shutil.copytree(start, folder / "whole")
    train(0, recipe, whole)
    while train(0, recipe, start, minutes=0) is None:
        pass
    one, other = weights_of(whole), weights_of(start)
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_with_packed_steps_goes_on_with_the_same_bits_from_the_state_of_one_without(tmp_path, warm_python):
    # In a process of its own: in one that has run other engines before, it ended without a word.
    tests = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {tests!r}; from test_nano_train import *; "
    code += f"assert packed_run_that_goes_on(Path({str(tmp_path)!r}))"
    done = subprocess.run([warm_python, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_other_step_may_repeat_one_drawn_before_and_batches_drawn_nowhere_else_come_first():
    stage = Stage("all", 10, 1, learning_rate=1.0, again=2)
    assert [stage.drawn_step(step) for step in range(10)] == [0, -2, 1, -1, 2, 0, 3, 1, 4, 2]
    assert [replace(stage, again=0).drawn_step(step) for step in range(3)] == [0, 1, 2]


def test_muon_for_many_matrices_takes_the_steps_of_pytorchs(monkeypatch):
    monkeypatch.setattr(muon, "fast_type", lambda device: torch.bfloat16)  # that of PyTorch's, on any machine
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 4), (8, 4), (4, 8), (8, 8)]]
    theirs = [torch.nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizers = [
        muon.BatchedMuon(ours, lr=0.1, weight_decay=0.1),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        optimizers.append(optimizers.pop(0))  # in any order
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)  # bfloat16
    assert optimizers[1].state_dict().keys() == optimizers[0].state_dict().keys()
    before = [one.detach().clone() for one in ours]
    (own,) = (optimizer for optimizer in optimizers if isinstance(optimizer, muon.BatchedMuon))
    own.zero_grad()
    own.step()  # as in a stage in which only the heads learn
    assert all(torch.equal(one, old) for one, old in zip(ours, before, strict=True))


def test_a_run_that_is_to_finish_ends_its_last_stage_with_the_minutes_and_writes_the_model(tmp_path):
    recipe = two_stages(tmp_path / "small")
    recipe.stages = recipe.stages[:1]
    recipe.stages[0].steps = 1000
    assert train(0, recipe, prepared(tmp_path / "run"), minutes=0, finishes=True) is not None
    assert (tmp_path / "run" / "model").is_dir() and is_trained(recipe, tmp_path / "run")
    stage = Stage("all", 100, 1, learning_rate=1.0, decay=0.5, warmup=1)
    assert [stage.rate(10, left) for left in (1.0, 0.5, 0.25, 0.0)] == [1.0, 1.0, 0.5, 0.05]
    assert stage.rate(75) == 0.5 == stage.rate(75, time_left=0.9)


# --- Card ---


def test_a_card_gets_the_figures_and_stages_of_a_run():
    old = "# nano\n<!-- nano table -->\n| row | what | right |\n|---|---|---|\n| `count` | how many | 1 % |\n<!-- end -->\nProse.\n"
    figures = {
        "count": {"exact": 0.955, "n": 200},
        "page_text": {"exact": 0.5, "characters": 0.975, "n": 200},
        "chair": {"chair_i": 0.01, "chair_s": 0.05, "recall": 0.98, "n": 200},
    }
    log = [
        {"stage": 0, "name": "tower", "samples": 100, "minutes": 2.0, "validation": {"patches": 0.86}},
        {"stage": 1, "name": "all", "samples": 300, "minutes": 5.0, "validation": {"patches": 0.9, "answers": 0.75}},
    ]
    new = card.written(old, figures, [log])
    assert "| `count` | how many | 95.5 % |" in new and "Prose." in new and "1 %  |" not in new
    assert "| `page_text` | page_text | 50 % (97.5 % of the characters) |" in new
    assert "| `chair` | chair | 1 % of the objects (recall 98 %) |" in new
    assert "| tower | 100 | 2 | 86 % of the patches |\n| all | 200 | 3 | 75 % of the answers |" in new
    assert card.written(new, figures, [log]) == new
    with pytest.raises(ArgumentsError, match="put the marks where it goes"):
        card.written("# nano\n", figures, [log])


def test_a_run_whose_loss_is_no_number_stops_and_saves_nothing(tmp_path):
    stage = Stage("tower", 4, 2, 1e30, Mixture({"shapes": 1}), batches=1, answers=False, warmup=1)
    with pytest.raises(TrainingError, match=r"Stage tower, step \d: the loss is .*Lower the learning_rate"):
        train(0, Recipe([stage], model=str(NANO), processes=1, validation_samples=2), tmp_path)
    assert not (tmp_path / "state.pt").exists() and not (tmp_path / "model").exists()


def test_an_installed_package_says_that_the_tokenizer_is_built_in_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr("minicpmv.train.nano.tokenizer.REPOSITORY", tmp_path)
    with pytest.raises(ArgumentsError, match="run this in a clone"):
        build(tmp_path)


def test_the_recipe_of_nano_is_valid_and_a_misspelt_field_is_named(tmp_path):
    for name in ("pretraining", "third", "fourth"):
        for stage in Recipe.load(REPOSITORY / "recipes" / "nano" / f"{name}.yaml").stages:
            assert set(stage.mixture.scenes) <= set(SCENES)
            assert set(stage.mixture.tasks or ()) <= set(ENGLISH.phrases)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("stages: [{name: a, steps: 1, batch_size: 1, learning_rat: 0.1}]")
    with pytest.raises(ArgumentsError, match="learning_rat"):
        Recipe.load(wrong)
    wrong.write_text("stages: [{name: a, steps: 1, batch_size: 1, learning_rate: 2e-3}]")
    assert Recipe.load(wrong).stages[0].rate(0, 1.0) == 2e-5  # the first of 100 steps of warming up
    wrong.write_text("stages: [{name: a, steps: 1, batch_size: 1, learning_rate: 1, mixture: elsewhere.yaml}]")
    with pytest.raises(ArgumentsError, match="mixture: there is no .*elsewhere.yaml"):
        Recipe.load(wrong)
    (tmp_path / "elsewhere.yaml").write_text("scenes: {line: 2}\nsystems: 0.5")
    assert Recipe.load(wrong).stages[0].mixture == Mixture({"line": 2}, systems=0.5)
    wrong.write_text("stages: [{name: a, steps: 1, batch_size: 1, learning_rate: high}]")
    with pytest.raises(ArgumentsError, match="high"):
        Recipe.load(wrong)


@pytest.mark.slow
def test_the_later_stages_of_nano_follow_each_other_by_their_recipes(tmp_path, monkeypatch):
    """Few and short steps, each from what the one before left."""
    monkeypatch.chdir(REPOSITORY)

    def folder(name):
        return str(tmp_path / name)

    def options(recipe, **changes):
        changed = (f"--{name}={value}" for name, value in changes.items())
        return ["--config", f"recipes/nano/{recipe}.yaml", *changed]

    few = {"max_steps": 1, "per_device_train_batch_size": 2}
    sft.main(options("sft", model_name_or_path=NANO, output_dir=folder("sft"), **few))
    # Hot enough that the captions of a picture differ.
    hot = {"temperature": 2.0, "max_prompts": 24}
    feedback.main(options("feedback", model_name_or_path=folder("sft"), output_dir=folder("feedback"), **hot))
    pairs = {"dataset_name": folder("feedback/pairs"), "warmup_steps": 0}
    dpo.main(options("dpo", model_name_or_path=folder("sft"), output_dir=folder("dpo"), **pairs, **few))
    before, after = (
        AutoModel.from_pretrained(folder(name), trust_remote_code=True).state_dict() for name in ("sft", "dpo")
    )
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
