"""Records of the benchmarks' data files: what is read, how much of it is held, and what is said of what is broken."""

import base64
import csv
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from minicpmv.evaluate.data_sets import (
    DATA_SETS,
    BrokenRecordError,
    MissingDataError,
    UnknownDataSetError,
    find_data_set,
    open_data,
    other_file,
    read_subtitles,
)
from minicpmv.evaluate.data_sets.catalog import hub_repositories
from minicpmv.evaluate.data_sets.records import MISSING, JsonLines, Table, as_list


def picture(color):
    file = io.BytesIO()
    Image.new("RGB", (20, 10), color).save(file, "PNG")
    return file.getvalue()


def encoded(color):
    return base64.b64encode(picture(color)).decode()


def write_table(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


TABLE = [
    {"index": "0", "question": 'What "is"\nthis?', "A": "a star", "B": "None", "answer": "A", "image": encoded("red")},
    {"index": "1", "question": "颜色\t？", "A": "x", "B": "y", "answer": "B", "image": "0"},
    {"index": "2", "question": "both", "A": "x", "B": "y", "answer": "B", "image": str(["0", encoded("blue")])},
]


def test_a_table_gives_its_cells_and_its_images_however_they_are_stored(tmp_path):
    table = Table(write_table(tmp_path / "t.tsv", TABLE))
    assert [record["question"] for record in table] == ['What "is"\nthis?', "颜色\t？", "both"]
    assert table[0]["image"] == table[1]["image"] == [picture("red")]
    assert table[2]["image"] == [picture("red"), picture("blue")]
    assert table[-1] == table[2] and table[1:] == [table[1], table[2]]
    assert list(table) == [table[0], table[1], table[2]]
    assert all("image" not in record for record in table.without_images())


def test_what_pandas_takes_for_a_missing_value_is_not_in_the_record(tmp_path):
    pandas = pytest.importorskip("pandas")
    words = [*MISSING, "none", "NONE", "0", "null ", "N / A", "nil"]
    path = write_table(tmp_path / "t.tsv", [{"index": str(i), "word": word} for i, word in enumerate(words)])
    there = pandas.read_csv(path, sep="\t")["word"].notna()
    assert ["word" in record for record in Table(path)] == list(there)


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\r\0"), max_size=20)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=8))
def test_any_text_that_was_written_is_read_again_in_any_order(tmp_path_factory, cells):
    rows = [{"index": f"i{number}", "a": a, "b": b} for number, (a, b) in enumerate(cells)]
    table = Table(write_table(tmp_path_factory.mktemp("table") / "t.tsv", rows))
    for number in reversed(range(len(rows))):
        assert table[number] == {name: text for name, text in rows[number].items() if text not in MISSING}


def test_a_large_table_is_not_held_in_memory(tmp_path):
    big = "A" * 400_000
    path = write_table(tmp_path / "t.tsv", [{"index": str(i), "image": big} for i in range(100)])  # 40 MB
    tracemalloc.start()
    table = Table(path)
    assert len(table) == 100 and table[57]["index"] == "57"
    assert sum(1 for _ in table) == 100
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8_000_000


def test_the_fingerprint_is_the_md5_of_the_file(tmp_path):
    import hashlib

    path = write_table(tmp_path / "t.tsv", TABLE)
    assert Table(path).digest == hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "content, named",
    [
        ("index\tquestion\timage\n0\tq\n", "row 1: 2 fields, but the header has 3"),
        ("index\tquestion\timage\n0\tq\tx\n1\tq\tx\ty\n", "row 2: 4 fields"),
        ("index\timage\n0\tx\n", "header: no column question"),
        ("index\tquestion\timage\n", "header: there are no rows"),
        ("", "header: there are no rows"),
    ],
)
def test_a_broken_table_is_named_with_its_row(tmp_path, content, named):
    (tmp_path / "t.tsv").write_text(content)
    with pytest.raises(BrokenRecordError) as error:
        Table(tmp_path / "t.tsv", ("index", "question"))
    assert f"t.tsv, {named}" in str(error.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "t.tsv").write_bytes(b"index\tquestion\n0\tq\n1\t\xff\xfe\n")
    with pytest.raises(BrokenRecordError, match="row 2: not a row"):
        Table(tmp_path / "t.tsv")


@pytest.mark.parametrize("image, named", [("7", "that of row '7'"), ("A" * 65, "not base64")])
def test_an_image_that_is_not_there_is_named(tmp_path, image, named):
    table = Table(write_table(tmp_path / "t.tsv", [{"index": "0", "image": image}]))
    with pytest.raises(BrokenRecordError, match=f"row 1: .*{named}"):
        table[0]


def test_data_in_the_cache_of_the_hub_are_found(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LMUData", str(tmp_path / "none"))
    repository = tmp_path / "hub" / "datasets--zai-org--LVBench"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    question = {"uid": "1", "question": "q", "answer": "A", "question_type": []}
    (snapshot / "video_info.meta.jsonl").write_text(json.dumps({"key": "k", "qa": [question]}))
    (snapshot / "k.mp4").touch()
    data = open_data("lvbench")
    assert data.media(data.records[0]["video"]) == snapshot / "k.mp4"


def test_lists_are_read_as_python_writes_them():
    assert as_list("['a', 'b']") == ["a", "b"]
    assert as_list("plain") == ["plain"]
    assert as_list("[not a list") == as_list("[not a list") == ["[not a list"]
    assert as_list("[x]") == ["[x]"]


def test_json_lines_name_the_broken_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"image_id": 1, "question": "q", "image": "QUJD"}\n\n{"image_id": 2}\n')
    with pytest.raises(BrokenRecordError, match="row 2: no question, image"):
        JsonLines(tmp_path / "a.jsonl", ("image_id", "question", "image"))
    (tmp_path / "a.jsonl").write_text('{"question": "q", "image": "QUJD"}\n[1]\n')
    with pytest.raises(BrokenRecordError, match="row 2: JSON, but not an object"):
        JsonLines(tmp_path / "a.jsonl", ("question",))


def test_a_data_set_is_found_by_either_name_and_unknown_ones_are_refused():
    assert find_data_set("MMBench_DEV_EN_V11") is find_data_set("mmbench-dev-en") is DATA_SETS["mmbench_dev_en"]
    with pytest.raises(UnknownDataSetError, match="no data set 'mmbanch'; there are mmbench_dev_en"):
        find_data_set("mmbanch")


def test_another_file_than_that_of_published_figures_is_told():
    known = DATA_SETS["mmstar"]
    assert other_file(known, known.sources[0].md5) is None
    assert "is not the file that others measured with" in other_file(known, "0" * 32)
    assert other_file(DATA_SETS["videomme"], "0" * 32) is None  # nobody says which one that is


def test_the_documentation_lists_every_data_set_with_its_license():
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    rows = {
        cells[1].strip("` "): cells for line in page.splitlines() if len(cells := line.split("|")) == 7 and "`" in line
    }
    for id, data_set in DATA_SETS.items():
        _, _, name, count, source, license, _ = (cell.strip() for cell in rows[id])
        assert (name, count, license) == (data_set.name, str(data_set.rows or "?"), data_set.license)
        assert all(repository in source for repository in hub_repositories(data_set))


def test_missing_data_says_where_it_looked_and_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("LMUData", str(tmp_path))
    with pytest.raises(MissingDataError) as error:
        open_data("mmstar")
    assert str(tmp_path / "MMStar.tsv") in str(error.value)
    assert "`minicpmv evaluate get mmstar`" in str(error.value)


def test_the_folder_of_vlmevalkit_is_used_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("LMUData", str(tmp_path))
    write_table(tmp_path / "MMStar.tsv", TABLE)
    data = open_data("mmstar")
    assert (data.id, len(data.records)) == ("mmstar", 3)
    assert open_data("mmstar", folder=tmp_path).fingerprint == data.fingerprint


def test_questions_of_a_video_become_records_and_its_file_is_found_wherever_it_was_unpacked(tmp_path):
    folder = tmp_path / "LVBench"
    (folder / "anywhere").mkdir(parents=True)
    (folder / "anywhere" / "k1.mkv").touch()
    asked = [{"uid": str(i), "question": f"q{i}\n(A) x", "answer": "A", "question_type": ["er"]} for i in range(2)]
    (folder / "video_info.meta.jsonl").write_text(json.dumps({"key": "k1", "type": "tv", "qa": asked}) + "\n")
    data = open_data("lvbench", folder=tmp_path)
    assert [(record["uid"], record["key"], record["type"]) for record in data.records] == [
        ("0", "k1", "tv"),
        ("1", "k1", "tv"),
    ]
    assert data.media(data.records[0]["video"]) == folder / "anywhere" / "k1.mkv"
    with pytest.raises(MissingDataError, match=r"no other\.mp4 below .*LVBench"):
        data.media("videos/other.mp4")


def test_a_video_without_questions_is_named(tmp_path):
    (tmp_path / "LVBench").mkdir()
    (tmp_path / "LVBench" / "video_info.meta.jsonl").write_text('{"key": "k1", "qa": 3}\n')
    with pytest.raises(BrokenRecordError, match="row 1: 'qa' is not a list of questions"):
        open_data("lvbench", folder=tmp_path)


def test_parquet_that_is_cut_off_is_named(tmp_path):
    file = tmp_path / "Video-MME" / "videomme" / "test-00000-of-00001.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PAR1 and no more")
    with pytest.raises(BrokenRecordError, match="not Parquet"):
        open_data("videomme", folder=tmp_path)


def test_subtitles_of_all_three_forms(tmp_path):
    (tmp_path / "a.srt").write_text(
        "1\r\n00:00:01,500 --> 00:01:02,250\r\n<i>one</i>\r\ntwo\r\n\r\n2\r\n01:00:00,000 --> 01:00:01,000\r\n\r\n"
    )
    assert read_subtitles(tmp_path / "a.srt") == [(1.5, 62.25, "one two")]
    (tmp_path / "a.json").write_text(json.dumps([{"start": "00:01:00.5", "end": "00:01:02", "line": "x"}]))
    assert read_subtitles(tmp_path / "a.json") == [(60.5, 62.0, "x")]
    (tmp_path / "b.json").write_text(json.dumps([{"timestamp": [1.0, None], "text": "y"}]))
    assert read_subtitles(tmp_path / "b.json") == [(1.0, 1.0, "y")]
    (tmp_path / "c.json").write_text("[3]")
    with pytest.raises(BrokenRecordError, match="not subtitles"):
        read_subtitles(tmp_path / "c.json")
