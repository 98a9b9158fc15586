"""What the model sees, drawn as HTML: the slices of a picture, the packed frames of a clip, the tokens of a turn.

What is special:
- Everything comes from the processor that feeds the model, with the same options: layout, frames, groups and counts.
- Pictures stand in the page as data: nothing is fetched, and names are escaped.
"""

import base64
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path


PICTURE_SIDE = 640  # most pixels of a side, as shown
FRAME_SIDE = 160


@dataclass(frozen=True)
class Seen:
    """A picture or clip as the model looks at it."""

    name: str
    kind: str  # "image" or "video"
    size: tuple[int, int]  # (width, height)
    tokens: int
    picture: str = ""  # data URL
    layout: object = None  # `SliceLayout` of a picture
    groups: tuple = ()  # of a clip: tuples of (seconds, data URL)
    report: object = None  # `VideoReport` of a clip


def look_at(processor, kind: str, file: str, max_slice_nums: int, clip_options: dict) -> Seen:
    """See a picture or clip with the processor's eyes.

    Args:
        max_slice_nums: of a picture.
        clip_options: those of `sample_video`.

    Raises:
        ValueError: it cannot be read.
    """
    if kind == "image":
        # A list of one frame: the processor's own loader, which turns it upright and lays it over white.
        (picture,) = processor.video_processor.sample_video([file], num_frames=1).frames
        layout = processor.image_processor.get_slice_layout(picture.size, max_slice_nums)
        tokens = layout.num_slices * processor.image_processor.image_feature_size
        return Seen(Path(file).name, kind, picture.size, tokens, _data_url(picture, PICTURE_SIDE), layout)
    clip = processor.video_processor.sample_video(file, **clip_options)
    frames = [
        (seconds, _data_url(frame, FRAME_SIDE))
        for seconds, frame in zip(clip.metadata.timestamps, clip.frames, strict=True)
    ]
    starts = range(0, len(frames), clip.metadata.packing)
    groups = tuple(tuple(frames[start : start + clip.metadata.packing]) for start in starts)
    report = clip.metadata
    return Seen(Path(file).name, kind, (report.width, report.height), report.num_tokens, groups=groups, report=report)


def render(seen: list[Seen], output=None) -> str:
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
    pictures = sum(each.tokens for each in seen)
    return [
        ("pictures", pictures),
        ("text", output.prompt_tokens - pictures),
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


def _data_url(picture, side):
    small = picture.copy()
    small.thumbnail((side, side))
    file = BytesIO()
    small.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
