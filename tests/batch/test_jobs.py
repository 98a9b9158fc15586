"""A row becomes requests as OpenAI's clients write them, and its answer one row."""

import base64
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import pytest
from answering import Echo
from conftest import REPOSITORY
from PIL import Image

from minicpmv.apps.clips import PROMPT
from minicpmv.apps.documents.prompts import Prompts
from minicpmv.batch.jobs import CAPTION, Asked, answer_row
from minicpmv.batch.rows import Row
from minicpmv.errors import MiniCPMVError


ASSETS = REPOSITORY / "assets"
PICTURE = ASSETS / "number.jpg"


def ask(columns, asked=None, as_files=False, folder=ASSETS):
    """(output row, request bodies)."""
    echo = Echo()
    echo.as_files = as_files
    return answer_row(Row("one", columns, folder), asked or Asked(), echo), echo.asked


def messages(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]


def sent(body):
    """The image of a body."""
    address = body["messages"][-1]["content"][0]["image_url"]["url"]
    assert address.startswith("data:image/")
    return base64.b64decode(address.partition(",")[2])


def test_a_line_of_openai_has_its_response():
    body = {"model": "other", "messages": [{"role": "user", "content": "hello"}], "stream": True, "temperature": 0}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": body}
    row, (asked,) = ask(line, Asked(fields={"temperature": 1, "max_tokens": 7}))
    assert row["custom_id"] == "one" and row["error"] is None and row["id"].startswith("batch_req_")
    assert row["response"]["status_code"] == 200
    assert row["response"]["body"]["choices"][0]["message"]["content"] == "hello"
    assert "stream" not in asked and asked["temperature"] == 0 and asked["max_tokens"] == 7


@pytest.mark.parametrize(
    "columns, reason",
    [
        ({"body": {"messages": [{"role": "user", "content": "bad"}]}}, "it is bad"),
        ({"body": [1]}, "not an object"),
        ({"body": {}, "url": "/v1/embeddings"}, "only POST /v1/chat/completions"),
        ({"body": {}, "method": "GET"}, "only POST"),
        ({"body": {"messages": messages({"type": "image_url", "image_url": {"url": "no.jpg"}})}}, "no such file"),
    ],
)
def test_a_line_that_cannot_be_answered_has_an_error(columns, reason):
    row, _ = ask({"custom_id": "one", **columns})
    assert row["response"] is None and reason in row["error"]["message"] and row["error"]["code"]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "number.jpg", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": PICTURE.as_uri()}, "text": None},
        {"type": "image", "image": str(PICTURE)},
        {"type": "image", "image": {"bytes": PICTURE.read_bytes(), "path": None}},
        {"type": "image", "image": {"bytes": None, "path": "number.jpg"}},
    ],
)
def test_files_travel_as_data_unless_the_engine_reads_them(part):
    row, (body,) = ask({"messages": messages(part)})
    assert row == {
        "id": "one",
        "text": "What?",
        "reasoning": None,
        "finish_reason": "stop",
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "error": None,
    }
    assert sent(body) == PICTURE.read_bytes()
    _, (body,) = ask({"messages": messages(part)}, as_files=True)
    if part.get("image", {}) == {"bytes": PICTURE.read_bytes(), "path": None}:
        assert sent(body) == PICTURE.read_bytes()  # there is no file
    else:
        assert body["messages"][0]["content"][0]["image_url"]["url"] == PICTURE.as_uri()


def test_addresses_stay_and_large_files_are_not_sent():
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.jpg"}}
    assert ask({"messages": messages(part)})[1][0]["messages"] == messages(part)
    row, bodies = ask({"image": "number.jpg", "prompt": "What?"}, Asked(max_megabytes=0.001))
    assert row["text"] is None and "--max-megabytes" in row["error"] and bodies == []


def test_an_image_is_captioned_or_asked_about():
    assert ask({"image": "number.jpg"}, Asked("caption"))[0]["text"] == CAPTION
    assert ask({"image": "number.jpg"}, Asked("caption", "How many?"))[0]["text"] == "How many?"
    assert ask({"image": "number.jpg", "prompt": "Who?"}, Asked("caption", "How many?"))[0]["text"] == "Who?"
    assert ask({"image": "number.jpg"}, Asked(prompt="How many?"))[0]["text"] == "How many?"
    assert "give a task" in ask({"image": "number.jpg"})[0]["error"]


def test_rows_that_a_task_does_not_take_have_an_error():
    assert "the task caption takes image" in ask({"video": "star.mp4"}, Asked("caption"))[0]["error"]
    assert "the task describe takes video" in ask({"image": "number.jpg"}, Asked("describe"))[0]["error"]
    assert "only the task read" in ask({"document": "a.pdf"}, Asked(prompt="What?"))[0]["error"]
    assert "none of the columns" in ask({"text": "hello"})[0]["error"]
    with pytest.raises(MiniCPMVError, match="caption, read, describe"):
        Asked("sing")


def test_a_document_is_read_page_by_page(tmp_path):
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(tmp_path / "two.pdf"), pagesize=(200, 100))
    for place in range(2):
        canvas.rect(10, 10, 50 + 100 * place, 20, fill=1)
        canvas.showPage()
    canvas.save()
    row, bodies = ask({"document": "two.pdf"}, Asked("read"), folder=tmp_path)
    assert row["text"] == "\n\n".join([Prompts().markdown] * 2) and row["pages"] == 2 and row["error"] is None
    assert row["completion_tokens"] == 4 and all(body["max_tokens"] == 8192 for body in bodies)
    first, second = (Image.open(BytesIO(sent(body))) for body in bodies)
    assert first.size == second.size == (556, 278) and first.tobytes() != second.tobytes()
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 no")
    assert "broken.pdf" in ask({"document": "broken.pdf"}, Asked("read"), folder=tmp_path)[0]["error"]


def test_a_video_is_described_segment_by_segment():
    own = {"mm_processor_kwargs": {"fps": 2}}
    row, bodies = ask({"video": "star.mp4"}, Asked("describe", seconds=1, fields=own), as_files=True)
    times = [(body["mm_processor_kwargs"]["start"], body["mm_processor_kwargs"]["end"]) for body in bodies]
    assert len(times) > 1 and times[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(times))
    assert all(body["mm_processor_kwargs"]["fps"] == 2 for body in bodies)
    assert [(segment["start"], segment["end"]) for segment in row["segments"]] == times
    lines = row["text"].splitlines()
    assert len(lines) == len(times) and lines[0].startswith("[0:00 - 0:01] ") and lines[0].endswith(PROMPT)
    assert "cannot be read as a video" in ask({"video": str(Path(__file__))}, Asked("describe"))[0]["error"]


def test_a_thought_stands_apart():
    row, _ = ask({"messages": [{"role": "user", "content": "hello"}]}, Asked(fields={"thought": "hm"}))
    assert (row["text"], row["reasoning"]) == ("hello", "hm")
