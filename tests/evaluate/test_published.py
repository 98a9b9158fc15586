"""Published figures: complete, marked, and consistent with each other."""

from statistics import fmean

import pytest
from conftest import REPOSITORY

from minicpmv.evaluate.published import COLUMNS, MARKS, OURS, ROWS


OPENCOMPASS = ("mmstar", "mmmu", "mathvista", "hallusionbench", "ai2d", "ocrbench", "mmvet")


def value(column, row):
    return column.figures[row].value


def mmbench(column):
    """Of both languages, where these are told apart."""
    if "mmbench_en" in column.figures:
        return fmean([value(column, "mmbench_en"), value(column, "mmbench_cn")])
    return value(column, "mmbench")


def test_the_main_table_has_33_rows_and_all_of_them_for_the_model_itself():
    assert len(ROWS) == 33 and COLUMNS[0].model == OURS
    assert list(COLUMNS[0].figures) == [row.id for row in ROWS]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: f"{column.model} {column.mode}")
def test_every_opencompass_average_is_that_of_its_eight_parts(column):
    average = fmean([mmbench(column), *(value(column, row) for row in OPENCOMPASS)])
    assert value(column, "opencompass") == pytest.approx(average, abs=0.101)  # parts are rounded, too


def test_marks_are_explained_and_sources_are_named():
    assert {figure.mark for column in COLUMNS for figure in column.figures.values()} == {"", *MARKS}
    assert all(column.source and column.mode for column in COLUMNS)
    figures = COLUMNS[0].figures
    assert (str(figures["mmvet"]), str(figures["mme"]), figures["omnidocbench_en"].value) == ("75.5†", "2500", 0.175)


def test_rows_that_are_better_when_lower_say_so():
    lower = {row.id for row in ROWS if row.lower_is_better}
    assert lower == {"omnidocbench_en", "omnidocbench_zh", "objhal_chair_s", "objhal_chair_i", "mmhal_rate"}


def cells_of(page, heading):
    """The cells of the first table below a heading."""
    section = (REPOSITORY / page).read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    lines = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\*", "*") for cell in line.strip("|").split("|")] for line in lines]


def test_the_pages_show_the_figures_with_an_empty_column_for_ones_own():
    head, _, *lines = cells_of("docs/evaluation.md", "Published figures")
    assert head == ["benchmark", *(column.model for column in COLUMNS[:6]), "yours"]
    assert lines == [
        [row.title + " ↓" * row.lower_is_better, *(str(column.figures.get(row.id, "-")) for column in COLUMNS[:6]), ""]
        for row in ROWS
    ]
    shown = [line[place : place + 3] for line in cells_of("README.md", "Measure it")[2:] for place in (0, 3, 6)]
    known = {str(figure) for figure in COLUMNS[0].figures.values()}
    assert len(shown) == 12 and all(figure in known and own == "" for _, figure, own in shown)
