"""What the model sees, drawn as HTML: the slices of an image, the packed frames of a video, the tokens of a turn.

What is special:
- Everything comes from the processor that feeds the model, with the same options: layout, frames, groups and counts.
- Images are part of the page as data: nothing is fetched, and names are escaped.
"""

import base64
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any


IMAGE_SIDE = 640  # most pixels of a side, as shown
FRAME_SIDE = 160


@dataclass(frozen=True)
class Seen:
    """An image or video as the model looks at it."""

    name: str
    kind: str  # "image" or "video"
    size: tuple[int, int]  # (width, height)
    tokens: int
    picture: str = ""  # data URL
    layout: Any = None  # `SliceLayout` of an image
    groups: tuple = ()  # of a video: tuples of (seconds, data URL)
    report: Any = None  # `VideoReport` of a video


def look_at(processor: Any, kind: str, file: str, max_slice_nums: int, video_options: dict) -> Seen:
    """See an image or video with the processor's eyes.

    Args:
        max_slice_nums: of an image.
        video_options: those of `sample_video`.

    Raises:
        ImageInputError, VideoInputError: (of the processor) it cannot be read.
    """
    if kind == "image":
        image = processor.load_image(file)
        layout = processor.image_processor.get_slice_layout(image.size, max_slice_nums)
        tokens = layout.num_slices * processor.image_processor.image_feature_size
        return Seen(Path(file).name, kind, image.size, tokens, _data_url(image, IMAGE_SIDE), layout)
    video = processor.video_processor.sample_video(file, **video_options)
    report = video.metadata
    frames = [
        (seconds, _data_url(frame, FRAME_SIDE)) for seconds, frame in zip(report.timestamps, video.frames, strict=True)
    ]
    starts = range(0, len(frames), report.packing)
    groups = tuple(tuple(frames[start : start + report.packing]) for start in starts)
    return Seen(Path(file).name, kind, (report.width, report.height), report.num_tokens, groups=groups, report=report)


def render(seen: list[Seen], output: Any = None) -> str:
    """HTML of everything the model looks at, and of the tokens of the last turn (`ChatOutput`)."""
    return _template().render(
        seen=seen,
        output=output,
        tokens=_tokens(seen, output),
        ending=ENDINGS.get(output.finish_reason) if output else None,
    )


ENDINGS = {"length": "The answer reached its limit of tokens.", "cancelled": "The answer was stopped."}


def _tokens(seen, output):
    """(name, number) of the tokens of a turn, for a bar of their shares."""
    if output is None:
        return []
    images = sum(each.tokens for each in seen)
    return [
        ("images", images),
        ("text", output.prompt_tokens - images),
        ("thought", output.reasoning_tokens),
        ("answer", output.generated_tokens - output.reasoning_tokens),
    ]


@cache
def _template():
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True).get_template(
        "view.html.jinja"
    )


def _data_url(image, side):
    small = image.copy()
    small.thumbnail((side, side))
    file = BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
