"""Pictures drawn with Pillow: colored shapes and print on plain backgrounds.

What is special:
- every drawing keeps an object map beside the picture (which object lies under each pixel), so labels for each patch are free;
- print uses Pillow's built-in typeface and the DejaVu family that comes with matplotlib: no font of the machine is asked for;
- all chance comes from the `random.Random` that is handed in.
"""

import math
import random
import string
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import cast

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont


COLORS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "purple": (140, 50, 170),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase + ".:/-+="
# Classes of the labels for each patch; 0 is the background. Black or white print has the color class "neutral".
KIND_CLASSES = ("background", *SHAPES, *CHARACTERS)
COLOR_CLASSES = ("background", *COLORS, "neutral")
BOX_BINS = 50  # of each side of a picture
# Files of matplotlib; None is Pillow's own typeface (bold by a stroke).
TYPEFACES = {
    ("aileron", False): None,
    ("aileron", True): None,
    ("sans", False): "DejaVuSans.ttf",
    ("sans", True): "DejaVuSans-Bold.ttf",
    ("serif", False): "DejaVuSerif.ttf",
    ("serif", True): "DejaVuSerif-Bold.ttf",
    ("mono", False): "DejaVuSansMono.ttf",
    ("mono", True): "DejaVuSansMono-Bold.ttf",
}
LEGIBLE = 6.0  # characters lower than this in a slice, in pixels, have no dense label: nobody could read them


@dataclass
class Thing:
    """One shape or character in a drawing; the box is (left, top, right, bottom) in pixels."""

    kind: str
    color: str
    box: tuple[float, float, float, float]

    @property
    def center(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2


@dataclass
class Drawing:
    """A picture, the things in it, and `object_map` (height, width): 0, or 1 + the index of the thing at that pixel."""

    image: Image.Image
    object_map: Image.Image
    things: list[Thing] = field(default_factory=list)


def jitter(color: tuple[int, int, int], rng: random.Random, amount: int = 18) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in color)
    return red, green, blue


def muted(rng: random.Random, dark: bool) -> tuple[int, int, int]:
    """A greyish color, far enough from the colors of things."""
    level = rng.randint(10, 60) if dark else rng.randint(185, 245)
    return jitter((level,) * 3, rng, 10)


def draw_background(size: tuple[int, int], rng: random.Random) -> tuple[Image.Image, bool]:
    """A flat, graded or two-part (sky and ground) background, at times with light noise; and whether it is dark."""
    width, height = size
    dark = rng.random() < 0.3
    style = rng.choice(("flat", "gradient", "horizon"))
    top, bottom = muted(rng, dark), muted(rng, dark)
    if style == "flat":
        image = Image.new("RGB", size, top)
    elif style == "gradient":
        ends = np.array([top, bottom], dtype=np.uint8).reshape(2, 1, 3)
        if rng.random() < 0.5:
            ends = ends.transpose(1, 0, 2)
        image = Image.fromarray(np.ascontiguousarray(ends)).resize(size, Image.Resampling.BILINEAR)
    else:
        image = Image.new("RGB", size, top)
        horizon = int(height * rng.uniform(0.4, 0.8))
        ImageDraw.Draw(image).rectangle((0, horizon, width, height), fill=bottom)
    if rng.random() < 0.3:
        coarse = np.random.default_rng(rng.getrandbits(64)).integers(0, 25, (height // 2 + 1, width // 2 + 1))
        coarse_image = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
        # Grain lightens dark backgrounds and darkens light ones, so that it never saturates.
        pixels, grain = np.asarray(image), np.asarray(coarse_image)[..., None]
        image = Image.fromarray(pixels + grain if dark else pixels - grain)
    return image, dark


def shape_outline(kind: str, center: tuple[float, float], radius: float) -> list[tuple[float, float]]:
    x, y = center
    if kind == "square":
        side = radius * 0.85
        return [(x - side, y - side), (x + side, y - side), (x + side, y + side), (x - side, y + side)]
    if kind == "triangle":
        return [(x, y - radius), (x + radius, y + radius * 0.75), (x - radius, y + radius * 0.75)]
    if kind == "cross":
        arm, r = radius * 0.36, radius
        corners = [(-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)]
        corners += [(arm, r), (-arm, r), (-arm, arm), (-r, arm), (-r, -arm), (-arm, -arm)]
        return [(x + dx, y + dy) for dx, dy in corners]
    points = []
    for i in range(10):
        reach = radius * 1.1 if i % 2 == 0 else radius * 0.45
        angle = math.pi * (i / 5 - 0.5)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return points


def outer_box(thing: Thing) -> tuple[float, float, float, float]:
    """The smallest box around what is drawn of a shape; `Thing.box` is that of its radius."""
    if thing.kind == "circle":
        return thing.box
    points = shape_outline(thing.kind, thing.center, (thing.box[2] - thing.box[0]) / 2)
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def add_shape(drawing: Drawing, kind: str, color: str, center, radius: float, rgb: tuple[int, int, int]) -> None:
    x, y = center
    drawing.things.append(Thing(kind, color, (x - radius, y - radius, x + radius, y + radius)))
    for canvas, fill in ((drawing.image, rgb), (drawing.object_map, len(drawing.things))):
        pen = ImageDraw.Draw(canvas)
        if kind == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        else:
            pen.polygon(shape_outline(kind, center, radius), fill=fill)


def recolor(drawing: Drawing, index: int, color: str, rgb: tuple[int, int, int]) -> None:
    """Give one shape of a drawing another color; nothing may lie on it."""
    old = drawing.things[index]
    repainted = Drawing(drawing.image, Image.new("L", drawing.image.size))
    add_shape(repainted, old.kind, color, old.center, (old.box[2] - old.box[0]) / 2, rgb)
    drawing.things[index] = repainted.things[0]


@dataclass(frozen=True)
class Print:
    """How characters are printed: a family of TYPEFACES, its weight, and the size in pixels."""

    family: str
    bold: bool
    size: int

    @property
    def font(self) -> ImageFont.FreeTypeFont:
        return load_font(TYPEFACES[self.family, self.bold], self.size)

    @property
    def stroke(self) -> int:
        return self.size // 24 if self.bold and self.family == "aileron" else 0

    def width(self, text: str) -> float:
        return sum(glyph_metrics(self, character)[0] for character in text)


@lru_cache(maxsize=2**15)
def glyph_metrics(style: Print, character: str) -> tuple[float, tuple[float, float, float, float]]:
    """How far the pen moves on after a character, and the box of its ink around the pen."""
    advance = style.font.getlength(character) + 2 * style.stroke
    return advance, style.font.getbbox(character, stroke_width=style.stroke)


@lru_cache(maxsize=1024)
def load_font(file: str | None, size: int) -> ImageFont.FreeTypeFont:
    if file is None:
        return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size))  # with a size it is one
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", file), size)


def any_print(rng: random.Random, size: int) -> Print:
    family, bold = rng.choice(tuple(TYPEFACES))
    return Print(family, bold, size)


def add_text(
    drawing: Drawing, text: str, color: str, corner: tuple[float, float], style: Print, rgb: tuple[int, int, int]
) -> None:
    """Write `text` from its upper left corner, each character (spaces excepted) as a thing of its own."""
    font, stroke = style.font, style.stroke
    x, y = corner
    picture_pen, map_pen = ImageDraw.Draw(drawing.image), ImageDraw.Draw(drawing.object_map)
    map_pen.fontmode = "1"  # an antialiased object map would invent objects
    for character in text:
        advance, box = glyph_metrics(style, character)
        if character != " ":
            drawing.things.append(Thing(character, color, (x + box[0], y + box[1], x + box[2], y + box[3])))
            picture_pen.text((x, y), character, fill=rgb, font=font, stroke_width=stroke)
            map_pen.text((x, y), character, fill=len(drawing.things), font=font, stroke_width=stroke)
        x += advance


def rotate(drawing: Drawing, degrees: float, fill: tuple[int, int, int]) -> None:
    """Turn picture and object map alike; the boxes of the things stay those of the upright drawing."""
    drawing.image = drawing.image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill)
    drawing.object_map = drawing.object_map.rotate(degrees, Image.Resampling.NEAREST)


def add_noise(drawing: Drawing, rng: random.Random, amount: int) -> None:
    noise = np.random.default_rng(rng.getrandbits(64)).integers(-amount, amount + 1, (*drawing.image.size[::-1], 1))
    drawing.image = Image.fromarray((np.asarray(drawing.image) + noise).clip(0, 255).astype(np.uint8))


def patch_labels(
    drawing: Drawing, crop: tuple[float, float, float, float], grid: tuple[int, int], patch_size: int = 14
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of a slice's patches, int64: indices into KIND_CLASSES and COLOR_CLASSES (rows * cols,), and in which of BOX_BINS
    parts of the picture's sides left, top, right and bottom of the thing lie (rows * cols, 4).

    `crop` is the part of the picture that the slice shows (left, top, right, bottom in pixels), `grid` its
    (rows, cols) of patches. A patch belongs to the thing that covers most of it; -100 (ignored) if that is under 10 %,
    or if it is a character too small to read. Only shapes have boxes, and only where the slice is the whole picture.
    """
    rows, cols = grid
    size = (cols * patch_size, rows * patch_size)
    pixels = np.asarray(drawing.object_map.resize(size, Image.Resampling.NEAREST, box=crop))
    pixels = pixels.reshape(rows, patch_size, cols, patch_size).transpose(0, 2, 1, 3).reshape(rows * cols, -1)
    bins = len(drawing.things) + 1
    offsets = np.arange(rows * cols)[:, None] * bins
    counts = np.bincount((pixels + offsets).ravel(), minlength=rows * cols * bins).reshape(rows * cols, bins)
    kinds = np.array([0] + [KIND_CLASSES.index(thing.kind) for thing in drawing.things])
    colors = np.array([0] + [COLOR_CLASSES.index(thing.color) for thing in drawing.things])
    sides = np.array(drawing.image.size * 2)
    boxes = np.full((bins, 4), -100)
    if crop == (0, 0, *drawing.image.size):
        for place, thing in enumerate(drawing.things, 1):
            if thing.kind in SHAPES:
                boxes[place] = (np.array(thing.box) / sides * BOX_BINS).astype(int).clip(0, BOX_BINS - 1)
    owner = counts[:, 1:].argmax(1) + 1 if bins > 1 else np.zeros(rows * cols, dtype=int)
    covered = np.take_along_axis(counts, owner[:, None], 1)[:, 0] if bins > 1 else np.zeros(rows * cols)
    owner = np.where(covered > 0, owner, 0)
    scale = rows * patch_size / (crop[3] - crop[1])
    small = [len(thing.kind) == 1 and scale * (thing.box[3] - thing.box[1]) < LEGIBLE for thing in drawing.things]
    small = [is_small and thing.kind not in ".:-=" for is_small, thing in zip(small, drawing.things, strict=True)]
    faint = ((covered > 0) & (covered < 0.1 * patch_size**2)) | np.array([False, *small])[owner]
    kinds, colors, boxes = kinds[owner], colors[owner], boxes[owner]
    kinds[faint] = colors[faint] = boxes[faint] = -100
    return kinds, colors, boxes
