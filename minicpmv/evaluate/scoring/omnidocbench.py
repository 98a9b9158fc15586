"""OmniDocBench 1.0, end to end: how far a page's transcription is from the reference (VLMEvalKit e8e78f0, quick match).

What is special:
- four edit distances a page: text, displayed formulas, tables, reading order; 0 is best. Edits and lengths are summed within
  a page and kind, pages of a language are averaged, and the published figure is the mean of the four;
- only letters, digits, _ and Chinese characters of texts are compared, formulas without fonts and blanks, tables as HTML;
- captions, footnotes, headers, footers, page numbers and code are matched, so that what stands for them does no harm, and
  not counted;
- strict: rows of Markdown tables with a colon stay, what has no match counts once, whichever side it is on;
- the reference gives up the quick match of a page after 30 seconds and matches simply; here it ends however long it takes.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from minicpmv.evaluate.benchmark import Metrics, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.page_markdown import (
    Element,
    comparable_formula,
    comparable_table,
    comparable_text,
    elements_of,
)
from minicpmv.evaluate.scoring.page_matching import Match, most_frequent, quick_match, simple_match
from minicpmv.evaluate.scoring.teds import teds


Box = Mapping[str, Any]  # an element of the reference's page

KINDS = ("text_block", "display_formula", "table", "reading_order")  # whose mean is published
NOT_COUNTED = (
    "figure_caption",
    "figure_footnote",
    "table_caption",
    "table_footnote",
    "code_algorithm",
    "code_algorithm_caption",
    "header",
    "footer",
    "page_footnote",
    "page_number",
    "equation_caption",
)
TEXTS = (
    "text_block",
    "title",
    "code_txt",
    "code_txt_caption",
    "reference",
    "equation_caption",
    *NOT_COUNTED[:10],
)


def omnidocbench(answer: str, expected: Any, *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """Edit distances of one page.

    Args:
        expected: the page: `layout_dets`, `extra` with `relation`, `page_info` with the `page_attribute` `language`; or
            the list of its elements.

    Returns:
        `score`, 1 minus the mean of the page's edit distances; each of these by its name, None where the page has none of the kind;
        `teds` and `teds_structure`, means over the page's tables; `language`.
    """
    page = expected if isinstance(expected, Mapping) else {"layout_dets": expected}
    boxes = _boxes(page)
    found = elements_of(answer, strict)
    texts, order = _texts(boxes, [element for element in found if element.kind == "text"], strict)
    displayed = [element for element in found if element.kind == "formula"]
    formulas = _formulas(boxes["equation_isolated"], displayed, strict)
    tables = _tables(boxes["table"], [element.content for element in found if element.kind == "table"])
    distances = dict(zip(KINDS, (_edit_share(texts), _edit_share(formulas), _edit_share(tables), order), strict=True))
    known = [distance for distance in distances.values() if distance is not None]
    attributes = page.get("page_info", {}).get("page_attribute", {})
    return {
        "score": 1 - fmean(known) if known else None,
        **distances,
        "teds": fmean(teds(*pair) for pair in tables) if tables else None,
        "teds_structure": fmean(teds(*pair, structure_only=True) for pair in tables) if tables else None,
        "language": attributes.get("language"),
    }


def omnidocbench_distance(scores: list[Scores]) -> Metrics:
    """Means over pages: `overall`, of the four edit distances, each of these, and `teds`; None where no page has the kind."""

    def mean(name: str) -> float | None:
        known = [score[name] for score in scores if score[name] is not None]
        return fmean(known) if known else None

    distances = {name: mean(name) for name in KINDS}
    known = [distance for distance in distances.values() if distance is not None]
    overall = fmean(known) if len(known) == len(KINDS) else None
    return {"overall": overall, **distances, "teds": mean("teds"), "teds_structure": mean("teds_structure")}


# --- The reference's page ---


def _boxes(page: Mapping[str, Any]) -> defaultdict[str, list[Box]]:
    """Elements by category; texts that are cut by a column or a figure are joined."""
    runs: list[list[Any]] = []  # ids of what belongs together, as often as relations name them
    for relation in page.get("extra", {}).get("relation", ()):
        if relation["relation_type"] == "truncated":
            ends = [relation["source_anno_id"], relation["target_anno_id"]]
            joined = [run for run in runs if set(run) & set(ends)]
            for run in joined:
                run += ends
            if not joined:
                runs.append(ends)
    cut: dict[Any, Box] = {name: {} for run in runs for name in run}
    found: defaultdict[str, list[Box]] = defaultdict(list)
    for box in page["layout_dets"]:
        if box.get("anno_id") in cut:
            cut[box["anno_id"]] = box
        else:
            found[box["category_type"]].append(box)
    for run in runs:
        parts = sorted((cut[name] for name in run if cut[name]), key=lambda box: box["order"])
        if parts:
            found[parts[0]["category_type"]].append({**parts[0], "text": "".join(box["text"] for box in parts)})
    return found


def _in_order(boxes: Sequence[Box]) -> list[Box]:
    return sorted(boxes, key=lambda box: box.get("order") or 0)


# --- Kinds of elements: pairs of (the reply's text, the reference's text) ---

Pairs = list[tuple[str, str]]


def _texts(boxes: Mapping[str, list[Box]], found: Sequence[Element], strict: bool) -> tuple[Pairs, float | None]:
    """Pairs of texts that count, and the edit distance of their order."""
    wanted = _in_order([box for category in TEXTS for box in boxes.get(category, ())])
    if not wanted:
        return [], None
    references, kept = _comparable([(str(box["text"]), comparable_text) for box in wanted])
    answers, _ = _comparable([(element.content, comparable_text) for element in found])
    categories = [wanted[place]["category_type"] for place in kept]
    counted = [
        match
        for match in quick_match(references, answers, strict)
        if not match.references
        or most_frequent([categories[place] for place in match.references], NOT_COUNTED) not in NOT_COUNTED
    ]
    pairs = [_joined(match, references, answers) for match in counted]
    return pairs, _order_distance(counted, wanted, found)


def _order_distance(matches: Sequence[Match], wanted: Sequence[Box], found: Sequence[Element]) -> float | None:
    """Edits between the orders of what was matched, over the longer of the two."""
    from rapidfuzz.distance import Levenshtein

    def orders(match: Match) -> list[Any]:
        return [order for place in match.references if (order := wanted[place].get("order"))]

    both = sorted((match for match in matches if match.references and match.answers), key=lambda m: _start(m, found))
    answered = [order for match in both for order in orders(match)]
    right = sorted(order for match in matches for order in orders(match))
    return Levenshtein.normalized_distance(right, answered) if right or answered else None


def _start(match: Match, found: Sequence[Element]) -> int:
    return found[match.answers[0]].start


def _formulas(boxes: Sequence[Box], found: Sequence[Element], strict: bool) -> Pairs:
    references, _ = _comparable([(str(box["latex"]), comparable_formula) for box in _in_order(boxes)])
    answers, _ = _comparable([(element.content, comparable_formula) for element in found])
    matches = [match for match in quick_match(references, answers, strict) if match.references]
    return [_joined(match, references, answers) for match in matches]


def _tables(boxes: Sequence[Box], found: Sequence[str]) -> Pairs:
    """Tables are matched as they stand and compared in their common form, where they have one."""
    references = [html for box in _in_order(boxes) if (html := str(box.get("html", "")))]
    answers = [table for table in found if table]
    pairs = [_joined(match, references, answers) for match in simple_match(references, answers)]
    return [(comparable_table(answer) or answer, comparable_table(wanted) or wanted) for answer, wanted in pairs]


def _comparable(texts: Sequence[tuple[str, Any]]) -> tuple[list[str], list[int]]:
    """Texts as they are compared, without empty ones; and the places of those that stay."""
    short = [compare(text) for text, compare in texts]
    kept = [place for place, (text, _) in enumerate(texts) if text and short[place]]
    return [short[place] for place in kept], kept


def _joined(match: Match, references: Sequence[str], answers: Sequence[str]) -> tuple[str, str]:
    return "".join(answers[place] for place in match.answers), "".join(references[place] for place in match.references)


def _edit_share(pairs: Pairs) -> float | None:
    """Edits over the longer lengths, both summed; None where there is nothing to compare."""
    from rapidfuzz.distance import Levenshtein

    edits = sum(Levenshtein.distance(answer, wanted) for answer, wanted in pairs)
    lengths = sum(max(len(answer), len(wanted)) for answer, wanted in pairs)
    return edits / lengths if lengths else None
