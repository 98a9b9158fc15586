"""Videos described in order: what happens in each segment, with time stamps.

What is special:
- the time stamps are those of the frames that the model was shown, not its own guess: the video is cut into segments of
  equal length, and each is asked about separately;
- a segment costs no more than a short video, so a film of any length can be described.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from minicpmv.errors import MiniCPMVError


PROMPT = "Describe what happens in this part of a video in one or two sentences. Tell only what can be seen."
MOST_SEGMENTS = 10_000


@dataclass(frozen=True)
class Segment:
    """What happens from `start` to `end`, in seconds."""

    start: float
    end: float
    text: str
    is_complete: bool  # False where max_new_tokens cut the text


def describe(
    model: Any,
    processor: Any,
    video: str | PathLike,
    seconds: float = 10,
    prompt: str = PROMPT,
    **options: Any,
) -> Iterator[Segment]:
    """Describe a video segment by segment.

    Args:
        video: path of the video.
        seconds: about how long a segment lasts; all are equally long.
        prompt: what is asked about each segment.
        options: those of `model.chat` and of the video processor (fps, max_num_packing, ...); greedy decoding where they
            say nothing else.

    Raises:
        MiniCPMVError: there are no segments of this length (see `segment_times`), or the video cannot be read.
    """
    content = [{"type": "video", "video": str(video)}, prompt]
    for start, end in segment_times(duration_of(processor, video), seconds):
        output = model.chat(
            msgs=[{"role": "user", "content": content}],
            processor=processor,
            return_dict=True,
            **{"decoding": "greedy"} | options | {"start": start, "end": end},
        )
        yield Segment(start, end, output.text, output.finish_reason != "length")


def duration_of(processor: Any, video: Any) -> float:
    """Seconds that a video lasts."""
    return processor.video_processor.sample_video(video, num_frames=1).metadata.duration


def segment_times(duration: float, seconds: float) -> list[tuple[float, float]]:
    """(start, end) of equal segments of about `seconds` that fill `duration`.

    Raises:
        MiniCPMVError: the length is not positive, or makes more than 10,000 of them.
    """
    if not seconds > 0 or duration / seconds > MOST_SEGMENTS:
        raise MiniCPMVError(
            f"a video of {duration:.1f} seconds cannot be cut into segments of {seconds} seconds; give a positive length "
            f"that makes at most {MOST_SEGMENTS:,} of them"
        )
    count = max(1, round(duration / seconds))
    return [(duration * i / count, duration * (i + 1) / count) for i in range(count)]


def as_time(seconds: float, comma: bool = False) -> str:
    """`1:02:03`, or with `comma` the time stamp of a subtitle file, `01:02:03,456`."""
    total = round(seconds * 1000)
    hours, minutes, rest = total // 3_600_000, total // 60_000 % 60, total % 60_000
    if comma:
        return f"{hours:02}:{minutes:02}:{rest // 1000:02},{rest % 1000:03}"
    return (f"{hours}:{minutes:02}" if hours else f"{minutes}") + f":{rest // 1000:02}"


def as_subtitles(segments: Sequence[Segment]) -> str:
    """SubRip text (.srt): the descriptions as subtitles of the video."""
    blocks = []
    for number, segment in enumerate(segments, 1):
        text = "\n".join(line for line in segment.text.splitlines() if line.strip())  # an empty line ends a block
        blocks.append(f"{number}\n{as_time(segment.start, True)} --> {as_time(segment.end, True)}\n{text}\n")
    return "\n".join(blocks)
