"""`minicpmv read` and `minicpmv video`, with nano."""

import json

import pytest
import typer
from conftest import GREEDY, REPOSITORY
from PIL import Image
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.pdfgen import canvas
from typer.testing import CliRunner

from minicpmv.apps.clips import Segment
from minicpmv.apps.documents.pages import OpenDocument
from minicpmv.commands.read import read
from minicpmv.commands.video import video


ASSETS = REPOSITORY / "assets"


def pdf_file(path, *pictures, **options):
    """A PDF with a page for each picture in assets/."""
    sheet = canvas.Canvas(str(path), pagesize=(200, 200), **options)
    for name in pictures:
        sheet.drawImage(str(ASSETS / name), 0, 0, 200, 200)
        sheet.showPage()
    sheet.save()
    return path


@pytest.fixture(scope="module")
def nano_pdf(tmp_path_factory):
    """Two pages that nano can read: a number, and shapes."""
    return pdf_file(tmp_path_factory.mktemp("pdf") / "two.pdf", "number.jpg", "shapes.jpg")


def ask_nano(nano_model, nano_processor, *content, **options):
    messages = [{"role": "user", "content": list(content)}]
    return nano_model.chat(msgs=messages, processor=nano_processor, **{"max_new_tokens": 8, **GREEDY, **options})


def run(command, *arguments):
    app = typer.Typer()
    app.command()(command)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_read_writes_what_is_known_about_every_page(nano_model, nano_processor, nano_pdf, tmp_path):
    prompt, out = "What does it say?", tmp_path / "out.json"
    options = (
        "--format",
        "json",
        "-o",
        out,
        "--tables",
        tmp_path / "csv",
        "--regions",
        tmp_path / "seen",
        "-q",
        "Who?",
    )
    result = run(read, nano_pdf, "-m", REPOSITORY / "nano", "--pages", "1", "--prompt", prompt, *options, "--dpi", 100)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text(encoding="utf-8"))
    with OpenDocument(nano_pdf, dpi=100, pages="1") as document:
        (page,) = document
    (seen,) = found["pages"]
    assert seen["text"] == ask_nano(nano_model, nano_processor, page.image, prompt, max_new_tokens=2048)
    assert (seen["page"], seen["width"], seen["height"], seen["language"]) == (1, 278, 278, None)
    assert found["answers"][0]["question"] == "Who?" and found["files"] == [str(nano_pdf)]
    assert Image.open(found["regions"][0]["image"]).size == (278, 278)
    assert all(box["right"] <= 278 and box["bottom"] <= 278 for box in found["regions"][0]["boxes"])
    seen = ("--pages", "1", "--regions", tmp_path / "seen", "--max-page-tokens", "1")  # no room for a box
    result = run(read, nano_pdf, "-m", REPOSITORY / "nano", *seen)
    assert "minicpmv: note: page 1: no regions" in result.stderr


def assert_one_line_error(result, *words):
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("minicpmv: ") and result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in words)


def test_nano_reads_the_receipt_and_tells_the_clip_with_no_prompt_given():
    nano = ("-m", REPOSITORY / "nano")
    assert run(read, ASSETS / "receipt.jpg", *nano).stdout == "TABLE: 47\nDATE: 21/11\nTIME: 18:05\nTOTAL: 12.50\n"
    assert run(video, ASSETS / "star.mp4", *nano).stdout == "[0:00 - 0:02] The red star moves to the right.\n"


def test_read_ends_with_one_line_and_the_remedy_before_a_model_is_loaded(tmp_path, nano_pdf, monkeypatch):
    monkeypatch.setattr("minicpmv.checkpoint.load", lambda *arguments: pytest.fail("a model was loaded"))
    secret = pdf_file(tmp_path / "s.pdf", "number.jpg", encrypt=StandardEncryption("a", "b"))
    assert_one_line_error(run(read, secret), "s.pdf is encrypted", "password")
    assert_one_line_error(run(read, tmp_path / "gone.pdf"), "gone.pdf")
    assert_one_line_error(run(read, nano_pdf, "--pages", "7"), "pages 1 to 2")
    assert_one_line_error(run(read, nano_pdf, "--max-pages", "1"), "max_pages=1")
    (tmp_path / "schema.json").write_text('{"type": "nothing"}')
    assert_one_line_error(run(read, nano_pdf, "--schema", tmp_path / "schema.json"), "not a JSON Schema")
    (tmp_path / "schema.json").write_text("{'a'")
    assert_one_line_error(run(read, nano_pdf, "--schema", tmp_path / "schema.json"), "schema.json is not JSON")
    for command, file in ((read, nano_pdf), (video, ASSETS / "star.mp4")):
        for output in (tmp_path, tmp_path / "nowhere" / "out.md"):
            assert_one_line_error(run(command, file, "-o", output), f"{output} cannot be written", "a folder that is")


def test_what_was_read_and_told_before_an_error_is_kept(nano_processor, tmp_path, monkeypatch):
    """And the error stands in one line, without bars, where stderr is no terminal."""
    out, file, clip = tmp_path / "out", tmp_path / "long.tif", ASSETS / "star.mp4"
    pages = [Image.open(ASSETS / "number.jpg").resize((90, 60)) for _ in range(2)]
    pages[0].save(file, save_all=True, append_images=pages[1:])
    file.write_bytes(file.read_bytes()[:-6000])
    nano = ("-m", REPOSITORY / "nano")
    result = run(read, file, *nano, "--prompt", "What does it say?", "-o", out)
    assert_one_line_error(result, "page 2", "damaged")
    assert out.read_text(encoding="utf-8").strip()
    assert_one_line_error(run(video, clip, *nano, "--fps", "-1"), "fps=-1")

    def interrupted(*args, **options):
        yield Segment(0, 1, "One", True)
        raise KeyboardInterrupt

    monkeypatch.setattr("minicpmv.apps.clips.describe", interrupted)
    assert run(video, clip, *nano, "-o", out, "--format", "srt").exit_code != 0
    assert out.read_text(encoding="utf-8").endswith("\nOne\n")


@pytest.mark.parametrize("command", [read, video])
def test_a_hub_model_is_not_run_unasked_and_a_folder_without_one_is_said(command, tmp_path):
    file = ASSETS / ("star.mp4" if command is video else "number.jpg")
    assert_one_line_error(run(command, file, "-m", "openbmb/some-model"), "--trust-remote-code")
    assert_one_line_error(run(command, file, "-m", tmp_path), "holds no model")


def test_video_describes_each_segment_with_its_times(nano_model, nano_processor):
    clip = ASSETS / "star.mp4"
    duration = nano_processor.video_processor.sample_video(str(clip), num_frames=1).metadata.duration
    options = ("--seconds", duration / 2, "--prompt", "What color is the shape?", "--format", "json")
    result = run(video, clip, "-m", REPOSITORY / "nano", *options, "--max-new-tokens", 8)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [(part["start"], part["end"]) for part in told] == [(0, duration / 2), (duration / 2, duration)]
    content = [{"type": "video", "video": str(clip)}, "What color is the shape?"]
    for part in told:
        bounds = {"start": part["start"], "end": part["end"]}
        assert part["text"] == ask_nano(nano_model, nano_processor, *content, **bounds)
