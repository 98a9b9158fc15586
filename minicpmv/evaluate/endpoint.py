"""A model behind an OpenAI-compatible endpoint, as an answerer: vLLM, SGLang, llama.cpp, `minicpmv serve`, a hosted model.

What is special:
- images are sent as they are: files byte for byte, drawn ones as PNG; a clip as evenly spaced frames or as a file;
- what the model does with them (slices, packing of frames) is the endpoint's own affair, unless it understands
  `mm_processor_kwargs`. Rows that take slices or times away mean nothing where it does not.
"""

import base64
import io
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

from minicpmv.errors import MiniCPMVError, require
from minicpmv.evaluate.answerers import Answer, Mode, Question


THINK_END = "</think>"  # how open models close a thought, where the endpoint does not part it from the answer
DECODING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
)  # options of chat() that APIs know too
LOST = ("temporal_ids", "use_image_id")  # there is no way to send these
# What vLLM and `minicpmv serve` take as mm_processor_kwargs.
PROCESSOR_OPTIONS = ("max_slice_nums", "fps", "num_frames", "max_num_packing", "force_packing", "start", "end")
QUESTIONS_A_LANE = 8  # held in memory for each request in flight, so that none waits for images to be drawn
SHOWN = 300  # characters of an endpoint's own message


class EndpointError(MiniCPMVError):
    """An endpoint cannot be asked, or does not answer: the message says why and what to do."""


class Endpoint:
    """A model that is asked over HTTP, several questions at a time.

    Failed connections, timeouts, and the answers 408, 409, 429 and 5xx are tried again, after waits that double from half
    a second up to eight, or as long as the endpoint asks for.

    Args:
        url: of the API; it mostly ends with `/v1`.
        model: the name that the endpoint knows.
        api_key: sent along; endpoints of your own mostly need none.
        concurrency: most requests in flight.
        retries: of each request.
        timeout: seconds for each try.
        clips: how a clip is sent: `"frames"`, as images; `"video_url"`, as a file (vLLM, SGLang, `minicpmv serve`).
        frames: how many frames, evenly spaced.
        processor_options: also send a question's options for the processor, as `mm_processor_kwargs`.
        thinking_switch: send `chat_template_kwargs.enable_thinking`, which open models obey. Without it nothing can be
            told to think or not to.
        extra_body: more fields for every request, such as `{"reasoning_effort": "low"}`.

    Raises:
        MissingPackageError: the client, openai, is not installed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        retries: int = 6,
        timeout: float = 600.0,
        clips: Literal["frames", "video_url"] = "frames",
        frames: int = 32,
        processor_options: bool = False,
        thinking_switch: bool = True,
        extra_body: Mapping[str, Any] | None = None,
    ):
        require("endpoint", "openai")
        from openai import OpenAI

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise EndpointError(f"{url!r} is not an address such as http://127.0.0.1:8000/v1")
        self.url = urlunsplit(
            parts._replace(netloc=parts.netloc.rpartition("@")[2])
        )  # to be shown: without a password
        self.model, self.concurrency = model, concurrency
        self.clips, self.frames, self.extra_body = clips, frames, dict(extra_body or {})
        self.processor_options, self.thinking_switch = processor_options, thinking_switch
        self.window = concurrency * QUESTIONS_A_LANE
        self.versions = {"openai": version("openai")}
        # The client insists on a key; a server of one's own ignores it.
        self._client = OpenAI(base_url=url, api_key=api_key or "none", max_retries=retries, timeout=timeout)

    def settings(self, mode: Mode | Sequence[str]) -> dict[str, Any]:
        """What is sent, and where. Which weights answer under the name, the endpoint alone knows: use another folder when
        they have changed.

        Raises:
            EndpointError: for `"auto"`, which needs the model itself, and for thoughts without a way to ask for them.
        """
        if mode == "auto":
            raise EndpointError("an endpoint cannot think on demand: set thinking on, off, or to the rows that think")
        return {
            "endpoint": self.url,
            "model": self.model,
            "clips": self.clips if self.clips == "video_url" else f"{self.frames} frames",
            "processor_options": self.processor_options,
            "thinking_switch": self.thinking_switch,
            "extra_body": self.extra_body,
        }

    def check(self) -> None:
        """Ask the endpoint for its models, before any question is made.

        Raises:
            EndpointError: it cannot be reached, or does not know the model.
        """
        import openai

        try:
            served = [model.id for model in self._client.models.list()]
        except (openai.NotFoundError, openai.PermissionDeniedError):
            return  # it does not tell
        except openai.OpenAIError as error:
            raise self._explained(error) from error
        except (AttributeError, TypeError, ValueError):
            raise EndpointError(f"{self.url} does not answer as OpenAI's API does: it mostly ends with /v1") from None
        if served and self.model not in served:
            raise EndpointError(f"{self.url} does not serve {self.model}; it serves {', '.join(served[:10])}")

    def answer(
        self, questions: Sequence[Question], mode: Mode, max_new_tokens: int
    ) -> Iterator[tuple[Question, Answer]]:
        asked = [question for question in questions if not question.answered]
        todo: SimpleQueue[tuple[Question, dict[str, Any]]] = SimpleQueue()
        done: SimpleQueue[tuple[Question, Answer | BaseException] | None] = SimpleQueue()
        for question in asked:
            todo.put((question, self._request(question, mode, max_new_tokens)))
        stop = Event()

        def work() -> None:
            while not (stop.is_set() or todo.empty()):
                try:
                    question, request = todo.get_nowait()
                except Empty:  # another thread was faster
                    break
                try:
                    done.put((question, self._ask(question, request, bool(mode))))
                except BaseException as error:  # raised again below, in the thread that waits
                    stop.set()
                    done.put((question, error))
            done.put(None)

        # Not a pool: Python would wait for its threads at the end of an interrupted run, for minutes where models think.
        threads = [Thread(target=work, daemon=True) for _ in range(min(self.concurrency, len(asked)))]
        for thread in threads:
            thread.start()
        failure, running = None, len(threads)
        try:
            while running:
                if (found := done.get()) is None:
                    running -= 1
                elif isinstance(found[1], BaseException):
                    failure = failure or found[1]
                else:
                    yield found[0], found[1]
        finally:
            stop.set()
        if failure is not None:  # not before: what was under way has been answered, and paid for
            raise failure

    def _request(self, question: Question, mode: Mode, max_new_tokens: int) -> dict[str, Any]:
        prompt = question.prompt
        options = dict(prompt.options)
        for name in LOST:
            options.pop(name, None)
        processing = {name: options.pop(name) for name in PROCESSOR_OPTIONS if name in options}
        extra = {name: options.pop(name) for name in DECODING if name in options}
        if options.pop("decoding", "greedy") == "greedy":
            extra["temperature"] = 0
        elif "temperature" not in extra:
            options = prompt.options  # beams, or sampling at a temperature that only the model knows
        if options:
            names = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise EndpointError(
                f"{_name(question)} wants {names}, which an endpoint cannot be told: leave this row out"
            )
        if self.thinking_switch:
            extra["chat_template_kwargs"] = {"enable_thinking": bool(mode)}
        if self.processor_options and processing:
            extra["mm_processor_kwargs"] = processing
        content = [part for parts in map(self._parts, prompt.content) for part in parts]
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_new_tokens,
            "extra_body": extra | self.extra_body,
        }

    def _ask(self, question: Question, request: dict[str, Any], thinks: bool) -> Answer:
        import openai

        try:
            reply = self._client.chat.completions.create(**request)
        except openai.OpenAIError as error:
            raise self._explained(error, question) from error
        if not getattr(reply, "choices", None):
            raise EndpointError(
                f"{self.url} did not answer {_name(question)} with a chat completion: {reply!s:.{SHOWN}}"
            )
        choice, usage = reply.choices[0], reply.usage
        text, thought = choice.message.content or "", None
        if thinks:
            names = ("reasoning_content", "reasoning")  # vLLM's and others'
            thought = next(filter(None, (getattr(choice.message, name, None) for name in names)), None)
            if thought is None and THINK_END in text:
                thought, _, text = text.rpartition(THINK_END)
                thought = thought.strip().removeprefix("<think>").strip()
        return Answer(
            text=text.strip(),
            thought=thought,
            finish_reason=choice.finish_reason,
            prompt_tokens=usage and usage.prompt_tokens,
            generated_tokens=usage and usage.completion_tokens,
            mode="deep" if thinks else "fast",
        )

    def _explained(self, error: Exception, question: Question | None = None) -> EndpointError:
        import openai

        reason = " ".join(str(error).split())[:SHOWN]
        if isinstance(error, openai.APITimeoutError):
            return EndpointError(f"{self.url} took too long: allow more time (--timeout), or less --concurrency")
        if isinstance(error, openai.APIConnectionError):
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            return EndpointError(f"{self.url} cannot be reached{cause}: is the server running, and is the port right?")
        if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
            return EndpointError(
                f"{self.url} refuses the key: name the variable that holds it (--api-key-env). {reason}"
            )
        if isinstance(error, openai.NotFoundError):
            return EndpointError(
                f"{self.url} knows no model {self.model}, or is not the address of an API (it mostly ends with /v1). {reason}"
            )
        if isinstance(error, (openai.RateLimitError, openai.InternalServerError)):
            return EndpointError(
                f"{self.url} failed on every try: run the same command again later, with less --concurrency. {reason}"
            )
        what = f"refuses {_name(question)}" if question else "cannot be asked"
        return EndpointError(f"{self.url} {what}. {reason}")

    def _parts(self, part: Any) -> list[dict[str, Any]]:
        """A part of a message in OpenAI's form; a clip may be several."""
        if isinstance(part, str):
            return [{"type": "text", "text": part}]
        if isinstance(part, Mapping):
            kind = str(part.get("type")).removesuffix("_url")
            if kind == "text":
                return [{"type": "text", "text": part["text"]}]
            source = part.get(kind, part.get(f"{kind}_url"))
            source = source["url"] if isinstance(source, Mapping) else source
        else:
            kind = "image"
            if isinstance(part, os.PathLike) and (mimetypes.guess_type(part)[0] or "").startswith("video"):
                kind = "video"
            source = part
        if kind == "image":
            return [_address("image_url", source)]
        if isinstance(source, (list, tuple)):  # frames that were cut before
            return [_address("image_url", frame) for frame in source]
        if self.clips == "video_url":
            return [_address("video_url", source)]
        return [_address("image_url", frame) for frame in even_frames(source, self.frames)]


def even_frames(clip: str | os.PathLike, count: int) -> list[Any]:
    """`count` frames of a clip as images, evenly spaced from the first to the last; all of them where there are fewer."""
    import av

    with av.open(os.fspath(clip)) as container:
        total = sum(1 for _ in container.decode(video=0))
    last = max(total - 1, 0)
    wanted = (
        set(range(total)) if total <= count else {round(place * last / max(count - 1, 1)) for place in range(count)}
    )
    with av.open(os.fspath(clip)) as container:
        frames = enumerate(container.decode(video=0))
        return [frame.to_image() for place, frame in frames if place in wanted]


def _address(kind: str, source: Any) -> dict[str, Any]:
    """An image or a clip by its address: as it is, or as a data URL."""
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        url = source
    elif isinstance(source, (str, os.PathLike)):
        media = mimetypes.guess_type(os.fspath(source))[0] or "application/octet-stream"
        url = f"data:{media};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"
    elif hasattr(source, "save"):  # a PIL image
        file = io.BytesIO()
        source.save(file, format="PNG", compress_level=1)
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    else:
        raise EndpointError(f"a {type(source).__name__} cannot be sent: give a PIL image, a file or an address")
    return {"type": kind, kind: {"url": url}}


def _name(question: Question) -> str:
    return f"question {question.key.index} of {question.key.row} (seed {question.key.seed})"
