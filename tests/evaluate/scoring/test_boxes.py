"""RefCOCO: boxes in replies, and how much of the true one they cover."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.evaluate.scoring.boxes import find_box, in_pixels, iou, mean_of_parts, refcoco


SIDES = st.floats(min_value=0, max_value=1000, allow_nan=False)
BOXES = st.tuples(SIDES, SIDES, SIDES, SIDES)


@pytest.mark.parametrize(
    ("reply", "box"),
    [
        ("<box>10 20 30 40</box>", (10, 20, 30, 40)),
        ("<ref>the 2 cats</ref> [0.1, 0.2, 0.3, 0.4]", (0.1, 0.2, 0.3, 0.4)),
        ("x1=1, y1=-2.5", (1, 1, 1, -2.5)),  # digits of names are numbers too
        ("from .5 1e2 to 3.25 +4", (0.5, 100, 3.25, 4)),
        ("(10,20),(30,40)", (10, 20, 30, 40)),
        ("[1 2 3 4] then [5 6 7 8]", (1, 2, 3, 4)),
        ("[1, 2, 3]", None),
        ("nothing", None),
    ],
)
def test_a_box_is_four_numbers_in_brackets_or_else_the_first_four(reply, box):
    assert find_box(reply) == box


def test_the_scale_is_guessed_from_the_largest_number():
    assert in_pixels((0.1, 0.2, 0.5, 1.0), 200, 100) == pytest.approx((20, 20, 100, 100))
    assert in_pixels((100, 200, 500, 1000), 200, 100) == pytest.approx((20, 20, 100, 100))
    assert in_pixels((100, 200, 1500, 1001), 2000, 1100) == (100, 200, 1500, 1001)
    assert in_pixels((1, 1, 1, 1), 2000, 1000, scale=1000) == (2, 1, 2, 1)


@given(BOXES, st.integers(1, 4000), st.integers(1, 4000))
def test_a_box_lies_in_its_image_with_its_corners_in_order(box, width, height):
    left, top, right, bottom = in_pixels(box, width, height)
    assert 0 <= left <= right <= width and 0 <= top <= bottom <= height


@given(BOXES, BOXES)
def test_overlap_is_symmetric_and_a_share(one, other):
    one, other = in_pixels(one, 640, 480), in_pixels(other, 640, 480)
    assert 0 <= iou(one, other) <= 1 + 1e-9
    assert iou(one, other) == pytest.approx(iou(other, one))


def test_half_the_overlap_is_enough():
    expected = {"box": [0, 0, 100, 100], "width": 100, "height": 100}
    assert refcoco("[0, 0, 1000, 500]", expected) == {"exact": 1.0, "iou": 0.5, "extracted": [0, 0, 100, 50]}
    assert refcoco("[0, 0, 1000, 499]", expected)["exact"] == 0.0
    assert refcoco("no box", expected) == {"exact": 0.0, "iou": 0.0, "extracted": None}


def test_a_small_box_is_taken_for_shares_unless_strict():
    expected = {"box": [0, 0, 1, 1], "width": 1000, "height": 1000}
    assert refcoco("[0, 0, 1, 1]", expected)["exact"] == 0.0
    assert refcoco("[0, 0, 1, 1]", expected, strict=True)["exact"] == 1.0


def test_every_split_has_the_same_weight():
    scores = [
        {"exact": exact, "iou": exact, "facts": {"split": split}}
        for exact, split in [(1.0, "RefCOCO_val"), (0.0, "RefCOCO_val"), (1.0, "RefCOCOg_test")]
    ]
    assert mean_of_parts(scores) == {"accuracy": 0.75, "iou": pytest.approx(2 / 3)}
