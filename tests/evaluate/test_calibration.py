"""Calibration of thinking on demand: what is chosen, what is asked again to check it, and what is stored."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import GREEDY, name_seeded_model
from transformers import AutoConfig, AutoProcessor
from typer.testing import CliRunner

from minicpmv.checkpoint import load
from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate import calibration
from minicpmv.evaluate.benchmark import Benchmark
from minicpmv.evaluate.sample_log import read_entries
from minicpmv.evaluate.suites import load_benchmark


REPOSITORY = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("drawn_data", "one_thread")


def test_every_question_is_asked_once_in_either_mode_and_controls_are_left_out():
    rows = {row.id: row for row in calibration.questions_in_both_modes(load_benchmark("nanobench"), None).rows}
    assert {"multistep_deep", "count", "printed_line"} <= set(rows)
    assert not {"multistep_fast", "fine_print_unsliced", "video_order_shuffled", "chair", "chinese"} & set(rows)
    assert all(row.thinking is None for row in rows.values())


def test_rows_that_cannot_think_are_refused_by_name():
    with pytest.raises(calibration.CalibrationError, match="multistep_fast"):
        calibration.questions_in_both_modes(load_benchmark("nanobench"), ["multistep_fast"])


def test_the_cheapest_threshold_that_keeps_enough_is_chosen():
    points = [(0.0, 0.80, 50), (0.2, 0.79, 30), (0.4, 0.76, 20), (0.6, 0.70, 10), (1.0, 0.5, 4)]
    curve = [SimpleNamespace(threshold=t, accuracy=a, tokens=n) for t, a, n in points]
    assert calibration.choose(curve, 0.95).threshold == 0.4
    assert calibration.choose(curve, 1.0).threshold == 0.0
    assert calibration.choose(curve, 0.5).threshold == 1.0


def test_where_thinking_does_harm_the_best_threshold_is_the_measure():
    points = [(0.0, 0.60, 50), (0.4, 0.84, 8), (0.7, 0.86, 6), (1.0, 0.80, 4)]
    curve = [SimpleNamespace(threshold=t, accuracy=a, tokens=n) for t, a, n in points]
    assert calibration.choose(curve, 0.99).threshold == 0.7


def test_the_curve_tells_accuracy_and_tokens_of_every_threshold():
    curve = calibration.threshold_curve(
        need=[0.9, 0.2, 0.2, 0.6],
        fast_correct=[False, True, True, False],
        deep_correct=[True, True, False, True],
        fast_tokens=[2, 2, 2, 20],
        deep_tokens=[50, 40, 30, 60],
        draft_tokens=8,
    )
    # From all deep: then the two at 0.2 go fast together, then 0.6, then 0.9. A draft costs at most 8 tokens.
    assert [point.threshold for point in curve] == pytest.approx([0, 0.4, 0.75, 1])
    assert [point.accuracy for point in curve] == [0.75, 1.0, 0.75, 0.5]
    assert [point.tokens for point in curve] == [
        (180 + 2 + 2 + 2 + 8) / 4,
        (110 + 4 + 2 + 8) / 4,
        (50 + 2 + 24) / 4,
        26 / 4,
    ]
    assert [point.deep_share for point in curve] == [1, 0.5, 0.25, 0]
    with pytest.raises(calibration.CalibrationError, match="one entry a question"):
        calibration.threshold_curve([0.5], [1], [1], [3], [], draft_tokens=8)


def test_the_curve_predicts_what_auto_does():
    config = AutoConfig.from_pretrained(REPOSITORY / "nano", trust_remote_code=True)
    model = name_seeded_model(config)
    processor = AutoProcessor.from_pretrained(REPOSITORY / "nano", trust_remote_code=True)

    def ask_all(thinking):
        questions = ("why", "how many stars", "what color is it " * 20)
        options = {"processor": processor, "max_new_tokens": 24, "return_dict": True, **GREEDY}
        return model.chat(
            msgs=[[{"role": "user", "content": text}] for text in questions], enable_thinking=thinking, **options
        )

    model.set_threshold(1)
    fast, deep = ask_all("auto"), ask_all(True)
    counts = [[output.generated_tokens for output in outputs] for outputs in (fast, deep)]
    needs = [output.need for output in fast]
    for point in calibration.threshold_curve(needs, [0] * 3, [1] * 3, *counts, draft_tokens=model.draft_tokens):
        model.set_threshold(point.threshold)
        outputs = ask_all("auto")
        assert sum(output.mode == "deep" for output in outputs) / 3 == pytest.approx(point.deep_share)
        tokens = sum(output.generated_tokens + output.draft_tokens for output in outputs)
        assert tokens / 3 == pytest.approx(point.tokens)


@pytest.mark.slow
def test_calibrating_stores_a_threshold_that_was_checked_on_other_questions(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(REPOSITORY / "nano", checkpoint)
    before = json.loads((checkpoint / "config.json").read_text())
    command = ["calibrate", "--model", str(checkpoint), "--rows", "count,multistep_deep", "--samples", "3"]
    command += ["--output", str(tmp_path / "run"), "--save"]
    answer = CliRunner().invoke(evaluate_app, command)
    assert answer.exit_code == 0, answer.output
    result = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert json.loads((checkpoint / "config.json").read_text()) == before | {"thinking_threshold": result["threshold"]}
    assert load(str(checkpoint))[0].thinking_threshold == result["threshold"]
    assert (tmp_path / "run" / "curve.png").stat().st_size > 5000

    deep, auto = (
        {(entry["row"], entry["seed"], entry["index"]): entry for entry in read_entries(path)}
        for path in sorted((tmp_path / "run").glob("[ad]*/samples.jsonl"), reverse=True)
    )
    assert {seed for _, seed, _ in deep} == {1, 2} and {seed for _, seed, _ in auto} == {2}
    assert {entry["mode"] for entry in deep.values()} == {"deep"}
    for key, entry in auto.items():
        assert entry["mode"] == ("deep" if entry["need"] >= result["threshold"] else "fast")
        if entry["mode"] == "deep":  # the draft is paid on top
            assert entry["answer"] == deep[key]["answer"]
            assert entry["generated_tokens"] > deep[key]["generated_tokens"]
    assert result["curve"][0]["deep_share"] == 1 and result["curve"][-1]["deep_share"] == 0
    checked = [entry["scores"]["exact"] for entry in auto.values()]
    assert result["check"]["auto"]["accuracy"] == pytest.approx(sum(checked) / len(checked))


@pytest.mark.slow
def test_a_data_set_is_calibrated_on_one_half_and_checked_on_the_other_with_budgets(tmp_path):
    command = ["calibrate", "--model", str(REPOSITORY / "nano"), "--benchmark", "ocrbench", "--fixtures"]
    command += ["--samples", "2", "--budgets", "4", "--output", str(tmp_path)]
    answer = CliRunner().invoke(evaluate_app, command)
    assert answer.exit_code == 0, answer.output
    result = json.loads((tmp_path / "calibration.json").read_text())
    assert (result["chosen on"], result["checked on"]) == ("every other question", "the questions between")
    assert result["rows"].keys() == {"ocrbench"} and [each["budget"] for each in result["budgets"]] == [None, 4]
    assert "thinking_budget" in answer.output

    deep, fast, bounded = (
        {entry["index"]: entry for entry in read_entries(tmp_path / folder / "samples.jsonl")}
        for folder in ("deep", "needs", "budget-4")
    )
    assert set(deep) == set(fast) == {0, 1, 2, 3}  # evenly spaced over the data set
    assert len({entry["facts"]["id"] for entry in deep.values()}) == 4
    assert all(len(entry["thought"]) <= len(deep[index]["thought"]) for index, entry in bounded.items())
    tokens = [deep[index]["generated_tokens"] for index in (1, 3)]
    assert result["check"]["deep"]["tokens"] == pytest.approx(sum(tokens) / 2)
    table = (tmp_path / "calibration.md").read_text()
    assert "| `ocrbench` |" in table and "| 4 |" in table


def test_on_demand_pays_for_the_draft_of_every_thought():
    fast = [{"need": need, "generated_tokens": 20, "mode": "fast"} for need in (0.2, 0.9)]
    deep = [{"generated_tokens": 50, "mode": "deep"}] * 2
    found = calibration.on_demand(fast, deep, 0.5, 8)
    assert [(entry["mode"], entry["generated_tokens"]) for entry in found] == [("fast", 20), ("deep", 58)]


def test_questions_of_a_data_set_are_taken_from_all_of_it():
    row = load_benchmark("nanobench").rows[0]
    whole = replace(row, length=10, sample=lambda seed, index: index)
    (few,) = calibration.spread(Benchmark("b", "B", 1, (whole,)), 4).rows
    assert [few.sample(0, index) for index in range(few.count(None))] == [0, 2, 5, 7]
    (all_of_it,) = calibration.spread(Benchmark("b", "B", 1, (whole,)), 40).rows
    assert all_of_it.count(None) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0"], "keep=0.0"),
        (["--budgets", "0"], "budget=0"),
        (["--rows", "chair", "--samples", "1"], "no score 'exact'"),
        (["--rows", "nothing"], "no row nothing"),
        (["--model", "openbmb/nowhere", "--save"], "--save"),
        (["--benchmark", "nowhere"], "nanobench"),
    ],
)
def test_a_mistake_is_named(options, message, tmp_path):
    answer = CliRunner().invoke(
        evaluate_app, ["calibrate", "-m", str(REPOSITORY / "nano"), "--output", str(tmp_path), *options]
    )
    assert answer.exit_code != 0 and message in answer.output and "Traceback" not in answer.output
