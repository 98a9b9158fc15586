"""OCRBench: containment of a reference."""

import pytest

from minicpmv.evaluate.scoring.ocrbench import FORMULAS, ocrbench, ocrbench_points


def right(answer, *references, category="Doc-oriented VQA", **more):
    return ocrbench(answer, {"answers": list(references), "category": category}, **more)["exact"]


def test_any_reference_may_be_contained_in_any_case():
    assert right("The sign says EXIT here", "entrance", "Exit") == 1.0
    assert right("The sign says EX IT here", "exit") == 0.0


def test_a_line_break_is_a_blank():
    assert right("total\namount", " Total Amount ") == right("total amount", "total\namount") == 1.0


def test_formulas_lose_their_blanks_and_keep_their_case():
    assert right("x ^ 2 + y", "x^2+y", category=FORMULAS) == 1.0
    assert right("x^2+Y", "x^2+y", category=FORMULAS) == 0.0
    assert right("x ^ 2 + y", "x^2+y") == 0.0


@pytest.mark.parametrize("answer", ["concatenate", "cats"])
def test_a_reference_inside_a_word_counts_unless_strict(answer):
    assert right(answer, "cat") == 1.0
    assert right(answer, "cat", strict=True) == 0.0
    assert right("a cat.", "cat", strict=True) == 1.0


def test_points_are_right_answers_of_a_thousand():
    scores = [{"exact": 1.0}] * 3 + [{"exact": 0.0}]
    assert ocrbench_points(scores) == {"accuracy": 0.75, "points": 750.0}
