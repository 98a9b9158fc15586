"""Yes or no, and the figures of HallusionBench and MME."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.evaluate.scoring.yes_no import hallusion, hallusion_facts, infer_yes_no, judge_of_yes_no, mme, yes_no


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("Yes", "Yes"),
        ("YES!", "Yes"),
        ("No, it is shorter.", "No"),
        ("the answer is (no)", "No"),
        ("yes and no", None),
        ("yes/no? yes", None),
        ("yesterday", None),
        ("not at all", None),
        ("", None),
    ],
)
def test_a_reply_means_the_one_word_that_it_holds(reply, read):
    assert infer_yes_no(reply) == read
    assert yes_no(reply, {"answer": "Yes"})["exact"] == float(read == "Yes")
    assert yes_no(reply, {"answer": "Yes"})["undecided"] == (read is None)


def test_a_strict_reading_takes_the_word_that_a_reply_begins_with():
    assert yes_no("No. Yes would be wrong.", {"answer": "No"}, strict=True)["exact"] == 1.0
    assert yes_no("No. Yes would be wrong.", {"answer": "No"})["undecided"]


@given(st.text(alphabet="yesno /.,!\n", max_size=30))
def test_a_reply_never_means_both(reply):
    words = reply.split()
    if words == ["yes"] or words == ["no"]:
        assert infer_yes_no(reply) == words[0].capitalize()
    assert infer_yes_no(reply) in ("Yes", "No", None)


def answered(exact, **facts):
    return {"exact": exact, "facts": {"l2_category": "chart", "set": "0", **facts}}


def test_a_figure_counts_if_all_questions_about_it_are_right_and_a_question_if_it_is_for_all_figures():
    scores = [
        answered(1.0, figure="1", question="0"),
        answered(1.0, figure="1", question="1"),
        answered(1.0, figure="2", question="0"),
        answered(0.0, figure="2", question="1"),
    ]
    found = hallusion(scores)
    assert found == {"mean": pytest.approx((0.75 + 0.5 + 0.5) / 3), "aAcc": 0.75, "fAcc": 0.5, "qAcc": 0.5}


def test_figures_of_other_sets_and_categories_are_other_figures():
    scores = [
        answered(1.0, figure="1", question="0"),
        answered(0.0, figure="1", question="0", set="1"),
        answered(1.0, figure="1", question="0", l2_category="map"),
    ]
    assert hallusion(scores)["fAcc"] == pytest.approx(2 / 3)


def test_set_figure_and_question_are_read_from_the_index():
    assert hallusion_facts("VS_chart_0_12_3_1") == {"set": "12", "figure": "3", "question": "1"}


def test_mme_sums_the_right_answers_and_the_pictures_with_both_right():
    def pair(category, picture, *answers):
        return [{"exact": answer, "facts": {"category": category, "picture": picture}} for answer in answers]

    scores = [*pair("count", "a", 1.0, 1.0), *pair("count", "b", 1.0, 0.0), *pair("text_translation", "a", 1.0, 1.0)]
    assert mme(scores) == {
        "total": 325.0,
        "perception": 125.0,  # acc 75 and acc+ 50
        "cognition": 200.0,
        "count": 125.0,
        "text_translation": 200.0,
    }


def test_a_judge_that_says_yes_decides_and_one_that_says_nothing_does_not():
    judge = judge_of_yes_no()
    entry = {"answer": "It rises.", "expected": {"answer": "Yes", "question": "Does it rise"}}
    assert "It rises." in judge.messages(entry)[0]["content"]
    assert judge.read("Yes", entry)["exact"] == 1.0
    assert judge.read("Unknown", entry) is None
    assert judge.give_up(entry)["exact"] == 0.0
