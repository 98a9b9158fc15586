"""What the synthetic tasks show: shapes, printed lines, forms, pages with fine print, bar charts, clips.

What is special:
- each scene draws itself and states the facts about it: task, subject, answer and, where it takes steps, the thought;
- printed text of three or more characters belongs to one split (`split_of_text`), so that no test text is ever trained on;
- all chance comes from the `random.Random` that is handed in, and words come from a `Wording`.
"""

import random
import string
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import cast

from PIL import Image, ImageDraw

from minicpmv.drawn.drawing import (
    COLORS,
    SHAPES,
    Drawing,
    Print,
    Thing,
    add_noise,
    add_shape,
    add_text,
    any_print,
    draw_background,
    jitter,
    outer_box,
    rotate,
)
from minicpmv.drawn.wording import Wording


CAPITALS = string.digits + string.ascii_uppercase
SMALL_LETTERS = string.digits + string.ascii_lowercase
FORM_KEYS = [
    "NAME",
    "CITY",
    "ROOM",
    "SEAT",
    "GATE",
    "CODE",
    "ITEM",
    "DATE",
    "TIME",
    "TOTAL",
    "TAX",
    "PRICE",
    "CASH",
    "QTY",
    "ORDER",
    "TABLE",
    "MODEL",
    "LOT",
    "TRAIN",
    "FLIGHT",
    "UNIT",
    "COLOR",
]
FRAMES = 6  # of a clip; all of them fit into one set of queries


@dataclass
class Fact:
    """One thing that is true and plain to see: what to ask for (`task` is a key of Wording.phrases), and the answer."""

    task: str
    subject: str | tuple[str, ...]
    answer: str
    thought: str | None = None


def split_of_text(text: str) -> str:
    """The only split in which a text of three or more characters is ever drawn: 1 in 10 each for validation and test."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")


def draw_until(split: str, rng: random.Random, propose) -> str:
    while True:
        text = propose(rng)
        if len(text) < 3 or split_of_text(text) == split:
            return text


def picture_size(
    rng: random.Random, short: tuple[int, int], widest: float = 1.6, upright: float = 0.2
) -> tuple[int, int]:
    side = rng.randint(*short)
    other = round(side * rng.uniform(1, widest))
    return (side, other) if rng.random() < upright else (other, side)


def blank(size: tuple[int, int], rng: random.Random) -> tuple[Drawing, bool]:
    image, dark = draw_background(size, rng)
    return Drawing(image, Image.new("L", size, 0)), dark


def ink(rng: random.Random, dark: bool, colored: float) -> tuple[str, tuple[int, int, int]]:
    """The name and value of a color for print; `colored` is the share that is neither black nor white."""
    if rng.random() >= colored:
        return "neutral", (240, 240, 240) if dark else (15, 15, 15)
    color = rng.choice([name for name in COLORS if dark or name != "yellow"])  # yellow on white cannot be read
    return color, jitter(COLORS[color], rng)


# --- Shapes ---


def shapes_scene(
    rng: random.Random, say: Wording, size: tuple[int, int], repeated: bool = False, most: int = 6
) -> tuple[Drawing, list[Fact]]:
    """One to `most` shapes; `repeated`: of two or three kinds and colors, so that most are there several times."""
    drawing, _ = blank(size, rng)
    count = rng.randint(1, most)
    smallest, biggest = {1: (0.14, 0.4), 2: (0.14, 0.26), 3: (0.13, 0.22), 4: (0.12, 0.2)}.get(count, (0.11, 0.17))
    placed: list[tuple[float, float, float]] = []
    while len(placed) < count:
        radius = min(size) * rng.uniform(smallest, biggest)
        margin = radius * 1.1
        for _ in range(30):
            x, y = rng.uniform(margin, size[0] - margin), rng.uniform(margin, size[1] - margin)
            if all((x - u) ** 2 + (y - v) ** 2 > (1.15 * (radius + r)) ** 2 for u, v, r in placed):
                placed.append((x, y, radius))
                break
        else:
            placed.clear()  # no room left: begin again
    same_kind = rng.choice(SHAPES) if rng.random() < 0.25 else None
    few = [(rng.choice(SHAPES), rng.choice(tuple(COLORS))) for _ in range(rng.randint(2, 3))] if repeated else []
    for x, y, radius in placed:
        kind, color = rng.choice(few) if few else (same_kind or rng.choice(SHAPES), rng.choice(tuple(COLORS)))
        add_shape(drawing, kind, color, (x, y), radius, jitter(COLORS[color], rng))
    return drawing, shape_facts(drawing, rng, say)


def shape_facts(drawing: Drawing, rng: random.Random, say: Wording) -> list[Fact]:
    things = by_axis(drawing.things, 0)
    kinds, colors = [thing.kind for thing in things], [thing.color for thing in things]
    names = [say.named(thing.color, thing.kind) for thing in things]
    listing = say.listing(names)
    seen = say.seen.format(listing)
    facts = [Fact("count", "shape", str(len(things)), seen), Fact("caption", "", listing)]
    if len(things) == 1:
        facts += [Fact("only_shape", "", say.shapes[kinds[0]]), Fact("colour", "shape", say.colors[colors[0]])]
    for thing in things:
        if kinds.count(thing.kind) == 1:
            facts.append(Fact("colour", thing.kind, say.colors[thing.color], seen))
        if colors.count(thing.color) == 1:
            facts.append(Fact("shape", thing.color, say.shapes[thing.kind], seen))
        facts.append(Fact("count", thing.kind, str(kinds.count(thing.kind)), seen))
    if len(things) > 1:
        for axis, low, high in ((0, "left", "right"), (1, "top", "bottom")):
            ordered, gap = by_axis(things, axis), 0.12 * drawing.image.size[axis]
            for side, end, inner in ((low, ordered[0], ordered[1]), (high, ordered[-1], ordered[-2])):
                if abs(end.center[axis] - inner.center[axis]) > gap:
                    facts.append(Fact("position", side, say.shapes[end.kind], seen))
                    facts.append(Fact("position_colour", side, say.colors[end.color], seen))
    color = rng.choice(colors)
    facts.append(Fact("count", f"{color} shape", str(colors.count(color)), seen))
    facts += [absent_fact(things, rng, say, seen) for _ in range(3)]
    facts += repeated_facts(things, say, seen)
    facts += box_facts(drawing, say)
    if len(things) > 1:
        facts.append(price_fact(things, rng, say))
    return facts


def absent_fact(things: list[Thing], rng: random.Random, say: Wording, seen: str) -> Fact:
    """As many questions are answered yes as no; what is absent shares a color or a shape with what is there, half the time."""
    pairs = {(thing.color, thing.kind) for thing in things}
    colors, kinds = sorted({color for color, _ in pairs}), sorted({kind for _, kind in pairs})
    if rng.random() < 0.5:
        there = rng.choice(things)
        name = say.named(there.color, there.kind) if rng.random() < 0.6 else say.shapes[there.kind]
        return Fact("absent_object", say.with_article(name), say.yes, seen)
    near = [(color, kind) for color in colors for kind in kinds if (color, kind) not in pairs]
    far = [(color, kind) for color in COLORS for kind in SHAPES if (color, kind) not in pairs]
    absent_kinds = [kind for kind in SHAPES if kind not in kinds]
    if absent_kinds and rng.random() < 0.4:
        name = say.shapes[rng.choice(absent_kinds)]
    else:
        name = say.named(*rng.choice(near if near and rng.random() < 0.6 else far))
    return Fact("absent_object", say.with_article(name), say.no, seen)


def repeated_facts(things: list[Thing], say: Wording, seen: str) -> list[Fact]:
    """Is something there at least n times? For what is there c > 1 times: 2 to c times (yes), c + 1 times (no). For one
    thing that is there once: twice (no), and in some pictures only, so that there are not many more noes."""
    asked = []
    counts = Counter((thing.color, thing.kind) for thing in things)
    for name, count in counts.items():
        if count > 1:
            asked += [(name, times, say.yes) for times in range(2, count + 1)] + [(name, count + 1, say.no)]
    single = next((name for name, count in counts.items() if count == 1), None)
    if single is not None and (asked or len(things) == 5):
        asked.append((single, 2, say.no))
    return [
        Fact("repeated_object", say.at_least(say.named(*name), times), answer, seen) for name, times, answer in asked
    ]


def box_facts(drawing: Drawing, say: Wording) -> list[Fact]:
    """Where each thing is, and that a thing of another color is not there: the answer then says so, without a box."""
    named: dict[str, list[str]] = {}
    for thing in by_axis(drawing.things, 0):
        named.setdefault(say.named(thing.color, thing.kind), []).append(box_text(outer_box(thing), drawing.image.size))
    facts = []
    for name, boxes in named.items():
        answer = "".join(boxes)
        facts += [Fact("grounding", name, answer), Fact("where", name, f"<ref>{name}</ref>{answer}")]
    there = drawing.things[0]
    absent = [color for color in COLORS if color not in {thing.color for thing in drawing.things}]
    if absent:  # one of them, without asking for chance: pictures stay those of the versions before this question
        name = say.named(absent[int(sum(there.box)) % len(absent)], there.kind)
        facts += [Fact(task, name, say.nothing.format(name)) for task in ("grounding", "where")]
    return facts


def box_text(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """A box in the model's words: thousandths of the sides, rounded to tens, since a pixel of a view is nine of them."""
    corners = (round(100 * corner / size[i % 2]) * 10 for i, corner in enumerate(box))
    return "<box>" + " ".join(str(min(1000, max(0, corner))) for corner in corners) + "</box>"


def price_fact(things: list[Thing], rng: random.Random, say: Wording) -> Fact:
    kinds = [thing.kind for thing in things]
    prices = {kind: rng.randint(1, 9) for kind in sorted(set(kinds))}
    asked = say.comma.join(say.price.format(name=say.shapes[kind], price=price) for kind, price in prices.items())
    listed = say.comma.join(f"{say.shapes[kind]} {prices[kind]}" for kind in kinds)
    return Fact("multistep_price", asked, *running_sum([prices[kind] for kind in kinds], listed + "\n"))


def running_sum(terms: list[int], before: str = "") -> tuple[str, str]:
    """The sum, and the written steps that lead to it."""
    total, steps = terms[0], []
    for term in terms[1:]:
        sign = "+" if term >= 0 else "-"
        steps.append(f"{total}{sign}{abs(term)}={total + term}")
        total += term
    return str(total), (before + "\n".join(steps)).strip()


def by_axis(things: list[Thing], axis: int) -> list[Thing]:
    return sorted(things, key=lambda thing: thing.center[axis])


# --- Print ---


def propose_line(rng: random.Random, letters: str, lengths: tuple[int, int]) -> str:
    length = rng.randint(*lengths)
    alphabet = letters if rng.random() < 0.6 else rng.choice((letters[:10], letters[10:]))
    return "".join(rng.choice(alphabet) for _ in range(length))


def write_line(rng: random.Random, text: str, colored: float) -> tuple[Drawing, str]:
    """A picture around one line of print, at times turned a little and with light noise; and the color of the print."""
    style = any_print(rng, rng.randint(16, 44))
    width, height = style.width(text), style.size * 1.3
    size = (round(max(width * rng.uniform(1.06, 1.5), 48)), round(height * rng.uniform(1.2, 3.0)))
    size = (max(size[0], size[1]), max(size[1], round(size[0] / 3.5)))  # from square to 3.5 times as wide as high
    drawing, dark = blank(size, rng)
    color, rgb = ink(rng, dark, colored)
    corner = rng.uniform(2, max(2, size[0] - width - 2)), rng.uniform(0, max(0, size[1] - height))
    add_text(drawing, text, color, corner, style, rgb)
    if rng.random() < 0.3 and size[1] > 1.6 * height:
        room = (size[1] - height) / 2 / size[0]
        background = cast(tuple[int, int, int], drawing.image.getpixel((0, 0)))
        rotate(drawing, rng.uniform(-1, 1) * min(6, 57 * room), background)
    if rng.random() < 0.3:
        add_noise(drawing, rng, rng.randint(5, 20))
    return drawing, color


def line_scene(
    rng: random.Random, say: Wording, split: str, lengths: tuple[int, int] = (4, 12), lower: bool = False
) -> tuple[Drawing, list[Fact]]:
    letters = SMALL_LETTERS if lower else CAPITALS
    text = draw_until(split, rng, lambda rng: propose_line(rng, letters, lengths))
    drawing, color = write_line(rng, text, colored=0.5)
    facts = [Fact("printed_line", "", text, say.seen.format(text))]
    if color != "neutral":
        facts.append(Fact("text_colour", "", say.colors[color]))
    return drawing, facts


def sum_scene(rng: random.Random, say: Wording) -> tuple[Drawing, list[Fact]]:
    """Three to five one-digit numbers to add and subtract; no partial sum is negative."""
    terms = [rng.randint(1, 9)]
    for _ in range(rng.randint(2, 4)):
        term = rng.randint(1, 9)
        terms.append(-term if term <= sum(terms) and rng.random() < 0.4 else term)
    text = str(terms[0]) + "".join(f"{term:+d}" for term in terms[1:])
    drawing, _ = write_line(rng, text, colored=0.3)
    return drawing, [Fact("multistep_sum", "", *running_sum(terms, text + "\n")), Fact("printed_line", "", text)]


def propose_value(rng: random.Random, key: str) -> str:
    digits, letters = string.digits, string.ascii_uppercase
    if key in ("TOTAL", "TAX", "PRICE", "CASH"):
        return f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"
    if key == "DATE":
        return f"{rng.randint(1, 28):02d}/{rng.randint(1, 12):02d}"
    if key == "TIME":
        return f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    if key in ("QTY", "TABLE", "ROOM", "ORDER", "LOT"):
        return str(rng.randint(1, 9999))
    if key in ("NAME", "CITY", "ITEM", "COLOR"):
        return "".join(rng.choice(letters) for _ in range(rng.randint(3, 6)))
    return "".join(rng.choice(digits + letters) for _ in range(rng.randint(3, 5)))


def entries(rng: random.Random, split: str, count: int) -> dict[str, str]:
    keys = rng.sample(FORM_KEYS, count)
    return {key: draw_until(split, rng, lambda rng, key=key: propose_value(rng, key)) for key in keys}


def form_scene(rng: random.Random, say: Wording, split: str) -> tuple[Drawing, list[Fact]]:
    """A form or receipt: a title and three to five lines with a key and a value."""
    values = entries(rng, split, rng.randint(3, 5))
    style = any_print(rng, rng.randint(17, 22))
    widest = max(style.width(f"{key}: {value}") for key, value in values.items())
    width = round(widest * rng.uniform(1.1, 1.4)) + 8
    pitch = style.size * rng.uniform(1.35, 1.7)
    title = rng.random() < 0.5
    lines = [f"{key}: {value}" for key, value in values.items()]
    size = (width, round(pitch * (len(values) + title) + style.size))
    drawing, dark = blank(size, rng)
    name, rgb = ink(rng, dark, colored=0.3)
    left, y = rng.uniform(3, 8), style.size * 0.4
    if title:
        heading = Print(style.family, True, style.size)
        text = rng.choice(("RECEIPT", "TICKET", "FORM", "BILL"))
        lines.insert(0, text)
        add_text(drawing, text, name, ((width - heading.width(text)) / 2, y), heading, rgb)
        y += pitch
    in_column = rng.random() < 0.5  # values begin at the right edge, or behind their keys
    for key, value in values.items():
        add_text(drawing, f"{key}:", name, (left, y), style, rgb)
        x = width - left - style.width(value) if in_column else left + style.width(f"{key}: ")
        add_text(drawing, value, name, (x, y), style, rgb)
        y += pitch
    if rng.random() < 0.2:
        add_noise(drawing, rng, rng.randint(5, 15))
    text = "\n".join(lines)
    facts = [Fact("form_value", key, value, f"{key}: {value}") for key, value in values.items()]
    return drawing, [*facts, Fact("printed_line", "", text)]


def page_scene(rng: random.Random, say: Wording, split: str, seen: int) -> tuple[Drawing, list[Fact]]:
    """A page of 900 to 1344 pixels a side: a shape, a large heading, and three or four entries in fine print.

    `seen` is the side in pixels that a model sees of a square page when it takes all its slices: the print is just
    large enough for that, and a third of it or less in the overview.
    """
    size = (rng.randint(900, 1344), rng.randint(900, 1344))
    drawing, dark = blank(size, rng)
    scale = seen / (size[0] * size[1]) ** 0.5
    kind, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    radius = min(size) * rng.uniform(0.1, 0.16)
    center = (rng.uniform(radius * 1.2, size[0] - radius * 1.2), rng.uniform(radius * 1.2, size[1] * 0.3))
    add_shape(drawing, kind, color, center, radius, jitter(COLORS[color], rng))
    name, rgb = ink(rng, dark, colored=0.3)
    values = entries(rng, split, rng.randint(3, 4))
    style = any_print(rng, round(rng.uniform(15, 18) / scale))
    top, bottom = max(size[1] * 0.32, center[1] + radius * 1.2), size[1] - style.size * 1.6
    pitch = (bottom - top) / len(values)
    for i, (key, value) in enumerate(values.items()):
        text = f"{key}: {value}"
        x = rng.uniform(10, max(10, size[0] - style.width(text) - 10))
        y = top + pitch * (i + rng.uniform(0, max(0.0, 1 - 1.4 * style.size / pitch)))
        add_text(drawing, text, name, (x, y), style, rgb)
    text = "\n".join(f"{key}: {value}" for key, value in values.items())
    facts = [Fact("form_value", key, value, f"{key}: {value}") for key, value in values.items()]
    facts += [Fact("printed_line", "", text), Fact("only_shape", "", say.shapes[kind])]
    return drawing, [*facts, Fact("colour", "shape", say.colors[color])]


# --- Charts ---


def chart_scene(rng: random.Random, say: Wording) -> tuple[Drawing, list[Fact]]:
    """A bar chart: three to five bars of whole numbers 1 to 9, named by letters, with lines and numbers at 3, 6, 9."""
    side = rng.randint(112, 200)
    size = (round(side * rng.uniform(1.0, 1.5)), side)
    drawing, dark = blank(size, rng)
    line = (90, 90, 90) if dark else (170, 170, 170)
    rgb = (240, 240, 240) if dark else (15, 15, 15)
    style = any_print(rng, max(11, round(side * 0.12)))
    left, bottom = style.width("9") + 6, side - style.size * 1.35
    unit = (bottom - style.size * 0.7) / 9.3
    pen = ImageDraw.Draw(drawing.image)
    for tick in (0, 3, 6, 9):
        y = bottom - tick * unit
        pen.line((left, y, size[0] - 2, y), fill=line if tick else rgb)
        if tick:
            add_text(drawing, str(tick), "neutral", (2, y - style.size * 0.6), style, rgb)
    count = rng.randint(3, 5)
    start = rng.choice((0, rng.randint(0, 20)))
    names = string.ascii_uppercase[start : start + count]
    values = [rng.randint(1, 9) for _ in names]
    colors = rng.sample(tuple(COLORS), count) if rng.random() < 0.6 else [rng.choice(tuple(COLORS))] * count
    pitch = (size[0] - left - 4) / count
    for i, (name, value, color) in enumerate(zip(names, values, colors, strict=True)):
        x = left + pitch * (i + 0.2)
        box = (x, bottom - value * unit, x + pitch * 0.6, bottom)
        drawing.things.append(Thing("square", color, box))
        pen.rectangle(box, fill=jitter(COLORS[color], rng))
        ImageDraw.Draw(drawing.object_map).rectangle(box, fill=len(drawing.things))
        add_text(drawing, name, "neutral", (x + pitch * 0.3 - style.width(name) / 2, bottom + 1), style, rgb)
    seen = say.comma.join(f"{name} {value}" for name, value in zip(names, values, strict=True))
    facts = [Fact("chart_bars", "", str(count), seen), Fact("caption", "", seen)]
    facts += [Fact("chart_value", name, str(value), seen) for name, value in zip(names, values, strict=True)]
    for task, end in (("chart_highest", max(values)), ("chart_lowest", min(values))):
        if values.count(end) == 1:
            facts.append(Fact(task, "", names[values.index(end)], seen))
    return drawing, facts


# --- Clips ---


def clip_scene(
    rng: random.Random, say: Wording, size: tuple[int, int], story: str, thing: tuple[str, str] | None = None
) -> tuple[list[Drawing], list[Fact]]:
    """Six frames of one shape that moves ("move"), takes three colors one after the other ("order") or flashes ("flash").

    `thing` is its shape and color; drawn, if not given. Thoughts say what is seen in one frame after the other.
    """
    kind, color = thing or (rng.choice(SHAPES), rng.choice(tuple(COLORS)))
    radius = min(size) * rng.uniform(0.16, 0.26)
    background, _ = draw_background(size, rng)
    center = [rng.uniform(radius * 1.2, side - radius * 1.2) for side in size]
    colors, places, visible = [color] * FRAMES, [center] * FRAMES, [True] * FRAMES
    facts = [Fact("only_shape", "", say.shapes[kind])]
    if story == "move":
        way = rng.choice(("left", "right", "up", "down"))
        axis = 0 if way in ("left", "right") else 1
        track = [radius * 1.2 + (size[axis] - 2.4 * radius) * i / (FRAMES - 1) for i in range(FRAMES)]
        if way in ("left", "up"):
            track.reverse()
        places = [[step, center[1]] if axis == 0 else [center[0], step] for step in track]
        began = {"left": "right", "right": "left", "up": "bottom", "down": "top"}[way]
        ends = {"up": "top", "down": "bottom"}.get(way, way)
        path = say.seen.format(f"{say.sides[began]}{say.comma}{say.sides[ends]}")
        facts += [Fact("video_direction", "", say.sides[way], path), Fact("colour", "shape", say.colors[color])]
        told = say.moves.format(name=say.named(color, kind), way=say.ways[way])
        facts.append(Fact("clip_description", "", told))
    elif story == "order":
        three = rng.sample(tuple(COLORS), 3)
        first, second = sorted(rng.sample(range(1, FRAMES), 2))
        colors = [three[0]] * first + [three[1]] * (second - first) + [three[2]] * (FRAMES - second)
        order, frames = (say.comma.join(say.colors[name] for name in names) for names in (three, colors))
        seen = say.seen.format(frames)
        facts += [
            Fact("video_order", "", order, seen),
            Fact("video_first", "", say.colors[three[0]], seen),
            Fact("video_last", "", say.colors[three[2]], seen),
            Fact("clip_description", "", say.changes.format(shape=say.shapes[kind], colors=order)),
        ]
    else:
        flashes = 0
        wanted = rng.randint(1, 3)  # a flash is a stretch of frames in which the shape is there
        while flashes != wanted:
            visible = [rng.random() < 0.5 for _ in range(FRAMES)]
            flashes = sum(on and (i == 0 or not visible[i - 1]) for i, on in enumerate(visible))
        seen = say.seen.format(say.comma.join(say.yes if on else say.no for on in visible))
        facts += [Fact("video_count", "", str(flashes), seen), Fact("colour", "shape", say.colors[color])]
        told = say.appears.format(name=say.named(color, kind), count=say.often[flashes])
        facts.append(Fact("clip_description", "", told))
    drawings: list[Drawing] = []
    for now, place, shown in zip(colors, places, visible, strict=True):
        drawing = Drawing(background.copy(), Image.new("L", size, 0))
        if shown:
            add_shape(drawing, kind, now, place, radius, COLORS[now])
        drawings.append(drawing)
    return drawings, facts


def times_fact(drawings: list[Drawing], times: list[int], say: Wording) -> Fact:
    """When each color of a clip first appears, by the times of its frames in tenths of a second."""
    colors = [drawing.things[0].color for drawing in drawings]
    starts = [i for i, color in enumerate(colors) if i == 0 or color != colors[i - 1]]
    return Fact(
        "clip_times",
        "",
        say.comma.join(say.at.format(color=say.colors[colors[i]], seconds=f"{times[i] / 10:.1f} s") for i in starts),
    )
