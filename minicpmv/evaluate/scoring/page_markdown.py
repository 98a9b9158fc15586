"""A page that a model wrote as Markdown, LaTeX or HTML, in its elements; and what of them is compared.

What is special:
- the rules are those of OmniDocBench 1.0's end-to-end evaluation as VLMEvalKit has it (e8e78f0), down to its defects, since
  every published figure went through them. The plain ones: inline formulas also count as displayed ones; of a Markdown
  table, rows with a colon or `---` are dropped, and so is a line of text right above it (not where one is strict); one
  character behind a LaTeX table is lost with it; a reply without blank lines is split at every line;
- LaTeX tables are taken out and not compared: the reference needs latexml for them and never prefers them.
"""

import html
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal


Kind = Literal["text", "formula", "table"]


@dataclass(frozen=True)
class Element:
    """A part of a page; `start` orders it among others of its kind."""

    kind: Kind
    start: int
    content: str


IMAGE = re.compile(r"!\[.*?\]\(.*?\)")
FENCES = (re.compile(r"^```markdown\n?", re.MULTILINE), re.compile(r"```\n?$", re.MULTILINE))
REPEATED = (
    (re.compile(r"_{4,}"), "____"),
    (re.compile(r" {4,}"), "    "),
    (re.compile(r"([^a-zA-Z0-9])\1{10,}"), r"\1\1\1\1"),
)
LATEX_TABLE = re.compile(r"\\begin{table}(.*?)\\end{table}", re.DOTALL)
FORMULA = re.compile(r"\$\$(.*?)\$\$|\\\[(.*?)\\\]|\$(.*?)\$|\\\((.*?)\\\)", re.DOTALL)
DOLLARS = re.compile(r"\$\$(.*?)\$\$|\$(.*?)\$|\\\((.*?)\\\)", re.DOTALL)
INLINE = re.compile(r"\$(.*?)\$|\\\((.*?)\\\)")
TABLE_ROW = re.compile(r"\|\s*.*?\s*\|\n", re.DOTALL)
MARKDOWN_TABLE = re.compile(r"(?:^[ \t]*\|.*\|[ \t]*\n)+", re.MULTILINE)
HTML_TABLE = re.compile(r"(<table.*?</table>)", re.DOTALL)
CODE = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)
HEADINGS = (
    re.compile(r"\\title\{(.*?)\}"),
    re.compile(r"\\title\s*\{\s*(.*?)\s*\}", re.DOTALL),
    re.compile(r"\\text\s*\{\s*(.*?)\s*\}", re.DOTALL),
    re.compile(r"\\section\*?\{(.*?)\}"),
    re.compile(r"\\section\*?\{\s*(.*?)\s*\}", re.DOTALL),
)


def elements_of(reply: str, strict: bool = False) -> list[Element]:
    """The elements of a page, in the order in which they are matched with those of the reference."""
    content = IMAGE.sub("", reply)
    for fence in FENCES:
        content = fence.sub("", content)
    for pattern, shorter in REPEATED:
        content = pattern.sub(shorter, content)
    found: list[Element] = []
    for start, end in _latex_tables(content):
        content = _blanked(content, start, end)
    for start, end in _nested(content, r"<table(?:[^>]*)>", r"</table>", step=8, end_length=8, restart=16):
        found.append(Element("table", start, content[start:end]))
        content = _blanked(content, start, end)
    content = _take_formulas(content, found)
    if len(TABLE_ROW.findall(content + "\n")) >= 2:
        content = _take_markdown_tables(content, found, strict)
    for match in CODE.finditer(content):
        found.append(Element("text", match.start(), match.group(2).strip()))
        content = _blanked(content, *match.span())
    for heading in HEADINGS:
        content = heading.sub(r"\1", content)
    _take_texts(content, found)
    return sorted(found, key=lambda element: element.start)


def _blanked(text: str, start: int, end: int) -> str:
    return text[:start] + " " * (end - start) + text[end:]


def _latex_tables(text: str) -> list[tuple[int, int]]:
    spans = []
    for match in LATEX_TABLE.finditer(text):
        spans.append(match.span())
        text = _blanked(text, *match.span())
    # The lengths are those of the patterns, which have a backslash more than what they match.
    spans += _nested(text, r"\\begin{tabular}", r"\\end{tabular}", step=14, end_length=14, restart=16)
    return [(start, min(end, len(text))) for start, end in sorted(spans)]


def _nested(text: str, begin: str, end: str, *, step: int, end_length: int, restart: int) -> list[tuple[int, int]]:
    """Spans from an outermost `begin` to its `end`; what is never closed is looked into from behind its begin."""
    spans, place, open_at = [], 0, list[int]()
    while place < len(text):
        first, last = re.search(begin, text[place:]), re.search(end, text[place:])
        if first and (not last or first.start() < last.start()):
            open_at.append(place + first.start())
            place += first.start() + step
        elif last:
            if open_at:
                start = open_at.pop()
                if not open_at:
                    spans.append((start, min(place + last.start() + end_length, len(text))))
            place += last.start() + end_length
        else:
            break
    if open_at:
        offset = open_at[0] + restart
        inner = _nested(text[offset:], begin, end, step=step, end_length=end_length, restart=restart)
        spans += [(start + offset, stop + offset) for start, stop in inner]
    return spans


def _take_formulas(content: str, found: list[Element]) -> str:
    """Formulas in \\[ \\]; inline ones stay in the text as well."""
    for match in FORMULA.finditer(content):
        line = "".join(match.group().split())
        dollars = DOLLARS.search(line)
        if dollars is None or dollars.group(1):
            line = line if dollars is None else DOLLARS.sub(r"\\[\1\\]", line)
            content = _blanked(content, *match.span())
        else:
            line = DOLLARS.sub(r"\\[\2\3\\]", line)
        found.append(Element("formula", match.start(), line))
    return content


def _take_texts(content: str, found: list[Element]) -> None:
    """Paragraphs; those that are formulas or tables as such. Their places do not count what separates them."""
    parts = content.split("\n\n")
    if len(parts) == 1:
        parts = content.split("\n")
    start = 0
    for part in parts:
        text = "\n".join(line.strip() for line in part.strip().split("\n") if line.strip())
        if text.startswith("<table") and text.endswith("</table>"):
            found.append(Element("table", start, text))
        elif text.startswith("$") and text.endswith("$"):
            if text.replace("$", "").strip():
                found.append(Element("formula", start, text))
        elif text:
            found.append(Element("text", start, text))
        start += len(part)


# --- Markdown tables ---


def _take_markdown_tables(content: str, found: list[Element], strict: bool) -> str:
    content = MARKDOWN_TABLE.sub(_as_html, content + "\n") if strict else _with_html_tables(content)
    for match in HTML_TABLE.finditer(content):
        found.append(Element("table", match.start(), match.group().strip()))
        content = _blanked(content, *match.span())
    return content


def _as_html(table: re.Match) -> str:
    """All rows of a Markdown table but the line below its header."""
    rows = [
        [cell.strip() for cell in line.strip().strip("|").split("|")] for line in table.group().strip().split("\n")
    ]
    kept = [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]
    cells = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in kept)
    return f"\n\n<table>{cells}</table>\n\n"


def _with_html_tables(content: str) -> str:
    """Rows of Markdown tables become tables of one row each; neighbors are then merged."""
    content = content.replace("\r", "") + "\n"
    for row in TABLE_ROW.findall(content):
        content = content.replace(row, _row_as_table(row), 1)
    merged = _with_merged_tables(content)
    return merged.replace("<table>", '<table border="1" >').replace("<td>", '<td colspan="1" rowspan="1">')


def _row_as_table(markdown: str) -> str:
    rows = [[cell.strip() for cell in row.strip().split("|")[1:-1]] for row in markdown.strip().split("\n")]
    lines = ["<table>", "  <thead>", "    <tr>"]
    lines += [f"      <th>{cell}</th>" for cell in rows[0]]
    lines += ["    </tr>", "  </thead>", "  <tbody>"]
    for row in rows[2:]:
        lines += ["    <tr>", *(f"      <td>{cell}</td>" for cell in row), "    </tr>"]
    return "\n".join([*lines, "  </tbody>", "</table>", ""])


def _with_merged_tables(content: str) -> str:
    """Lines between tables stay; a run of tables becomes one, without the lines that look like a separator of a header."""
    kept, block, previous, in_table = list[str](), "", "", False
    for line in content.split("\n"):
        if "<table>" in line:
            in_table = True
            block += previous
        elif in_table:
            if not re.search(r":|---", previous) and "</thead>" not in previous:
                block += "\n" + previous
            if "</table>" in previous:
                kept.append(_merged(block))
                block, in_table = "", False
        else:
            kept.append(previous)
        previous = line
    if previous:
        is_table = in_table or "</table>" in previous
        kept.append(_merged(f"{block}\n{previous}") if is_table else previous)
    return "\n".join(kept)


def _merged(block: str) -> str:
    rows: list[str] = []
    for table in re.findall(r"<table>[\s\S]*?</table>", re.sub(r"<!--[\s\S]*?-->", "", block)):
        lines = [
            line.replace("<th>", "<td>").replace("</th>", "</td>") if "<th>" in line else line
            for line in table.split("\n")
        ]
        lines = [line for line in lines if not re.search(r"</?t(able|head|body)>", line)]
        if len(lines) > 2:
            rows += lines
    return "\n\n<table>\n" + "\n".join(rows) + "\n</table>\n\n"


# --- What is compared ---

NOT_IN_FORMULAS = (
    *(
        "\\mathbf",
        "\\mathrm",
        "\\mathnormal",
        "\\mathit",
        "\\mathbb",
        "\\mathcal",
        "\\mathscr",
        "\\mathfrak",
        "\\mathsf",
    ),
    *(
        "\\mathtt",
        "\\textbf",
        "\\text",
        "\\boldmath",
        "\\boldsymbol",
        "\\operatorname",
        "\\bm",
        "\\symbfit",
        "\\mathbfcal",
    ),
    *(
        "\\symbf",
        "\\scriptscriptstyle",
        "\\notag",
        "\\setlength",
        "\\coloneqq",
        "\\space",
        "\\thickspace",
        "\\thinspace",
    ),
    *("\\medspace", "\\nobreakspace", "\\negmedspace", "\\quad", "\\qquad", "\\enspace", "\\substackw", " "),
)
DISPLAYED = re.compile(r"\\\[(.+?)(?<!\\)\\\]")
FORMULA_COMMANDS = [
    re.compile(pattern)
    for pattern in (r"\\tag\{.*?\}", r"\\hspace\{.*?\}", r"\\begin\{.*?\}", r"\\end\{.*?\}", r"\\arraycolsep.*?\}")
]
ESCAPED = re.compile(r"\\([\\_&%^])")
WHITE = ("\\t", "\\n", "\t", "\n", "/t", "/n")  # the last two are a slip of the reference
NOT_LETTERS = re.compile(r"[^\w\u4e00-\u9fff]")
TABLE = re.compile(r"<table\b[^>]*>(.*)</table>", re.DOTALL | re.IGNORECASE)
TABLE_ATTRIBUTES = ("style", "height", "width", "align", "class")
CELL_TAGS = ("<sup>", "</sup>", "<sub>", "</sub>", "<span>", "</span>", "<div>", "</div>", "<p>", "</p>")


def comparable_formula(text: str) -> str:
    """Without delimiters, tags, environments, fonts and blanks, in lower case."""
    if match := DISPLAYED.search(text):
        text = match.group(1).strip()
    for command in FORMULA_COMMANDS:
        text = command.sub("", text)
    text = text.strip(".")
    for name in NOT_IN_FORMULAS:
        text = text.replace(name, "")
    return text.lower()


def comparable_text(text: str) -> str:
    """Letters, digits, _ and Chinese characters; inline formulas as the characters that they stand for."""
    text = _inline_as_characters(text)
    for blank in WHITE:
        text = text.replace(blank, "")
    return NOT_LETTERS.sub("", text)


def _inline_as_characters(text: str) -> str:
    from pylatexenc.latex2text import LatexNodes2Text
    from pylatexenc.latexwalker import LatexWalkerError

    for match in reversed(list(INLINE.finditer(text))):
        formula = match.group(1) if match.group(1) is not None else match.group(2)
        formula = ESCAPED.sub("", formula)
        if not any(mark in formula for mark in "\\^_"):
            continue
        try:
            characters = LatexNodes2Text().latex_to_text(formula + " " * formula.endswith("\\"))
        except (LatexWalkerError, ValueError, LookupError, AttributeError, TypeError, RecursionError):
            continue  # what cannot be read stays as it is, as in the reference
        text = text[: match.start()] + characters.strip() + text[match.end() :]
    return text


def comparable_table(text: str) -> str:
    """A table in one line, with its spans and without other attributes; "" for what is none."""
    from bs4 import BeautifulSoup

    if "<table" not in text.replace(" ", "").replace("'", '"'):
        return ""
    soup = BeautifulSoup(text, "html.parser")
    for cell in soup.find_all("th"):
        cell.name = "td"
    for head in soup.find_all("thead"):
        head.unwrap()
    for formula in soup.find_all("math"):
        formula.replace_with(f"${formula.get('alttext', '')}$")
    for span in soup.find_all("span"):
        span.unwrap()
    text = unicodedata.normalize("NFKC", html.unescape(str(soup)).replace("\n", "")).strip()
    text = "".join(TABLE.findall(text))
    for attribute in TABLE_ATTRIBUTES:
        text = re.sub(f'( {attribute}=".*?")', "", text)
    text = re.sub("</?tbody>", "", text)
    text = re.sub(r"\s+", " ", text)
    for tag in CELL_TAGS:
        text = text.replace(tag, "")
    text = re.sub("<colgroup>.*?</colgroup>", "", text.replace('<spandata-span-identity="">', ""))
    return f'<html><body><table border="1" >{text}</table></body></html>'
