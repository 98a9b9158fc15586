"""Questions about drawn pictures: an endless, seeded stream of samples, from which training and tests take their parts.

What is special:
- sample `index` of a split depends on (split, seed, index) alone: streams resume anywhere, and no state is shared;
- the splits never share a random state, and words and numbers of three or more characters belong to one split each,
  so that reading a test picture cannot be remembered from training;
- a sample carries several questions, asked as turns of one conversation: one encoded picture teaches several answers.
"""

import random
import string
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image

from minicpmv.data.drawing import COLORS, SHAPES, Drawing, add_shape, add_text, draw_background, jitter, text_width


SPLITS = ("train", "validation", "test")
WORDS = (
    "ACT ADD AGE AIR ARM ART BAG BALL BAR BED BIG BIRD BLUE BOAT BOOK BOX BOY BUS BUY CAFE CAKE CALL CAR CARD CAT "
    "CITY COAT COLD COW CUP DAY DESK DOG DOOR DOWN DRY DUCK EAR EAST EAT EGG END EXIT EYE FACE FAN FARM FAST FIRE "
    "FISH FLAG FOOD FOX FREE FROG GAME GAS GATE GIFT GIRL GO GOAT GOLD GOOD GREY HAIR HAND HAT HELP HEN HILL HOME "
    "HOT ICE INK JAM JAR JOB KEY KING KITE LAKE LAMP LEAF LEG LIFE LION LIP LOVE MAN MAP MILK MOON NAME NET NEW NEXT "
    "NO NORTH NOSE OIL OLD OPEN OUT OWL OX PAN PARK PEN PIG PLAY POST RAIN RED RING ROAD ROOM ROSE RUN SALE SEA SHIP "
    "SHOP SHOE SKY SNOW SOAP STAR STOP SUN TAXI TEA TEN TIME TREE TWO UP VAN WALL WEST WIND WOLF YES ZERO ZOO"
).split()
WORDS = tuple(word for word in WORDS if 3 <= len(word) <= 4)

# Several ways to ask for the same thing; {} is filled from the scene.
PHRASES = {
    "color": ("What color is the {}?", "What colour is the {}?", "Which color is the {}?", "The {} is what color?"),
    "shape": ("What shape is {}?", "Which shape is {}?", "What is the {} shape?", "What is the {} thing?"),
    "only_shape": (
        "What shape is this?",
        "What shape is in the picture?",
        "Which shape is it?",
        "What is in the picture?",
    ),
    "count": (
        "How many {}s are there?",
        "How many {}s are in the picture?",
        "How many {}s do you see?",
        "Count the {}s.",
    ),
    "position": ("What shape is on the {}?", "Which shape is on the {}?", "What is on the {}?"),
    "position_color": ("What color is the shape on the {}?", "What colour is the {} shape?"),
    "exists": ("Is there a {}?", "Is there a {} in the picture?", "Do you see a {}?"),
    "describe": ("Describe the picture.", "Describe this picture.", "What do you see?"),
    "number": ("What number is this?", "Read the number.", "What number is written?", "What does it say?"),
    "word": ("What word is this?", "Read the word.", "What word is written?", "What does it say?"),
    "text": ("Read the text.", "What is written here?", "What is the text?"),
    "text_color": ("What color is the text?", "What colour is the text?", "Which color is the text?"),
    "move": ("Which way does the shape move?", "Where does the shape move?", "In which direction does it move?"),
    "first": ("Which color comes first?", "What color comes first?", "What is the first color?"),
    "last": ("Which color comes last?", "What color comes last?", "What is the last color?"),
    "flash": ("How many times does the shape appear?", "How many times does it flash?", "Count the flashes."),
}


class UnknownSplitError(ValueError):
    """The split is none of SPLITS."""


@dataclass
class Turn:
    task: str
    question: str
    answer: str


@dataclass
class Sample:
    """One picture (or the frames of one clip) and the turns asked about it.

    temporal_ids: None for a picture, else groups of frame times in tenths of a second (one pack each).
    max_slice_nums: how many slices the picture may be cut into; a clip is never cut.
    """

    drawings: list[Drawing]
    turns: list[Turn]
    temporal_ids: list[list[int]] | None = None
    max_slice_nums: int = 1

    @property
    def images(self) -> list[Image.Image]:
        return [drawing.image for drawing in self.drawings]


@dataclass
class Mixture:
    """Shares of a stream. The rest after text and video are scenes of shapes; `sliced` is a share of the pictures."""

    text: float = 0.35
    video: float = 0.15
    sliced: float = 0.15
    max_slice_nums: int = 4
    max_turns: int = 4


def sample_rng(split: str, seed: int, index: int) -> random.Random:
    """The random state of one sample; another split, seed or index is another state (the text is hashed whole)."""
    if split not in SPLITS:
        raise UnknownSplitError(f"split {split!r} is none of {', '.join(SPLITS)}")
    return random.Random(f"{split}/{seed}/{index}")


def split_of_text(text: str) -> str:
    """The only split in which a text of three or more characters is ever drawn: 1 in 10 each for validation and test."""
    return {0: "validation", 1: "test"}.get(zlib.crc32(text.encode()) % 10, "train")


def draw_until(split: str, rng: random.Random, propose) -> str:
    while True:
        text = propose(rng)
        if len(text) < 3 or split_of_text(text) == split:
            return text


def picture_size(rng: random.Random, short: tuple[int, int] = (112, 240)) -> tuple[int, int]:
    side = rng.randint(*short)
    other = round(side * rng.choice((1, 1.2, 4 / 3, 4 / 3, 1.5)))
    return (other, side) if rng.random() < 0.75 else (side, other)


def blank(size: tuple[int, int], rng: random.Random) -> tuple[Drawing, bool]:
    image, dark = draw_background(size, rng)
    return Drawing(image, Image.new("L", size, 0)), dark


# --- Scenes of shapes ---


def shapes_scene(rng: random.Random, size: tuple[int, int]) -> Drawing:
    drawing, _ = blank(size, rng)
    count = rng.choice((1, 2, 2, 3, 3, 4, 4))
    short = min(size)
    biggest = {1: 0.4, 2: 0.26, 3: 0.22, 4: 0.2}[count]
    placed = []
    while len(placed) < count:
        radius = short * rng.uniform(0.14, biggest)
        margin = radius * 1.1
        for _ in range(30):
            x, y = rng.uniform(margin, size[0] - margin), rng.uniform(margin, size[1] - margin)
            if all((x - u) ** 2 + (y - v) ** 2 > (1.15 * (radius + r)) ** 2 for u, v, r in placed):
                placed.append((x, y, radius))
                break
        else:
            placed.clear()  # no room left: begin again
    same_kind = rng.choice(SHAPES) if rng.random() < 0.25 else None
    for x, y, radius in placed:
        kind, color = same_kind or rng.choice(SHAPES), rng.choice(tuple(COLORS))
        add_shape(drawing, kind, color, (x, y), radius, jitter(COLORS[color], rng))
    return drawing


def with_article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def shape_facts(drawing: Drawing, rng: random.Random) -> list[tuple[str, str, str]]:
    """Every (task, what is filled into the phrase, answer) that is true and plain to see in the scene."""
    things = drawing.things
    kinds, colors = [thing.kind for thing in things], [thing.color for thing in things]
    facts = [("count", "shape", str(len(things)))]
    facts.append(("describe", "", ", ".join(with_article(f"{t.color} {t.kind}") for t in by_axis(things, 0))))
    if len(things) == 1:
        facts += [("only_shape", "", kinds[0]), ("color", "shape", colors[0]), ("color", kinds[0], colors[0])]
    for thing in things:
        if kinds.count(thing.kind) == 1:
            facts.append(("color", thing.kind, thing.color))
        if colors.count(thing.color) == 1:
            facts.append(("shape", thing.color, thing.kind))
    if len(things) > 1:
        for axis, low, high in ((0, "left", "right"), (1, "top", "bottom")):
            ordered, gap = by_axis(things, axis), 0.12 * drawing.image.size[axis]
            for side, end, inner in ((low, ordered[0], ordered[1]), (high, ordered[-1], ordered[-2])):
                if abs(end.center[axis] - inner.center[axis]) > gap:
                    facts += [("position", side, end.kind), ("position_color", side, end.color)]
    kind, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    facts.append(("count", kind, str(kinds.count(kind))))
    facts.append(("count", f"{color} shape", str(colors.count(color))))
    # As many questions answered yes as no.
    if rng.random() < 0.5:
        there = rng.choice(things)
        names = (there.kind, f"{there.color} {there.kind}")
        facts.append(("exists", rng.choice(names), "yes"))
    else:
        pairs = list(zip(colors, kinds, strict=True))
        absent = [k for k in SHAPES if k not in kinds]
        absent += [f"{c} {k}" for c in set(colors) for k in set(kinds) if (c, k) not in pairs]
        if absent:
            facts.append(("exists", rng.choice(absent), "no"))
    return facts


def by_axis(things, axis: int):
    return sorted(things, key=lambda thing: thing.center[axis])


# --- Scenes of print ---


def propose_number(rng: random.Random) -> str:
    digits = rng.choice((1, 2, 2, 3, 3, 4, 4))
    return str(rng.randint(10 ** (digits - 1) if digits > 1 else 0, 10**digits - 1))


def propose_word(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(WORDS)
    return "".join(rng.choice(string.ascii_uppercase) for _ in range(rng.choice((3, 4))))


def text_scene(rng: random.Random, size: tuple[int, int], split: str) -> tuple[Drawing, str]:
    drawing, dark = blank(size, rng)
    text = draw_until(split, rng, propose_number if rng.random() < 0.5 else propose_word)
    bold = rng.random() < 0.5
    room = size[0] * 0.92
    largest = min(size[1] * 0.6, 40 * room / text_width(text, 40, bold))
    points = max(8, int(largest * rng.uniform(0.7, 1.0)))
    width, height = text_width(text, points, bold), points * 1.25
    corner = (
        rng.uniform(0.03 * size[0], max(0.03 * size[0], 0.97 * size[0] - width)),
        rng.uniform(0, max(0, size[1] - height)),
    )
    if rng.random() < 0.4:
        color, rgb = "neutral", (240, 240, 240) if dark else (15, 15, 15)
    else:
        # Yellow on white cannot be read.
        color = rng.choice([name for name in COLORS if dark or name != "yellow"])
        rgb = jitter(COLORS[color], rng)
    add_text(drawing, text, color, corner, points, bold, rgb)
    return drawing, text


def text_facts(drawing: Drawing, text: str) -> list[tuple[str, str, str]]:
    kind = "number" if text[0].isdigit() else "word"
    facts = [(kind, "", text), ("text", "", text), ("describe", "", f"the {kind} {text}")]
    if drawing.things[0].color != "neutral":
        facts.append(("text_color", "", drawing.things[0].color))
    return facts


# --- Clips ---


def clip_frames(rng: random.Random, size: tuple[int, int]) -> tuple[list[Drawing], list[tuple[str, str, str]]]:
    """Four to six frames of one shape that moves, changes color or flashes."""
    frames, story = rng.randint(4, 6), rng.choice(("move", "change", "flash"))
    kind, color = rng.choice(SHAPES), rng.choice(tuple(COLORS))
    radius = min(size) * rng.uniform(0.16, 0.26)
    background, _ = draw_background(size, rng)
    center = [rng.uniform(radius * 1.2, side - radius * 1.2) for side in size]
    colors, places, visible = [color] * frames, [center] * frames, [True] * frames
    facts = []
    if story == "move":
        way = rng.choice(("left", "right", "up", "down"))
        axis = 0 if way in ("left", "right") else 1
        track = [radius * 1.2 + (size[axis] - 2.4 * radius) * i / (frames - 1) for i in range(frames)]
        if way in ("left", "up"):
            track.reverse()
        places = [[step, center[1]] if axis == 0 else [center[0], step] for step in track]
        facts += [("move", "", way), ("only_shape", "", kind), ("color", "shape", color)]
    elif story == "change":
        other = rng.choice([name for name in COLORS if name != color])
        switch = rng.randint(2, frames - 2)
        colors = [color] * switch + [other] * (frames - switch)
        facts += [("first", "", color), ("last", "", other), ("only_shape", "", kind)]
    else:
        visible = [True]
        while len(visible) < frames:
            visible.append(not visible[-1] if rng.random() < 0.7 else visible[-1])
        if rng.random() < 0.5:
            visible.reverse()
        flashes = sum(on and (i == 0 or not visible[i - 1]) for i, on in enumerate(visible))
        facts += [("flash", "", str(flashes)), ("color", "shape", color), ("only_shape", "", kind)]
    drawings = []
    for now, place, shown in zip(colors, places, visible, strict=True):
        drawing = Drawing(background.copy(), Image.new("L", size, 0))
        if shown:
            add_shape(drawing, kind, now, place, radius, COLORS[now])
        drawings.append(drawing)
    return drawings, facts


def frame_groups(count: int, rng: random.Random) -> list[list[int]]:
    """Times of `count` frames in tenths of a second, cut into packs of 1 to 6."""
    step, start, size = rng.uniform(1, 6), rng.uniform(0, 3), rng.choice((1, 2, 3, 6))
    times = [int(start + step * i) for i in range(count)]
    return [times[i : i + size] for i in range(0, count, size)]


# --- The stream ---


def make_sample(split: str, seed: int, index: int, mixture: Mixture) -> Sample:
    """Sample `index` of a split: deterministic in (split, seed, index) for one mixture."""
    rng = sample_rng(split, seed, index)
    part = rng.random()
    temporal_ids, max_slice_nums = None, 1
    if part < mixture.video:
        drawings, facts = clip_frames(rng, picture_size(rng, (96, 160)))
        temporal_ids = frame_groups(len(drawings), rng)
    else:
        sliced = rng.random() < mixture.sliced
        size = picture_size(rng, (160, 336) if sliced else (112, 240))
        max_slice_nums = mixture.max_slice_nums if sliced else 1
        if part < mixture.video + mixture.text:
            drawing, text = text_scene(rng, size, split)
            facts = text_facts(drawing, text)
        else:
            drawing = shapes_scene(rng, size)
            facts = shape_facts(drawing, rng)
        drawings = [drawing]
    # Tasks first, then facts, so that tasks with many facts are not asked more often than others.
    tasks = sorted({task for task, _, _ in facts})
    rng.shuffle(tasks)
    turns = []
    for task in tasks[: rng.randint(1, mixture.max_turns)]:
        _, subject, answer = rng.choice([fact for fact in facts if fact[0] == task])
        turns.append(Turn(task, rng.choice(PHRASES[task]).format(subject), answer))
    return Sample(drawings, turns, temporal_ids, max_slice_nums)


def stream(split: str, seed: int, mixture: Mixture, start: int = 0) -> Iterator[Sample]:
    """Samples from `start` on, without end."""
    index = start
    while True:
        yield make_sample(split, seed, index, mixture)
        index += 1
