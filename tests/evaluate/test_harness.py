"""The harness: its log, its settings, and that an interrupted run ends as one that ran through."""

import json
import os
import subprocess
import time
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import accelerate
import pytest
import torch
from conftest import NANO
from PIL import Image

from minicpmv.checkpoint import load
from minicpmv.evaluate import LocalModel, harness
from minicpmv.evaluate.answerers import Answer, Question, batches
from minicpmv.evaluate.benchmark import Benchmark, Prompt, Row, SampleCountError, UnknownRowError
from minicpmv.evaluate.fingerprint import checksum, weights_fingerprint
from minicpmv.evaluate.sample_log import SampleKey, SampleLog, SampleLogError, read_entries
from minicpmv.evaluate.scoring.drawn import exact_match
from minicpmv.evaluate.suites import load_benchmark
from minicpmv.files import DamagedFileError


REPOSITORY = Path(__file__).resolve().parents[2]
COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220)}


pytestmark = pytest.mark.usefixtures("one_thread")


def square(seed, index):
    name = sorted(COLORS)[(seed + index) % 3]
    picture = Image.new("RGB", (112, 112), (235, 235, 235))
    picture.paste(COLORS[name], (30, 30, 84, 84))
    return picture, name


def ask_for_the_color(sample):
    return Prompt([sample[0], "What color is the square?"], sample[1], {"max_slice_nums": 1})


def squares(**changes):
    row = Row("color", "color of a square", square, ask_for_the_color, exact_match, max_new_tokens=8)
    row = replace(row, max_thought_tokens=4, **changes)
    deep, fast = replace(row, id="deep", thinking=True), replace(row, id="fast")
    return Benchmark("squares", "Squares", 1, (row, deep, fast))


def run(nano, folder, benchmark=None, batch_size=2, **options):
    options = {"rows": ["color"], "samples": 5} | options
    return harness.measure(LocalModel(*nano, batch_size), benchmark or squares(), folder, name="nano", **options)


class Parrot:
    """An answerer without a model: says what its function makes of a question, and counts what it was asked."""

    window = 4
    versions = {"parrot": "1"}

    def __init__(self, says=lambda question: question.prompt.expected):
        self.says, self.asked = says, []

    def settings(self, mode):
        return {"model": "parrot"}

    def answer(self, questions, mode, max_new_tokens):
        for question in questions:
            if not question.answered:
                self.asked.append(question.key.index)
                yield question, Answer(self.says(question), mode="deep" if mode else "fast")


def ask_parrot(folder, benchmark=None, parrot=None, **options):
    options = {"rows": ["color"]} | options
    return harness.measure(parrot or Parrot(), benchmark or squares(), folder, name="parrot", **options)


# --- One run ---


def test_figures_are_the_shares_of_right_answers_in_the_log(nano, tmp_path):
    results = run(nano, tmp_path, samples=6)
    entries = read_entries(tmp_path / "samples.jsonl")
    assert [entry["expected"] for entry in entries] == ["blue", "green", "red"] * 2
    right = [entry["answer"] == entry["expected"] for entry in entries]
    assert sum(right) > 0 and [entry["scores"]["exact"] for entry in entries] == right
    assert harness.figures(results) == {"color": {"exact": sum(right) / 6, "n": 6}}
    assert json.loads((tmp_path / "results.json").read_text()) == results


def test_a_line_of_the_log_tells_what_was_asked_answered_and_spent(nano, tmp_path):
    run(nano, tmp_path, samples=1)
    (entry,) = read_entries(tmp_path / "samples.jsonl")
    assert (entry["row"], entry["seed"], entry["index"]) == ("color", 0, 0)
    assert entry["question"] == "What color is the square?" and entry["finish_reason"] == "stop"
    assert entry["thought"] is None and entry["generated_tokens"] > 0 and entry["prompt_tokens"] > 16


def test_batches_answer_as_single_questions_do(nano, tmp_path):
    run(nano, tmp_path / "single", batch_size=1)
    run(nano, tmp_path / "batch", batch_size=5)
    answers = [
        [entry["answer"] for entry in read_entries(tmp_path / name / "samples.jsonl")] for name in ("single", "batch")
    ]
    assert answers[0] == answers[1]


def test_several_seeds_give_their_mean_and_their_spread(tmp_path):
    parrot = Parrot(lambda question: "red" if question.key.seed else question.prompt.expected)
    results = ask_parrot(tmp_path, parrot=parrot, seeds=[0, 1, 2], samples=4)
    summary = results["rows"]["color"]
    shares = torch.tensor([summary["seeds"][str(seed)]["exact"] for seed in range(3)])
    assert shares[0] == 1 and 0 < shares[1] < 1
    assert summary["mean"]["exact"] == pytest.approx(shares.mean().item())
    assert summary["std"]["exact"] == pytest.approx(shares.std().item())
    assert summary["n"] == 12
    assert set(harness.figures(results)["color"]) == {"exact", "exact_std", "n"}


def test_a_metric_without_value_for_a_seed_has_no_mean(tmp_path):
    row_of = {"aggregate": lambda scores: {"exact": None}}
    results = ask_parrot(tmp_path, squares(**row_of), seeds=[0, 1], samples=1)
    assert harness.figures(results)["color"] == {"exact": None, "exact_std": None, "n": 2}
    assert results["rows"]["color"]["tokens"] is None  # the parrot does not count


@pytest.mark.parametrize(
    ("thinking", "thinks"),
    [
        (False, {"color": False, "deep": True, "fast": False}),
        (True, {"color": True, "deep": True, "fast": True}),
        (["fast"], {"color": False, "deep": True, "fast": True}),
    ],
)
def test_rows_think_as_the_run_says_unless_they_fix_it(tmp_path, thinking, thinks):
    ask_parrot(tmp_path, rows=["color", "deep", "fast"], samples=1, thinking=thinking)
    entries = read_entries(tmp_path / "samples.jsonl")
    assert {entry["row"]: entry["mode"] == "deep" for entry in entries} == thinks


def writes(text, tokenizer):
    """An option of chat() that lets the model write this text only."""
    ids, start = tokenizer(text, add_special_tokens=False).input_ids, []

    def allowed(_, written):
        start.append(len(written))
        return [ids[len(written) - start[0]]]

    return {"prefix_allowed_tokens_fn": allowed}


@pytest.mark.parametrize(
    ("row", "text", "answer", "exact"),
    [
        ("deep", "I see blue.\n</think>\n\nblue<|im_end|>", "blue", 1.0),
        ("deep", "I see blue.\n</think>\n\nblue, I think<|im_end|>", "blue, I think", 0.0),
        ("deep", "blue<|im_end|>", "", 0.0),  # the thought never ended
        ("fast", "blue<|im_end|>", "blue", 1.0),
        ("fast", "I see blue.\n</think>\n\nblue<|im_end|>", "I see blue.\n</think>\n\nblue", 0.0),
        ("fast", "blue</box><|im_end|>", "blue</box>", 0.0),
    ],
)
def test_only_what_follows_the_thought_is_the_answer(nano, tmp_path, row, text, answer, exact):
    def prompt(sample):
        asked = ask_for_the_color(sample)
        return replace(asked, options=asked.options | writes(text, nano[1].tokenizer))

    run(nano, tmp_path, squares(prompt=prompt, max_new_tokens=40), rows=[row], samples=1)
    (entry,) = read_entries(tmp_path / "samples.jsonl")
    assert (entry["answer"], entry["scores"]) == (answer, {"exact": exact})
    assert entry["finish_reason"] == "stop" and (entry["thought"] is not None) == (row == "deep")


def test_an_answer_that_is_cut_off_says_so(nano, tmp_path):
    run(nano, tmp_path, squares(max_new_tokens=1), samples=1)
    (entry,) = read_entries(tmp_path / "samples.jsonl")
    assert entry["finish_reason"] == "length" and entry["generated_tokens"] == 1


def test_a_row_that_never_thinks_cannot_be_told_to(tmp_path):
    with pytest.raises(UnknownRowError, match="color is the row without thinking"):
        ask_parrot(tmp_path, squares(thinking=False), thinking=["color"])
    with pytest.raises(UnknownRowError, match="'color' is not True, False, 'auto' or a list of rows"):
        ask_parrot(tmp_path, thinking="color")
    assert not list(tmp_path.iterdir())


def test_batches_hold_questions_with_equal_options_only(nano, tmp_path):
    def prompt(sample):
        asked = ask_for_the_color(sample)
        if sample[1] == "red":
            return Prompt(asked.content, "red", asked.options | {"max_slice_nums": 2})
        if sample[1] == "blue":
            return Prompt([sample[0], *asked.content], "blue", asked.options | {"temporal_ids": [[0, 3]]})
        return asked

    row = squares(prompt=prompt).rows[0]
    found = list(batches([Question(SampleKey("color", 0, index), row) for index in range(9)], 2))
    names = [[question.prompt.expected for question in batch] for batch in found]
    assert sorted(names) == [["blue"], ["blue"] * 2, ["green"], ["green"] * 2, ["red"], ["red"] * 2]
    assert run(nano, tmp_path, squares(prompt=prompt), samples=9)["rows"]["color"]["n"] == 9


def test_a_data_set_is_asked_whole_unless_fewer_samples_are_wanted(tmp_path):
    """A public benchmark in miniature: rows of a fixed length, each its own."""
    rows = tuple(replace(squares().rows[0], id=name, length=length) for name, length in (("short", 3), ("long", 7)))
    fixed = Benchmark("fixed", "Fixed", 1, rows)
    results = ask_parrot(tmp_path, fixed, rows=None)
    assert {row: summary["n"] for row, summary in results["rows"].items()} == {"short": 3, "long": 7}
    assert len(read_entries(tmp_path / "samples.jsonl")) == 10
    assert ask_parrot(tmp_path, fixed, rows=None, samples=2)["rows"]["long"]["n"] == 2
    with pytest.raises(SampleCountError, match="5 samples were asked for; short has 1 to 3"):
        ask_parrot(tmp_path, fixed, rows=None, samples=5)


def test_a_row_without_end_is_asked_a_hundred_samples_unless_told(tmp_path):
    assert ask_parrot(tmp_path)["rows"]["color"]["n"] == 100
    with pytest.raises(SampleCountError, match="0 samples were asked for; color has 1 to any number"):
        ask_parrot(tmp_path, samples=0)


def test_a_seed_given_twice_is_refused(tmp_path):
    with pytest.raises(SampleCountError, match="0, 1, 0 are not all different"):
        ask_parrot(tmp_path, seeds=[0, 1, 0])


# --- Going on ---


def test_what_the_log_holds_is_not_asked_again(nano, tmp_path, monkeypatch):
    first = run(nano, tmp_path)
    lines = (tmp_path / "samples.jsonl").read_text()
    monkeypatch.setattr(nano[0], "chat", None)
    assert run(nano, tmp_path) == first
    assert (tmp_path / "samples.jsonl").read_text() == lines


def test_a_longer_run_asks_only_for_the_rest(tmp_path):
    parrot = Parrot()
    ask_parrot(tmp_path, parrot=parrot, samples=3)
    results = ask_parrot(tmp_path, parrot=parrot, samples=7, rows=["color", "fast"])
    assert parrot.asked == [0, 1, 2, 3, 4, 5, 6, *range(7)]
    assert results["rows"] == ask_parrot(tmp_path / "whole", samples=7, rows=["color", "fast"])["rows"]


def test_answers_are_on_disk_before_the_next_one_is_there(tmp_path):
    def says(question):
        log = tmp_path / "samples.jsonl"
        return str(log.read_text().count("\n") if log.exists() else 0)

    ask_parrot(tmp_path, parrot=Parrot(says), samples=3)
    assert [entry["answer"] for entry in read_entries(tmp_path / "samples.jsonl")] == ["0", "1", "2"]


def test_a_resumed_run_asks_in_the_same_batches(nano, tmp_path, monkeypatch):
    asked, chat = [], nano[0].chat

    def listen(msgs, **options):
        asked.append(len(msgs))
        return chat(msgs=msgs, **options)

    monkeypatch.setattr(nano[0], "chat", listen)
    run(nano, tmp_path)
    assert asked == [2, 2, 1]
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]) + b'{"settings": "torn')
    asked.clear()
    run(nano, tmp_path)
    assert asked == [2, 1]
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_run_that_was_killed_and_goes_on_ends_as_one_that_ran_through(nano, tmp_path, warm_python):
    rows = ["printed_line", "video_order"]
    command = "-m minicpmv evaluate nanobench -m nano --samples 16 --batch-size 2 --rows " + ",".join(rows)
    process = subprocess.Popen(
        [warm_python, *command.split(), "--output", str(tmp_path / "killed")],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    log, deadline = tmp_path / "killed" / "samples.jsonl", time.monotonic() + 300
    while not (log.exists() and log.read_bytes().count(b"\n") >= 9):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()  # until nobody holds its output any more
    assert 9 <= log.read_bytes().count(b"\n") < 32 and not (tmp_path / "killed" / "results.json").exists()
    for folder in ("killed", "whole"):
        run(nano, tmp_path / folder, load_benchmark("nanobench"), rows=rows, samples=16)
    for name in ("samples.jsonl", "settings.json", "results.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_two_processes_share_the_questions_and_one_writes_the_log(nano, tmp_path, warm_python):
    """A run that one process began: the other two go on with it."""
    options = {"rows": ["shape", "multistep_deep"], "seeds": [0]}
    benchmark = load_benchmark("nanobench")
    run(nano, tmp_path / "both", benchmark, samples=1, **options)
    command = "accelerate.commands.launch --config_file recipes/accelerate/ddp.yaml --num_processes 2"
    command += " -m minicpmv evaluate nanobench -m nano --rows shape,multistep_deep --samples 7"
    done = subprocess.run(
        [warm_python, "-m", *command.split(), "--batch-size", "2", "--output", str(tmp_path / "both")],
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHON_EXEC": warm_python},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("answers and results") == 1
    run(nano, tmp_path / "alone", benchmark, samples=7, **options)
    both, alone = (read_entries(tmp_path / name / "samples.jsonl") for name in ("both", "alone"))
    # The first question was answered; then the main process has the even ones, the other the odd ones.
    assert [entry["index"] for entry in both if entry["row"] == "shape"] == [0, 2, 4, 6, 1, 3, 5]
    key = itemgetter("row", "index")
    assert sorted(both, key=key) == sorted(alone, key=key)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("both", "alone")]
    assert results[0] == results[1]


# --- The log ---


def entry(index, **fields):
    return {"row": "color", "seed": 0, "index": index, "answer": "naïve\u2028红色\n", "scores": {}, **fields}


def test_a_log_cut_anywhere_loses_its_last_line_at_most_and_goes_on(tmp_path):
    log = SampleLog(tmp_path, {"weights": "a"})
    log.append([entry(0)])
    end_of_first = log.path.stat().st_size
    log.append([entry(1)])
    whole = log.path.read_bytes()
    for cut in range(end_of_first, len(whole)):
        log.path.write_bytes(whole[:cut])
        again = SampleLog(tmp_path, {"weights": "a"})
        assert [key.index for key in again.entries] == [0]
        again.append([entry(1)])
        assert log.path.read_bytes() == whole
    assert SampleLog(tmp_path, {"weights": "a"}).entries[SampleKey("color", 0, 1)]["answer"] == "naïve\u2028红色\n"


def test_a_log_of_other_settings_is_refused_and_left_as_it_is(tmp_path):
    SampleLog(tmp_path, {"weights": "a", "thinking": False}).append([entry(0)])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SampleLogError, match=r"weights 'a' \(now 'b'\); choose another folder"):
        SampleLog(tmp_path, {"weights": "b", "thinking": False})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lines_that_were_made_with_other_settings_are_refused(tmp_path):
    SampleLog(tmp_path / "a", {"weights": "a"}).append([entry(0)])
    SampleLog(tmp_path / "b", {"weights": "b"})
    (tmp_path / "a" / "samples.jsonl").rename(tmp_path / "b" / "samples.jsonl")
    with pytest.raises(SampleLogError, match="an answer made with other settings"):
        SampleLog(tmp_path / "b", {"weights": "b"})
    (tmp_path / "b" / "settings.json").unlink()
    with pytest.raises(SampleLogError, match="no settings.json next to it"):
        SampleLog(tmp_path / "b", {"weights": "a"})


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b"not JSON", "line 2 is not JSON"),
        (b"\xff\xfe", "line 2 is not JSON"),
        (b"\0\0", "line 2 is not JSON"),
        (b"[" * 100_000, "line 2 is not JSON"),
        (b"[1]", "line 2 is not a JSON object"),
        (b"null", "line 2 is not a JSON object"),
        (b"{}", "line 2 is not an answer: 'settings' is None"),
        (b'{"settings": "a", "row": "color", "seed": "0"}', "line 2 is not an answer: 'seed' is '0', not of type int"),
        (b'{"settings": "a", "row": "r", "seed": 0, "index": 0, "answer": "", "scores": 1}', "'scores' is 1"),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_the_remedy(tmp_path, line, what):
    log = SampleLog(tmp_path, {})
    log.append([entry(0), entry(1)])
    first, second = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(first + line + b"\n" + second)
    with pytest.raises(DamagedFileError) as caught:
        SampleLog(tmp_path, {})
    assert str(log.path) in str(caught.value) and what in str(caught.value)
    assert "delete the line, or the file" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3", b"\0"])
def test_damaged_settings_are_named(tmp_path, content):
    SampleLog(tmp_path, {"a": 1})
    (tmp_path / "settings.json").write_bytes(content)
    with pytest.raises(DamagedFileError, match=r"settings\.json is .*JSON.*delete it"):
        SampleLog(tmp_path, {"a": 1})


# --- Settings ---


def test_settings_follow_weights_processor_thinking_and_version(nano):
    model, processor = nano

    def settings(benchmark, thinking):
        return harness.settings_of(LocalModel(model, processor), benchmark, thinking)

    first = settings(squares(), False)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        kept = weight[3, 5].item()
        weight[3, 5] += 1e-3
        changed = settings(squares(), False)
        weight[3, 5] = kept
    assert {name for name in first if first[name] != changed[name]} == {"weights"}
    processor.image_processor.max_slice_nums += 1
    changed = settings(replace(squares(), version=2), ["b", "a"])
    processor.image_processor.max_slice_nums -= 1
    assert {name for name in first if first[name] != changed[name]} == {"processor", "version", "thinking"}
    assert settings(squares(), False) == first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_checksum_follows_every_bit_and_its_place(dtype):
    values = torch.randint(0, 2, (3, 70_001), generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = checksum(values)
    assert checksum(values.clone()) == whole
    for place in ((0, 0), (1, 12_345), (2, 70_000)):
        changed = values.clone()
        changed[place] = 1 - values[place].int()
        assert checksum(changed) != whole
    assert checksum(values.flip(0)) != whole and checksum(values.flip(1)) != whole
    assert checksum(values[1:2].clone()) == checksum(values[1:2])  # wherever in memory it begins


def test_weights_that_were_put_elsewhere_are_the_same_weights(nano):
    offloaded = accelerate.cpu_offload(load(NANO)[0], execution_device="cpu")
    assert next(offloaded.parameters()).device.type == "meta"
    assert weights_fingerprint(offloaded) == weights_fingerprint(nano[0])


def test_the_scales_of_quantized_weights_count():
    """4-bit codes of a weight and of its double are the same."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))

    def fingerprint(scale):
        net = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        net.load_state_dict({"weight": weight * scale})
        return weights_fingerprint(net.to("cpu"))

    assert fingerprint(1) == fingerprint(1) != fingerprint(2)


def test_stored_buffers_count_and_computed_ones_do_not():
    net = torch.nn.BatchNorm1d(3)
    net.register_buffer("computed", torch.ones(2), persistent=False)
    before = weights_fingerprint(net)
    net.computed += 1
    assert weights_fingerprint(net) == before
    net.running_mean += 1
    assert weights_fingerprint(net) != before


def test_a_run_with_other_weights_does_not_touch_the_log(nano, tmp_path):
    run(nano, tmp_path, samples=1)
    before = (tmp_path / "samples.jsonl").read_bytes()
    with pytest.raises(SampleLogError, match="thinking False"):
        run(nano, tmp_path, samples=2, thinking=True)
    assert (tmp_path / "samples.jsonl").read_bytes() == before
