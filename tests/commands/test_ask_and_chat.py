"""`minicpmv chat` and `minicpmv ask`, with nano, in pipes and in a real terminal."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import GREEDY, REPOSITORY, ground_floor
from PIL import Image, ImageChops
from rich.console import Console
from typer.testing import CliRunner

from minicpmv import checkpoint
from minicpmv.apps.grounding import locate
from minicpmv.chat import ChatSession
from minicpmv.commands import terminal
from minicpmv.commands.chat import COMMANDS, Conversation
from minicpmv.commands.main import app
from minicpmv.evaluate.scoring.boxes import iou


ASSETS = REPOSITORY / "assets"
NANO = REPOSITORY / "nano"
NUMBER, SHAPES, STAR = (str(ASSETS / name) for name in ("number.jpg", "shapes.jpg", "star.mp4"))
QUESTION = "What does it say?"
SHORT = ["--temperature", "0", "--max-new-tokens", "24"]


@pytest.fixture
def run(nano, monkeypatch):
    """A function that runs a command in this process, where nano is loaded already."""
    load = checkpoint.load
    monkeypatch.setattr(checkpoint, "load", lambda name, **rest: nano if name == str(NANO) else load(name, **rest))

    def run(command, *arguments, model=NANO, stdin=None):
        return CliRunner().invoke(app, [command, "-m", str(model), *map(str, arguments)], input=stdin)

    return run


@pytest.fixture
def answer(nano):
    """A function that gives what `model.chat` answers to some parts."""
    model, processor = nano

    def answer(*content, **options):
        messages = [{"role": "user", "content": list(content)}]
        return model.chat(
            msgs=messages, processor=processor, max_new_tokens=24, return_dict=True, **GREEDY | options
        ).text

    return answer


def assert_one_line_error(result, *parts):
    assert result.exit_code == 1
    assert result.stderr.startswith("minicpmv: ") and result.stderr.count("\n") == 1
    assert all(part in result.stderr for part in parts)
    assert result.stdout == ""


# ---- ask ----


def test_ask_writes_what_chat_answers_and_nothing_else(run, answer):
    result = run("ask", NUMBER, QUESTION, *SHORT)
    assert result.exit_code == 0
    assert result.stdout == answer(Path(NUMBER), QUESTION) + "\n"


def test_the_first_question_of_the_readme_is_answered_the_same_every_time(run):
    assert {run("ask", NUMBER, QUESTION).stdout for _ in range(3)} == {"47\n"}


def test_a_temperature_samples_and_a_seed_repeats_it(run):
    warm = ["--temperature", 1.5, "--max-new-tokens", 16]
    first, again = (run("ask", NUMBER, "Hello", *warm, "--seed", 3).stdout for _ in range(2))
    assert first == again
    assert len({run("ask", NUMBER, "Hello", *warm, "--seed", seed).stdout for seed in range(5)}) > 1


def test_a_bug_is_no_one_line_error(run, nano, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(nano[0].llm, "forward", fail)
    for command, arguments, stdin in (("ask", [QUESTION], ""), ("chat", [], QUESTION)):
        result = run(command, *arguments, stdin=stdin)
        assert isinstance(result.exception, ValueError) and "minicpmv: a bug" not in result.stderr


def test_ask_streams_the_same_answer(run, answer):
    assert run("ask", NUMBER, QUESTION, "--stream", *SHORT).stdout == answer(Path(NUMBER), QUESTION) + "\n"


def test_a_command_takes_no_attention_that_plans_anew_for_each_size(run):
    was_on = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        checkpoint.load(NANO)
        assert torch.backends.cuda.cudnn_sdp_enabled()  # a library leaves its user's process as it is
        run("ask", NUMBER, QUESTION, *SHORT)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(was_on)


def test_ask_takes_pictures_and_clips_in_their_order(run, answer):
    result = run("ask", SHAPES, STAR, NUMBER, "What is it?", *SHORT)
    assert result.stdout == answer(Path(SHAPES), Path(STAR), Path(NUMBER), "What is it?") + "\n"


def test_ask_without_files_asks_about_text(run, answer):
    assert run("ask", "Hello", *SHORT, stdin="").stdout == answer("Hello") + "\n"


def test_ask_hands_options_of_clips_and_slices_on(run, answer):
    few = json.loads(run("ask", STAR, "What is it?", "--fps", 1, "--json", *SHORT).stdout)
    many = json.loads(run("ask", STAR, "What is it?", "--fps", 3, "--json", *SHORT).stdout)
    assert few["prompt_tokens"] < many["prompt_tokens"]
    sliced = json.loads(run("ask", SHAPES, QUESTION, "--json", *SHORT).stdout)
    whole = json.loads(run("ask", SHAPES, QUESTION, "--max-slice-nums", 1, "--json", *SHORT).stdout)
    assert whole["prompt_tokens"] < sliced["prompt_tokens"]
    assert whole["text"] == answer(Path(SHAPES), QUESTION, max_slice_nums=1)


def test_slices_are_for_pictures_and_leave_frames_whole(run):
    few, many = (
        json.loads(run("ask", STAR, "What is it?", "--max-slice-nums", slices, "--json", *SHORT).stdout)
        for slices in (1, 4)
    )
    assert few["prompt_tokens"] == many["prompt_tokens"]


def test_thinking_is_on_or_auto_and_not_both(run):
    result = run("ask", NUMBER, QUESTION, "--think", "--auto-think", *SHORT)
    assert result.exit_code == 2 and "not both" in result.stderr


def test_ask_as_json_tells_answer_thought_and_figures(run):
    result = run("ask", NUMBER, QUESTION, "--json", "--think", "--thinking-budget", 8, *SHORT)
    record = json.loads(result.stdout)
    assert record["files"] == [NUMBER] and record["question"] == QUESTION
    assert record["mode"] == "deep" and record["reasoning"] is not None
    assert 0 < record["reasoning_tokens"] <= record["generated_tokens"] <= 24
    assert record["finish_reason"] in ("stop", "length")


def test_ask_can_leave_it_to_the_model_whether_to_think(run):
    record = json.loads(run("ask", NUMBER, QUESTION, "--json", "--auto-think", *SHORT).stdout)
    assert 0 <= record["need"] <= 1


def test_a_thought_stays_out_of_what_a_pipe_gets(run, answer):
    result = run("ask", NUMBER, QUESTION, "--stream", "--think", "--thinking-budget", 8, *SHORT)
    thoughtful = answer(Path(NUMBER), QUESTION, enable_thinking=True, thinking_budget=8)
    assert "think>" not in result.output and result.stdout == thoughtful + "\n"


@pytest.mark.parametrize("arguments", [[NUMBER], [NUMBER, "-"]])
def test_a_question_may_come_from_stdin(run, answer, arguments):
    assert run("ask", *arguments, *SHORT, stdin=f"{QUESTION}\n").stdout == answer(Path(NUMBER), QUESTION) + "\n"


@pytest.mark.parametrize("arguments", [[], ["-"]])
@pytest.mark.parametrize("file", [NUMBER, STAR])
def test_a_picture_or_clip_may_come_from_stdin(run, answer, arguments, file):
    result = run("ask", *arguments, QUESTION, *SHORT, stdin=Path(file).read_bytes())
    assert result.stdout == answer(Path(file), QUESTION) + "\n"


def test_a_picture_from_stdin_stands_where_its_sign_stands(run, answer):
    result = run("ask", SHAPES, "-", QUESTION, *SHORT, stdin=Path(NUMBER).read_bytes())
    assert result.stdout == answer(Path(SHAPES), Path(NUMBER), QUESTION) + "\n"


def test_text_from_stdin_stands_before_the_question(run, answer):
    assert run("ask", "Repeat.", *SHORT, stdin="12\n34\n").stdout == answer("12\n34\n\nRepeat.") + "\n"


def test_a_picture_may_be_an_address(run, answer):
    handler = partial(SimpleHTTPRequestHandler, directory=ASSETS)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = run("ask", f"{address}/number.jpg", QUESTION, *SHORT)
        missing = run("ask", f"{address}/nowhere.jpg", QUESTION)
        server.shutdown()
    assert result.stdout == answer(Path(NUMBER), QUESTION) + "\n"
    assert missing.exit_code == 1 and missing.stderr.splitlines()[-1].startswith("minicpmv: ")
    assert_one_line_error(run("ask", f"{address}/number.jpg", QUESTION), address, "cannot be")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that cannot be read, even by root")
def test_a_clip_that_cannot_be_read_is_a_one_line_error(run, tmp_path):
    clip = tmp_path / "clip.mp4"
    clip.symlink_to("/proc/self/mem")
    assert_one_line_error(run("ask", clip, QUESTION), "cannot be read")


def test_stdin_is_left_alone_where_files_and_a_question_are_given(run):
    record = json.loads(run("ask", NUMBER, QUESTION, "--json", *SHORT, stdin="lines of a loop").stdout)
    assert record["question"] == QUESTION


@pytest.mark.parametrize(
    "arguments, stdin, parts",
    [
        (["nowhere.jpg", QUESTION], None, ["nowhere.jpg", "no such file"]),
        (["nowhere.jpg"], None, ["nowhere.jpg", "no such file"]),
        ([QUESTION, "nowhere", "What?"], None, [QUESTION, "no such file"]),
        (["What is this?", NUMBER], None, ["What is this?", "no such file", "the question comes last, in quotes"]),
        ([NUMBER, "what", "is", "it"], None, ["what: no such file", "the question comes last, in quotes"]),
        ([str(ASSETS), QUESTION], None, ["assets", "no such file"]),
        ([NUMBER], "", ["no question", "give it last"]),
        ([], "", ["no question"]),
        ([NUMBER], Path(NUMBER).read_bytes(), ["no question"]),
        (["-", QUESTION], "", ["stdin, which is empty"]),
        (["-", "-", QUESTION], "a", ["not 2 times"]),
        ([NUMBER, QUESTION, "--json", "--stream"], None, ["leave out --stream"]),
        ([str(ASSETS / "README.md"), QUESTION], None, ["README.md", "not an image"]),
        (["-", QUESTION], b"\0no picture and no clip", ["cannot be read as a video"]),
        ([NUMBER, QUESTION, "--think", "--thinking-budget", "9999"], None, ["thinking_budget=9999"]),
    ],
)
def test_what_makes_no_question_is_a_one_line_error_with_the_remedy(run, arguments, stdin, parts):
    assert_one_line_error(run("ask", *arguments, stdin=stdin), *parts)


def test_find_writes_what_locate_finds(run, nano):
    found = locate(*nano, SHAPES, "red circle", max_new_tokens=24)
    result = run("ask", SHAPES, "--find", "red circle", "--json", *SHORT)
    record = json.loads(result.stdout)
    assert record["find"] == "red circle" and record["files"] == [SHAPES]
    assert {name: record[name] for name in ("boxes", "malformed", "answer")} == asdict(found)


def test_nano_finds_the_star_of_a_frame(run, tmp_path):
    with av.open(STAR) as video:
        frame = next(video.decode(video=0)).to_image()
    frame.save(tmp_path / "frame.png")
    hue, saturation, _ = np.moveaxis(np.asarray(frame.convert("HSV")).astype(int), -1, 0)
    rows, columns = np.nonzero((saturation > 150) & ((hue < 12) | (hue > 243)))  # red
    result = run("ask", tmp_path / "frame.png", "--find", "red star")
    name, _, corners = result.stdout.strip().partition(": ")
    assert name == "red star"
    assert (
        iou([float(corner) for corner in corners.split()], (columns.min(), rows.min(), columns.max(), rows.max()))
        >= 0.5
    )


@pytest.fixture
def answering(nano, monkeypatch):
    """A function that lets nano answer what it is given."""

    def answering(text):
        output = ground_floor("chat_minicpmv").ChatOutput(text, None, "stop", prompt_tokens=9, generated_tokens=9)
        monkeypatch.setattr(nano[0], "chat", lambda **_: output)

    return answering


def test_boxes_are_lines_and_drawn_where_that_is_asked_for(run, answering, tmp_path):
    answering("<ref>circle</ref><box>100 300 400 700</box><box>500 0 100 10</box>")
    file = tmp_path / "found.png"
    result = run("ask", "--find", "circle", "--draw", file, stdin=Path(SHAPES).read_bytes())
    assert result.stdout == "circle: 64 144 256 336\n"
    assert "it has no area" in result.stderr
    with Image.open(file) as drawn, Image.open(SHAPES) as image:
        difference = ImageChops.difference(drawn.convert("RGB"), image.convert("RGB"))
        assert difference.crop((60, 140, 68, 340)).getbbox() and not difference.crop((80, 160, 240, 320)).getbbox()


def test_find_knows_the_home_folder(run, answering, monkeypatch, tmp_path):
    answering("<box>100 300 400 700</box>")
    (tmp_path / "shapes.jpg").write_bytes(Path(SHAPES).read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run("ask", "~/shapes.jpg", "--find", "circle").stdout == "circle: 64 144 256 336\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_drawing_that_cannot_be_written_is_a_one_line_error(run, answering, tmp_path):
    answering("<box>100 300 400 700</box>")
    file = tmp_path / "found.png"
    file.symlink_to("/dev/full")
    result = run("ask", SHAPES, "--find", "circle", "--draw", file)
    assert_one_line_error(result, "found.png cannot be written: No space left on device")


def test_where_nothing_is_found_stdout_stays_empty_and_the_answer_is_noted(run, answering):
    answering("There is no red star.")
    result = run("ask", SHAPES, "--find", "red star")
    assert result.exit_code == 0 and result.stdout == ""
    assert "'There is no red star.'" in result.stderr


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ([SHAPES, "How many?", "--find", "star"], ["leave out the question 'How many?'"]),
        ([SHAPES, NUMBER, "--find", "star"], ["one image, not at 2"]),
        ([STAR, "--find", "star"], ["not at a video"]),
        ([SHAPES, "--find", " "], ["--find is empty"]),
        ([SHAPES, "--find", "star", "--stream"], ["leave out --stream"]),
        ([SHAPES, "--find", "star", "--draw", "found.txt"], ["found.txt", ".png or .jpg"]),
        ([SHAPES, "--find", "star", "--draw", "nowhere/found.png"], ["nowhere/found.png", "cannot be written"]),
        ([SHAPES, "How many?", "--draw", "found.png"], ["--find"]),
    ],
)
def test_what_find_cannot_do_is_refused_before_the_model_is_loaded(monkeypatch, arguments, parts):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    assert_one_line_error(CliRunner().invoke(app, ["ask", "-m", str(NANO), *arguments]), *parts)


@pytest.mark.parametrize("temperature", ["inf", "nan", "-1"])
def test_a_temperature_is_a_finite_number(run, temperature):
    result = run("ask", NUMBER, QUESTION, "--temperature", temperature)
    assert result.exit_code == 2 and "--temperature" in result.stderr


def test_a_budget_without_a_thought_is_refused(run):
    result = run("ask", NUMBER, QUESTION, "--thinking-budget", 8)
    assert result.exit_code == 2 and "--think or --auto-think" in result.stderr


@pytest.mark.parametrize(
    "data, parts",
    [
        (b"%PDF-1.7\n\xe2\xe3\xcf\xd3", ["PDF", "minicpmv read"]),
        ("Was heißt das?".encode("latin1"), ["not UTF-8", "iconv"]),
        ("What is this?".encode("utf-16"), ["not UTF-8", "iconv"]),
    ],
)
def test_what_stdin_holds_is_named_where_it_is_of_no_use(run, data, parts):
    assert_one_line_error(run("ask", QUESTION, stdin=data), *parts)


def test_what_cannot_be_read_is_refused_before_the_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoint, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    for name, whole in (("cut.jpg", NUMBER), ("cut.png", NUMBER), ("text.jpg", ASSETS / "README.md")):
        (tmp_path / name).write_bytes(Path(whole).read_bytes()[:1000])
        result = CliRunner().invoke(app, ["ask", "-m", str(NANO), str(tmp_path / name), QUESTION])
        assert_one_line_error(result, name, "not an image")
    (tmp_path / "letter.pdf").write_bytes(b"%PDF-1.7")
    result = CliRunner().invoke(app, ["ask", "-m", str(NANO), str(tmp_path / "letter.pdf"), QUESTION])
    assert_one_line_error(result, "letter.pdf", "minicpmv read")


def test_a_folder_without_a_model_is_a_one_line_error_that_names_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(CliRunner().invoke(app, ["ask", QUESTION]), "this folder holds no model", "-m nano")


def test_a_checkpoint_that_says_what_it_knows_is_quoted_once(run):
    result = run("ask", NUMBER, QUESTION, *SHORT)
    assert result.stderr.count("\n") == 1 and "nano knows drawn shapes" in result.stderr
    assert run("ask", "Hello", *SHORT, stdin="").stderr == ""
    result = run("chat", NUMBER, *SHORT, stdin=f"{QUESTION}\n/image {SHAPES}\n{QUESTION}\n")
    assert result.stderr.count("nano knows") == 1


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_and_a_closed_pipe_leave_no_traceback(warm_python):
    command = ["-m", "minicpmv", "ask", NUMBER, QUESTION, "-m", str(NANO), *SHORT]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, *command], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True, timeout=300
        )
    assert done.returncode == 1
    assert done.stderr == "minicpmv: the output cannot be written: No space left on device\n"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [warm_python, *command], cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=300
    )
    os.close(writer)
    assert done.returncode == 1 and done.stderr == ""


def test_a_cut_answer_is_noted_on_stderr(run):
    result = run("ask", NUMBER, QUESTION, "--temperature", 0, "--max-new-tokens", 1)
    assert result.exit_code == 0 and "--max-new-tokens" in result.stderr


@pytest.mark.parametrize("command", ["ask", "chat"])
def test_a_missing_model_is_a_one_line_error_with_the_remedy(run, command, tmp_path):
    model = tmp_path / "nowhere"
    assert_one_line_error(run(command, NUMBER, model=model, stdin=QUESTION), "nowhere", "--trust-remote-code")


@pytest.mark.slow
def test_ask_is_a_program_that_can_stand_in_a_pipe_and_imports_no_more_than_it_needs(answer):
    """Most of its time is imports: those of training, evaluation and documents stay out."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "minicpmv",
        "ask",
        "-m",
        str(NANO),
        "--json",
        *SHORT,
        QUESTION,
    ]
    with open(NUMBER, "rb") as picture:
        done = subprocess.run(command, cwd=REPOSITORY, stdin=picture, capture_output=True, timeout=300, check=True)
    assert json.loads(done.stdout)["text"] == answer(Path(NUMBER), QUESTION)
    assert b"\r" not in done.stderr  # no bars where there is no terminal
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.decode().splitlines()}
    needless = "bitsandbytes datasets deepspeed matplotlib pandas peft prompt_toolkit pypdfium2 sklearn torchao torchvision trl"
    assert "torch" in imported and not imported & set(needless.split())


# ---- chat in a pipe ----


def test_every_line_of_a_pipe_is_a_turn_of_one_conversation(run, nano):
    model, processor = nano
    lines = [QUESTION, "/image " + SHAPES, "How many shapes are there?", "/reset", "Hello"]
    result = run("chat", NUMBER, *SHORT, stdin="\n".join(lines))
    session = ChatSession(model, processor, max_new_tokens=24, **GREEDY)
    expected = [session.send([Path(NUMBER), lines[0]]), session.send([Path(SHAPES), lines[2]])]
    session.reset()
    expected.append(session.send(lines[-1]))
    assert result.exit_code == 0
    assert result.stdout == "".join(f"{output.text}\n" for output in expected)


def test_errors_leave_the_conversation_usable_and_end_in_exit_code_1(run, answer):
    lines = ["/image nowhere.png", "/dance", "/think perhaps", "/thought", "/save", "/image 'a", QUESTION]
    result = run("chat", NUMBER, *SHORT, stdin="\n".join(lines))
    assert result.exit_code == 1
    assert result.stdout == answer(Path(NUMBER), QUESTION) + "\n"
    errors = [line for line in result.stderr.splitlines() if "note" not in line]
    assert len(errors) == 6 and all(line.startswith("minicpmv: ") for line in errors)
    assert "no such file" in errors[0] and "/help" in errors[1] and "on, off or auto" in errors[2]


def test_too_little_memory_is_a_one_line_error_and_the_conversation_goes_on(run, nano, answer, monkeypatch):
    attempts, forward = [], nano[0].llm.forward

    def forward_later(*args, **kwargs):
        attempts.append(1)
        if len(attempts) < 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has ...")
        return forward(*args, **kwargs)

    monkeypatch.setattr(nano[0].llm, "forward", forward_later)
    assert_one_line_error(run("ask", NUMBER, QUESTION, *SHORT), "CUDA out of memory", "--max-slice-nums")
    result = run("chat", NUMBER, *SHORT, stdin=f"{QUESTION}\n{QUESTION}\n")
    assert result.exit_code == 1 and result.stderr.count("CUDA out of memory") == 1
    assert result.stdout == answer(Path(NUMBER), QUESTION) + "\n"


def test_of_several_pictures_none_is_shown_where_one_is_broken(run, answer):
    result = run("chat", *SHORT, stdin=f"/image '{NUMBER}' '{ASSETS / 'README.md'}'\nHello\n")
    assert result.exit_code == 1 and "not an image" in result.stderr
    assert result.stdout == answer("Hello") + "\n"


def test_a_picture_that_is_dragged_onto_the_terminal_is_shown(run, answer, tmp_path):
    spaced = tmp_path / "my number.jpg"
    spaced.write_bytes(Path(NUMBER).read_bytes())
    for line in (str(spaced), f"'{spaced}'", str(spaced).replace(" ", "\\ "), f"/image {spaced}"):
        assert run("chat", *SHORT, stdin=f"{line}\n{QUESTION}\n").stdout == answer(spaced, QUESTION) + "\n"


def test_text_between_quotes_is_one_question_even_with_a_slash(run, answer):
    result = run("chat", *SHORT, stdin='"""\n/reset\nis a word\n"""\n"""12"""\n/exit\nno more\n')
    assert result.exit_code == 0
    assert result.stdout.startswith(answer("/reset\nis a word") + "\n")
    assert_one_line_error(run("chat", *SHORT, stdin='"""\nopen\n'), "no end")


def test_thinking_is_switched_in_the_conversation_and_the_thought_is_kept_apart(run, answer):
    settings = ["--thinking-budget", 8, *SHORT]
    result = run("chat", NUMBER, *settings, stdin=f"/think\n{QUESTION}\n/think auto\n/think off\n")
    assert result.stdout == answer(Path(NUMBER), QUESTION, enable_thinking=True, thinking_budget=8) + "\n"
    assert [line.split()[-1] for line in result.stderr.splitlines() if "thinking is" in line] == ["on", "auto", "off"]


def test_a_saved_conversation_goes_on_where_it_was(run, nano, tmp_path):
    _model, _processor = nano
    folder = tmp_path / "talk"
    saved = run("chat", NUMBER, STAR, "--system", "Be kind.", *SHORT, stdin=f"{QUESTION}\n/save {folder}\nAnd?\n")
    assert saved.exit_code == 0
    assert sorted(file.suffix for file in folder.iterdir()) == [".json", ".mp4", ".png"]
    roles = [message["role"] for message in json.loads((folder / "history.json").read_text())["messages"]]
    assert roles == ["system", "user", "assistant"]
    loaded = run("chat", *SHORT, stdin=f"/load {folder}\nAnd?\n")
    assert loaded.stdout == saved.stdout.splitlines(keepends=True)[-1]
    other = run("chat", *SHORT, stdin=f"Hello\n/save {ASSETS}\n/load {tmp_path}\n")
    assert other.exit_code == 1 and other.stderr.count("no saved history") == 2


def test_the_last_question_is_taken_back_or_answered_again(run, answer):
    result = run("chat", NUMBER, *SHORT, stdin=f"{QUESTION}\n/retry\n/undo\n/undo\nHello\n/retry\n")
    about, hello = answer(Path(NUMBER), QUESTION), answer("Hello")
    assert result.stdout == f"{about}\n{about}\n{hello}\n{hello}\n"
    assert result.exit_code == 1 and result.stderr.count("no question to take back") == 1


def test_images_that_wait_still_wait_after_the_last_question_is_answered_again(run, answer):
    result = run("chat", *SHORT, stdin=f"Hello\n/image {NUMBER}\n/retry\n/undo\n{QUESTION}\n")
    hello = answer("Hello")
    assert result.stdout == f"{hello}\n{hello}\n{answer(Path(NUMBER), QUESTION)}\n"


def test_a_conversation_in_another_encoding_is_a_one_line_error(run):
    result = run("chat", *SHORT, stdin="Was heißt das?\n".encode("latin1"))
    assert_one_line_error(result, "not UTF-8", "iconv")


def test_a_temperature_is_set_and_taken_back_in_the_conversation(run, answer):
    lines = ["/set temperature 2", "/set seed 1", "Hello", "/undo", "/set temperature 0", "Hello"]
    shown, greedy = run("chat", "--max-new-tokens", 24, stdin="\n".join(lines)).stdout, answer("Hello") + "\n"
    assert shown.endswith(greedy) and not shown.startswith(greedy)


def test_settings_are_changed_in_the_conversation(run, answer):
    result = run("chat", NUMBER, *SHORT, stdin=f"/set max_new_tokens 1\n{QUESTION}\n/set\n/set seed x\n/set size 1\n")
    assert 1 < len(result.stdout) < len(answer(Path(NUMBER), QUESTION) + "\n")
    assert result.stderr.count("give a number") == 1 and result.stderr.count("needs the name of a setting") == 2


def test_help_names_every_command(run):
    shown = run("chat", stdin="/help\n").stdout
    assert all(command in shown for command in COMMANDS)


# ---- a terminal ----


def test_ctrl_c_keeps_what_was_read_and_the_conversation(nano, monkeypatch):
    from minicpmv.commands.chat import one_interrupt

    pieces = []

    def write(text, end="\n"):
        pieces.append(text)
        if len(pieces) == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(terminal, "write", write)
    endless = {"max_new_tokens": 1000, "min_new_tokens": 999}
    conversation = Conversation(*nano, Console(stderr=True), "nano", False, max_slice_nums=None, **GREEDY, **endless)
    conversation.show([NUMBER])
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), one_interrupt():
        conversation.take(QUESTION, None)
    assert signal.getsignal(signal.SIGINT) is handler
    question, kept = conversation.session.history
    assert len(question["content"]) == 2 and conversation.waiting == []
    assert kept["content"] == "".join(pieces) and len(pieces) == 2
    assert conversation.session.send("And?", max_new_tokens=4, min_new_tokens=0).cached_tokens > 0


def test_what_the_model_writes_cannot_steer_the_terminal(nano, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)

    class Stream:
        is_thought = False

        def __iter__(self):
            yield from ("a\n\tb", "\x1b]0;title\x07", "\x9b2J", "\r")

    terminal.show_answer(Stream(), nano[1], Console(stderr=True))
    assert capsys.readouterr().out == "a\n\tb\ufffd]0;title\ufffd\ufffd2J\ufffd\n"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals of this kind")
def test_a_conversation_in_a_terminal(answer, tmp_path, warm_python):
    import pexpect

    settings = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "XDG_CONFIG_HOME": str(tmp_path / "config")}
    arguments = ["-m", "minicpmv", "chat", NUMBER, "-m", str(NANO), "--thinking-budget", "8", *SHORT]
    child = pexpect.spawn(
        warm_python,
        arguments,
        env=os.environ | settings,
        cwd=str(REPOSITORY),
        encoding="utf-8",
        dimensions=(40, 150),
        timeout=120,
    )

    def enter(line, *expected):
        child.send(line + "\r")
        for text in expected:
            child.expect_exact(text)
        child.expect_exact(">>>")

    child.expect_exact("[1 to show] >>>")
    enter(QUESTION, answer(Path(NUMBER), QUESTION))
    enter(f"/image {SHAPES}", "[1 to show]")
    enter("/think", "thinking is on")
    enter("How many shapes\x1b\rare there?", "Thought for ")  # Alt-Enter
    enter("/thought")
    enter(f"/save {tmp_path / 'talk'}", "saved in")
    enter("/reset", "begins anew")
    enter("/dance", "minicpmv: /dance is no command")
    child.sendintr()
    child.expect_exact("Ctrl-D or /exit")
    child.expect_exact(">>>")
    enter("/think off", "thinking is off")
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    messages = json.loads((tmp_path / "talk" / "history.json").read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[2]["content"][-1]["text"] == "How many shapes\nare there?"
    assert f"+{QUESTION}" in next((tmp_path / "config").rglob("history")).read_text()
