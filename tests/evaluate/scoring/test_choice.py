"""Which option a reply means, by the reference's rule in each of its versions, and by stricter reading."""

from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.evaluate.scoring import SCORINGS
from minicpmv.evaluate.scoring.choice import (
    REFUSALS,
    choice,
    choices_of,
    circular,
    draw_lot,
    infer_choice,
    judge_of_choice,
    matching_request,
    stated_choice,
)


FRUIT = {"A": "Ripe mango", "B": "Sour lemon", "C": "Black grape", "D": "Dried fig"}
LONG = "C, since nothing else in the picture has that color, as far as anybody could tell"
REPLIES = st.text(alphabet=st.sampled_from(list("ABCDZ abc.()*:,answer is\nlemon grape")), max_size=60)


@pytest.mark.parametrize(
    "reply", ["B", "(B)", "B.", "**B**", "Answer: B", "the option to pick is {B}", "Sour lemon", "a sour lemon!"]
)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_reply_means_the_option_whose_letter_or_text_it_names(reply, scoring):
    assert infer_choice(reply, FRUIT, scoring) == "B"


@pytest.mark.parametrize("reply", ["", "E", "c", "A or B", "a ripe mango or a dried fig", "something else"])
@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_reply_that_names_no_option_or_several_decides_nothing(reply, scoring):
    assert infer_choice(reply, FRUIT, scoring) is None


@pytest.mark.parametrize("refusal", [*REFUSALS, "Z", "the answer: Z"])
def test_a_refusal_and_a_z_mean_none_of_the_options(refusal):
    assert infer_choice(f"{refusal} ", FRUIT) == "Z"
    assert choice(refusal, {"answer": "A", "choices": FRUIT}) == {"exact": 0.0, "extracted": "Z", "undecided": False}


def test_an_early_letter_counts_only_before_2025_08():
    assert [infer_choice(LONG, FRUIT, scoring) for scoring in SCORINGS] == ["C", None, None]
    assert infer_choice("so it is C after all", FRUIT, "2025-09") == "C"
    assert infer_choice("so C it is then, after all", FRUIT, "2025-09") is None


def test_a_letter_named_early_and_late_counts_as_early():
    assert infer_choice("C is what I said, and so the last word is C", FRUIT, "2025-09") is None


def test_a_stated_answer_counts_anywhere_since_2026_06():
    reply = "The correct answer is **C**, and here is why in more than a few words"
    assert [infer_choice(reply, FRUIT, scoring) for scoring in SCORINGS] == ["C", None, "C"]


@pytest.mark.parametrize(
    ("reply", "read"), [("A lemon is yellow", "A"), ("the answer is a lemon", "A"), ("answer is black", "B")]
)
def test_the_article_and_a_word_after_answer_is_are_read_as_letters(reply, read):
    assert infer_choice(reply, FRUIT) == read


def test_a_reply_beyond_twice_the_options_is_not_searched_for_their_texts():
    reply = "it is a sour lemon " + "and so on " * 10
    assert [infer_choice(reply, FRUIT, scoring) for scoring in SCORINGS] == ["B", None, None]


@given(reply=REPLIES)
def test_whatever_the_reply_the_rule_gives_an_option_or_z_or_nothing(reply):
    for scoring in SCORINGS:
        assert infer_choice(reply, FRUIT, scoring) in {*FRUIT, "Z", None}
    assert stated_choice(reply, FRUIT) in {*FRUIT, None}


@given(
    letter=st.sampled_from("ABCD"),
    before=st.text(alphabet="xyz ", max_size=80),
    marks=st.sampled_from(["{}", "({}).", "**{}**", ": {}!"]),
)
def test_a_letter_at_the_end_counts_whatever_words_stand_before_it(letter, before, marks):
    reply = f"{before} {marks.format(letter)}"
    for scoring in SCORINGS:
        assert infer_choice(reply, FRUIT, scoring) == letter


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("B", "B"),
        ("B. Sour lemon", "B"),
        ("(B) because it is sour", "B"),
        ("A lemon is yellow", None),
        ("The answer is a mango", None),
        ("the answer is blue", None),
        ("Sour lemon is one option, but the answer is C", "C"),
        ("The answer is B. Wait: the answer is D.", "D"),
        ("Answer: A mango of some kind", None),
        ("it is a ripe mango", "A"),
        ("so it must be D", "D"),
        (LONG, "C"),
        ("Option C.", "C"),
        ("Option A is wrong, so it must be B", "B"),
        ("答案是B吧", "B"),
        ("应该选C，因为它最大", "C"),
    ],
)
def test_the_strict_reading_takes_what_is_stated(reply, read):
    assert stated_choice(reply, FRUIT) == read


def test_the_strict_reading_takes_the_longer_of_options_that_contain_each_other():
    assert stated_choice("it turns left twice", {"A": "turns left", "B": "turns left twice"}) == "B"
    assert stated_choice("it turns leftward", {"A": "turns left", "B": "stands"}) is None


def test_the_strict_reading_finds_words_of_languages_without_blanks():
    assert stated_choice("图中是一只猫。", {"A": "猫", "B": "狗"}) == "A"


def test_an_open_question_is_a_choice_between_its_answer_and_others():
    expected = {"answer": "24.32", "choices": {}}
    assert choice("about 24.32 cm", expected)["exact"] == 1.0
    assert choice("A", expected)["exact"] == 1.0  # the reference's defect
    assert choice("Other Answers", expected)["extracted"] == "B"
    assert choice("24.3", expected) == {"exact": 0.0, "extracted": None, "undecided": True}


@pytest.mark.parametrize("answers", [["24.32", "24.3"], "['24.32', '24.3']"])
def test_a_strict_open_question_wants_one_of_its_answers(answers):
    expected = {"answer": answers, "choices": {}}
    assert choice("A", expected, strict=True)["exact"] == 0.0
    assert choice("It is 24.3.", expected, strict=True)["exact"] == 1.0
    for other in ("It is 124.3", "-24.3", "24.35", "24.3.1"):
        assert choice(other, expected, strict=True)["exact"] == 0.0


def test_a_question_of_circular_evaluation_counts_if_every_rotation_is_right():
    scores = [
        {"exact": exact, "facts": {"group": group}}
        for group, exact in [(1, 1.0), (2, 1.0), (1, 1.0), (2, 0.0), (2, 1.0), (3, 0.0)]
    ]
    assert circular(scores) == {"accuracy": pytest.approx(1 / 3), "rotations": pytest.approx(4 / 6)}


def entry(answer, question="Which fruit?", **more):
    return {"answer": answer, "expected": {"answer": "D", "choices": FRUIT, "question": question}, **more}


@pytest.mark.parametrize("question", ["Which fruit is it", "图中是什么水果"])
def test_the_judge_is_shown_question_options_and_reply_in_the_question_s_language(question):
    request = matching_request(question, FRUIT, "a dry thing")
    assert question in request and "D. Dried fig" in request and "a dry thing" in request
    assert ("选项" in request) == (not question.isascii())


def test_the_judge_reads_what_was_cut_out_and_its_reply_is_read_by_the_same_rule():
    judge = judge_of_choice()
    asked = entry("a long reply", cut="the dried one", scores={"exact": 0.0, "undecided": True})
    assert judge.applies(asked)
    assert "the dried one" in judge.messages(asked)[0]["content"]
    assert judge.read("D", asked) == {"exact": 1.0, "extracted": "D", "undecided": False, "judged": True}
    assert judge.read("Z", asked)["exact"] == 0.0
    assert judge.read("no idea", asked) is None


def test_a_judge_that_never_answers_is_replaced_by_a_lot_that_falls_the_same_each_time():
    asked = entry("?")
    assert judge_of_choice().give_up(asked) == judge_of_choice().give_up(asked)
    assert {draw_lot(FRUIT, str(seed)) for seed in range(100)} == {*FRUIT, "Z"}
    assert judge_of_choice(strict=True).give_up(asked)["exact"] == 0.0


def test_options_of_a_list_get_letters():
    assert choices_of(["x", "y"]) == {"A": "x", "B": "y"}
    assert list(choices_of(list(ascii_uppercase))) == list(ascii_uppercase)
