"""Where things are: the question that asks for boxes, boxes read from the model's answers, and boxes drawn on the image.

What is special:
- the model counts from 0 to 1000 along each side of the image; here boxes are pixels;
- what looks like a box but cannot be used is returned next to the boxes, with the reason: nothing is dropped or repaired;
- the name of the thing to find may hold anything: only the tags around it, which the processor writes, are control tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from minicpmv.errors import MiniCPMVError


# The words that MiniCPM-V was trained with (model card); the processor writes the name behind them, between ref tags.
QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: "
SCALE = 1000
COLORS = ("#d62828", "#2850d2", "#289c3c", "#f58c14", "#8c32aa", "#00a0a8", "#c2185b", "#6d4c41")

# A whole ref, a whole box, or a tag that belongs to neither.
_PIECES = re.compile(
    r"<ref>(?P<ref>(?:(?!</?(?:ref|box)>).)*)</ref>"
    r"|<box>(?P<box>(?:(?!</?(?:ref|box)>).)*)</box>"
    r"|(?P<stray></?(?:ref|box)>)",
    re.DOTALL,
)
_NUMBER = r"-?\d+(?:\.\d+)?"
_FOUR_NUMBERS = re.compile(rf"[\s\[(]*({_NUMBER})[\s,]+({_NUMBER})[\s,)(]+({_NUMBER})[\s,]+({_NUMBER})[\s\])]*")


@dataclass(frozen=True)
class Box:
    """A box in pixels of the upright image; `label` is what the answer calls it, or None."""

    label: str | None
    left: float
    top: float
    right: float
    bottom: float

    @property
    def corners(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), as Pillow's `crop` takes them."""
        return self.left, self.top, self.right, self.bottom


@dataclass(frozen=True)
class Malformed:
    """A piece of an answer that was meant as a box or its name, and cannot be used."""

    text: str
    reason: str

    def __str__(self) -> str:
        return f"{self.text!r}: {self.reason}"


@dataclass(frozen=True)
class Grounding:
    """What an answer says about where things are."""

    boxes: list[Box]
    malformed: list[Malformed]
    answer: str


def parse_boxes(text: str, width: int, height: int) -> tuple[list[Box], list[Malformed]]:
    """Boxes in an answer such as `<ref>cat</ref><box>12 30 500 640</box><box>510 20 990 700</box>`.

    A name counts for all boxes that follow it without other text between them; a box without one has no label.

    Args:
        text: the answer; its numbers are thousandths of the sides.
        width, height: of the upright image, in pixels.

    Returns:
        The boxes in pixels, and the pieces that cannot be used: not four numbers, numbers outside 0 to 1000, no area, tags
        without their counterpart, names without a box.

    Raises:
        MiniCPMVError: the image has no pixels.
    """
    if width < 1 or height < 1:
        raise MiniCPMVError(
            f"an image of {width} x {height} pixels has no room for boxes; both sides must be at least 1"
        )
    boxes: list[Box] = []
    malformed: list[Malformed] = []
    label: str | None = None
    label_text, label_is_used, end = "", True, 0
    for piece in _PIECES.finditer(text):
        between = text[end : piece.start()].strip(" \t\r\n,;")
        end = piece.end()
        if piece["ref"] is not None:
            if not label_is_used:
                malformed.append(Malformed(label_text, "no box follows this name"))
            label, label_text, label_is_used = piece["ref"].strip(), piece[0], False
            continue
        if piece["stray"]:
            malformed.append(Malformed(text[piece.start() : piece.start() + 40], "a tag without its counterpart"))
            continue
        if between and label_is_used:
            label = None
        label_is_used = True
        corners = _read_corners(piece["box"])
        if isinstance(corners, str):
            malformed.append(Malformed(piece[0], corners))
        else:
            x1, y1, x2, y2 = corners
            boxes.append(Box(label, x1 * width / SCALE, y1 * height / SCALE, x2 * width / SCALE, y2 * height / SCALE))
    if not label_is_used:
        malformed.append(Malformed(label_text, "no box follows this name"))
    return boxes, malformed


def _read_corners(text: str) -> tuple[float, float, float, float] | str:
    """The four numbers of a box, or why it has none."""
    found = _FOUR_NUMBERS.fullmatch(text)
    if not found:
        return "a box is four numbers: left, top, right, bottom"
    x1, y1, x2, y2 = (float(number) for number in found.groups())
    if not all(0 <= number <= SCALE for number in (x1, y1, x2, y2)):
        return f"its numbers must lie between 0 and {SCALE}"
    if x1 >= x2 or y1 >= y2:
        return "it has no area: left must be less than right, top less than bottom"
    return x1, y1, x2, y2


def locate(model: Any, processor: Any, image: Any, name: str, **options: Any) -> Grounding:
    """Ask where in an image something is, in the words that the model was trained with.

    Args:
        image: anything that a message may hold: a Pillow image, a path, an address, bytes, an array.
        name: what to find: a word, a phrase or a sentence.
        options: those of `model.chat` (max_slice_nums, max_new_tokens, ...); greedy decoding where they say nothing else.

    Returns:
        [`Grounding`]; a box that the answer does not name is labelled `name`. Without boxes, `answer` says what the model
        wrote in their place.

    Raises:
        ImageInputError: (of the processor) the image cannot be read.
    """
    image = processor.load_image(image)  # upright: boxes belong to what the model sees
    content = [image, {"type": "text", "text": QUESTION, "ref": name}]
    output = model.chat(
        msgs=[{"role": "user", "content": content}],
        processor=processor,
        return_dict=True,
        **{"decoding": "greedy"} | options,
    )
    boxes, malformed = parse_boxes(output.text, *image.size)
    boxes = [Box(name, *box.corners) if box.label is None else box for box in boxes]
    if output.finish_reason == "length":
        reason = f"the answer ended after {output.generated_tokens} tokens: raise max_new_tokens"
        malformed.append(Malformed(output.text[-40:], reason))
    return Grounding(boxes, malformed, output.text)


def draw_boxes(image: Image.Image, boxes: Sequence[Box], font: str | PathLike | None = None) -> Image.Image:
    """A copy of the image with the boxes and their labels on it, one color per label.

    Args:
        image: the one that the boxes were parsed for; it is turned upright first.
        font: a TrueType file; by default Pillow's own typeface, which has no Chinese.
    """
    image = ImageOps.exif_transpose(image).convert("RGB")
    pen = ImageDraw.Draw(image)
    size = max(12, round(min(image.size) / 40))
    letters = ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        color = ImageColor.getrgb(COLORS[labels.index(box.label) % len(COLORS)])
        pen.rectangle(box.corners, outline=color, width=max(2, size // 6))
        if box.label:
            label = " ".join(box.label.split())
            # Above the box, or inside where there is no room; and never out of the image on the right.
            x = max(0, min(box.left, image.width - letters.getlength(label) - 4))
            y = max(0, box.top - size * 1.3)
            pen.rectangle(pen.textbbox((x + 2, y), label, font=letters), fill=color, outline=color, width=2)
            pen.text((x + 2, y), label, fill="white", font=letters)
    return image
