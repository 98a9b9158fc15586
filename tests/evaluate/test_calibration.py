"""Calibration of thinking on demand: what is chosen, what is asked again to check it, and what is stored."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from minicpmv.checkpoint import load
from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate import calibration
from minicpmv.evaluate.sample_log import read_entries
from minicpmv.evaluate.suites import load_benchmark


REPOSITORY = Path(__file__).resolve().parents[2]


pytestmark = pytest.mark.usefixtures("one_thread")


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


@pytest.mark.slow
def test_calibrating_stores_a_threshold_that_was_checked_on_other_questions(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(REPOSITORY / "nano", checkpoint)
    before = json.loads((checkpoint / "config.json").read_text())
    command = ["calibrate", "--checkpoint", str(checkpoint), "--rows", "count,multistep_deep", "--samples", "3"]
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "0"], "keep=0.0"),
        (["--rows", "chair", "--samples", "1"], "no score 'exact'"),
        (["--rows", "nothing"], "no row nothing"),
        (["--checkpoint", "openbmb/nowhere", "--save"], "--save"),
        (["--benchmark", "nowhere"], "nanobench"),
    ],
)
def test_a_mistake_is_named(options, message, tmp_path):
    answer = CliRunner().invoke(evaluate_app, ["calibrate", "--output", str(tmp_path), *options])
    assert answer.exit_code != 0 and message in answer.output and "Traceback" not in answer.output
