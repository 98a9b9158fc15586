"""Several pictures in one conversation, and a picture with a clip: which of them, what is in the second, are they the same?

What is special:
- every question names a picture by its place ("the second picture"), or asks for the place;
- in the scenes for "the same?" the second picture is the first one over again, at times with one shape of another color.
"""

import random
from collections import Counter

from minicpmv.drawn.drawing import COLORS, Drawing, jitter, recolor
from minicpmv.drawn.scenes import (
    CAPITALS,
    Fact,
    clip_scene,
    draw_until,
    picture_size,
    propose_line,
    shapes_scene,
    write_line,
)
from minicpmv.drawn.wording import Wording


PLACES = ("first", "second", "third")


def pair_scene(rng: random.Random, say: Wording, split: str) -> tuple[list[Drawing], list[Fact]]:
    """Two pictures, at times three, each of up to four shapes or of a printed line."""
    texts: list[str | None] = []
    drawings = []
    is_twice = rng.random() < 0.2
    for _ in range(3 if not is_twice and rng.random() < 0.15 else 2):
        if not is_twice and rng.random() < 0.25:
            text = draw_until(split, rng, lambda rng: propose_line(rng, CAPITALS, (3, 8)))
            drawings.append(write_line(rng, text, colored=0.5)[0])
            texts.append(text)
        else:
            drawings.append(shapes_scene(rng, say, picture_size(rng, (96, 180)), most=4)[0])
            texts.append(None)
    facts = []
    if is_twice:
        second, same = drawings[0], rng.random() < 0.5
        drawings[1] = Drawing(second.image.copy(), second.object_map.copy(), list(second.things))
        if not same:
            index = rng.randrange(len(second.things))
            color = rng.choice([name for name in COLORS if name != second.things[index].color])
            recolor(drawings[1], index, color, jitter(COLORS[color], rng))
        facts.append(Fact("pair_same", "", say.yes if same else say.no))
    elif rng.random() < 0.1:
        facts.append(Fact("pair_same", "", say.no))
    return drawings, facts + pair_facts(drawings, texts, say)


def pair_facts(drawings: list[Drawing], texts: list[str | None], say: Wording) -> list[Fact]:
    facts = []
    named = [
        set() if text else {(thing.color, thing.kind) for thing in drawing.things}
        for drawing, text in zip(drawings, texts, strict=True)
    ]
    counts = {
        place: len(drawing.things) for place, drawing, text in zip(PLACES, drawings, texts, strict=False) if not text
    }
    where = Counter(pair for pairs in named for pair in pairs)
    where_kind = Counter(kind for pairs in named for kind in {kind for _, kind in pairs})
    captions = []
    for place, drawing, text, pairs in zip(PLACES, drawings, texts, named, strict=False):
        name = say.ordinals[place]
        if text:
            facts += [Fact("pair_text", place, text), Fact("pair_says", text, name)]
            captions.append(say.each.format(ordinal=name, objects=text))
            continue
        things = sorted(drawing.things, key=lambda thing: thing.center[0])
        facts.append(Fact("pair_count", place, str(len(things))))
        captions.append(
            say.each.format(ordinal=name, objects=say.listing(say.named(thing.color, thing.kind) for thing in things))
        )
        facts += [
            Fact("pair_which", f"{color} {kind}", name) for color, kind in sorted(pairs) if where[color, kind] == 1
        ]
        facts += [
            Fact("pair_which", kind, name) for kind in sorted({kind for _, kind in pairs}) if where_kind[kind] == 1
        ]
        kinds, colors = Counter(thing.kind for thing in things), Counter(thing.color for thing in things)
        for thing in things:
            if kinds[thing.kind] == 1:
                facts.append(Fact("pair_colour", (place, thing.kind), say.colors[thing.color]))
            if colors[thing.color] == 1:
                facts.append(Fact("pair_shape", (place, thing.color), say.shapes[thing.kind]))
    if len(counts) > 1 and list(counts.values()).count(max(counts.values())) == 1:
        facts.append(Fact("pair_more", "", say.ordinals[max(counts, key=lambda place: counts[place])]))
    both = [pair for pair, number in where.items() if number == 2]
    if len(drawings) == 2 and len(both) == 1:
        facts.append(Fact("pair_both", "", say.named(*both[0])))
    facts.append(Fact("pair_caption", "", "\n".join(captions)))
    return facts


def mixed_scene(rng: random.Random, say: Wording) -> tuple[list[Drawing], list[Fact]]:
    """A picture of up to three shapes, then the six frames of a clip, whose shape is in the picture half the time."""
    picture, _ = shapes_scene(rng, say, picture_size(rng, (96, 180)), most=3)
    story = rng.choice(("move", "move", "order", "flash"))
    seen = rng.choice(picture.things)
    thing = (seen.kind, seen.color) if rng.random() < 0.5 else None
    frames, about_clip = clip_scene(rng, say, picture_size(rng, (96, 140)), story, thing)
    shown = next(frame.things[0] for frame in frames if frame.things)
    facts = [Fact("mixed_count", "", str(len(picture.things))), Fact("mixed_clip_shape", "", say.shapes[shown.kind])]
    kinds = Counter(thing.kind for thing in picture.things)
    facts += [
        Fact("mixed_colour", thing.kind, say.colors[thing.color]) for thing in picture.things if kinds[thing.kind] == 1
    ]
    if story != "order":
        is_there = any((thing.kind, thing.color) == (shown.kind, shown.color) for thing in picture.things)
        facts.append(Fact("mixed_same", "", say.yes if is_there else say.no))
        facts.append(Fact("mixed_clip_colour", "", say.colors[shown.color]))
    asked = {"video_direction": "mixed_clip_direction", "video_order": "mixed_clip_order"}
    facts += [Fact(asked[fact.task], "", fact.answer) for fact in about_clip if fact.task in asked]
    return [picture, *frames], facts
