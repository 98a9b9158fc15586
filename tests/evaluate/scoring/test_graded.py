"""Benchmarks whose answers a judge grades: MM-Vet and MMHal-Bench."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.evaluate.scoring.mmhal import judge_of_mmhal, mmhal, mmhal_score, rate, read_rating
from minicpmv.evaluate.scoring.mmvet import judge_of_mmvet, mmvet, mmvet_score, read_grade


@pytest.mark.parametrize(("reply", "grade"), [("0.3", 0.3), (" 1\n", 1.0), ("0", 0.0), (".5", 0.5)])
def test_a_grade_is_the_whole_reply(reply, grade):
    assert read_grade(reply) == grade


@pytest.mark.parametrize("reply", ["", "0.5.", "Correctness: 0.5", "1.1", "-0.1", "nan", "inf", "50%"])
def test_anything_but_a_number_up_to_one_is_no_grade(reply):
    assert read_grade(reply) is None


def test_a_reply_that_is_no_grade_is_asked_for_again_and_at_last_is_zero():
    judge, entry = judge_of_mmvet(), {"answer": "42", "expected": {"answer": "4<AND>2<OR>42", "question": "What?"}}
    assert "What? | 4 <AND> 2 <OR> 42 | 42 | " in judge.messages(entry)[0]["content"]
    assert judge.read("good", entry) is None
    assert judge.read("0.9", entry)["score"] == 0.9
    assert judge.give_up(entry)["score"] == 0.0
    assert (judge.tries, judge.required) == (5, True)


def test_without_a_judge_there_is_no_grade():
    scores = mmvet("42", {"answer": "42", "question": "?"})
    assert scores["undecided"] and scores["score"] is None
    assert mmvet_score([scores | {"facts": {"capabilities": ["ocr"]}}])["score"] is None


def test_a_grade_counts_under_each_capability_that_the_question_needs():
    scores = [
        {"score": 1.0, "facts": {"capabilities": ["ocr", "math"]}},
        {"score": 0.5, "facts": {"capabilities": ["ocr"]}},
    ]
    found = mmvet_score(scores)
    assert (found["score"], found["ocr"], found["math"], found["gen"]) == (0.75, 0.75, 1.0, None)


@pytest.mark.parametrize(
    ("review", "rating"),
    [
        ("A fair answer.\nRating: 4, somewhat informative", 4),
        ("RATING: 0", 0),
        ("rating: 3 ... rating: 3", 3),
        ("Rating: 2. Rating: 3.", None),
        ("four of six", None),
        ("Rating 5", None),
        ("Rating: 7", None),
        ("rating: 10", 1),  # as the reference reads it
    ],
)
def test_a_review_gives_the_one_rating_that_it_names(review, rating):
    assert read_rating(review) == rating
    assert rate(review)["rating"] == float(rating or 0)
    assert rate(review)["hallucination"] == float((rating or 0) < 3)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=96))
def test_the_score_is_the_mean_rating_and_the_rate_the_share_below_three(ratings):
    found = mmhal_score([rate(f"Rating: {rating}") for rating in ratings])
    assert found["score"] == pytest.approx(sum(ratings) / len(ratings))
    assert found["hallucination_rate"] == pytest.approx(sum(rating < 3 for rating in ratings) / len(ratings))


def test_the_reviewer_is_shown_what_the_image_holds_and_its_review_counts_whatever_it_is():
    expected = {"question": "What is it?", "answer": "A heron.", "contents": ["Bird", "Water"]}
    judge, entry = judge_of_mmhal(), {"answer": "A crane.", "expected": expected}
    request = judge.messages(entry)[0]["content"]
    for part in (
        "### Image Contents\nBird, Water\n",
        "What is it?",
        "A heron.",
        "### LMM Response to Evaluate\nA crane.\n",
    ):
        assert part in request
    assert judge.read("no rating at all", entry)["hallucination"] == 1.0
    assert mmhal_score([mmhal("A crane.", expected)]) == {"score": None, "hallucination_rate": None}


def test_a_strict_review_counts_only_with_a_rating():
    judge, entry = judge_of_mmhal(strict=True), {"answer": "A crane.", "expected": {}}
    assert judge.read("no rating at all", entry) is None
    assert judge.read("Rating: 1", entry)["rating"] == 1.0
    assert mmhal_score([judge.give_up(entry)])["hallucination_rate"] is None
