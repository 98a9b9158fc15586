"""Short pages as our applications read them: forms, receipts, tables and lines of words, as text, Markdown and JSON.

What is special:
- a page knows its regions, so that they can be asked for;
- words are those of five languages, in the letters that the typefaces have.
"""

import json
import random
from dataclasses import dataclass, field

from minicpmv.drawn import prompts
from minicpmv.drawn.drawing import Drawing, Print, add_noise, add_text, any_print
from minicpmv.drawn.scenes import Fact, blank, box_text, draw_until, entries, ink, propose_value
from minicpmv.drawn.wording import Wording


TITLES = {
    "form": ("FORM", "TICKET"),
    "receipt": ("RECEIPT", "BILL"),
    "table": ("LIST", "PRICES", "STOCK"),
    "words": (),
}
COLUMNS = ("QTY", "PRICE", "LOT", "TIME", "CODE")
NUMBERS = ("TOTAL", "TAX", "PRICE", "CASH", "QTY")  # keys whose values a schema may call numbers
# Common words of a language, in letters without marks.
WORDS = {
    "English": [
        "the",
        "house",
        "is",
        "old",
        "and",
        "we",
        "go",
        "home",
        "with",
        "three",
        "big",
        "dogs",
        "every",
        "day",
        "when",
        "rain",
        "falls",
        "on",
        "our",
        "garden",
    ],
    "German": [
        "das",
        "haus",
        "ist",
        "alt",
        "und",
        "wir",
        "gehen",
        "mit",
        "drei",
        "hunden",
        "jeden",
        "tag",
        "nach",
        "hause",
        "wenn",
        "regen",
        "auf",
        "den",
        "garten",
    ],
    "French": [
        "la",
        "maison",
        "est",
        "vieille",
        "et",
        "nous",
        "allons",
        "avec",
        "trois",
        "chiens",
        "chaque",
        "jour",
        "dans",
        "le",
        "jardin",
        "quand",
        "il",
        "pleut",
    ],
    "Spanish": [
        "la",
        "casa",
        "es",
        "vieja",
        "y",
        "vamos",
        "con",
        "tres",
        "perros",
        "cada",
        "noche",
        "al",
        "campo",
        "cuando",
        "llueve",
        "mucho",
        "en",
        "el",
        "pueblo",
    ],
    "Italian": [
        "la",
        "casa",
        "vecchia",
        "e",
        "noi",
        "andiamo",
        "con",
        "tre",
        "cani",
        "ogni",
        "giorno",
        "nel",
        "giardino",
        "quando",
        "piove",
        "molto",
        "qui",
    ],
}


@dataclass
class Block:
    """Lines of a page that belong together: cells of each line, and what kind of region they are."""

    kind: str  # title, text or table
    rows: list[list[str]]
    box: list[float] = field(default_factory=list)  # left, top, right, bottom in pixels

    @property
    def markdown(self) -> str:
        if self.kind == "title":
            return f"# {self.rows[0][0]}"
        if self.kind == "text":
            return self.text
        lines = ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([lines[0], "| " + " | ".join("---" for _ in self.rows[0]) + " |", *lines[1:]])

    @property
    def text(self) -> str:
        return "\n".join(" ".join(row) for row in self.rows)


def draw_blocks(rng: random.Random, blocks: list[Block]) -> Drawing:
    """The blocks below each other in one typeface: columns of a table side by side, a title in the middle; values of a form
    stand behind their keys or at the right edge."""
    style = any_print(rng, rng.randint(17, 22))
    gap = style.size * rng.uniform(0.8, 1.6)
    at_edge = rng.random() < 0.5
    columns = {
        id(block): [max(style.width(row[i]) for row in block.rows) + gap for i in range(len(block.rows[0]))]
        for block in blocks
    }
    heading = Print(style.family, True, style.size)
    widest = max(
        heading.width(block.rows[0][0]) if block.kind == "title" else sum(columns[id(block)]) for block in blocks
    )
    pitch = style.size * rng.uniform(1.35, 1.7)
    lines = sum(len(block.rows) for block in blocks)
    width = round(widest * rng.uniform(1.05, 1.3)) + 8
    drawing, dark = blank((width, round(pitch * (lines + 0.3 * (len(blocks) - 1)) + style.size)), rng)
    name, rgb = ink(rng, dark, colored=0.3)
    left, y, blank_width = rng.uniform(3, 8), style.size * 0.4, style.width(" ")
    for block in blocks:
        first = len(drawing.things)
        for row in block.rows:
            x, own = left, style
            if block.kind == "title":
                x, own = (width - heading.width(row[0])) / 2, heading
            for number, (cell, step) in enumerate(zip(row, columns[id(block)], strict=True)):
                if block.kind == "text" and number:
                    x = width - left - style.width(cell) if at_edge else left + style.width(row[0]) + blank_width
                add_text(drawing, cell, name, (x, y), own, rgb)
                x += step
            y += pitch
        y += 0.3 * pitch
        boxes = [thing.box for thing in drawing.things[first:]]
        block.box = [min(box[i] for box in boxes) for i in (0, 1)] + [max(box[i] for box in boxes) for i in (2, 3)]
    if rng.random() < 0.2:
        add_noise(drawing, rng, rng.randint(5, 15))
    return drawing


def paper_scene(rng: random.Random, say: Wording, split: str, kind: str) -> tuple[Drawing, list[Fact]]:
    """A page of a kind: "form" (or receipt), "table" or "words"."""
    blocks, facts, language = [], [], "English"
    if kind == "form":
        kind = rng.choice(("form", "receipt"))
        values = entries(rng, split, rng.randint(2, 5))
        blocks = [Block("text", [[f"{key}:", value] for key, value in values.items()])]
        facts += form_facts(rng, values, kind)
    elif kind == "table":
        table = table_rows(rng, split)
        blocks = [Block("table", table)]
        facts += [
            Fact("table_cell", (row[0], key), cell)
            for row in table[1:]
            for key, cell in zip(table[0][1:], row[1:], strict=True)
        ]
        told = f"A table with {', '.join(table[0][:-1])} and {table[0][-1]}."
        facts += [Fact("page_summary", "", told), Fact("page_digest", "", f"{told} {row_sentences(table)}")]
    else:
        language = rng.choice(tuple(WORDS))
        lines = [propose_words(rng, split, language) for _ in range(rng.randint(2, 4))]
        blocks = [Block("text", [[line] for line in lines])]
        told = f"A text in {language}."
        facts += [Fact("page_language", "", language), Fact("page_summary", "", told)]
        facts.append(Fact("page_digest", "", f"{told} It says: {' '.join(lines)}"))
    if (titles := TITLES[kind]) and rng.random() < 0.6:
        blocks.insert(0, Block("title", [[rng.choice(titles)]]))
    drawing = draw_blocks(rng, blocks)
    regions = "\n".join(
        f"<ref>{block.kind}</ref>{box_text((block.box[0], block.box[1], block.box[2], block.box[3]), drawing.image.size)}"
        for block in blocks
    )
    facts += [
        Fact("page_text", "", "\n".join(block.text for block in blocks)),
        Fact("page_markdown", "", "\n\n".join(block.markdown for block in blocks)),
        Fact("page_regions", "", regions),
        Fact("page_kind", "", "text" if kind == "words" else kind),
    ]
    return drawing, facts


def table_rows(rng: random.Random, split: str) -> list[list[str]]:
    """A header and two or three rows: items, and one or two values of each."""
    keys = rng.sample(COLUMNS, rng.choice((1, 1, 2)))
    names: list[str] = []
    while len(names) < rng.choice((2, 2, 3)):
        name = draw_until(split, rng, lambda rng: propose_value(rng, "ITEM"))
        if name not in names:
            names.append(name)
    cells = [[draw_until(split, rng, lambda rng, key=key: propose_value(rng, key)) for key in keys] for _ in names]
    return [["ITEM", *keys], *([name, *row] for name, row in zip(names, cells, strict=True))]


def row_sentences(table: list[list[str]]) -> str:
    return " ".join(
        f"{row[0]} has {' and '.join(f'{key} {cell}' for key, cell in zip(table[0][1:], row[1:], strict=True))}."
        for row in table[1:]
    )


def propose_words(rng: random.Random, split: str, language: str) -> str:
    line = draw_until(split, rng, lambda rng: " ".join(rng.choice(WORDS[language]) for _ in range(rng.randint(2, 3))))
    return line.upper() if rng.random() < 0.3 else line


def form_facts(rng: random.Random, values: dict[str, str], kind: str) -> list[Fact]:
    """What a form says: as JSON after a schema, which may call its keys in small letters and its numbers numbers; about a
    key, with the page; and in a sentence."""
    small, typed = rng.random() < 0.5, rng.random() < 0.3
    asked = list(values) if rng.random() < 0.7 else rng.sample(list(values), rng.randint(1, len(values)))
    properties, pairs = {}, []
    for key in asked:
        name, is_number = key.lower() if small else key, typed and key in NUMBERS
        properties[name] = {"type": "number" if is_number else "string"}
        pairs.append(f"{json.dumps(name)}: {values[key] if is_number else json.dumps(values[key])}")
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    keys = list(values)
    told = f"A {kind} with {', '.join(keys[:-1])} and {keys[-1]}."
    listed = " ".join(f"{key} is {value}." for key, value in values.items())
    return [
        Fact("page_json", json.dumps(schema), "{" + ", ".join(pairs) + "}"),
        Fact("page_summary", "", told),
        Fact("page_digest", "", f"{told} {listed}"),
        *(Fact("form_value", key, value, f"{key}: {value}") for key, value in values.items()),
        *(Fact("page_question", key, f"{value} [page 1]") for key, value in values.items()),
    ]


def pages_scene(rng: random.Random, say: Wording, split: str) -> tuple[list[Drawing], list[Fact]]:
    """Two pages of a form; no key is on both."""
    values = entries(rng, split, rng.randint(3, 5))
    keys, cut = list(values), rng.randint(1, 2)
    drawings, facts = [], []
    for number, part in enumerate((keys[:cut], keys[cut:]), 1):
        drawings.append(draw_blocks(rng, [Block("text", [[f"{key}:", values[key]] for key in part])]))
        facts += [Fact("page_question", key, f"{values[key]} [page {number}]") for key in part]
    told = f"A form with {', '.join(keys[:-1])} and {keys[-1]}."
    return drawings, [*facts, Fact("page_summary", "", told)]


# Tasks that our applications ask about numbered pages.
NUMBERED = ("page_json", "page_summary", "page_digest", "page_question")


def page_labels(count: int) -> list[str]:
    return [prompts.PAGE.format(number=number) for number in range(1, count + 1)]
