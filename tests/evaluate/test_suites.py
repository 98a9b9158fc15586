"""The suites of public benchmarks on their drawn fixtures: what they ask, that they run whole, and that they go on after a kill."""

import json
import os
import subprocess
import time
import zipfile
from xml.etree import ElementTree

import pytest
from conftest import NANO, REPOSITORY
from PIL import Image
from typer.testing import CliRunner

from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate import harness
from minicpmv.evaluate.answerers import Answer
from minicpmv.evaluate.benchmark import UnknownRowError, main_score
from minicpmv.evaluate.comparison import sample_counts
from minicpmv.evaluate.data_sets import DATA_SETS, MissingDataError
from minicpmv.evaluate.groups import averages, measure_group, open_group
from minicpmv.evaluate.sample_log import read_entries, read_scored
from minicpmv.evaluate.suite import Setting, SuiteError, VideoSetting
from minicpmv.evaluate.suites import GROUPS, SUITES, UnknownBenchmarkError, load_suite


STEP_BY_STEP = (
    "Read the following question carefully, solve it step by step, and then output the final answer in the format of "
    '"Answer: single number or single word or phrase".\n\n'
)
CHOOSE_STEP_BY_STEP = (
    "Carefully read the following multichoice question, solve it step by step and finally pick the option associated with "
    'the correct answer in the format of "Answer: selected option\n\n'
)

pytestmark = pytest.mark.usefixtures("drawn_data", "one_thread")


def rows_of(name, **setting):
    return load_suite(name).open(Setting(**setting), fixtures=True).rows


def prompt_of(row, index=0):
    return row.prompt(row.sample(0, index))


def words(prompt):
    """The content with pictures and videos as their kinds."""
    kinds = {Image.Image: "<image>", dict: "<video>"}
    return [
        part if isinstance(part, str) else next((kinds[k] for k in kinds if isinstance(part, k)), "<subtitles>")
        for part in prompt.content
    ]


class Knowing:
    """An answerer without a model that says the right letter, word or text."""

    window, versions = 8, {"knowing": "1"}

    def settings(self, mode):
        return {"model": "knowing"}

    def answer(self, questions, mode, max_new_tokens):
        for question in questions:
            expected = question.prompt.expected
            text = expected.get("answer", expected.get("answers", ["?"])) if isinstance(expected, dict) else "?"
            text = str(text[0] if isinstance(text, list) else text)
            yield question, Answer(text, finish_reason="stop", prompt_tokens=1, generated_tokens=1)


# --- What is asked ---


def test_every_data_set_of_the_catalog_is_asked_by_a_suite():
    asked = {task.data for name in SUITES for task in load_suite(name).tasks}
    assert asked == set(DATA_SETS) - {"docvqa_test"}
    assert {load_suite(name).id for name in SUITES} == set(SUITES)


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("name", SUITES)
def test_every_question_of_a_suite_can_be_asked_scored_and_named(name, as_published):
    for row in rows_of(name, as_published=as_published):
        assert 10 <= row.length <= 25
        ids = set()
        for index in range(row.length):
            sample = row.sample(0, index)
            prompt, facts = row.prompt(sample), row.facts(sample)
            json.dumps([prompt.expected, facts, prompt.options])
            ids.add(facts["id"])
            score = main_score(row.scorer("A", prompt.expected))
            assert score is None or 0 <= score <= 1
            assert set(row.breakdowns) <= facts.keys(), row.id
        assert len(ids) > 3


@pytest.mark.parametrize(
    ("name", "plain", "published"),
    [
        (
            "mmstar",
            ["<image>", "Question: {q}\nOptions:\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n"
             "Please select the correct answer from the options above. \n"],
            ["<image>", CHOOSE_STEP_BY_STEP + "{q}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n"],
        ),
        (
            "ai2d",
            None,
            ["<image>", "Question: {q}\nOptions:\nA. {A}\nB. {B}\nC. {C}\nD. {D}\n\n"
             "Answer with the option's letter from the given choices directly."],
        ),
        ("mmvet", ["<image>", "{q}"], ["Answer this question in detail.", "<image>", "{q}"]),
        ("hallusionbench", ["<image>", "{q}"], ["<image>", STEP_BY_STEP + "{q}"]),
        ("mathvista", ["<image>", "{q}"], ["<image>", STEP_BY_STEP + "{q}"]),
        ("mme", ["<image>", "{q}"], ["<image>", "{q}"]),
        ("ocrbench", ["<image>", "{q}"],
         ["<image>", "Carefully observe the image and answer the OCR-related questions below. \n\n{q}"]),
        ("chartqa", ["<image>", "{q}\nAnswer the question using a single word or phrase."],
         ["<image>", STEP_BY_STEP + "{q}"]),
        ("docvqa", ["<image>", "{q}\nAnswer the question using a single word or phrase."],
         ["Answer the question using a single word or phrase.", "<image>", "{q}"]),
        ("textvqa", None, ["Answer the question using a single word or phrase.", "<image>", "{q}"]),
    ],
)  # fmt: skip
def test_prompts_are_those_of_the_sources_word_for_word(name, plain, published):
    for as_published, expected in ((False, plain), (True, published)):
        (row,) = rows_of(name, as_published=as_published)
        record = row.sample(0, 0).record
        fields = {letter: record.get(letter, "") for letter in "ABCD"} | {"q": record["question"]}
        if expected is not None:
            assert words(prompt_of(row)) == [part.format(**fields) for part in expected]


def test_a_hint_stands_before_the_question():
    plain, published = (rows_of("mmbench", as_published=published)[0] for published in (False, True))
    assert words(prompt_of(plain))[1].startswith("Hint: The image is drawn.\nQuestion: ")
    assert words(prompt_of(published))[1].startswith(CHOOSE_STEP_BY_STEP + "Hint: The image is drawn.\n")


def test_pictures_of_mmmu_stand_where_the_question_names_them():
    (row,) = rows_of("mmmu", as_published=True)
    prompts = [prompt_of(row, index) for index in range(row.length)]
    assert words(prompts[0])[:2] == [CHOOSE_STEP_BY_STEP, "<image>"]
    assert any(words(prompt).count("<image>") > 1 for prompt in prompts)
    assert all("<image " not in "".join(words(prompt)) for prompt in prompts)
    is_open = next(prompt for prompt in prompts if not prompt.expected["choices"])
    assert words(is_open)[0] == STEP_BY_STEP


THINKING = {
    "decoding": "sample",
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "num_beams": 1,
    "repetition_penalty": 1.0,
}
BEAMS = {"decoding": "beam", "num_beams": 3, "repetition_penalty": 1.2}


@pytest.mark.parametrize(
    ("names", "thinks", "tokens", "options", "enlarges", "runs"),
    [
        ("mmbench mmstar mmmu mathvista hallusionbench mmvet", True, 8192, THINKING, True, 3),
        ("ocrbench ocrbench_v2 chartqa", False, 2048, BEAMS, True, 1),
        ("ai2d textvqa", False, 1024, BEAMS, True, 1),
        ("docvqa mme realworldqa mmtbench mmhal objhal refcoco", False, 1024, BEAMS, False, 1),
    ],
)
def test_decoding_as_published_goes_by_groups_of_data_sets(names, thinks, tokens, options, enlarges, runs):
    for name in names.split():
        row = rows_of(name, as_published=True)[0]
        assert (row.thinking, row.max_new_tokens + row.max_thought_tokens * thinks, row.runs) == (thinks, tokens, runs)
        prompt, sample = prompt_of(row), row.sample(0, 0)
        assert prompt.options.items() >= options.items()
        assert (prompt.options.get("think_prefix") == "I") == thinks
        (picture, *_) = [part for part in prompt.content if isinstance(part, Image.Image)]
        assert (picture.size != sample.images[0].size) == enlarges, name
        plain = rows_of(name)[0]
        assert plain.thinking is None and plain.runs == 1 and not prompt_of(plain).options


@pytest.mark.parametrize(
    ("name", "reply", "cut"),
    [
        ("mmstar", "A is red, so no. Answer: B\nAnswer: (C) or Answer: D", "D"),
        ("mmbench", "No idea", "No idea"),
        ("chartqa", "It rises. Answer: 41%\nAnswer: 42", "41%\nAnswer: 42"),
        ("hallusionbench", "Answer: No.", "No."),
        ("mathvista", "So x = 3", "So x = 3"),
    ],
)
def test_answers_as_published_are_cut_as_the_authors_cut_them(name, reply, cut):
    assert rows_of(name, as_published=True)[0].cut(reply) == cut
    assert rows_of(name)[0].cut is None


@pytest.mark.parametrize("name", ["ocrbench", "mmvet", "docvqa", "mme", "ai2d"])
def test_other_answers_as_published_are_scored_whole(name):
    assert rows_of(name, as_published=True)[0].cut is None


def test_rules_are_those_of_the_published_figures_where_they_are_compared_with_them():
    versions = [load_suite("mmstar").open(Setting(as_published, scoring), fixtures=True).scoring["version"]
                for as_published in (False, True) for scoring in (None, "2025-07")]  # fmt: skip
    assert versions == ["current", "2025-07", "2025-09", "2025-07"]


def test_rotations_of_a_question_are_asked_one_after_the_other():
    for row in rows_of("mmbench"):
        groups = [row.facts(row.sample(0, index))["group"] for index in range(row.length)]
        assert groups == [str(number) for number in range(5) for _ in range(4)]


def test_hidden_answers_of_motionbench_are_not_asked_about():
    (row,) = rows_of("motionbench")
    assert row.length < len(row.sample(0, 0).data.records)
    assert all(prompt_of(row, index).expected["answer"] in "ABCDEF" for index in range(row.length))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("videomme", ["<video>", "Select the best answer to the following multiple-choice question based on the video. Respond "
         "with only the letter (A, B, C, or D) of the correct option.\n{q}\n{lines}\nThe best answer is:"]),
        ("longvideobench", ["<video>", "{q}\n{lines}\nAnswer with the option's letter from the given choices directly."]),
        ("mlvu", ["Carefully watch this video and pay attention to every detail. Based on your observations, select the best "
         "option that accurately addresses the question.", "<video>", "Question: {q}\nOptions:\n{brackets}",
         "\nOnly give the best option."]),
        ("lvbench", ["<video>", "{q}\nAnswer the question with the option letter"]),
        ("motionbench", ["<video>", "{q}\nAnswer with only the option letter (A, B, C, D, E, or F)."]),
        ("favorbench", ["<video>", "Carefully watch the video and pay attention to temporal dynamics in this video, focusing on "
         "the camera motions, actions, activities, and interactions. Based on your observations, select the best option that "
         "accurately addresses the question.\n{q}\nYou can only response with the answer among {list}"]),
    ],
)  # fmt: skip
def test_prompts_about_videos_are_those_of_their_sources(name, expected):
    row = rows_of(name)[0]
    record, prompt = row.sample(0, 0).record, prompt_of(row)
    options = record.get("options") or record.get("candidates") or []
    texts = [option.removeprefix(f"{letter}. ") for letter, option in zip("ABCD", options, strict=False)]
    pairs = list(zip("ABCD", texts, strict=False))
    fields = {
        "q": record["question"],
        "lines": "\n".join(f"{letter}. {text}" for letter, text in pairs),
        "brackets": "\n".join(f"({letter}) {text}" for letter, text in pairs),
        "list": texts,
    }
    assert words(prompt) == [part.format(**fields) for part in expected]
    assert prompt.options == {"fps": 5, "max_num_frames": 180, "max_num_packing": 3, "max_inp_length": 32768}


def test_videos_have_subtitles_where_there_are_some():
    row = rows_of("videomme")[1]
    contents = [words(prompt_of(row, index)) for index in range(row.length)]
    assert all(content[:2] == ["<video>", "<subtitles>"] for content in contents)
    lines = [len(prompt_of(row, index).content[1].lines) for index in range(row.length)]
    assert 0 in lines and 2 in lines


def test_the_right_answers_are_found_right_by_every_rule():
    """Suites that hand a wrong key to their scorers would show here."""
    for name in ("mmbench", "mmstar", "mmmu", "ai2d", "hallusionbench", "mme", "realworldqa", "mmtbench", "chartqa", "docvqa",
                 "textvqa", "ocrbench", "videomme", "lvbench", "mlvu", "longvideobench", "motionbench", "favorbench"):  # fmt: skip
        for row in rows_of(name):
            for index in range(row.length):
                expected = prompt_of(row, index).expected
                right = expected.get("answer", expected.get("answers"))
                right = str(right[0] if isinstance(right, list) else right)
                assert main_score(row.scorer(right, expected)) >= 0.9, (name, expected)


# --- Runs ---


FEW = ("--fixtures", "--samples", "3", "--max-new-tokens", "2")


@pytest.fixture(scope="module")
def published(drawn_data, tmp_path_factory):
    """The dry run of everything, as a user types it, with a few questions of each."""
    folder = tmp_path_factory.mktemp("published")
    command = ["published", "-m", str(NANO), *FEW, "--output", str(folder)]
    result = CliRunner().invoke(evaluate_app, [*command, "--json", str(folder / "figures.json")])
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_a_dry_run_of_everything_gives_figures_and_a_report(published):
    folder, output = published
    results = json.loads((folder / "results.json").read_text())
    assert set(results["suites"]) == set(SUITES) - {"mmbench_test"}
    for suite in results["suites"]:
        assert (folder / suite / "results.json").is_file()
    assert {summary["n"] for summary in results["rows"].values()} == {3}
    assert results["averages"] == {"opencompass": None}  # MM-Vet has no figure without a judge
    assert all((folder / f"report.{suffix}").stat().st_size > 1000 for suffix in ("html", "md", "csv"))
    assert set(json.loads((folder / "figures.json").read_text())) == set(results["rows"])
    assert "Drawn questions stood in for the data" in (folder / "report.md").read_text()
    assert "mathvista: rules only" in output and "judge" in output


def test_rows_that_need_a_judge_have_no_figure_and_those_that_may_have_one_say_so(published):
    rows = json.loads((published[0] / "results.json").read_text())["rows"]
    for name in ("mmvet", "mmhal"):
        assert set(rows[name]["mean"].values()) == {None} and rows[name]["judge"] == "rules only"
    assert rows["mmstar"]["judge"] == "rules only" and rows["ocrbench"]["judge"] is None
    assert rows["mme"]["points"][0] == "total" and rows["omnidocbench_en"]["lower_is_better"]


def test_a_group_can_be_read_as_one_log(published):
    entries = read_scored(published[0])
    rows = json.loads((published[0] / "results.json").read_text())["rows"]
    assert {entry["row"] for entry in entries} == set(rows)
    assert len(entries) == sum(summary["n"] for summary in rows.values())
    videos = [entry for entry in entries if entry["row"] == "videomme"]
    assert all(entry["media"]["frames"] == 6 and entry["media"]["packing"] == 1 for entry in videos)
    assert any("picture" in entry for entry in videos)


def test_a_dry_run_that_is_run_again_asks_nothing(published, monkeypatch):
    folder, _ = published
    before = {path: path.read_bytes() for path in folder.glob("*/samples.jsonl")}
    monkeypatch.setattr("minicpmv.evaluate.answerers.LocalModel.answer", None)
    command = ["published", "-m", str(NANO), *FEW, "--output", str(folder)]
    result = CliRunner().invoke(evaluate_app, command)
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in folder.glob("*/samples.jsonl")} == before


def test_a_group_has_the_average_of_its_suites_where_all_have_figures(tmp_path):
    benchmarks = open_group("opencompass", Setting(), fixtures=True)
    results = measure_group(Knowing(), "opencompass", benchmarks, tmp_path, model="knowing", samples=3)
    assert results["averages"] == {"opencompass": None}
    shares = {row: next(iter(summary["mean"].values())) for row, summary in results["rows"].items()}
    assert {shares[row] for row in ("mmbench_en", "mmbench_cn", "mmstar", "mmmu", "ai2d", "ocrbench")} == {1}
    known = results["rows"] | {"mmvet": {"mean": {"score": 0.5}}, "mathvista": {"mean": {"accuracy": 0.5}}}
    assert averages(known)["opencompass"] == pytest.approx((6 + 0.5 + 0.5) / 8)
    assert averages({"mmstar": known["mmstar"]}) == {}


def test_answers_about_the_test_set_are_written_for_upload(tmp_path):
    benchmark = load_suite("mmbench_test").open(Setting(), fixtures=True)
    results = harness.measure(Knowing(), benchmark, tmp_path, name="knowing")
    assert results["rows"]["mmbench_test_en"]["mean"] == {"exact": None}
    for language in ("en", "cn"):
        with zipfile.ZipFile(tmp_path / f"mmbench_test_{language}.xlsx") as file:
            sheet = ElementTree.fromstring(file.read("xl/sheet.xml"))
        lines = [["".join(cell.itertext()) for cell in row] for row in sheet.iter() if row.tag.endswith("}row")]
        assert lines[0][:3] == ["index", "question", "hint"] and lines[0][-1] == "prediction"
        assert len(lines) == 21 and {len(line) for line in lines} == {len(lines[0])}
        assert lines[1][0] == "0" and lines[1][-1] == "?"


@pytest.mark.parametrize("name", ["mmbench", "chartqa", "videomme"])
def test_what_a_kill_left_of_a_suite_is_not_asked_again(name, tmp_path):
    """Whatever the log held when the run was killed: the rest is asked, and the end is the same."""
    benchmark = load_suite(name).open(Setting(), fixtures=True)
    whole = harness.measure(Knowing(), benchmark, tmp_path / "whole", name="knowing")
    harness.measure(Knowing(), benchmark, tmp_path / "cut", name="knowing")
    log = tmp_path / "cut" / "samples.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:7]) + b'{"settings": "torn')
    (tmp_path / "cut" / "results.json").unlink()
    assert harness.measure(Knowing(), benchmark, tmp_path / "cut", name="knowing") == whole
    assert len(read_entries(log)) == len(lines)


@pytest.mark.slow
def test_a_group_that_was_killed_goes_on_in_the_suite_where_it_was(tmp_path, warm_python):
    command = ["-m", "minicpmv", "evaluate", "hallucination", "-m", "nano", *FEW, "--batch-size", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [warm_python, *command, "--output", str(tmp_path)],
        cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    log, deadline = tmp_path / "mmhal" / "samples.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_bytes().count(b"\n") >= 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()  # until nobody holds its output any more
    kept = {path: path.read_bytes() for path in tmp_path.glob("*/samples.jsonl")}
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "objhal").exists()
    done = subprocess.run(
        [warm_python, *command, "--output", str(tmp_path)],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path, content in kept.items():
        assert path.read_bytes().startswith(content[: content.rfind(b"\n") + 1])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["suites"]) == list(GROUPS["hallucination"][0])


def test_as_published_runs_three_times_and_thinks(nano, tmp_path):
    command = ["mmstar", "-m", str(NANO), "--fixtures", "--as-published", "--samples", "2", "--output", str(tmp_path)]
    result = CliRunner().invoke(evaluate_app, command)
    assert result.exit_code == 0, result.output
    entries = read_entries(tmp_path / "samples.jsonl")
    assert sorted((entry["seed"], entry["index"]) for entry in entries) == [(s, i) for s in range(3) for i in range(2)]
    assert all(entry["mode"] == "deep" and entry["thought"].startswith("I") for entry in entries)
    assert json.loads((tmp_path / "results.json").read_text())["scoring"]["version"] == "2025-09"
    assert "±" in result.output and "seeds 0, 1, 2" in result.output


def test_rows_of_one_run_and_of_three_tell_their_samples_alike(tmp_path):
    command = [
        "opencompass",
        "-m",
        str(NANO),
        "--fixtures",
        "--as-published",
        "--samples",
        "1",
        "--max-new-tokens",
        "2",
    ]
    result = CliRunner().invoke(evaluate_app, [*command, "--rows", "mmstar,ai2d", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row: summary["n"] for row, summary in results["rows"].items()} == {"mmstar": 3, "ai2d": 1}
    assert sample_counts(results) == [1] and results["seeds"] == [0, 1, 2]


def test_packings_are_compared_in_one_run(nano, tmp_path):
    command = ["video", "-m", str(NANO), "--fixtures", "--packing", "1,6", "--rows", "mlvu_packing1,mlvu_packing6"]
    result = CliRunner().invoke(
        evaluate_app, [*command, "--max-new-tokens", "4", "--samples", "3", "--output", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert rows["mlvu_packing1"]["prompt_tokens"] > rows["mlvu_packing6"]["prompt_tokens"]
    shown = {entry["row"]: entry["media"] for entry in read_scored(tmp_path)}
    assert (shown["mlvu_packing1"]["groups"], shown["mlvu_packing6"]["groups"]) == (6, 1)
    assert shown["mlvu_packing1"]["timestamps"] == shown["mlvu_packing6"]["timestamps"]


@pytest.mark.parametrize(
    ("name", "id"),
    [("Video-MME", "videomme"), ("MMT-Bench val", "mmtbench"), ("ocrbench-v2", "ocrbench_v2"), ("Object HalBench", "objhal"),
     ("MMHal-Bench", "mmhal"), ("MM-Vet", "mmvet"), ("OpenCompass", "opencompass"), ("report", "report")],
)  # fmt: skip
def test_names_are_understood_in_any_spelling(name, id):
    helps = [CliRunner().invoke(evaluate_app, [each, "--help"]) for each in (name, id)]
    assert [result.exit_code for result in helps] == [0, 0]
    assert helps[0].output.partition("\n\n")[2] == helps[1].output.partition("\n\n")[2]


# --- What is refused ---


def test_what_lacks_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("minicpmv.checkpoint.load", None)
    result = CliRunner().invoke(evaluate_app, ["hallucination", "-m", str(NANO), "--data", str(tmp_path)])
    assert result.exit_code == 1
    for name in ("hallusionbench", "mmhal", "objhal"):
        assert f"minicpmv evaluate get {name}" in result.output
    with pytest.raises(MissingDataError, match="minicpmv evaluate get mmstar"):
        load_suite("mmstar").open(folder=tmp_path)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["mmstar", "--packing", "1,3"], "mmstar has no videos to be packed"),
        (["ocr", "--packing", "1,3"], "ocr has no videos to be packed"),
        (["videomme", "--packing", "1,9"], "packing 9 does not exist"),
        (["mmstar", "--rows", "mmmu"], "mmstar has no row mmmu; its rows are mmstar"),
        (["opencompass", "--rows", "chartqa"], "opencompass has no row chartqa"),
        (["mmstar", "--data", "."], "leave --data or --fixtures out"),
        (["mmstar", "--judge-model", "gpt"], "--judge-model also needs --judge-endpoint"),
        (["mmstar", "--judge-endpoint", "http://127.0.0.1:9/v1"], "--judge-endpoint also needs --judge-model"),
        (["mmstar", "--endpoint", "http://127.0.0.1:9/v1"], "--endpoint also needs --model"),
    ],
)
def test_options_that_do_not_go_together_are_refused(command, message):
    result = CliRunner().invoke(evaluate_app, [*command, "--fixtures"])
    assert result.exit_code == 1 and message in result.output


def test_suites_and_settings_that_do_not_exist_are_named():
    with pytest.raises(UnknownBenchmarkError, match="there is no benchmark 'mmsta'; there are nanobench, mmbench"):
        load_suite("mmsta")
    with pytest.raises(UnknownRowError, match="mmbench has no row mmstar; its rows are mmbench_en, mmbench_cn"):
        load_suite("mmbench").open(fixtures=True, rows=["mmstar"])
    with pytest.raises(SuiteError, match="has no videos"):
        load_suite("mmstar").open(Setting(video=VideoSetting(packings=(1,))), fixtures=True)
