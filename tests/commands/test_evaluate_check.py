"""`minicpmv evaluate check-scorers`."""

import json

import pytest
from typer.testing import CliRunner

from minicpmv.commands.main import app


CASE = {
    "id": "lot",
    "benchmark": "ChartQA",
    "scorer": "relaxed_accuracy",
    "prediction": "105",
    "reference": "100",
    "expected": 1.0,
}


@pytest.fixture
def check(tmp_path):
    def run(*cases, options=()):
        file = tmp_path / "cases.json"
        file.write_text(json.dumps({"cases": cases}))
        return CliRunner().invoke(app, ["evaluate", "check-scorers", str(file), *options])

    return run


def test_cases_that_all_agree_end_well(check):
    result = check(CASE, {**CASE, "prediction": "106", "expected": 0.0})
    assert result.exit_code == 0
    assert result.stdout.startswith("2 of 2 cases agree with ")


def test_a_case_that_falls_short_is_named_and_fails_the_command(check):
    result = check(CASE, {**CASE, "id": "bay", "expected": 0.5}, {**CASE, "id": "pier", "scorer": "taste"})
    assert result.exit_code == 1
    assert result.stdout.splitlines()[:2] == [
        "bay: expected 1.0 instead of 0.5",
        "pier: unknown scorer 'taste' of ChartQA",
    ]
    assert "1 of 3 cases agree" in result.stdout


def test_rules_of_another_time_can_be_asked_for_and_of_no_time_not(check):
    reply = "The answer is B, but one has to look at the legend first to see it"
    case = {**CASE, "benchmark": "MMStar", "scorer": "mcq_vanilla (no judge)", "prediction": reply, "reference": "B"}
    assert check(case).exit_code == 0
    assert check(case, options=["--scoring", "2025-09"]).exit_code == 1
    assert check(case, options=["--scoring", "1999"]).exit_code == 2


def test_a_file_that_holds_no_cases_is_one_line_on_stderr(tmp_path):
    for file in (tmp_path / "none.json", tmp_path):
        result = CliRunner().invoke(app, ["evaluate", "check-scorers", str(file)])
        assert result.exit_code == 1
        assert result.stderr.startswith("minicpmv: ") and result.stderr.count("\n") == 1
