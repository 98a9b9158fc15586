"""Two runs question by question, and a page over many runs."""

import csv
import json

import pytest
from markdown_it import MarkdownIt
from test_report import LIVELY, Page, store_public_run
from typer.testing import CliRunner

from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate.leaderboard import write_leaderboard
from minicpmv.evaluate.pairing import PairingError, pair_runs
from minicpmv.evaluate.report import ReportError
from minicpmv.evaluate.sample_log import SampleLog


def store_log(folder, scores, facts=lambda index: {}, expected=lambda index: "A", row="r"):
    log = SampleLog(folder, {"benchmark": "b", "version": 1, "weights": folder.name})
    for index, score in enumerate(scores):
        entry = {"row": row, "seed": 0, "index": index, "question": f"q{index}", "expected": expected(index)}
        log.append([{**entry, "answer": f"{folder.name} {index}", "scores": {"exact": score}, "facts": facts(index)}])
    return folder


def paired(tmp_path, first, second, **options):
    folders = [store_log(tmp_path / name, scores, **options) for name, scores in (("a", first), ("b", second))]
    (row,) = pair_runs(*folders)
    return row


def test_flips_are_the_questions_that_just_one_run_has_right(tmp_path):
    row = paired(tmp_path, [1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0])
    flips = [(flip.first["index"], flip.second["answer"], flip.gained) for flip in row.flips]
    assert flips == [(0, "b 0", False), (1, "b 1", True)]
    assert (row.pairing.questions, row.alone, row.pairing.p) == (3, 1, 1.0)


def test_rotations_of_a_question_are_one_question_that_is_as_right_as_its_worst_answer(tmp_path):
    row = paired(tmp_path, [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0, 1.0], facts=lambda index: {"group": str(index // 2)})
    assert (row.pairing.questions, row.pairing.second) == (2, 0.5)
    assert [(flip.first["facts"], flip.gained) for flip in row.flips] == [({"group": "0"}, False)]


def test_questions_about_one_video_widen_the_interval(tmp_path):
    first, second = [1.0] * 40, [1.0] * 20 + [0.0] * 20
    apart = paired(tmp_path / "apart", first, second).pairing.interval
    (tmp_path / "same").mkdir()
    same = paired(tmp_path / "same", first, second, facts=lambda index: {"video": index // 10}).pairing.interval
    assert same.high - same.low > 2 * (apart.high - apart.low)


def test_answers_without_a_score_and_questions_with_another_answer_are_no_pairs(tmp_path):
    first = store_log(tmp_path / "a", [1.0, None, 1.0])
    second = store_log(tmp_path / "b", [1.0, 1.0, 1.0], expected=lambda index: "B" if index == 2 else "A")
    (row,) = pair_runs(first, second)
    assert (row.pairing.questions, row.alone) == (1, 3)
    with pytest.raises(PairingError, match="no question in common"):
        pair_runs(first, store_log(tmp_path / "c", [1.0], row="other"))


def test_the_command_shows_the_table_what_differs_and_some_flips(tmp_path):
    first = store_public_run(tmp_path / "full", "nano")
    second = store_public_run(tmp_path / "int4", "nano-int4", wrong=(1, 2, 3), pictures=False, dtype="\x1b[2J")
    result = CliRunner().invoke(
        evaluate_app, ["diff", str(first), str(second), "--show", "1", "--json", str(tmp_path / "d.json")]
    )
    assert result.exit_code == 0, result.output
    assert "-25.0" in result.stdout and "\x1b" not in result.stdout and "dtype: None, then" in result.stdout
    assert (
        "mmstar 0/2 now wrong: 'q2' 'a2' -> 'a2', expected 'A'" in result.stdout and "mmstar: 2 more" in result.stdout
    )
    (stored,) = json.loads((tmp_path / "d.json").read_text())
    assert (stored["only_first"], stored["only_second"], len(stored["flips"])) == (2, 1, 3)


def test_a_leaderboard_orders_own_runs_among_published_models(tmp_path):
    run = store_public_run(tmp_path / "run", "models/mine")
    write_leaderboard([run], tmp_path / "board.html", by="mmstar")
    page = Page((tmp_path / "board.html").read_text(encoding="utf-8"))
    models = [row[0].split("thinking")[0] for row in page.rows[1:]]
    place = next(place for place, row in enumerate(page.rows[1:]) if row[0].startswith("mine"))
    star = page.rows[0].index("MMStar")
    values = [float(row[star].rstrip("†*‡")) for row in page.rows[1:] if row[star] != "-"]
    assert values == sorted(values, reverse=True) and values[place] == 72.1 and len(models) > 10
    write_leaderboard([run], tmp_path / "board.csv", published=False)
    with open(tmp_path / "board.csv", newline="") as file:
        (line,) = csv.DictReader(file)
    assert (line["opencompass"], line["mmhal_rate"]) == ("77.0", "19.4")


def test_low_figures_lead_where_low_is_better(tmp_path):
    run = store_public_run(tmp_path / "run")
    write_leaderboard([run], tmp_path / "board.csv", by="mmhal_rate")
    with open(tmp_path / "board.csv", newline="") as file:
        rates = [line["mmhal_rate"] for line in csv.DictReader(file)]
    known = [float(rate.rstrip("†*‡")) for rate in rates if rate]
    assert known == sorted(known) and rates[-1] == ""


def test_runs_of_one_model_in_one_setting_make_one_line(tmp_path):
    runs = [store_public_run(tmp_path / name) for name in ("one", "two")]
    other = store_public_run(tmp_path / "three", thinking=True)
    write_leaderboard([*runs, other], tmp_path / "board.csv", published=False)
    with open(tmp_path / "board.csv", newline="") as file:
        assert [line["mode"] for line in csv.DictReader(file)] == ["thinking None", "thinking on"]


def test_nothing_on_a_leaderboard_comes_alive(tmp_path):
    run = store_public_run(tmp_path / "run", LIVELY, thinking=[LIVELY])
    write_leaderboard([run], tmp_path / "board.html")
    write_leaderboard([run], tmp_path / "board.md")
    page = Page((tmp_path / "board.html").read_text(encoding="utf-8"))
    assert not {"a", "script", "img", "b"} & {tag for tag, _ in page.tags}
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse((tmp_path / "board.md").read_text())
    inline = [child for token in tokens for child in token.children or []]
    assert {token.type for token in inline} <= {"text", "code_inline", "strong_open", "strong_close"}


def test_a_leaderboard_that_makes_no_sense_is_refused(tmp_path):
    run = store_public_run(tmp_path / "run")
    with pytest.raises(ReportError, match="no run has this row; they have opencompass, mmstar"):
        write_leaderboard([run], tmp_path / "b.html", by="chartqa")
    with pytest.raises(ReportError, match=r"an \.html, an \.md or a \.csv file"):
        write_leaderboard([run], tmp_path / "b.pdf")
