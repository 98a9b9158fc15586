"""Scorers of drawn questions, on answers made by hand."""

import pytest

from minicpmv.drawn.samples import named_objects
from minicpmv.evaluate.benchmark import Benchmark, Row, UnknownRowError, mean_of_each
from minicpmv.evaluate.scoring.drawn import (
    boxes_found,
    chair,
    exact_match,
    hallucinated_objects,
    printed_characters,
    same_cells,
    same_json,
    share_of_characters,
)


@pytest.mark.parametrize("answer", ["red", " red\n", "\tred "])
def test_an_answer_counts_whatever_blanks_stand_around_it(answer):
    assert exact_match(answer, "red") == {"exact": 1.0}


@pytest.mark.parametrize("answer", ["", "Red", "red.", "the red", "red red", "red, blue", "re d", "ｒｅｄ", "<red>"])
def test_an_answer_that_is_not_the_whole_expected_one_does_not_count(answer):
    assert exact_match(answer, "red") == {"exact": 0.0}


def characters(*pairs):
    return share_of_characters([printed_characters(*pair) for pair in pairs])


def test_wrong_missing_and_surplus_characters_are_one_error_each():
    assert characters(("AB12", "AB12")) == {"exact": 1.0, "characters": 1.0}
    for answer in ("AX12", "A12", "AB122"):
        assert characters((answer, "AB12")) == {"exact": 0.0, "characters": 0.75}
    assert characters((" AB12 ", "AB12"))["characters"] == 1.0
    assert characters(("ab12", "AB12"))["characters"] == 0.5


def test_characters_are_summed_over_all_lines_before_they_are_divided():
    # One error in 4 and none in 12: 1 in 16, not the mean of 1/4 and 0.
    assert characters(("AX12", "AB12"), ("ABCDEFGHIJKL", "ABCDEFGHIJKL")) == {"exact": 0.5, "characters": 15 / 16}


def test_an_endless_answer_cannot_push_characters_below_zero():
    assert characters(("A" * 500, "AB12"))["characters"] == 0.0


def captions(*pairs):
    scorer = hallucinated_objects(named_objects)
    return chair([scorer(*pair) for pair in pairs])


def test_chair_counts_objects_that_are_not_in_the_picture():
    there = ["red circle", "blue star"]
    assert captions(("a red circle, a blue star", there)) == {"chair_i": 0.0, "chair_s": 0.0, "recall": 1.0}
    assert captions(("a red circle, a green star", there)) == {"chair_i": 0.5, "chair_s": 1.0, "recall": 0.5}
    # 1 of 4 objects named in the two captions, in 1 of the 2; the star is not named.
    pairs = (("a red circle, a blue star, an orange cross", there), ("a red circle", there))
    assert captions(*pairs) == {"chair_i": 0.25, "chair_s": 0.5, "recall": 0.75}


def test_chair_counts_an_object_that_is_named_more_often_than_it_is_there():
    assert captions(("a red circle, a red circle", ["red circle"])) == {"chair_i": 0.5, "chair_s": 1.0, "recall": 1.0}
    assert captions(("a red circle, a red circle", ["red circle"] * 2))["chair_i"] == 0.0


def test_who_names_nothing_has_no_rate_of_hallucination_rather_than_the_best_one():
    assert captions(("", ["red circle"])) == {"chair_i": None, "chair_s": None, "recall": 0.0}


def test_scores_are_averaged_over_answers():
    assert mean_of_each([{"exact": 1.0}, {"exact": 0.0}, {"exact": 0.0}, {"exact": 0.0}]) == {"exact": 0.25}


def test_rows_are_chosen_by_name_in_the_order_of_the_benchmark():
    rows = tuple(Row(name, name, None, None, exact_match) for name in "abc")
    benchmark = Benchmark("letters", "Letters", 1, rows)
    assert [row.id for row in benchmark.choose(["c", "a"])] == ["a", "c"]
    assert benchmark.choose(None) == list(rows)
    with pytest.raises(UnknownRowError, match="letters has no row d; its rows are a, b, c"):
        benchmark.choose(["a", "d"])


BOX = "<ref>red star</ref><box>100 100 300 300</box>"


@pytest.mark.parametrize(
    ("answer", "exact"),
    [
        (BOX, 1.0),
        ("<box>100 100 300 300</box>", 1.0),  # the name may be left out
        ("<box>110 90 310 300</box>\n", 1.0),
        ("<box>100 100 300 199</box>", 0.0),  # less than half
        ("<box>300 300 100 100</box>", 0.0),
        (BOX + "<box>500 500 600 600</box>", 0.0),
        (f"It is at {BOX}", 0.0),
        ("100 100 300 300", 0.0),
        ("There is no red star.", 0.0),
    ],
)
def test_a_box_counts_when_it_covers_by_half_and_stands_alone(answer, exact):
    assert boxes_found(answer, BOX)["exact"] == exact


def test_each_of_several_boxes_has_to_cover_its_own():
    both = "<box>0 0 100 100</box><box>500 0 600 100</box>"
    assert boxes_found(both, both) == {"exact": 1.0, "iou": 1.0}
    assert boxes_found("<box>500 0 600 100</box><box>0 0 100 100</box>", both) == {"exact": 0.0, "iou": 0.0}
    assert boxes_found("<box>0 0 100 100</box>", both) == {"exact": 0.0, "iou": 0.5}


def test_where_nothing_is_there_the_sentence_counts():
    assert boxes_found("There is no red star.", "There is no red star.") == {"exact": 1.0, "iou": 1.0}
    assert boxes_found(BOX, "There is no red star.") == {"exact": 0.0, "iou": 0.0}


@pytest.mark.parametrize(
    ("answer", "scores"),
    [
        ('{"a": "1", "b": 2.50}', (1.0, 1.0)),
        ('{"b":2.5,\n "a":"1"}', (1.0, 1.0)),
        ('{"a": 1, "b": 2.5}', (0.0, 1.0)),  # a number is no string
        ('{"a": "1"}', (0.0, 1.0)),
        ("47", (0.0, 0.0)),  # JSON, but no object
        ('```json\n{"a": "1", "b": 2.5}\n```', (0.0, 0.0)),
        ("", (0.0, 0.0)),
    ],
)
def test_json_counts_by_its_value(answer, scores):
    found = same_json(answer, '{"a": "1", "b": 2.5}')
    assert (found["exact"], found["valid"]) == scores


def test_tables_count_by_their_cells_however_they_are_written():
    page = "# STOCK\n\n| A | B |\n| --- | --- |\n| x | 1 |\n| y | 2 |"
    assert same_cells(page, page) == {"exact": 1.0, "cells": 1.0}
    assert same_cells("# STOCK\n|A|B|\n|:-|-:|\n|x  | 1|\n|y|2|", page) == {"exact": 1.0, "cells": 1.0}
    assert same_cells(page.replace("| 2", "| 3"), page) == {"exact": 0.0, "cells": 5 / 6}
    assert same_cells(page.replace("# STOCK", "STOCK"), page) == {"exact": 0.0, "cells": 1.0}
    assert same_cells(page + "\n| z | 3 |", page)["exact"] == 0.0
    assert same_cells("", page) == {"exact": 0.0, "cells": 0.0}
