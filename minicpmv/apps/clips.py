"""A clip told in order: what happens in each stretch of it, with time stamps.

What is special:
- the time stamps are those of the frames that the model was shown, not the model's own guess: the clip is cut into
  stretches of equal length, and each is asked about by itself;
- a stretch costs no more than a short clip, so a film of any length can be told.
"""

from collections.abc import Iterator
from dataclasses import dataclass


PROMPT = "Describe what happens in this part of a video in one or two sentences. Tell only what can be seen."
GREEDY = {"sampling": False, "num_beams": 1, "repetition_penalty": 1.0}


class StretchError(ValueError):
    """Stretches of this length cannot be made."""


@dataclass(frozen=True)
class Stretch:
    """What happens from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str
    is_complete: bool  # whether the model ended the text itself; else max_new_tokens did


def stretches(duration: float, seconds: float) -> list[tuple[float, float]]:
    """(start, end) of equal stretches of about `seconds` that fill the clip.

    Raises:
        StretchError: the length is not positive, or makes more than 10,000 of them.
    """
    if not seconds > 0 or duration / seconds > 10_000:
        raise StretchError(
            f"stretches of {seconds} seconds do not fit a clip of {duration:.1f} seconds; give a positive length that "
            "makes at most 10,000 of them"
        )
    count = max(1, round(duration / seconds))
    return [(duration * i / count, duration * (i + 1) / count) for i in range(count)]


def duration_of(processor, clip) -> float:
    """Seconds that a clip lasts."""
    return processor.video_processor.sample_video(clip, num_frames=1).metadata.duration


def tell(model, processor, clip, seconds: float = 10, prompt: str = PROMPT, **options) -> Iterator[Stretch]:
    """Tell a clip stretch by stretch.

    Args:
        clip: the path of a video.
        seconds: about how long a stretch lasts; they are equally long.
        prompt: what is asked about each.
        options: those of `model.chat` and of the video processor (fps, max_num_packing, ...), over greedy search.

    Raises:
        StretchError: see `stretches`.
        ValueError: the clip cannot be read.
    """
    content = [{"type": "video", "video": str(clip)}, prompt]
    for start, end in stretches(duration_of(processor, clip), seconds):
        output = model.chat(
            msgs=[{"role": "user", "content": content}],
            processor=processor,
            return_dict=True,
            **GREEDY | options | {"start": start, "end": end},
        )
        yield Stretch(start, end, output.text, output.finish_reason != "length")


def as_time(seconds: float, comma: bool = False) -> str:
    """`1:02:03`-like stamp; with `comma` that of a subtitle file, `01:02:03,456`."""
    total = round(seconds * 1000)
    hours, minutes, rest = total // 3_600_000, total // 60_000 % 60, total % 60_000
    if comma:
        return f"{hours:02}:{minutes:02}:{rest // 1000:02},{rest % 1000:03}"
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{rest // 1000:02}"


def as_subtitles(told: list[Stretch]) -> str:
    """SubRip text (.srt): the descriptions as subtitles of the clip."""
    blocks = []
    for number, stretch in enumerate(told, 1):
        text = "\n".join(line for line in stretch.text.splitlines() if line.strip())  # an empty line ends a block
        blocks.append(f"{number}\n{as_time(stretch.start, True)} --> {as_time(stretch.end, True)}\n{text}\n")
    return "\n".join(blocks)
