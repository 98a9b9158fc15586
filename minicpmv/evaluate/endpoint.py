"""A model behind an OpenAI-compatible endpoint, as an answerer: vLLM, SGLang, llama.cpp, `minicpmv serve`, a hosted model.

What is special:
- images are sent as they are: files byte for byte, drawn ones as PNG; a clip as evenly spaced frames or as a file;
- subtitles are those of the frames that are sent;
- what the model does with them (slices, packing of frames) is the endpoint's own affair, unless it understands
  `mm_processor_kwargs`. Rows that take slices or times away mean nothing where it does not.
"""

import base64
import hashlib
import io
import mimetypes
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from minicpmv.evaluate.answerers import Answer, Mode, Question, QuestionError, is_video
from minicpmv.evaluate.benchmark import Subtitles
from minicpmv.evaluate.client import ChatClient, EndpointError, RefusedError, side_by_side


THINK_END = "</think>"  # how open models close a thought, where the endpoint does not part it from the answer
DECODING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
)  # options of chat() that APIs know too
# There is no way to send these.
LOST = ("temporal_ids", "use_image_id", "think_prefix", "max_num_frames", "max_inp_length")
BEAMS = ("num_beams", "no_repeat_ngram_size")  # nor these, which are left out where the run sets a temperature
# What vLLM and `minicpmv serve` take as mm_processor_kwargs.
PROCESSOR_OPTIONS = ("max_slice_nums", "fps", "num_frames", "max_num_packing", "force_packing", "start", "end")
QUESTIONS_A_LANE = 8  # held in memory for each request in flight, so that none waits for images to be drawn
FRAME_QUALITY = 90  # of frames that are sent as JPEG

Media = dict[str, Any]  # see `Answer.media`


class RefusedQuestionError(QuestionError, EndpointError):
    """The endpoint refuses a question: a filter of its own, an image that is too large."""


class Endpoint:
    """A model that is asked over HTTP, several questions at a time.

    Args:
        url, model: as `ChatClient` takes them.
        clips: how a clip is sent: `"frames"`, as images; `"video_url"`, as a file (vLLM, SGLang, `minicpmv serve`).
        frames: how many frames, evenly spaced.
        frame_size: longest side in pixels that frames are reduced to, and sent as JPEG; None: as they are, as PNG.
        processor_options: also send a question's options for the processor, as `mm_processor_kwargs`.
        thinking_switch: send `chat_template_kwargs.enable_thinking`, which open models obey. Without it nothing can be
            told to think or not to, but by `reasoning_effort`.
        detail: of images, as OpenAI's API takes it: `"low"`, `"high"` or `"auto"`; None: not sent.
        options: further ones of `ChatClient`: key, concurrency, retries, and how this API wants its requests.

    Raises:
        MissingPackageError: the client, openai, is not installed.
        EndpointError: `url` is no address.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        clips: Literal["frames", "video_url"] = "frames",
        frames: int = 32,
        frame_size: int | None = None,
        processor_options: bool = False,
        thinking_switch: bool = True,
        detail: str | None = None,
        **options: Any,
    ):
        self.client = ChatClient(url, model, **options)
        self.clips, self.frames, self.frame_size = clips, frames, frame_size
        self.processor_options, self.thinking_switch = processor_options, thinking_switch
        self.detail = detail
        self.window = self.client.concurrency * QUESTIONS_A_LANE
        self.versions = self.client.versions

    def settings(self, mode: Mode | Sequence[str]) -> dict[str, Any]:
        """What is sent, and where. Which weights answer under the name, the endpoint alone knows: use another folder when
        they have changed.

        Raises:
            EndpointError: for `"auto"`, which needs the model itself, and for thoughts without a way to ask for them.
        """
        if mode == "auto":
            raise EndpointError("an endpoint cannot think on demand: set thinking on, off, or to the rows that think")
        return {
            **self.client.settings(),
            "clips": self.clips if self.clips == "video_url" else f"{self.frames} frames",
            "frame_size": self.frame_size,
            "processor_options": self.processor_options,
            "thinking_switch": self.thinking_switch,
            "detail": self.detail,
        }

    def check(self) -> None:
        """Ask the endpoint for its models, before any question is made.

        Raises:
            EndpointError: it cannot be reached, or does not know the model.
        """
        self.client.check()

    def answer(
        self, questions: Sequence[Question], mode: Mode, max_new_tokens: int
    ) -> Iterator[tuple[Question, Answer]]:
        asked = [
            (question, self._request(question, mode, max_new_tokens))
            for question in questions
            if not question.answered
        ]

        def ask(item: tuple[Question, tuple[dict[str, Any], Media | None]]) -> Answer:
            question, (request, media) = item
            started = time.perf_counter()
            try:
                reply = self.client.complete(question.name, request)
            except RefusedError as error:
                raise RefusedQuestionError(question, error) from error
            return _answer(reply, bool(mode), media, time.perf_counter() - started)

        for (question, _), answer in side_by_side(ask, asked, self.client.concurrency):
            yield question, answer

    def _request(self, question: Question, mode: Mode, max_new_tokens: int) -> tuple[dict[str, Any], Media | None]:
        """The body of a request, and what is to be known about the frames of its video."""
        prompt = question.prompt
        options = {name: value for name, value in prompt.options.items() if name not in LOST}
        processing = {name: options.pop(name) for name in PROCESSOR_OPTIONS if name in options}
        decoding = {name: options.pop(name) for name in DECODING if name in options}
        if isinstance(decoding.get("seed"), str):
            decoding["seed"] = int.from_bytes(hashlib.sha256(decoding["seed"].encode()).digest()[:4], "big") // 2
        is_greedy = options.pop("decoding", "greedy") == "greedy"
        if self.client.temperature != "question":
            options = {name: value for name, value in options.items() if name not in BEAMS}
        elif options.get("num_beams") == 1:
            del options["num_beams"]
        if is_greedy:
            decoding["temperature"] = 0
        elif "temperature" not in decoding and self.client.temperature == "question":
            options = prompt.options  # beams, or sampling at a temperature that only the model knows
        if options:
            names = ", ".join(f"{name}={value!r}" for name, value in options.items())
            raise EndpointError(
                f"{question.name} wants {names}, which an endpoint cannot be told: leave this row out, or set the "
                "temperature of the run"
            )
        more: dict[str, Any] = {}
        if self.thinking_switch:
            more["chat_template_kwargs"] = {"enable_thinking": bool(mode)}
        if self.processor_options and processing:
            more["mm_processor_kwargs"] = processing
        shown, media = self._with_frames(prompt.content)
        content = [part for parts in map(self._parts, shown) for part in parts]
        if self.detail is not None:
            for part in content:
                if part["type"] == "image_url":
                    part["image_url"]["detail"] = self.detail
        return self.client.request([{"role": "user", "content": content}], max_new_tokens, decoding, **more), media

    def _with_frames(self, content: Sequence[Any]) -> tuple[list[Any], Media | None]:
        """The content with the frames of its video in the video's place where frames are sent, and its subtitles as text."""
        videos = [
            part["video"] for part in content if is_video(part) and isinstance(part["video"], (str, os.PathLike))
        ]
        if len(videos) != 1 or str(videos[0]).startswith(("http://", "https://", "data:")):
            return list(content), None
        times, frames = zip(*timed_frames(videos[0], self.frames), strict=True)
        shown: list[Any] = []
        for part in content:
            if is_video(part) and self.clips == "frames":
                shown.append({"type": "video", "video": list(frames)})
            elif isinstance(part, Subtitles):
                shown += [text] if (text := part.shown_at(times)) else []
            else:
                shown.append(part)
        if self.clips == "video_url":  # the endpoint chooses its own frames
            return shown, {"timestamps": list(times)}
        return shown, {"frames": len(frames), "packing": 1, "timestamps": list(times)}

    def _parts(self, part: Any) -> list[dict[str, Any]]:
        """A part of a message in OpenAI's form; a clip may be several."""
        if isinstance(part, str):
            return [{"type": "text", "text": part}]
        if isinstance(part, Mapping):
            kind = str(part.get("type")).removesuffix("_url")
            if kind == "text":
                # In the words of the prompt: most servers know no "ref" beside a text, and would leave the name out.
                name = "" if part.get("ref") is None else f"<ref>{part['ref']}</ref>"
                return [{"type": "text", "text": part["text"] + name}]
            source = part.get(kind, part.get(f"{kind}_url"))
            source = source["url"] if isinstance(source, Mapping) else source
        elif isinstance(part, Subtitles):
            raise EndpointError("subtitles need one video in a file, to know which frames are shown")
        else:
            kind = "image"
            if isinstance(part, os.PathLike) and (mimetypes.guess_type(part)[0] or "").startswith("video"):
                kind = "video"
            source = part
        if kind == "image":
            return [_address("image_url", source)]
        if not isinstance(source, (list, tuple)):
            if self.clips == "video_url":
                return [_address("video_url", source)]
            source = even_frames(source, self.frames)
        if self.frame_size is None:
            return [_address("image_url", frame) for frame in source]
        frames = [frame.copy() for frame in source]
        for frame in frames:
            frame.thumbnail((self.frame_size, self.frame_size))
        return [_address("image_url", frame, "JPEG", quality=FRAME_QUALITY) for frame in frames]


def _answer(reply: Any, thinks: bool, media: Media | None, seconds: float) -> Answer:
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
        media=media,
        seconds=seconds,
    )


def even_frames(clip: str | os.PathLike, count: int) -> list[Any]:
    """`count` frames of a clip as images, evenly spaced from the first to the last; all of them where there are fewer."""
    return [frame for _, frame in timed_frames(clip, count)]


def timed_frames(clip: str | os.PathLike, count: int) -> list[tuple[float, Any]]:
    """Even frames, each with the seconds from the first one at which it is shown."""
    import av

    with av.open(os.fspath(clip)) as container:
        times = [frame.time or 0.0 for frame in container.decode(video=0)]
    total = len(times)
    last = max(total - 1, 0)
    wanted = (
        set(range(total)) if total <= count else {round(place * last / max(count - 1, 1)) for place in range(count)}
    )
    with av.open(os.fspath(clip)) as container:
        frames = enumerate(container.decode(video=0))
        return [(round(times[place] - times[0], 2), frame.to_image()) for place, frame in frames if place in wanted]


def _address(kind: str, source: Any, encoding: str = "PNG", **options: Any) -> dict[str, Any]:
    """An image or a clip by its address: as it is, or as a data URL."""
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        url = source
    elif isinstance(source, (str, os.PathLike)):
        media = mimetypes.guess_type(os.fspath(source))[0] or "application/octet-stream"
        url = f"data:{media};base64,{base64.b64encode(Path(source).read_bytes()).decode()}"
    elif hasattr(source, "save"):  # a PIL image
        file = io.BytesIO()
        source.save(file, format=encoding, **options or {"compress_level": 1})
        url = f"data:image/{encoding.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
    else:
        raise EndpointError(f"a {type(source).__name__} cannot be sent: give a PIL image, a file or an address")
    return {"type": kind, kind: {"url": url}}
