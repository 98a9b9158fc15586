"""Where things are: boxes out of the model's answers, boxes drawn on the picture, and the question that asks for them.

What is special:
- the model counts from 0 to 1000 along each side of the picture; here boxes are pixels;
- what looks like a box and is none is handed back beside the boxes, with the reason: nothing is dropped or repaired;
- the name of the thing to find may hold anything: only the tags around it, which this file writes, are control tokens.
"""

import re
from dataclasses import dataclass
from os import PathLike

from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps


# The words that MiniCPM-V was trained with (model card); the processor writes the name behind them, between ref tags.
QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: "
SCALE = 1000
GREEDY = {"sampling": False, "num_beams": 1, "repetition_penalty": 1.0}
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
    """A box in pixels of the upright picture; `label` is what the answer calls it, None where it does not."""

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

    def __str__(self):
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
        text: the answer; numbers are thousandths of the sides.
        width, height: of the upright picture, in pixels.

    Returns:
        The boxes in pixels, and the pieces that are none: not four numbers, numbers outside 0 to 1000, no area, tags
        without their counterpart, names without a box.
    """
    if width < 1 or height < 1:
        raise ValueError(
            f"a picture of {width} x {height} pixels has no place for boxes; both sides must be at least 1"
        )
    boxes, malformed = [], []
    label, label_text, label_is_used, end = None, "", True, 0
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
        corners, reason = _read_corners(piece["box"])
        if reason:
            malformed.append(Malformed(piece[0], reason))
        else:
            x1, y1, x2, y2 = corners
            scaled = x1 * width / SCALE, y1 * height / SCALE, x2 * width / SCALE, y2 * height / SCALE
            boxes.append(Box(label, *scaled))
    if not label_is_used:
        malformed.append(Malformed(label_text, "no box follows this name"))
    return boxes, malformed


def _read_corners(text):
    found = _FOUR_NUMBERS.fullmatch(text)
    if not found:
        return None, "a box is four numbers: left, top, right, bottom"
    x1, y1, x2, y2 = corners = [float(number) for number in found.groups()]
    if not all(0 <= number <= SCALE for number in corners):
        return None, f"its numbers must lie between 0 and {SCALE}"
    if x1 >= x2 or y1 >= y2:
        return None, "it has no area: left must be less than right, top less than bottom"
    return corners, None


def locate(model, processor, image, name: str, **options) -> Grounding:
    """Ask where in a picture something is, in the words that the model was trained with.

    Args:
        image: a Pillow picture, or the path of one.
        name: what to find: a word, a phrase or a sentence.
        options: those of `model.chat` (max_slice_nums, max_new_tokens, ...), over greedy search.

    Returns:
        [`Grounding`]; a box that the answer does not name is labelled `name`. No boxes: the model gave none, see `answer`.
    """
    if isinstance(image, (str, PathLike)):
        with Image.open(image) as file:
            image = ImageOps.exif_transpose(file)  # loads it
    else:
        image = ImageOps.exif_transpose(image)  # the processor turns it as well, and boxes belong to what it sees
    content = [image, {"type": "text", "text": QUESTION, "ref": name}]
    output = model.chat(
        msgs=[{"role": "user", "content": content}], processor=processor, return_dict=True, **GREEDY | options
    )
    boxes, malformed = parse_boxes(output.text, *image.size)
    boxes = [Box(name, *box.corners) if box.label is None else box for box in boxes]
    if output.finish_reason == "length":
        reason = f"the answer ended after {output.generated_tokens} tokens: raise max_new_tokens"
        malformed.append(Malformed(output.text[-40:], reason))
    return Grounding(boxes, malformed, output.text)


def draw_boxes(image: Image.Image, boxes: list[Box], font: str | PathLike | None = None) -> Image.Image:
    """A copy of the picture with the boxes and their labels on it, one color a label.

    Args:
        image: the picture that the boxes were parsed for; it is turned upright first.
        font: a TrueType file; Pillow's own typeface, which has no Chinese, where it is not given.
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
            # Above the box, or inside where there is no room; and never out of the picture on the right.
            x = max(0, min(box.left, image.width - letters.getlength(label) - 4))
            y = max(0, box.top - size * 1.3)
            pen.rectangle(pen.textbbox((x + 2, y), label, font=letters), fill=color, outline=color, width=2)
            pen.text((x + 2, y), label, fill="white", font=letters)
    return image
