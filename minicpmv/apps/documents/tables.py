"""Tables in a page's text -> rows -> CSV files.

What is special:
- Markdown tables are read by markdown-it, so escaped bars and markup in cells are understood;
- models also write tables as HTML, where cells may span rows and columns: the text of such a cell stands in its first
  place, and the others are empty.
"""

import csv
import re
from html.parser import HTMLParser
from itertools import count
from os import PathLike
from pathlib import Path


LARGEST_SPAN = 1000  # HTML's own limit for colspan

_HTML_TABLE = re.compile(r"<table\b.*?</table\s*>", re.DOTALL | re.IGNORECASE)


def find_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text in their order, as rows of cells; all rows of a table are equally long."""
    from markdown_it import MarkdownIt

    found = [(match.start(), _read_html(match[0])) for match in _HTML_TABLE.finditer(text)]
    # Blanked out, with its lines kept: what stands in an HTML table is not Markdown.
    rest = _HTML_TABLE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    starts = [0, *(match.end() for match in re.finditer("\n", rest))]
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(rest):
        if token.type == "table_open" and token.map:
            rows = []
            found.append((starts[token.map[0]], rows))
        elif token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level >= 4:  # table, head or body, row, cell
            rows[-1].append(_plain(token))
        elif token.type == "table_close":
            rows = []
    return [_rectangle(table) for _, table in sorted(found, key=lambda pair: pair[0])]


def write_csv(table: list[list[str]], path: str | PathLike) -> None:
    """Write a table as CSV in UTF-8."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(table)


def _plain(token):
    breaks = {"softbreak": " ", "hardbreak": " "}
    return "".join(
        breaks.get(child.type, child.content)
        for child in token.children
        if child.type in breaks or child.type in ("text", "code_inline", "html_inline")
    ).strip()


def _rectangle(rows):
    width = max(map(len, rows), default=0)
    return [[*row, *[""] * (width - len(row))] for row in rows]


def _read_html(html):
    parser = _TableParser()
    parser.feed(html)
    parser.close()
    return [
        [" ".join(row.get(column, "").split()) for column in range(max(row, default=-1) + 1)] for row in parser.rows
    ]


class _TableParser(HTMLParser):
    """Collects `rows`: {column: text} each."""

    def __init__(self):
        super().__init__()
        self.rows: list[dict[int, str]] = []
        self.cell: int | None = None  # column of the open one
        self.covered: dict[int, int] = {}  # column -> following rows that a cell above fills

    def handle_starttag(self, tag, attributes):
        if tag == "tr":
            self.rows.append(dict.fromkeys(self.covered, ""))
            self.covered = {column: rows - 1 for column, rows in self.covered.items() if rows > 1}
            self.cell = None
        elif tag in ("td", "th") and self.rows:
            row, spans = self.rows[-1], dict(attributes)
            self.cell = next(column for column in count() if column not in row)
            for column in range(self.cell, self.cell + _span(spans.get("colspan"))):
                row[column] = ""
                if _span(spans.get("rowspan")) > 1:
                    self.covered[column] = _span(spans.get("rowspan")) - 1
        elif tag == "br" and self.cell is not None:
            self.rows[-1][self.cell] += " "

    def handle_endtag(self, tag):
        if tag in ("td", "th", "tr"):
            self.cell = None

    def handle_data(self, data):
        if self.cell is not None:
            self.rows[-1][self.cell] += data


def _span(value):
    return min(max(int(value), 1), LARGEST_SPAN) if value and value.isdecimal() else 1
