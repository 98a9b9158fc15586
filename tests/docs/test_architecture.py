"""The drawing and the tables of docs/architecture.md say what the code imports."""

import ast
import re
from pathlib import Path

import pytest


REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "architecture.md").read_text(encoding="utf-8")
GROUND, UPPER = PAGE.split("## The ground floor")[1].split("## The upper floor")
BASE = "checkpoint"  # the modules directly in minicpmv/ share its row
SHARED = ("errors", "files")  # everybody may import these


def table(section):
    """The rows of the only table of a section: lists of cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def names(cell):
    return re.findall(r"`(\w+)(?:\.py)?`", cell)


def drawn_arrows():
    """`{from: all that it reaches}` along the arrows of the drawing."""
    drawing = (REPOSITORY / "docs" / "images" / "floors.svg").read_text(encoding="utf-8")
    arrows = re.findall(r'data-from="(.*?)" data-to="(.*?)"', drawing)
    reached = {name: set() for arrow in arrows for name in arrow}
    for _ in reached:
        for source, target in arrows:
            reached[source] |= {target} | reached[target]
    return reached


def imported_modules(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


# ---- the ground floor ----

STRATA = {row[0]: names(row[1]) for row in table(GROUND)}
GROUND_FILES = sorted(REPOSITORY.glob("*.py"))


def test_every_file_at_the_top_stands_in_one_stratum():
    assert sorted(name for members in STRATA.values() for name in members) == [file.stem for file in GROUND_FILES]


def test_strata_import_what_lies_below_them_as_drawn():
    stratum_of = {name: stratum for stratum, members in STRATA.items() for name in members}
    found = {stratum: set() for stratum in STRATA}
    for file in GROUND_FILES:
        here = stratum_of[file.stem]
        found[here] |= {stratum_of[module[1:]] for module in imported_modules(file) if module.startswith(".")} - {here}
    reached = drawn_arrows()
    assert {stratum: reached[stratum] for stratum in STRATA} == found


def test_the_ground_floor_knows_nothing_of_the_package_and_has_no_circle():
    graph = {}
    for file in GROUND_FILES:
        modules = list(imported_modules(file))
        assert not [module for module in modules if module.partition(".")[0] == "minicpmv"], file.name
        graph[file.stem] = {module[1:] for module in modules if module.startswith(".")}
    while graph:  # take away what imports nothing that is left
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


# ---- the upper floor ----

ROOMS = {names(row[0])[0]: set(names(row[2])) for row in table(UPPER)}


def room_of(file):
    parts = file.relative_to(REPOSITORY / "minicpmv").parts
    return parts[0] if len(parts) > 1 else BASE


def test_every_room_has_a_row():
    folders = {file.parent.name for file in (REPOSITORY / "minicpmv").glob("*/__init__.py")}
    assert set(ROOMS) == folders | {BASE}


def test_the_drawing_and_the_table_have_the_same_arrows():
    reached = drawn_arrows()
    assert {room: reached[room] for room in ROOMS} == ROOMS
    assert reached.keys() == ROOMS.keys() | STRATA.keys()


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_imports_only_what_its_row_names(room):
    found = {}
    for file in (REPOSITORY / "minicpmv").rglob("*.py"):
        if room_of(file) != room or (file.stem in ("__init__", "__main__") and file.parent.name == "minicpmv"):
            continue
        for module in imported_modules(file):
            if module.startswith("minicpmv.") and (other := module.split(".")[1]) not in SHARED:
                other = other if (REPOSITORY / "minicpmv" / other).is_dir() else BASE
                found.setdefault(other, f"{file.relative_to(REPOSITORY)} imports {module}")
    assert {other: why for other, why in found.items() if other not in ROOMS[room] | {room}} == {}
