"""`minicpmv compress`: a target, a folder that loads with nothing new, and a report; what cannot be is refused first."""

import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import NANO, REPOSITORY
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from minicpmv.commands.main import app
from minicpmv.compress import plan
from minicpmv.compress.plan import Target
from minicpmv.compress.run import REPORT, Settings, compress
from minicpmv.compress.shapes import CompressionError, Shape
from minicpmv.compress.sparsity import PATTERNS, zeroed
from minicpmv.evaluate import harness


WHOLE = Shape(layers=8, heads=4, mlp=512, vocabulary=1000, tower_layers=8, tower_heads=4, tower_mlp=512, queries=64)


def area(shape):
    return shape.layers * (shape.mlp + 100 * shape.heads)


# ---- targets ----


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("75%", Target(None, 0.75, True)),
        ("6e9", Target(None, 6e9, False)),
        ("6B", Target(None, 6e9, False)),
        ("500m", Target(None, 5e8, False)),
        ("llm=75%", Target("llm", 0.75, True)),
        ("tower=2000", Target("tower", 2000, False)),
    ],
)
def test_targets_are_read_as_people_write_them(text, target):
    assert Target.parse(text) == target


@pytest.mark.parametrize("text", ["", "0%", "120%", "mouth=75%", "x", "75%%"])
def test_other_targets_are_refused(text):
    with pytest.raises(CompressionError, match="the target"):
        Target.parse(text)


def test_the_path_cuts_first_what_costs_least_for_what_it_saves():
    curves = {
        "layers": [(8, 0.1), (4, 4.1)],
        "mlp": [(512, 0.1), (256, 0.2)],
        "heads": [(4, 0.1), (2, 9.0)],
    }
    path = list(plan.steps(WHOLE, list(curves), area, curves))
    assert path[0] == WHOLE
    assert [area(shape) for shape in path] == sorted((area(shape) for shape in path), reverse=True)
    narrow = next(shape for shape in path if shape.mlp == 256)
    assert (narrow.layers, narrow.heads) == (8, 4)
    assert path[-1].layers == 4 and path[-1].heads == 2  # never below what was measured


def test_without_measurements_all_kinds_keep_about_the_same_share():
    shape = plan.choose(WHOLE, ["layers", "mlp", "heads"], area, 0.4 * area(WHOLE), None)
    assert area(shape) <= 0.4 * area(WHOLE)
    shares = [shape.layers / 8, shape.mlp / 512, shape.heads / 4]
    assert max(shares) - min(shares) <= 0.26


def test_what_a_whole_layer_made_needless_is_given_back():
    curves = {"mlp": [(512, 0.1), (256, 0.101)], "layers": [(8, 0.1), (4, 0.2)]}
    half = replace(WHOLE, mlp=256)  # as far as the MLPs go; then layers follow
    limit = area(half) - 1
    first = next(shape for shape in plan.steps(WHOLE, list(curves), area, curves) if area(shape) <= limit)
    chosen = plan.choose(WHOLE, list(curves), area, limit, curves)
    assert first.mlp == 256 and first.layers == chosen.layers == 7
    assert chosen.mlp > 256 and area(chosen) <= limit < area(replace(chosen, mlp=chosen.mlp + 16))


def test_a_target_out_of_reach_names_how_far_it_goes():
    curves = {"mlp": [(512, 0.1), (256, 0.2)]}
    with pytest.raises(CompressionError, match=r"100 cannot be reached: mlp .* leave 5,248"):
        plan.choose(WHOLE, ["mlp"], area, 100, curves)


def test_a_target_of_time_takes_the_largest_shape_that_is_fast_enough_and_times_few():
    path = list(plan.steps(WHOLE, ["mlp", "layers"], area, None))
    timed = []

    def seconds(shape):
        timed.append(shape)
        return area(shape) / 1000

    chosen = plan.choose_by_time(path, seconds, 4)
    assert chosen == next(shape for shape in path if area(shape) <= 4000)
    assert len(timed) < 10
    with pytest.raises(CompressionError, match="1 ms cannot be reached"):
        plan.choose_by_time(path, seconds, 0.001)


# ---- a checkpoint ----


@pytest.mark.slow
def test_a_target_is_met_by_a_folder_that_loads_by_itself_with_its_report(tmp_path):
    heard = []
    settings = Settings(targets=[Target.parse("llm=90%")], kinds=["mlp"], conversations=4, compares_sparsity=True)
    report = compress(NANO, tmp_path / "smaller", settings, heard.append)
    model = AutoModel.from_pretrained(tmp_path / "smaller", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "smaller", trust_remote_code=True)
    assert "smaller" in type(model).__module__  # its own code
    written = json.loads((tmp_path / "smaller" / REPORT).read_text())
    count = sum(parameter.numel() for parameter in model.parameters())
    assert written["after"]["sizes"]["parameters"] == count < written["before"]["sizes"]["parameters"]
    assert report.after["sizes"]["llm_parameters"] <= 0.9 * report.before["sizes"]["llm_parameters"]
    assert report.after["loss"] < report.before["loss"] + 0.5
    assert len(report.sparsity) == 4
    assert any("1 of 5: mlp" in what for what in heard)  # progress
    assert (tmp_path / "smaller" / "sensitivity.png").stat().st_size > 0
    content = [{"type": "image", "image": str(REPOSITORY / "assets" / "shapes.jpg")}, "How many shapes are there?"]
    content[1] = {"type": "text", "text": content[1]}
    answer = model.chat(msgs=[{"role": "user", "content": content}], processor=processor, decoding="greedy")
    assert answer.strip()
    assert not list(tmp_path.glob("unfinished*"))


def test_a_target_of_time_is_met_by_the_largest_size_that_the_measured_times_allow(tmp_path, monkeypatch):
    """The clock is replaced by one that knows the width alone, and NanoBench has two rows; all else goes the whole way."""
    monkeypatch.setattr(plan, "seconds_of_question", lambda model, inputs: model.config.intermediate_size / 1000)
    monkeypatch.setattr(harness, "measure", partial(harness.measure, rows=["colour", "count"]))
    options = ["--target-latency", "403", "--cut", "mlp", "--conversations", "2", "--samples", "1"]
    result = CliRunner().invoke(app, ["compress", "-m", str(NANO), "--output", str(tmp_path / "faster"), *options])
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "faster" / REPORT).read_text())
    before, after = report["before"], report["after"]
    assert (before["milliseconds"], after["milliseconds"]) == (512, 400) and after["shape"]["mlp"] == 400
    assert {name: size for name, size in before["shape"].items() if name != "mlp"}.items() <= after["shape"].items()
    assert len(report["curves"]["mlp"]) == 6  # the whole model, and five sizes
    assert [(row, found["metric"], found["n"]) for row, found in report["bench"].items()] == [
        ("colour", "exact", 1),
        ("count", "exact", 1),
    ]
    assert report["bench"]["colour"]["before"] == 1 and 0 <= report["bench"]["colour"]["after"] <= 1
    assert "| colour | exact | 1.000 |" in (tmp_path / "faster" / "README.md").read_text()
    model = AutoModel.from_pretrained(tmp_path / "faster", trust_remote_code=True)
    assert model.config.intermediate_size == model.llm.model.layers[0].mlp.up_proj.out_features == 400


def test_given_sizes_queries_and_vocabulary_go_through_files_together(tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("How many shapes are there?\nWhat is this?\n")
    settings = Settings(sizes={"queries": 18}, corpus=str(corpus), conversations=2)
    compress(NANO, tmp_path / "smaller", settings)
    model = AutoModel.from_pretrained(tmp_path / "smaller", trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "smaller", trust_remote_code=True)
    assert model.config.vocab_size == len(processor.tokenizer) < 1000
    assert processor.image_token_id == model.config.image_token_id
    assert processor.tokenizer.eos_token_id in model.generation_config.eos_token_id
    inputs = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": str(REPOSITORY / "assets" / "shapes.jpg")},
                    {"type": "text", "text": "How many shapes are there?"},
                ],
            }
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    assert (inputs["input_ids"] == model.config.image_token_id).sum() % 18 == 0
    clip = [{"role": "user", "content": [{"type": "video", "video": str(REPOSITORY / "assets" / "star.mp4")}]}]
    frames = processor.apply_chat_template(clip, tokenize=True, return_dict=True, return_tensors="pt", force_packing=3)
    with torch.no_grad():
        assert model(**frames).logits.isfinite().all()  # a clip has as many slots as features
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(), "nothing is to be cut"),
        (Settings(sizes={"mlp": 999}), "mlp=999, but the model has 512"),
        (Settings(targets=[Target.parse("75%")], kinds=["knees"]), "knees is nothing that a target can cut"),
        (Settings(targets=[Target.parse("75%")], milliseconds=5), "not both"),
        (Settings(corpus="nowhere.txt"), "nowhere.txt does not exist"),
        (Settings(sizes={"mlp": 384}, conversations=0), "at least 1"),
    ],
)
def test_what_cannot_be_done_leaves_nothing(tmp_path, settings, message):
    with pytest.raises(CompressionError, match=message):
        compress(NANO, tmp_path / "smaller", settings)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_overwritten(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CompressionError, match="is there already"):
        compress(NANO, tmp_path, Settings(sizes={"mlp": 384}))


def test_the_published_shape_is_cut_without_weights(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    for file in [*REPOSITORY.glob("*.py"), REPOSITORY / "config.json"]:
        shutil.copy(file, folder)
    result = CliRunner().invoke(
        app, ["compress", "-m", str(folder), "--dry-run", "--target-parameters", "6B", "--cut", "layers,mlp"]
    )
    assert result.exit_code == 0, result.output
    rows = {line[:30].strip(): line[30:].split() for line in result.output.splitlines() if line[:10] == "parameters"}
    before, after = (int(rows["parameters"][place].replace(",", "")) for place in (0, 1))
    assert before == 8_695_895_280
    assert 5.8e9 < after <= 6e9


def test_two_of_each_four_are_the_smaller_ones():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 0.1, 0.2, 9.0, -8.0]])
    assert zeroed(weight, weight.abs(), PATTERNS[1]).tolist() == [[0, -4, 0, 3, 0, 0, 9, -8]]
    assert zeroed(weight, weight.abs(), PATTERNS[0]).tolist() == [[0, -4, 0, 3, 0, 0, 9, -8]]
