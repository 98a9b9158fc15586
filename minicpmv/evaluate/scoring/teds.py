"""TEDS, the similarity of two tables as trees (Zhong et al. 2020, "Image-based table recognition: data, model, and evaluation").

1 - distance / nodes, where the distance is that of the trees of tags below <table>, and the larger tree counts. To change a
cell's spans costs 1; to change its content costs the share of its characters and tags that have to be edited.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from lxml.html import HtmlElement


class Node:
    """A tag of a table, with the spans and the content where it is a cell."""

    def __init__(self, label: tuple[str, int, int], content: list[str], children: list["Node"]):
        self.label, self.content, self.children = label, content, children


class Costs:
    """What edits cost; the interface is that of the package apted."""

    valuecls = float

    def __init__(self, rename: Callable[[Node, Node], float]):
        self.rename = rename

    def delete(self, node: Node) -> float:
        return 1.0

    def insert(self, node: Node) -> float:
        return 1.0

    def children(self, node: Node) -> list[Node]:
        return node.children


def tree_distance(old: Node, new: Node, rename: Callable[[Node, Node], float]) -> float:
    """The least that it costs to make one tree into the other: 1 for a node inserted or deleted, `rename` for one changed."""
    from apted import APTED

    return APTED(old, new, Costs(rename)).compute_edit_distance()


def teds(answer: str, expected: str, structure_only: bool = False) -> float:
    """Similarity of two HTML documents' first tables, 0 to 1.

    Args:
        answer, expected: with <html>, <body> and <table>; 0 where one of them has no table there.
        structure_only: do not look at what stands in the cells.
    """
    tables = [table for table in map(_table, (answer, expected)) if table is not None]
    if len(tables) < 2:
        return 0.0
    nodes = max(len(table.xpath(".//*")) for table in tables)
    try:
        trees = [_tree(table, structure_only) for table in tables]
    except ValueError:  # a span that is no number
        return 0.0
    if nodes == 0:  # two empty tables, of which the reference makes a division by zero
        return 1.0
    return 1 - tree_distance(trees[0], trees[1], _cell_change) / nodes


def _cell_change(old: Node, new: Node) -> float:
    from rapidfuzz.distance import Levenshtein

    return 1.0 if old.label != new.label else Levenshtein.normalized_distance(old.content, new.content)


def _table(text: str) -> "HtmlElement | None":
    from lxml import etree, html

    if not text.strip():
        return None
    try:
        page = html.fromstring(text, parser=html.HTMLParser(remove_comments=True, encoding="utf-8"))
    except (etree.ParserError, ValueError):  # nothing but comments; characters that XML forbids
        return None
    found = page.xpath("body/table")
    return found[0] if found else None


def _tree(element: "HtmlElement", structure_only: bool) -> Node:
    if element.tag == "td":
        spans = (int(element.get("colspan", "1")), int(element.get("rowspan", "1")))
        return Node(("td", *spans), [] if structure_only else _content(element)[1:-1], [])
    return Node((str(element.tag), 1, 1), [], [_tree(child, structure_only) for child in element])


def _content(element: Any) -> list[str]:
    """Characters and tags of a cell, with its own tags at both ends."""
    found = [f"<{element.tag}>", *(element.text or "")]
    for child in element:
        found += _content(child)
    if element.tag != "unk":
        found.append(f"</{element.tag}>")
    if element.tag != "td":
        found += element.tail or ""
    return found
