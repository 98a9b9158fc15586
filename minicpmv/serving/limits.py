"""What requests may take, each and all together, looked at before the work."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from minicpmv.serving.schema import ChatRequest, CompletionRequest, RequestError


LEAST_TEXT = 128_000  # bytes, for the smallest context
BYTES_PER_TOKEN = 8  # of a text that may fit into a context: English has about 4.5
RETRY_AFTER = 2  # seconds


@dataclass(frozen=True)
class Limits:
    """What one request may take, but for the last three: those are of all that are there at a time."""

    seconds: float = 20  # to fetch its images and videos
    megabytes: float = 64  # of its body, and of what is fetched for it
    megapixels: float = 128  # of its images and animations; of these every frame counts
    frames: int = 4096  # of an animation
    hosts: frozenset[str] = frozenset()  # fetched from wherever they are
    requests: int = 64
    total_megabytes: float = 256  # of bodies, and of what is fetched
    slice_megabytes: float = (
        4096  # of slices and frames that the model has not read yet; others wait with their decoding
    )

    def text_bytes(self, context: int) -> int:
        """Most bytes of a request besides its data URLs."""
        return max(LEAST_TEXT, BYTES_PER_TOKEN * context)


class Room:
    """How much of something all requests together may take."""

    def __init__(self, most: float, what: str) -> None:
        self.most, self.what, self.taken = most, what, 0.0
        self._lock = threading.Lock()

    def take(self, amount: float) -> None:
        """Take some of it.

        Raises:
            RequestError: not as much is left; with the status 503.
        """
        with self._lock:
            if self.taken + amount > self.most:
                raise RequestError(
                    f"The server is busy: there are {self.what} already. Try again in {RETRY_AFTER} seconds.",
                    status=503,
                    code="overloaded",
                    retry_after=RETRY_AFTER,
                )
            self.taken += amount

    def give_back(self, amount: float) -> None:
        with self._lock:
            self.taken -= amount

    @contextmanager
    def taking(self, amount: float) -> Iterator[None]:
        self.take(amount)
        try:
            yield
        finally:
            self.give_back(amount)


def no_memory() -> RequestError:
    """What a request is told that there is not enough memory for."""
    return RequestError(
        "There is not enough memory for this request now: try again, or give less.",
        status=503,
        code="overloaded",
        retry_after=RETRY_AFTER,
    )


def check_body(body: bytes, most: int) -> None:
    """Refuse a body with too much besides its data URLs, before it is parsed: objects take many times its bytes.

    Raises:
        RequestError: it holds more than `most` bytes of text.
    """
    _check_text(len(body) - _data_urls(body), most)


def _data_urls(body: bytes) -> int:
    """How many bytes of JSON are strings that begin like data URLs. Not by a pattern: others would wait until it had run."""
    found, end = 0, -1
    while (start := body.find(b'"data:', end + 1)) >= 0 and (end := body.find(b'"', start + 1)) >= 0:
        found += end + 1 - start
    return found


def check_request(request: ChatRequest | CompletionRequest, most: int) -> None:
    """Refuse a request with more than `most` bytes of text; what looked like data URLs may have been text after all.

    Raises:
        RequestError: as it says.
    """
    texts = [request.prompt] if isinstance(request, CompletionRequest) else list(_texts(request))
    _check_text(sum(len(text.encode(errors="replace")) for text in texts), most)


def _texts(request: ChatRequest) -> Iterator[str]:
    for message in request.messages:
        yield message.reasoning_content or ""
        for part in message.content or ():
            if part.type == "text":
                yield part.text
                yield part.ref or ""
        for call in message.tool_calls or ():
            yield call.model_dump_json()
    for tool in request.tools or ():
        yield tool.model_dump_json()


def _check_text(length: int, most: int) -> None:
    if length > most:
        raise RequestError(
            f"The request has {length} bytes besides images and videos; the limit is {most}, more than the model's context "
            "has tokens for. Shorten it.",
            code="context_length_exceeded",
        )
