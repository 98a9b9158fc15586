"""Reports: what they compare, that they open, and that their charts show something."""

import base64
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate import report
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
    results = {"checkpoint": checkpoint, "settings": log.settings, "samples": samples, "seeds": list(seeds)}
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
    lines = report.compare([report.read_run(folder) for folder in runs])
    best = {(line["id"], line["metric"]): [cell["best"] for cell in line["cells"]] for line in lines}
    assert best["count", "exact"] == [True, False]
    assert best["printed_line", "exact"] == [False, True]
    assert best["chair", "chair_i"] == [False, True]
    assert best["chart", "exact"] == [False, False]  # a tie
    assert best["chair", "recall"] == [False, False]


def test_mistakes_are_shown_with_the_thought_and_right_answers_are_not(runs, tmp_path):
    report.write_report(runs, tmp_path / "report.html")
    rows = Page((tmp_path / "report.html").read_text(encoding="utf-8")).rows
    assert ["count", "0/7", "What | is <it>?", "red", "a `blue`\none (cut off)I <see>."] in rows
    assert "right one" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_reader_is_told_how_far_to_trust_a_difference(runs):
    first, second = (report.read_run(folder) for folder in runs)
    assert "out of 50 has a standard error of up to 7.1 points" in report.notes([first])[0]
    assert not any("same samples" in note for note in report.notes([first]))
    assert any("not asked about the same samples" in note for note in report.notes([first, second]))
    assert any("standard deviation" in note for note in report.notes([second]))


def test_a_markdown_report_has_tables_of_even_width_and_charts_beside_it(runs, tmp_path):
    files = report.write_report(runs, tmp_path / "report.md")
    assert [file.name for file in files] == ["report.md", "report-bars.png", "report-radar.png"]
    lines = files[0].read_text(encoding="utf-8").splitlines()
    tables = "\n".join(line.replace("\\|", "") if line.startswith("|") else "" for line in lines).split("\n\n")
    tables = [table.strip().splitlines() for table in tables if table.strip()]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count("|") for line in table}) == 1 and set(table[1]) <= set("|-:")
    assert "| count | exact | **90.0** | 80.0 ± 14.1 |" in lines
    assert "| count 0/7 | What \\| is &lt;it>? | red | a \\`blue\\` one (cut off) |" in lines
    for file in files[1:]:
        assert f"]({file.name})" in "\n".join(lines)
        with Image.open(file) as picture:
            assert picture.size[0] > 500 and len(picture.convert("RGB").getcolors(1 << 24)) > 20


def colours_in(figure, tmp_path):
    figure.savefig(tmp_path / "chart.png", dpi=100)
    pixels = np.asarray(Image.open(tmp_path / "chart.png").convert("RGB")).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {"#{:02X}{:02X}{:02X}".format(*colour): count for colour, count in zip(found, counts, strict=True)}


def test_bars_are_as_long_as_the_values(tmp_path):
    rows = [("a", [0.8, 0.4], [None, None]), ("b", [0.8, None], [None, None])]
    area = colours_in(bars(["one", "two"], rows), tmp_path)
    # 160 % of bars against 40 %, and a key of the legend each.
    assert 3.2 < area["#0072B2"] / area["#E69F00"] < 4.2


def test_the_radar_has_a_line_for_each_run(tmp_path):
    colours = colours_in(radar(["one", "two"], [(name, [0.9, 0.5]) for name in "abcd"]), tmp_path)
    assert colours["#0072B2"] > 300 and colours["#E69F00"] > 200


def test_rows_that_a_run_lacks_stay_out_of_the_radar_and_empty_in_the_table(tmp_path):
    whole = store_run(tmp_path / "whole", "nano", FIRST)
    part = store_run(tmp_path / "part", "other", {"count": {"exact": [None]}})
    pair = [report.read_run(folder) for folder in (whole, part)]
    assert set(report.draw(["whole", "part"], pair)) == {"bars"}  # a radar needs three rows
    cells = {line["id"]: [cell["text"] for cell in line["cells"]] for line in report.compare(pair) if line["is_main"]}
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
    assert report.labels_of(folders[:2], [loaded[0], loaded[1] | {"checkpoint": "me/tuned"}]) == ["nano", "tuned"]
    assert report.labels_of(folders[:2], loaded[:2]) == ["base", "thinking"]
    assert report.labels_of(folders, loaded) == [str(folder) for folder in folders]


def test_the_command_writes_a_report_and_names_its_files(runs, tmp_path):
    output = tmp_path / "report.md"
    result = CliRunner().invoke(evaluate_app, ["report", *map(str, runs), "--output", str(output)])
    assert result.exit_code == 0 and result.stdout.split()[0] == str(output) and output.exists()


def test_a_mistake_is_one_line_that_names_the_remedy(runs, tmp_path):
    def message(*arguments):
        result = CliRunner().invoke(evaluate_app, ["report", *map(str, arguments)])
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
        return result.stderr

    (tmp_path / "killed").mkdir()
    assert "run the same command again" in message(tmp_path / "killed", "--output", tmp_path / "r.html")
    assert "an .html or an .md file" in message(*runs, "--output", tmp_path / "r.pdf")
    other = store_run(tmp_path / "other", "nano", FIRST, version=2)
    assert "version 1 and nanobench, version 2" in message(*runs, other, "--output", tmp_path / "r.html")
