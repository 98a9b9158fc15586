"""Reports: what they compare, that they open, and that their charts show something."""

import base64
import csv
import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import REPOSITORY
from markdown_it import MarkdownIt
from PIL import Image
from typer.testing import CliRunner

from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate import comparison, report
from minicpmv.evaluate.charts import bars, radar
from minicpmv.evaluate.sample_log import SampleLog


SETTINGS = {"benchmark": "nanobench", "version": 1, "weights": "0123", "dtype": "float32", "thinking": False}


def store_run(folder, checkpoint, values, lower=("chair",), samples=50, seeds=(0,), **settings):
    """A finished run as the harness leaves it: {row: {metric: [value of each seed]}} and a wrong answer a row."""
    log = SampleLog(folder, SETTINGS | settings)
    rows = {}
    for row, metrics in values.items():
        spreads = {name: float(np.std(v, ddof=1)) if len(v) > 1 else None for name, v in metrics.items()}
        rows[row] = {
            "title": f"what {row} is",
            "lower_is_better": row in lower,
            "n": samples * len(seeds),
            "mean": {name: None if None in v else sum(v) / len(v) for name, v in metrics.items()},
            "std": spreads,
            "seeds": {},
        }
        answer = {"question": "What | is <it>?", "expected": "red", "answer": "a `blue`\none", "thought": "I <see>."}
        score = {"row": row, "seed": 0, "finish_reason": "length", "scores": {"exact": 0.0}}
        log.append([{**score, **answer, "index": 7}])
        log.append([{**score, **answer, "index": 8, "scores": {"exact": 1.0}, "answer": "right one"}])
    results = {"model": checkpoint, "settings": log.settings, "samples": samples, "seeds": list(seeds)}
    results |= {"versions": {"torch": "2", "transformers": "5"}, "rows": rows}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


FIRST = {
    "count": {"exact": [0.9]},
    "printed_line": {"exact": [0.5], "characters": [0.75]},
    "chart": {"exact": [0.25]},
    "chair": {"chair_i": [0.3], "recall": [0.8]},
}
SECOND = {
    "count": {"exact": [0.7, 0.9]},
    "printed_line": {"exact": [0.6, 0.8], "characters": [0.9, 0.9]},
    "chart": {"exact": [0.25, 0.25]},
    "chair": {"chair_i": [0.1, 0.1], "recall": [0.6, 0.6]},
}


@pytest.fixture
def runs(tmp_path):
    first = store_run(tmp_path / "before", "models/nano", FIRST)
    return [first, store_run(tmp_path / "after", "models/tuned <b>", SECOND, samples=25, seeds=(0, 1))]


class Page(HTMLParser):
    """What a browser would show: the cells of the tables by row, the pictures, and every address."""

    VOID = {"meta", "img", "br", "link", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.pictures, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "img":
            self.pictures.append(attributes["src"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data.strip()


def test_an_html_report_is_one_file_that_opens_and_holds_its_charts(runs, tmp_path):
    output = tmp_path / "made" / "report.html"
    assert report.write_report(runs, output) == [output]
    page = Page(output.read_text(encoding="utf-8"))
    assert len(page.pictures) == 2
    for address in page.pictures:
        kind, data = address.split(",")
        assert kind == "data:image/svg+xml;base64"
        drawing = ElementTree.fromstring(base64.b64decode(data))
        assert drawing.tag.endswith("svg") and len(list(drawing.iter())) > 50
    addresses = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert all(address.startswith("data:") for address in addresses)
    assert not {"script", "link", "iframe", "b"} & {tag for tag, _ in page.tags}


def test_the_report_sets_runs_side_by_side_with_their_spread(runs, tmp_path):
    report.write_report(runs, tmp_path / "report.html")
    rows = Page((tmp_path / "report.html").read_text(encoding="utf-8")).rows
    assert ["row", "metric", "nano", "tuned <b>", ""] in rows
    assert ["count", "exact", "90.0", "80.0 ± 14.1", "what count is"] in rows
    assert ["", "characters", "75.0", "90.0 ± 0.0", ""] in rows
    assert ["chair ↓", "chair_i", "30.0", "10.0 ± 0.0", "what chair is"] in rows


def test_the_best_main_figure_of_a_row_is_marked_low_ones_where_low_is_better(runs):
    lines = comparison.compare([report.read_run(folder) for folder in runs])
    best = {(line["id"], line["metric"]): [cell["best"] for cell in line["cells"]] for line in lines}
    assert best["count", "exact"] == [True, False]
    assert best["printed_line", "exact"] == [False, True]
    assert best["chair", "chair_i"] == [False, True]
    assert best["chart", "exact"] == [False, False]  # a tie
    assert best["chair", "recall"] == [False, False]


def test_mistakes_are_shown_with_the_thought_and_right_answers_are_not(runs, tmp_path):
    report.write_report(runs, tmp_path / "report.html")
    rows = Page((tmp_path / "report.html").read_text(encoding="utf-8")).rows
    assert ["count", "0/7", "", "What | is <it>?", "red", "a `blue`\none (cut off)I <see>."] in rows
    assert "right one" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_reader_is_told_how_far_to_trust_a_difference(runs):
    first, second = (report.read_run(folder) for folder in runs)
    assert "out of 50 has a standard error of up to 7.1 points" in comparison.notes([first])[0]
    assert not any("same samples" in note for note in comparison.notes([first]))
    assert any("not asked about the same samples" in note for note in comparison.notes([first, second]))
    assert any("standard deviation" in note for note in comparison.notes([second]))


def test_a_markdown_report_has_tables_of_even_width_and_charts_beside_it(runs, tmp_path):
    files = report.write_report(runs, tmp_path / "report.md")
    assert [file.name for file in files] == ["report.md", "report-bars.png", "report-radar.png"]
    lines = files[0].read_text(encoding="utf-8").splitlines()
    tables = "\n".join(line.replace("\\|", "") if line.startswith("|") else "" for line in lines).split("\n\n")
    tables = [table.strip().splitlines() for table in tables if table.strip()]
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and set(table[1]) <= set("|-:")
    assert "| `count` | `exact` | **90.0** | 80.0 ± 14.1 |" in lines
    assert "| `count 0/7` | | `What \\| is <it>?` | `red` | ``a `blue` one`` (cut off) |" in lines
    for file in files[1:]:
        assert f"]({file.name})" in "\n".join(lines)
        with Image.open(file) as picture:
            assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


PUBLIC_ROWS = {
    "mmstar": {"mean": {"exact": 0.721}, "interval": {"exact": [0.62, 0.81]}, "tokens": 812.4, "seconds": 1.234},
    "mme": {"mean": {"total": 2468.2}, "points": ["total"], "judge": "judge-1", "judge_returned": ["judge-1-2026"]},
    "videomme": {
        "mean": {"accuracy": 0.679},
        "video": {"fps": 5.0, "frames": 402.5, "groups": 150.0, "packing": [1, 3]},
    },
    "mmbench_en": {"mean": {"accuracy": 0.8}},
    "mmbench_cn": {"mean": {"accuracy": 0.9}},
    "mmhal": {
        "mean": {"score": 4.96, "hallucination_rate": 0.194},
        "points": ["score"],
        "judge": "rules only",
        "undecided": 3,
    },
}


def store_public_run(folder, model="nano", wrong=(0, 1), pictures=True, **settings):
    """A finished run of a group, with its log in a folder of its suite."""
    rows = {}
    for name, row in PUBLIC_ROWS.items():
        spread = {"std": dict.fromkeys(row["mean"]), "title": name, "lower_is_better": False, "n": 4}
        rows[name] = {"points": [], **spread, **row}
    log = SampleLog(folder / "mmstar", SETTINGS)
    for index in range(4):
        entry = {"row": "mmstar", "seed": 0, "index": index, "question": f"q{index}", "expected": "A"}
        entry |= {"answer": f"a{index}", "scores": {"exact": float(index not in wrong)}, "facts": {"id": str(index)}}
        if pictures and index == 1:
            (folder / "mmstar" / "pictures").mkdir()
            Image.new("RGB", (40, 20), "red").save(folder / "mmstar" / "pictures" / "mmstar-0-1.jpg")
            entry["picture"] = "pictures/mmstar-0-1.jpg"
        log.append([{"finish_reason": "stop", "thought": None, **entry}])
    results = {"model": model, "settings": {"benchmark": "published", "version": 1} | settings, "samples": None}
    judge = {"model": "judge-1", "endpoint": "http://127.0.0.1/v1"}
    results["scoring"] = {"version": "2025-09", "strict": True, "judge": judge}
    results |= {"seeds": [0], "versions": {}, "rows": rows, "averages": {"opencompass": 0.7704}}
    results["suites"] = {"mmstar": {"folder": "mmstar", "settings": {"as_published": False, "data": {"mmstar": "0"}}}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_figures_stand_beside_the_published_ones_in_their_own_units(tmp_path):
    run = report.read_run(store_public_run(tmp_path / "run"))
    found = comparison.beside_published([run])
    own = {row["title"]: (row["own"][0], row["figures"][0]) for row in found["rows"]}
    assert own == {
        "OpenCompass average": ("77.0", "77.0†"),
        "MMStar": ("72.1", "72.1†"),
        "MME": ("2468", "2500"),
        "MMBench V1.1": ("85.0", "84.2"),
        "MMBench V1.1 EN": ("80.0", "-"),
        "MMBench V1.1 CN": ("90.0", "-"),
        "MMHal-Bench score (0 to 6)": ("5.0", "5.0†"),
        "MMHal-Bench rate": ("19.4", "19.4†"),
        "Video-MME without subtitles": ("67.9", "67.9"),
    }
    told = " ".join(found["notes"])
    for part in ("Plain setting", "Rules only, without a judge: mmhal", "mmstar", "MMBench is the dev set", "† with"):
        assert part in told
    assert comparison.beside_published([report.read_run(store_run(tmp_path / "drawn", "nano", FIRST))]) is None


def test_a_public_report_shows_intervals_costs_the_judge_and_images_of_mistakes(tmp_path):
    run = store_public_run(tmp_path / "run")
    report.write_report([run], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    rows = {row[0]: row for row in page.rows if row}
    assert ["mmstar", "exact", "72.162.0 to 81.0", "mmstar"] in page.rows
    assert ["mme", "total", "2468", "mme"] in page.rows
    assert rows["mme"] and ["mmstar", "812", "1.23", "-", "-", "-"] in page.rows
    assert ["mme", "-", "-", "-", "-", "judge-1, judge-1-2026"] in page.rows
    assert ["videomme", "-", "-", "402.5 at 5 a second, in groups of 1 to 3", "-", "-"] in page.rows
    assert [*page.rows[1][-3:]] == ["plain", "2025-09, strict", "judge-1 at http://127.0.0.1/v1"]
    assert sum(address.startswith("data:image/jpeg") for address in page.pictures) == 1
    wrong = [row for row in page.rows if len(row) == 6 and row[1].startswith("0/")]
    assert [row[1] for row in wrong] == ["0/1", "0/0"]  # those with an image first
    files = report.write_report([run], tmp_path / "report.md")
    assert [file.name for file in files[-1:]] == ["0-mmstar-0-1.jpg"] and files[-1].is_file()
    assert "(report-pictures/0-mmstar-0-1.jpg)" in files[0].read_text(encoding="utf-8")


def test_rows_are_broken_down_by_what_their_data_say(tmp_path):
    first, second = (store_public_run(tmp_path / name) for name in ("one", "two"))
    stored = json.loads((first / "results.json").read_text())
    stored["rows"]["mmstar"]["by"] = {"category": {"math": {"n": 2, "exact": 0.5}, LIVELY: {"n": 2, "exact": None}}}
    (first / "results.json").write_text(json.dumps(stored))
    (part,) = comparison.breakdowns([report.read_run(first), report.read_run(second)])
    assert (part["row"], part["fact"], part["metric"]) == ("mmstar", "category", "exact")
    assert [(line["n"], line["cells"]) for line in part["lines"]] == [(2, ["50.0", "-"]), (2, ["-", "-"])]
    report.write_report([first, second], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert ["math", "2", "50.0", "-"] in page.rows and not {"a", "script"} & {tag for tag, _ in page.tags}
    report.write_report([first, second], tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "| `mmstar` | `category` | `math` | 2 | `exact` | 50.0 | - |" in text
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    assert not any(token.type.startswith("html") for token in tokens)


def test_a_log_cannot_name_an_image_outside_of_its_run(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    run = store_public_run(tmp_path / "run")
    for picture in ("../../secret.jpg", str(tmp_path / "secret.jpg"), "pictures/../../../secret.jpg", "*.jpg", 3):
        assert report.picture_of(run, {"picture": picture}) is None


def test_runs_on_the_same_questions_are_compared_question_by_question(tmp_path):
    first = store_public_run(tmp_path / "full", "nano")
    second = store_public_run(tmp_path / "int4", "nano-int4", wrong=(1, 2, 3), pictures=False)
    report.write_report([first, second], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    (line,) = [row for row in page.rows if row[:2] == ["mmstar", "4"]]
    assert line[2:5] == ["50.0", "25.0", "-25.0"] and line[6:] == ["2", "1", "1"]


def test_a_table_for_spreadsheets_has_a_line_for_each_metric_and_no_formulas(tmp_path):
    run = store_public_run(tmp_path / "run", model="=HYPERLINK(1)")
    report.write_report([run], tmp_path / "report.csv")
    with open(tmp_path / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 7 and {line["model"] for line in lines} == {"'=HYPERLINK(1)"}
    assert [(line["value"], line["low"], line["published"]) for line in lines[:2]] == [
        ("0.721", "0.62", "72.1†"),
        ("2468.2", "", "2500"),
    ]


LIVELY = (
    "[link](http://evil.example) ![image](http://evil.example/i.png) <img src=x onerror=alert(1)> **bold** a\\|b | `code"
    " <script>alert(1)</script> http://evil.example www.evil.example <http://evil.example> me@evil.example &lt;b&gt; $x^$"
)


@pytest.fixture
def lively_run(tmp_path):
    """A run whose every text tries to be more than text."""
    folder = store_run(tmp_path / "lively", LIVELY, {LIVELY: {LIVELY: [0.5]}}, thinking=[LIVELY], dtype=LIVELY)
    stored = json.loads((folder / "results.json").read_text())
    stored["versions"] = {LIVELY: LIVELY}
    stored["rows"][LIVELY]["title"] = LIVELY
    (folder / "results.json").write_text(json.dumps(stored))
    path = folder / "samples.jsonl"
    texts = {"question": LIVELY, "expected": LIVELY, "answer": LIVELY + "\n\n# h\n", "thought": LIVELY}
    lines = [json.loads(line) | texts for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_nothing_that_a_run_holds_comes_alive_in_markdown(lively_run, tmp_path):
    files = report.write_report([lively_run], tmp_path / "report.md")
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(files[0].read_text(encoding="utf-8"))
    inline = [child for token in tokens for child in token.children or []]
    assert {token.type for token in inline} == {"text", "code_inline", "image"}
    assert [token.attrs["src"] for token in inline if token.type == "image"] == ["report-bars.png"]
    assert not any(token.type.startswith("html") for token in tokens)
    plain = " ".join(token.content for token in inline if token.type == "text")
    assert "evil" not in plain and "alert" not in plain
    assert sum("evil.example" in token.content for token in inline if token.type == "code_inline") >= 10
    rows = [token.map for token in tokens if token.type == "tr_open"]
    cells = [token.type for token in tokens].count("td_open") + [token.type for token in tokens].count("th_open")
    assert (len(rows), cells) == (6, 2 * 8 + 2 * 3 + 2 * 5)


def test_nothing_that_a_run_holds_comes_alive_in_html(lively_run, tmp_path):
    report.write_report([lively_run], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"a", "script", "b", "strong"} & {tag for tag, _ in page.tags}
    assert len(page.pictures) == 1 and page.pictures[0].startswith("data:image/svg+xml;base64,")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_accuracy_is_drawn_over_tokens_where_several_runs_tell_both(tmp_path):
    runs = [report.read_run(store_public_run(tmp_path / mode)) for mode in ("off", "on")]
    assert "tokens" not in report.draw(["off", "on"], runs)  # not every row tells
    for run, tokens in zip(runs, (5, 50), strict=True):
        run["rows"] = {"mmstar": run["rows"]["mmstar"] | {"tokens": tokens}}
    assert report.points_of(["off", "on"], runs, ["mmstar"]) == [("off", 5, 0.721), ("on", 50, 0.721)]
    assert set(report.draw(["off", "on"], runs)) == {"bars", "tokens"} and set(report.draw(["off"], runs[:1])) == {
        "bars"
    }


def colors_in(figure, tmp_path):
    figure.savefig(tmp_path / "chart.png", dpi=100)
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {"#{:02X}{:02X}{:02X}".format(*color): count for color, count in zip(found, counts, strict=True)}


def test_bars_are_as_long_as_the_values(tmp_path):
    rows = [("a", [0.8, 0.4], [None, None]), ("b", [0.8, None], [None, None])]
    area = colors_in(bars(["one", "two"], rows), tmp_path)
    # 160 % of bars against 40 %, and a key of the legend each.
    assert 3.2 < area["#0072B2"] / area["#E69F00"] < 4.2


def test_the_radar_has_a_line_for_each_run(tmp_path):
    colors = colors_in(radar(["one", "two"], [(name, [0.9, 0.5]) for name in "abcd"]), tmp_path)
    assert colors["#0072B2"] > 300 and colors["#E69F00"] > 200


def test_rows_that_a_run_lacks_stay_out_of_the_radar_and_empty_in_the_table(tmp_path):
    whole = store_run(tmp_path / "whole", "nano", FIRST)
    part = store_run(tmp_path / "part", "other", {"count": {"exact": [None]}})
    pair = [report.read_run(folder) for folder in (whole, part)]
    assert set(report.draw(["whole", "part"], pair)) == {"bars"}  # a radar needs three rows
    cells = {
        line["id"]: [cell["text"] for cell in line["cells"]] for line in comparison.compare(pair) if line["is_main"]
    }
    assert cells == {
        "count": ["90.0", "-"],
        "printed_line": ["50.0", "-"],
        "chart": ["25.0", "-"],
        "chair": ["30.0", "-"],
    }
    assert set(report.draw(["whole"], pair[:1])) == {"bars", "radar"}


def test_runs_are_named_by_what_tells_them_apart(tmp_path):
    places = ("a/base", "a/thinking", "b/base")
    folders = [store_run(tmp_path / place, "nano", {"count": {"exact": [1.0]}}) for place in places]
    loaded = [report.read_run(folder) for folder in folders]
    assert comparison.labels_of(folders[:2], [loaded[0], loaded[1] | {"model": "me/tuned"}]) == ["nano", "tuned"]
    assert comparison.labels_of(folders[:2], loaded[:2]) == ["base", "thinking"]
    assert comparison.labels_of(folders, loaded) == [str(folder) for folder in folders]


def test_the_command_writes_a_report_and_names_its_files(runs, tmp_path):
    output = tmp_path / "report.md"
    result = CliRunner().invoke(evaluate_app, ["report", *map(str, runs), "--output", str(output)])
    assert result.exit_code == 0 and result.stdout.split()[0] == str(output) and output.exists()


def message(*arguments):
    result = CliRunner().invoke(evaluate_app, ["report", *map(str, arguments)])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    return result.stderr


def test_a_mistake_is_one_line_that_names_the_remedy(runs, tmp_path):
    (tmp_path / "killed").mkdir()
    assert "run the same command again" in message(tmp_path / "killed", "--output", tmp_path / "r.html")
    assert "an .html, an .md or a .csv file" in message(*runs, "--output", tmp_path / "r.pdf")
    other = store_run(tmp_path / "other", "nano", FIRST, version=2)
    assert "version 1 and nanobench, version 2" in message(*runs, other, "--output", tmp_path / "r.html")


@pytest.mark.parametrize("place", ["folder.html", "file/report.html", "/proc/nowhere/report.html"])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(runs, tmp_path, monkeypatch, place):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(report, "read_run", None)
    assert f"{tmp_path / place} cannot be written" in message(*runs, "--output", tmp_path / place)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "is not JSON"),
        ("[]", "is JSON, but not an object"),
        ("{}", "'model' of the run is None, not of type str"),
        ('{"model": "a", "settings": {}, "seeds": [0], "versions": {}, "rows": {"x": 3}}', "'title' of row x is None"),
    ],
)
def test_a_damaged_result_is_named(runs, tmp_path, content, what):
    (runs[0] / "results.json").write_text(content)
    assert what in message(*runs, "--output", tmp_path / "r.html")
    assert str(runs[0] / "results.json") in message(*runs, "--output", tmp_path / "r.html")


def test_a_damaged_answer_is_named(runs, tmp_path):
    with open(runs[0] / "samples.jsonl", "a") as file:
        file.write("null\n")
    line = message(*runs, "--output", tmp_path / "r.html")
    assert f"{runs[0] / 'samples.jsonl'}, line 9 is not a JSON object" in line


def test_an_output_that_cannot_be_written_to_is_named(runs, tmp_path):
    command = [sys.executable, "-m", "minicpmv", "evaluate", "report", *map(str, runs), "--output", "r.html"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=tmp_path, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "minicpmv: the output cannot be written: No space left on device\n"
