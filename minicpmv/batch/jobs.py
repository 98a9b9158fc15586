"""A row -> requests to `/v1/chat/completions`; their replies -> the columns of its output row.

| row | requests | columns besides the id and `error` |
|---|---|---|
| a line of OpenAI's batches: `custom_id`, `body` | the body | `response` |
| `messages` | one | `text`, `reasoning`, `finish_reason` and the counts of tokens |
| `image`, `video` or `document`, and a task or a prompt | one; a page each; a segment each | the same; `pages`; `segments` |

A task asks what [`minicpmv.apps`] asks. Requests of one row are made one after the other, as a page or a segment is needed.
"""

import base64
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, Literal, get_args
from uuid import uuid4

from minicpmv.batch.answerers import Answerer, RefusedError
from minicpmv.batch.media import Media, MediaError
from minicpmv.batch.rows import Row
from minicpmv.errors import MiniCPMVError, one_line


URL = "/v1/chat/completions"
CAPTION = "Describe this image in one or two sentences. Tell only what can be seen."
PAGE_TOKENS = 8192  # most of one page, as `minicpmv read` has it
NO_STREAM = ("stream", "stream_options")
_PDFIUM = Lock()  # the library that draws PDF pages is not for several threads

Task = Literal["caption", "read", "describe"]
TAKES = {"caption": ("image",), "read": ("document", "image"), "describe": ("video",)}


class RowError(MiniCPMVError):
    """A row that cannot be asked about: the message becomes its error."""


@dataclass(frozen=True)
class Asked:
    """What is asked about every row.

    Args:
        task: a ready prompt for rows that are an image, a document or a video.
        prompt: asked in place of the task's, or without one about each image or video as a whole.
        seconds: about how long a segment of a described video lasts.
        fields: of every request, where the row does not say otherwise: `max_tokens`, `temperature`, ...
        max_megabytes: most of an image or a video that is sent to another process.
    """

    task: Task | None = None
    prompt: str | None = None
    seconds: float = 10
    fields: Mapping[str, Any] = field(default_factory=dict)
    max_megabytes: float = 64

    def __post_init__(self) -> None:
        if self.task not in (None, *get_args(Task)):
            raise MiniCPMVError(f"task={self.task!r} does not exist; choose one of {', '.join(get_args(Task))}")


def answer_row(row: Row, asked: Asked, answerer: Answerer) -> dict[str, Any]:
    """The output row of a row: with its answer, or with an error that says why there is none.

    Raises:
        MiniCPMVError: nobody answers any more, so that other rows would fare no better.
    """
    media = Media(row.folder, answerer.as_files, asked.max_megabytes)
    is_line = "body" in row.columns
    try:
        columns = (_answer_line if is_line else _answer_columns)(row, asked, answerer, media)
        return {**_identity(row, is_line), **columns}
    except (RefusedError, RowError, MediaError, OSError) as error:
        code = str(getattr(error, "code", None) or "invalid_request_error")
        found = one_line(error)
    return _identity(row, is_line) | (
        {"response": None, "error": {"code": code, "message": found}} if is_line else {"text": None, "error": found}
    )


def _identity(row, is_line):
    if is_line:
        return {"id": f"batch_req_{uuid4().hex}", "custom_id": row.id}
    return {"id": row.id}


# ---- lines of OpenAI's batches ----


def _answer_line(row, asked, answerer, media):
    columns, body = row.columns, row.columns["body"]
    if str(columns.get("method") or "POST").upper() != "POST" or (columns.get("url") or URL) != URL:
        raise RowError(f"{columns.get('method')} {columns.get('url')} is not answered here; only POST {URL}")
    if not isinstance(body, Mapping):
        raise RowError(f"its body is {str(body)[:40]!r}, not an object")
    reply = _ask(row, dict(body), asked, answerer, media)
    response = {"status_code": 200, "request_id": reply.get("id"), "body": reply}
    return {"response": response, "error": None}


# ---- rows of messages, images, videos and documents ----


def _answer_columns(row, asked, answerer, media):
    columns = row.columns
    if columns.get("messages") is not None:
        return _columns([_ask(row, {"messages": columns["messages"]}, asked, answerer, media)])
    kind = next((kind for kind in ("image", "video", "document") if columns.get(kind) is not None), None)
    if kind is None:
        raise RowError("it has none of the columns body, messages, image, video and document")
    prompt = columns.get("prompt") or asked.prompt
    if asked.task is not None and kind not in TAKES[asked.task]:
        raise RowError(f"{kind}: the task {asked.task} takes {' or '.join(TAKES[asked.task])}")
    if asked.task == "read":
        return _read(row, columns[kind], prompt, asked, answerer, media)
    if asked.task == "describe":
        return _describe(row, columns[kind], prompt, asked, answerer, media)
    if kind == "document":
        raise RowError("document: only the task read (--task read) opens it")
    if not (prompt := prompt or (CAPTION if asked.task else None)):
        raise RowError(f"{kind}: nothing is asked about it; give a task (--task) or a question (--prompt)")
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": media.url(columns[kind], kind)}}
    return _columns([_ask(row, _question(part, prompt), asked, answerer, media)])


def _read(row, source, prompt, asked, answerer, media):
    """Pages as Markdown, one below the other."""
    from minicpmv.apps.documents.prompts import Prompts
    from minicpmv.apps.documents.reader import unfenced
    from minicpmv.apps.documents.writing import cut_loop

    replies, texts = [], []
    for page in _pages(media.source(source)):
        part = {"type": "image_url", "image_url": {"url": _png_url(page.image)}}
        body = {"max_tokens": PAGE_TOKENS} | asked.fields | _question(part, prompt or Prompts().markdown)
        replies.append(_ask(row, body, asked, answerer, media))
        texts.append(cut_loop(unfenced(_text(replies[-1])))[0])
    return _columns(replies) | {"text": "\n\n".join(texts), "pages": len(texts)}


def _pages(source: Path | bytes) -> Iterator[Any]:
    """The pages of a document, each drawn when it is asked for."""
    from minicpmv.apps.documents.pages import DocumentError, OpenDocument

    try:
        with _PDFIUM:
            document = OpenDocument(source)
        try:
            pages = iter(document)
            while True:
                with _PDFIUM:
                    page = next(pages, None)
                if page is None:
                    return
                yield page
        finally:
            with _PDFIUM:
                document.close()
    except DocumentError as error:
        raise RowError(str(error)) from error


def _png_url(image: Any) -> str:
    file = BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _describe(row, source, prompt, asked, answerer, media):
    """What happens in each segment of a video, with its times."""
    from minicpmv.apps.clips import PROMPT, Segment, as_time, segment_times

    url = media.url(source, "video")
    segments, replies = [], []
    for start, end in segment_times(duration_of(media.source(source)), asked.seconds):
        body = _question({"type": "video_url", "video_url": {"url": url}}, prompt or PROMPT)
        own = asked.fields.get("mm_processor_kwargs", {})
        replies.append(
            _ask(row, body | {"mm_processor_kwargs": {**own, "start": start, "end": end}}, asked, answerer, media)
        )
        text = " ".join(_text(replies[-1]).split())
        segments.append(Segment(start, end, text, replies[-1]["choices"][0]["finish_reason"] != "length"))
    lines = [f"[{as_time(segment.start)} - {as_time(segment.end)}] {segment.text}" for segment in segments]
    return _columns(replies) | {"text": "\n".join(lines), "segments": [asdict(segment) for segment in segments]}


def duration_of(source: Path | bytes) -> float:
    """Seconds that a video lasts, by its header or else by its packets.

    Raises:
        MediaError: it is no video.
    """
    import av

    try:
        with av.open(BytesIO(source) if isinstance(source, bytes) else str(source), "r") as container:
            if container.duration:
                return container.duration / av.time_base
            packets = container.demux(container.streams.video[0])
            return max(float(packet.pts * packet.time_base) for packet in packets if packet.pts is not None)
    except (av.FFmpegError, LookupError, ValueError) as error:
        name = f"{len(source)} bytes" if isinstance(source, bytes) else source
        raise MediaError(f"{name} cannot be read as a video ({error})") from error


# ---- requests and replies ----


def _question(part: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": prompt}]}]}


def _ask(row, body, asked, answerer, media):
    body = {**asked.fields, **{name: value for name, value in body.items() if name not in NO_STREAM}}
    return answerer.answer(f"row {row.id}", body | {"messages": _with_addresses(body.get("messages"), media)})


def _with_addresses(messages: Any, media: Media) -> Any:
    """Messages with an address in place of every path; parts of transformers' form in OpenAI's."""
    if not isinstance(messages, list):
        return messages  # refused by whoever answers, who knows how
    turns = []
    for message in messages:
        if isinstance(message, Mapping) and isinstance(message.get("content"), list):
            message = {**message, "content": [_part(part, media) for part in message["content"]]}
        turns.append(message)
    return turns


def _part(part: Any, media: Media) -> Any:
    if not isinstance(part, Mapping):
        return part
    # Rows of Parquet have every key of every part.
    part = {name: value for name, value in part.items() if value is not None}
    for kind in ("image", "video"):
        name = f"{kind}_url"
        if isinstance(address := part.get(name), Mapping) and "url" in address:
            return {**part, name: {**address, "url": media.url(address["url"], kind)}}
        if part.get("type") == kind and kind in part:
            return {"type": name, name: {"url": media.url(part[kind], kind)}}
    return part


def _text(reply: Mapping[str, Any]) -> str:
    return reply["choices"][0]["message"].get("content") or ""


def _columns(replies: list[Mapping[str, Any]]) -> dict[str, Any]:
    """What the replies to one row say, taken together."""
    messages = [reply["choices"][0]["message"] for reply in replies]
    thoughts = [message.get("reasoning_content") or message.get("reasoning") or "" for message in messages]
    reasons = [reply["choices"][0].get("finish_reason") for reply in replies]
    usages = [reply.get("usage") or {} for reply in replies]
    return {
        "text": "\n\n".join(map(_text, replies)),
        "reasoning": "\n\n".join(filter(None, thoughts)) or None,
        "finish_reason": next((reason for reason in reasons if reason != "stop"), "stop"),
        "prompt_tokens": sum(usage.get("prompt_tokens") or 0 for usage in usages),
        "completion_tokens": sum(usage.get("completion_tokens") or 0 for usage in usages),
        "error": None,
    }
