"""The drawn stand-ins for public data sets: of the same format, answerable, the same every time, made once."""

import io
import json
import shutil

import pytest
from PIL import Image

from minicpmv.evaluate.data_sets import DATA_SETS, MissingDataError, open_data, read_subtitles
from minicpmv.evaluate.fixtures import fixture_folder, write_fixtures
from minicpmv.evaluate.suite import check_videos
from minicpmv.evaluate.suites import load_suite


pytestmark = pytest.mark.usefixtures("drawn_data")


@pytest.mark.parametrize("id", DATA_SETS)
def test_every_data_set_has_about_20_questions_that_can_be_read(id):
    data = open_data(id, fixtures=True)
    assert 20 <= len(data.records) <= 25
    for record in data.records:
        for file in record.get("image", ()):
            Image.open(io.BytesIO(file)).load()
        if "video" in record:
            assert data.media(record["video"]).stat().st_size > 500
        assert ("image" in record) or ("video" in record)


def test_they_are_made_once_and_are_the_same_every_time(tmp_path):
    folder = fixture_folder()
    stamp = folder.stat().st_mtime_ns
    assert fixture_folder() == folder and folder.stat().st_mtime_ns == stamp
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    write_fixtures(tmp_path)
    for path in sorted(tmp_path.rglob("*")):
        if path.suffix in (".tsv", ".json", ".jsonl", ".png", ".srt"):
            assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes(), path.name


@pytest.mark.parametrize("id", ["mmbench_dev_en", "mmbench_dev_cn", "mmstar", "ai2d", "realworldqa", "mmtbench"])
def test_options_differ_and_the_letter_names_one(id):
    for record in open_data(id, fixtures=True).records:
        options = [record[letter] for letter in "ABCD" if letter in record]
        assert len(set(options)) == len(options) >= 2
        assert record[record["answer"]] in options


def test_rotations_of_mmbench_keep_the_right_option_and_the_image():
    records = list(open_data("mmbench_dev_en", fixtures=True).records)
    for base in records[::4]:
        group = [record for record in records if int(record["index"]) % 10**6 == int(base["index"])]
        assert len(group) == 4
        assert {record[record["answer"]] for record in group} == {base[base["answer"]]}
        assert {record["answer"] for record in group} == set("ABCD")
        assert all(record["image"] == base["image"] for record in group)


def test_hallusion_bench_asks_the_same_questions_about_two_figures():
    records = list(open_data("hallusionbench", fixtures=True).records)
    parts = [record["index"].split("_") for record in records]
    assert {(part[4], part[5]) for part in parts} == {("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")}
    assert {record["answer"] for record in records} == {"Yes", "No"}


def test_mme_asks_twice_about_each_image():
    records = list(open_data("mme", fixtures=True).records)
    for yes, no in zip(records[::2], records[1::2], strict=True):
        assert yes["image_path"] == no["image_path"] and (yes["answer"], no["answer"]) == ("Yes", "No")


def test_pages_of_omnidocbench_hold_text_tables_and_formulas_in_both_languages():
    pages = [record["answer"] for record in open_data("omnidocbench", fixtures=True).records]
    kinds = {
        (page["page_info"]["page_attribute"]["language"], box["category_type"])
        for page in pages
        for box in page["layout_dets"]
    }
    for language in ("english", "simplified_chinese"):
        for kind in ("title", "text_block", "table", "equation_isolated"):
            assert (language, kind) in kinds
    assert all("</tr><tr>" in box["html"] for page in pages for box in page["layout_dets"] if "html" in box)


def test_ocrbench_v2_asks_for_all_that_is_printed_and_every_bar():
    records = {record["category"]: record["answer"][0] for record in open_data("ocrbench_v2", fixtures=True).records}
    assert len(records["full-page OCR en"].splitlines()) >= 3
    assert len(records["key information extraction en"]) >= 3 and len(records["chart parsing en"]) >= 3
    assert set(records["formula recognition en"]) <= set("0123456789+-")


def test_clips_have_six_frames_and_their_subtitles_can_be_read():
    av = pytest.importorskip("av")
    data = open_data("longvideobench", fixtures=True)
    with av.open(str(data.media(data.records[0]["video"]))) as file:
        assert len(list(file.decode(video=0))) == 6
    for record in data.records:
        assert read_subtitles(data.media(record["subtitle"])) == [(0.0, 0.6, "a shape")]


def test_object_halbench_comes_with_the_annotations_of_coco():
    data = open_data("objhal", fixtures=True)
    instances = [
        json.loads((data.folder / "annotations" / f"instances_{part}2014.json").read_text())
        for part in ("train", "val")
    ]
    known = {image["id"] for part in instances for image in part["images"]}
    assert {record["image_id"] for record in data.records} == known


def test_videos_that_are_not_there_are_told_before_a_model_is_loaded(tmp_path):
    shutil.copytree(fixture_folder() / "LVBench", tmp_path / "LVBench")
    suite = load_suite("lvbench").open(folder=tmp_path)
    check_videos(suite)
    (tmp_path / "LVBench" / "videos" / "drawn3.mp4").unlink()
    suite = load_suite("lvbench").open(folder=tmp_path)
    check_videos(suite, 4)  # those of the first questions are there
    with pytest.raises(MissingDataError, match=r"lvbench: 1 videos are not there .*drawn3\.mp4.*--keep-going"):
        check_videos(suite)
    check_videos(load_suite("mmstar").open(fixtures=True))
