"""NanoBench: what its rows ask, that none of them is easy, and the commands."""

import importlib.util
import json
import subprocess
import sys
from collections import Counter
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from minicpmv.commands.evaluate import evaluate_app
from minicpmv.evaluate.sample_log import read_entries
from minicpmv.evaluate.suites import BENCHMARKS
from minicpmv.evaluate.suites.nanobench import BENCHMARK, QUESTION_TASKS


REPOSITORY = Path(__file__).resolve().parents[2]
ROWS = {row.id: row for row in BENCHMARK.rows}
QUESTION_ROWS = [row.id for row in BENCHMARK.rows if row.id not in ("chair", "chinese")]


@pytest.fixture(scope="module")
def processor(nano):
    return nano[1]


@cache
def drawn(function, arguments, seed, index):
    return function(*arguments, seed, index)


def samples(name, count, seed=0):
    """Samples of a row, drawn once: rows that ask about the same ones differ in their prompts."""
    row = ROWS[name]
    function = (row.sample.func, row.sample.args) if isinstance(row.sample, partial) else (row.sample, ())
    return [drawn(*function, seed, index) for index in range(count * row.questions_per_sample)]


def prompts(name, count, seed=0):
    return [ROWS[name].prompt(sample) for sample in samples(name, count, seed)]


def pixels(prompt):
    return [np.asarray(part).tobytes() for part in prompt.content if not isinstance(part, str)]


def metrics(name, answers_to, count=6):
    row = ROWS[name]
    return row.aggregate([row.scorer(answers_to(prompt), prompt.expected) for prompt in prompts(name, count)])


def inputs(processor, prompt):
    messages = [{"role": "user", "content": prompt.content}]
    options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, tokenize=True, **options, **prompt.options)


# --- Scoring ---


@pytest.mark.parametrize("name", QUESTION_ROWS)
def test_the_expected_answer_is_right_and_anything_around_it_is_wrong(name):
    assert metrics(name, lambda prompt: prompt.expected)["exact"] == 1.0
    for wrong in ("", "The answer is {}", "{}.", "{0} {0}", "<think>\n</think>\n\n{}"):
        assert metrics(name, lambda prompt, wrong=wrong: wrong.format(prompt.expected))["exact"] == 0.0


def test_captions_that_list_the_picture_invent_nothing():
    def listing(prompt):
        return ", ".join(f"a {name}" for name in prompt.expected)

    assert metrics("chair", listing) == {"chair_i": 0.0, "chair_s": 0.0, "recall": 1.0}
    one_more = metrics("chair", lambda prompt: listing(prompt) + ", a grey dog")
    named = sum(len(prompt.expected) + 1 for prompt in prompts("chair", 6))
    assert one_more == {"chair_i": 6 / named, "chair_s": 1.0, "recall": 1.0}


def test_chinese_is_compared_with_english_about_the_same_pictures():
    asked = prompts("chinese", 2 * len(QUESTION_TASKS))
    for chinese, english in zip(asked[::2], asked[1::2], strict=True):
        assert pixels(chinese) == pixels(english) and chinese.options == english.options
        assert (chinese.expected["language"], english.expected["language"]) == ("zh", "en")
        assert any("\u4e00" <= letter <= "\u9fff" for letter in chinese.content[-1])
        assert english.content[-1].isascii()
    only_chinese = metrics("chinese", lambda prompt: prompt.expected["answer"] * (prompt.expected["language"] == "zh"))
    assert only_chinese == {"exact": 1.0, "exact_english": 0.0, "difference": 1.0}


def test_a_resample_of_few_answers_may_lack_a_language():
    (row,) = (row for row in BENCHMARK.rows if row.id == "chinese")
    assert row.aggregate([{"zh": 1.0}, {"zh": 0.0}]) == {"exact": 0.5, "exact_english": None, "difference": None}


def test_chinese_asks_every_kind_of_question_and_expects_chinese_words():
    asked = prompts("chinese", 3 * len(QUESTION_TASKS))
    assert len(asked) == 6 * len(QUESTION_TASKS)
    shapes = {prompt.expected["answer"] for prompt in asked[::2]} & {"圆形", "方形", "三角形", "星形", "十字形"}
    assert shapes and {"是", "否"} & {prompt.expected["answer"] for prompt in asked[::2]}


# --- Questions ---


@pytest.mark.parametrize("name", QUESTION_ROWS)
def test_no_constant_answer_is_right_two_times_in_three(name):
    expected = Counter(sample.turns[0].answer for sample in samples(name, 60))
    assert max(expected.values()) < 40


@pytest.mark.parametrize("name", ROWS)
def test_samples_follow_from_seed_and_index(name):
    first, other = prompts(name, 3), prompts(name, 3, seed=1)
    again = [ROWS[name].prompt(ROWS[name].sample(0, index)) for index in range(len(first))]
    assert [(pixels(p), p.content[-1], p.expected, p.options) for p in first] == [
        (pixels(p), p.content[-1], p.expected, p.options) for p in again
    ]
    assert [pixels(p) for p in first] != [pixels(p) for p in other]


def test_printed_lines_are_four_to_twelve_digits_and_capitals():
    lines = [prompt.expected for prompt in prompts("printed_line", 100)]
    assert {len(line) for line in lines} <= set(range(4, 13)) and {len(line) for line in lines} >= {4, 12}
    assert all(line.isascii() and line.isalnum() and line == line.upper() for line in lines)
    assert any(line != line.upper() for line in (prompt.expected for prompt in prompts("printed_line_lower", 20)))


def test_counts_go_from_1_to_6():
    assert {prompt.expected for prompt in prompts("count", 120)} == set("123456")


def test_unsliced_fine_print_is_the_same_page_in_one_view(processor):
    for sliced, unsliced in zip(prompts("fine_print", 4), prompts("fine_print_unsliced", 4), strict=True):
        assert pixels(sliced) == pixels(unsliced)
        assert (sliced.content[-1], sliced.expected) == (unsliced.content[-1], unsliced.expected)
        assert all(900 <= side <= 1344 for side in sliced.content[0].size)
        assert len(inputs(processor, sliced)["pixel_values"][0]) > 4
        assert len(inputs(processor, unsliced)["pixel_values"][0]) == 1


@pytest.mark.parametrize("name", ["video_direction", "video_order", "video_count", "video_order_shuffled"])
def test_six_frames_are_packed_into_one_set_of_queries(processor, name):
    for prompt in prompts(name, 4):
        made = inputs(processor, prompt)
        assert len(made["pixel_values"][0]) == 6 and len(made["image_bound"][0]) == 1
        assert made["temporal_ids"] == [prompt.options["temporal_ids"]]


def test_shuffled_clips_are_the_same_clips_in_which_no_frame_keeps_its_time():
    orders = set()
    for clip, shuffled in zip(prompts("video_order", 40), prompts("video_order_shuffled", 40), strict=True):
        assert pixels(clip) == pixels(shuffled)
        assert (clip.content[-1], clip.expected) == (shuffled.content[-1], shuffled.expected)
        (times,), (moved,) = clip.options["temporal_ids"], shuffled.options["temporal_ids"]
        assert sorted(times) == sorted(moved) == times
        assert all(old != new for old, new in zip(times, moved, strict=True))
        orders.add(tuple(times.index(time) for time in moved))
    assert len(orders) > 20


def test_times_tell_the_order_of_shuffled_clips_so_they_must_hurt():
    """Colors in the order of the shuffled times, which a model that trusts them would give, are seldom the answer."""
    right = 0
    for index in range(100):
        sample = ROWS["video_order_shuffled"].sample(0, index)
        frames = sorted(zip(sample.temporal_ids[0], (d.things[0].color for d in sample.drawings), strict=True))
        right += list(dict.fromkeys(color for _, color in frames)) == sample.turns[0].answer.split(", ")
    assert right < 30


def test_deep_and_fast_are_asked_the_same_questions():
    for deep, fast in zip(prompts("multistep_deep", 5), prompts("multistep_fast", 5), strict=True):
        assert pixels(deep) == pixels(fast)
        assert (deep.content[-1], deep.expected) == (fast.content[-1], fast.expected)
    assert (ROWS["multistep_deep"].thinking, ROWS["multistep_fast"].thinking) == (True, False)


@pytest.mark.parametrize("name", ROWS)
def test_the_longest_right_answer_fits_with_room_to_spare(processor, name):
    """An answer that is cut off can then never look right."""
    row = ROWS[name]

    def tokens(text):
        return len(processor.tokenizer(text).input_ids)

    for sample in samples(name, 60):
        turn = (sample[1] if isinstance(sample, tuple) else sample).turns[0]
        assert tokens(turn.answer) + 1 < row.max_new_tokens
        assert tokens(turn.thought or "") + 4 < row.max_thought_tokens


# --- Commands ---


def run(*arguments):
    return CliRunner().invoke(evaluate_app, [str(argument) for argument in arguments])


@pytest.fixture
def in_the_repository(monkeypatch, one_thread):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.slow
def test_the_command_runs_every_row_prints_the_table_and_writes_json(tmp_path, in_the_repository):
    figures, output = tmp_path / "new" / "figures.json", tmp_path / "run"
    result = run(*("nanobench", "--model", "nano", "--seed", 3, "--samples", 2, "--json", figures, "--output", output))
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in ROWS)
    written = json.loads(figures.read_text())
    assert list(written) == list(ROWS)
    for name, row in written.items():
        assert row.pop("n") == 2 and next(iter(row)) in ("exact", "chair_i")
        assert all(value is None or -1 <= value <= 1 for value in row.values()), name
    assert set(written["printed_line"]) == {"exact", "characters"}
    assert set(written["chair"]) == {"chair_i", "chair_s", "recall"}
    assert set(written["chinese"]) == {"exact", "exact_english", "difference"}
    entries = read_entries(output / "samples.jsonl")
    assert len(entries) == 2 * (len(ROWS) + 1) and {entry["seed"] for entry in entries} == {3}
    assert {entry["row"] for entry in entries if entry["thought"] is not None} == {"multistep_deep"}


def test_runs_of_one_setting_share_a_folder_and_others_have_their_own(tmp_path, in_the_repository, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nano = REPOSITORY / "nano"
    for arguments in (["--rows", "shape"], ["--rows", "colour"], ["--rows", "shape", "--thinking", "shape"]):
        result = run("nanobench", "--model", nano, "--samples", 2, "--seeds", "4,5", *arguments)
        assert result.exit_code == 0, result.output
    folders = sorted((tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(folder.name.startswith("nanobench-nano-") for folder in folders)
    assert sorted(len(read_entries(folder / "samples.jsonl")) for folder in folders) == [4, 8]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--rows", "shape,size"], ["no row size", "printed_line"]),
        (["--model", "no/such/model"], ["no/such/model is not a folder here", "--trust-remote-code"]),
        (["--thinking", "multistep_fast"], ["multistep_fast is the row without thinking"]),
        (["--seeds", "1,1"], ["give each once"]),
    ],
)
def test_a_mistake_is_one_line_that_names_the_remedy(tmp_path, in_the_repository, arguments, parts):
    result = run("nanobench", "-m", "nano", "--samples", 1, "--output", tmp_path / "run", *arguments)
    assert result.exit_code == 1 and result.stdout == ""
    line = result.stderr.splitlines()[-1]
    assert line.startswith("minicpmv: ") and all(part in line for part in parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "package"), [("nanobench", "rapidfuzz"), ("nanobench", "matplotlib"), ("report .", "matplotlib")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, command, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    result = run(*command.split())
    assert result.exit_code == 1
    assert result.stderr == f"minicpmv: {package} is not installed: pip install -e '.[evaluate]' in a clone\n"


def test_seeds_that_are_no_numbers_are_named():
    result = run("nanobench", "--seeds", "1,two")
    assert result.exit_code == 2 and "1,two" in result.stderr


def test_help_names_every_benchmark_and_imports_no_model_code():
    code = (
        "import sys; from typer.testing import CliRunner; from minicpmv.commands.evaluate import evaluate_app; "
        "print(CliRunner().invoke(evaluate_app, ['--help']).output); "
        "print(sorted({'torch', 'transformers', 'matplotlib', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(name in done.stdout for name in (*BENCHMARKS, "report"))
