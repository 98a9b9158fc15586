"""From a suite's card to figures: what is asked, what is logged, and what follows from the log alone."""

import io
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from minicpmv.evaluate import harness
from minicpmv.evaluate.answerers import Answer, LocalModel, QuestionError
from minicpmv.evaluate.benchmark import Benchmark, Judge, Subtitles
from minicpmv.evaluate.data_sets import Records
from minicpmv.evaluate.sample_log import read_entries, read_scored
from minicpmv.evaluate.suite import Asking, Decoding, Setting, SuiteError, Task, VideoSetting, enlarged


COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220)}

pytestmark = pytest.mark.usefixtures("one_thread")


class Colors(Records):
    """Squares of three colors; every third is of the part "hidden"."""

    files, digest = [Path("colors")], "d1"

    def __len__(self):
        return 9

    def read(self, index):
        name = sorted(COLORS)[index % 3]
        file = io.BytesIO()
        Image.new("RGB", (112, 112), COLORS[name]).save(file, format="PNG")
        part = "hidden" if index % 3 == 2 else "open"
        return {"index": str(index), "answer": name, "part": part, "image": [file.getvalue()]}


@dataclass
class ColorData:
    id = fingerprint = "colors"
    records = Colors()


def same(answer, expected, *, scoring, strict):
    right = answer == expected or (strict and answer.lower() == expected)
    return {"exact": float(right), "undecided": not right}


ASKING = Asking(lambda sample: [*sample.images, "What color?"], Decoding(8))
TASK = Task(
    id="colors",
    title="colors",
    data="colors",
    plain=ASKING,
    published=replace(
        ASKING,
        decoding=Decoding(64, {"decoding": "sample"}, thinking=True, enlarge=True, runs=3),
        cut=lambda answer: answer.rpartition("Answer: ")[2],
    ),
    expected=lambda sample: sample["answer"],
    facts=lambda sample: {"id": sample["index"], "part": sample["part"], "letters": list(sample["answer"])[:2]},
    scorer=same,
    breakdowns=("part", "letters"),
)


class Parrot:
    window, versions = 4, {"parrot": "1"}

    def __init__(self, says):
        self.says, self.asked = says, []

    def settings(self, mode):
        return {"model": "parrot"}

    def answer(self, questions, mode, max_new_tokens):
        for question in questions:
            if not question.answered:
                self.asked.append((question, mode, max_new_tokens))
                yield question, Answer(self.says(question), mode="deep" if mode else "fast", finish_reason="stop")


def benchmark(setting=None, task=TASK, **scoring):
    row = task.bind(ColorData(), setting or Setting())
    return Benchmark("colors", "Colors", 1, (row,), scoring={"version": "current", "strict": False} | scoring)


def ask(folder, says=lambda question: question.prompt.expected, asked=None, **options):
    parrot = Parrot(says)
    return harness.measure(parrot, asked or benchmark(), folder, name="parrot", **options), parrot


# --- What is asked ---


def test_the_plain_way_asks_once_and_as_published_three_times_with_a_thought(tmp_path):
    _, plain = ask(tmp_path / "plain")
    assert len(plain.asked) == 9 and {(mode, tokens) for _, mode, tokens in plain.asked} == {(False, 8)}
    results, published = ask(tmp_path / "published", asked=benchmark(Setting(as_published=True)))
    assert len(published.asked) == 27 and {(mode, tokens) for _, mode, tokens in published.asked} == {(True, 64)}
    assert results["seeds"] == [0, 1, 2] and results["rows"]["colors"]["std"]["exact"] == 0


def test_chance_is_the_questions_own():
    """The width of an enlarged picture and the seed of its answer: another run differs, the same one does not."""
    row = benchmark(Setting(as_published=True)).rows[0]
    first, again, other = (row.prompt(row.sample(seed, 4)) for seed in (0, 0, 1))
    assert first.content[0].size == again.content[0].size != other.content[0].size
    assert first.options["seed"] == again.options["seed"] != other.options["seed"]
    width, height = first.content[0].size
    assert 112 <= width <= 1344 and height == width


@pytest.mark.parametrize("size", [(1344, 1344), (3000, 700), (1, 1), (2000, 1), (640, 480)])
def test_small_pictures_become_larger_and_large_ones_stay(size):
    picture = Image.new("L", size)
    found = enlarged(picture, random.Random(0)).size
    if size[0] * size[1] >= 1344**2:
        assert found == size
    else:
        assert found[0] >= size[0] and found[0] * found[1] <= 1344**2 + 1344


def test_a_row_takes_the_records_that_are_its_own_in_its_order(tmp_path):
    task = replace(TASK, keep=lambda record: record["part"] == "open", order=lambda record: record["answer"])
    ask(tmp_path, asked=benchmark(task=task))
    assert [entry["expected"] for entry in read_entries(tmp_path / "samples.jsonl")] == ["blue"] * 3 + ["green"] * 3
    with pytest.raises(SuiteError, match="colors holds no question of colors"):
        benchmark(task=replace(TASK, keep=lambda record: False))


def test_answers_can_be_kept_short():
    assert benchmark(Setting(max_new_tokens=4)).rows[0].max_new_tokens == 4
    assert benchmark(Setting(max_new_tokens=4000)).rows[0].max_new_tokens == 8


@pytest.mark.parametrize("packings", [(0,), (1, 7), (3, 3)])
def test_packings_that_do_not_exist_are_refused(packings):
    with pytest.raises(SuiteError, match="packing"):
        VideoSetting(packings=packings)


# --- What is logged, and what follows from it ---


def test_figures_are_also_given_by_category(tmp_path):
    results, _ = ask(tmp_path, lambda question: "blue")
    summary = results["rows"]["colors"]
    assert summary["mean"] == {"exact": pytest.approx(1 / 3)}
    assert summary["by"]["part"] == {"hidden": {"n": 3, "exact": 0}, "open": {"n": 6, "exact": 0.5}}
    assert {name: part["n"] for name, part in summary["by"]["letters"].items()} == {
        "b": 3, "l": 3, "g": 3, "r": 6, "e": 3
    }  # fmt: skip


def test_only_the_cut_answer_is_scored_and_both_are_logged(tmp_path):
    results, _ = ask(
        tmp_path, lambda question: f"It is. Answer: {question.prompt.expected}", benchmark(Setting(as_published=True))
    )
    entry = read_entries(tmp_path / "samples.jsonl")[0]
    assert (entry["answer"], entry["cut"]) == ("It is. Answer: blue", "blue")
    assert results["rows"]["colors"]["mean"] == {"exact": 1}


def test_the_first_mistakes_keep_a_small_picture(tmp_path):
    ask(tmp_path, lambda question: "green")
    entries = read_entries(tmp_path / "samples.jsonl")
    assert [("picture" in entry) for entry in entries] == [entry["expected"] != "green" for entry in entries]
    assert all((tmp_path / entry["picture"]).is_file() for entry in entries if "picture" in entry)


def test_other_rules_ask_nothing_again(tmp_path):
    ask(tmp_path, lambda question: question.prompt.expected.upper())
    results, parrot = ask(tmp_path, asked=benchmark(Setting(strict=True), strict=True))
    assert not parrot.asked and results["rows"]["colors"]["mean"] == {"exact": 1}
    assert results["scoring"] == {"version": "current", "strict": True, "judge": None}
    assert [entry["scores"]["exact"] for entry in read_scored(tmp_path)] == [1] * 9
    assert [entry["scores"]["exact"] for entry in read_entries(tmp_path / "samples.jsonl")] == [0] * 9


class Lenient:
    """A judge who lets everything pass that she is asked about."""

    name = "lenient"

    def settings(self):
        return {"model": "lenient"}

    def judge(self, pairs):
        for row, entry in pairs:
            if row.judge.applies(entry):
                yield entry, row.judge.read("yes", entry)


def test_a_judge_decides_what_rules_leave_open_and_is_named(tmp_path):
    judge = Judge(
        model="reference",
        applies=lambda entry: entry["scores"].get("undecided", False),
        messages=lambda entry: [{"role": "user", "content": entry["answer"]}],
        read=lambda reply, entry: {"exact": float(reply == "yes"), "judged": True},
        give_up=lambda entry: {"exact": 0.0},
    )
    asked = benchmark(task=replace(TASK, judge=lambda scoring, strict: judge))
    alone, _ = ask(tmp_path, lambda question: "blue", asked)
    assert (alone["rows"]["colors"]["judge"], alone["rows"]["colors"]["undecided"]) == ("rules only", 6)
    judged, parrot = ask(tmp_path, asked=asked, judge=Lenient())
    assert not parrot.asked and judged["scoring"]["judge"] == {"model": "lenient"}
    summary = judged["rows"]["colors"]
    assert (summary["judge"], summary["undecided"], summary["mean"]) == ("lenient", 0, {"exact": 1})


def test_a_question_that_cannot_be_asked_ends_the_run_with_its_name_or_counts_as_wrong(nano, tmp_path):
    def content(sample):
        if sample["index"] == "4":
            return [*sample.images, "What color? " * 9000]  # too long for a prompt
        if sample["index"] == "6":
            raise SuiteError("the picture is gone")
        return ASKING.content(sample)

    asked = benchmark(task=replace(TASK, plain=replace(ASKING, content=content)))
    with pytest.raises(QuestionError, match=r"question [46] of colors \(seed 0\)"):
        harness.measure(LocalModel(*nano, batch_size=3), asked, tmp_path / "strict", name="nano")
    lenient = harness.measure(LocalModel(*nano, batch_size=3), asked, tmp_path, name="nano", keep_going=True)
    entries = {entry["index"]: entry for entry in read_entries(tmp_path / "samples.jsonl")}
    assert set(entries) == set(range(9)) and lenient["rows"]["colors"]["failed"] == 2
    assert {index for index, entry in entries.items() if "error" in entry} == {4, 6}
    assert "the picture is gone" in entries[6]["error"] and entries[4]["scores"]["exact"] == 0
    assert entries[4]["expected"] == "green" and entries[4]["facts"]["part"] == "open"
    others = harness.measure(LocalModel(*nano), benchmark(), tmp_path / "others", name="nano")
    assert lenient["rows"]["colors"]["mean"]["exact"] <= others["rows"]["colors"]["mean"]["exact"]
    again = harness.measure(LocalModel(*nano, batch_size=3), asked, tmp_path, name="nano")
    assert again == lenient


def test_a_run_without_facts_writes_no_file_of_scores(tmp_path):
    row = replace(TASK.bind(ColorData(), Setting()), facts=None)
    ask(tmp_path, asked=Benchmark("colors", "Colors", 1, (row,)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "samples.jsonl", "settings.json"]


# --- The model in this process ---


def test_a_thought_begins_with_the_words_it_is_given(nano, tmp_path):
    task = replace(TASK, plain=replace(ASKING, decoding=Decoding(24, {"think_prefix": "I"}, thinking=True)))
    harness.measure(LocalModel(*nano), benchmark(task=task), tmp_path, name="nano", samples=2)
    for entry in read_entries(tmp_path / "samples.jsonl"):
        assert entry["thought"].startswith("I ") and entry["mode"] == "deep"


def test_sampled_answers_do_not_depend_on_the_batch(nano, tmp_path):
    sampled = replace(ASKING, decoding=Decoding(8, {"decoding": "sample", "temperature": 20.0}))
    for size in (1, 4):
        answerer = LocalModel(*nano, batch_size=size)
        harness.measure(answerer, benchmark(task=replace(TASK, plain=sampled)), tmp_path / str(size), name="nano")
    one, four = (
        {entry["index"]: entry["answer"] for entry in read_entries(tmp_path / size / "samples.jsonl")}
        for size in ("1", "4")
    )
    assert one == four and len(set(one.values())) > 3


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Two seconds of a square that moves, at 12 frames a second."""
    import av

    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)
        stream.width, stream.height = 128, 96
        for place in range(24):
            frame = Image.new("RGB", (128, 96), "white")
            frame.paste((200, 0, 0), (4 * place, 30, 4 * place + 20, 50))
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    return path


def video_task(clip, *parts):
    content = [{"type": "video", "video": str(clip)}, *parts, "What happens?"]
    return replace(TASK, plain=Asking(lambda sample: content, Decoding(6)), is_video=True)


def test_a_video_row_says_which_frames_were_looked_at(nano, tmp_path, clip):
    harness.measure(LocalModel(*nano), benchmark(task=video_task(clip)), tmp_path, name="nano", samples=1)
    (entry,) = read_entries(tmp_path / "samples.jsonl")
    media = entry["media"]
    assert (media["fps"], media["frames"], media["packing"], media["groups"]) == (5, 10, 1, 10)
    assert len(media["timestamps"]) == 10 and media["seconds"] == pytest.approx(2, abs=0.01)
    model, processor = nano
    whole = model.chat(
        msgs=[{"role": "user", "content": [{"type": "video", "video": str(clip)}, "What happens?"]}],
        processor=processor, fps=5, max_num_frames=180, max_num_packing=3, max_new_tokens=6, decoding="greedy",
        return_dict=True,
    )  # fmt: skip
    assert (whole.text.strip(), whole.prompt_tokens) == (entry["answer"], entry["prompt_tokens"])


def test_packings_show_the_same_frames_in_fewer_tokens(nano, tmp_path, clip):
    setting = Setting(video=VideoSetting(packings=(1, 3, 6)))
    rows = tuple(video_task(clip).bind(ColorData(), setting, packing) for packing in (1, 3, 6))
    asked = Benchmark("colors", "Colors", 1, rows, scoring={"version": "current", "strict": False})
    results = harness.measure(LocalModel(*nano), asked, tmp_path, name="nano", samples=1)
    entries = read_entries(tmp_path / "samples.jsonl")
    assert len({json.dumps(entry["media"]["timestamps"]) for entry in entries}) == 1
    assert [entry["media"]["tokens"] for entry in entries] == [10 * 36, 4 * 36, 2 * 36]
    tokens = [results["rows"][f"colors_packing{packing}"]["prompt_tokens"] for packing in (1, 3, 6)]
    assert tokens == sorted(tokens, reverse=True)
    assert all(summary["seconds"] > 0 for summary in results["rows"].values())


def test_subtitles_are_those_of_the_frames_that_are_shown(nano, tmp_path, clip):
    lines = ((0.0, 0.5, "It begins."), (0.51, 0.55, "too short to be seen"), (1.5, 2.0, "It ends."), (9, 10, "later"))
    task = video_task(clip, Subtitles(lines, before="Subtitles:\n", after="\n"))
    harness.measure(LocalModel(*nano), benchmark(task=task), tmp_path, name="nano", samples=1)
    (entry,) = read_entries(tmp_path / "samples.jsonl")
    assert entry["question"] == "Subtitles:\nIt begins.\nIt ends.\n What happens?"
    assert not Subtitles(lines, before="Subtitles:\n").shown_at([5.0])
