"""Letters in replies about videos, as each benchmark reads them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.evaluate.scoring.video_choice import (
    OPENINGS,
    best_ranked_letter,
    bracketed_letter,
    favorbench,
    first_capital,
    known_accuracy,
    lone_letter,
    longvideobench,
    lvbench,
    lvbench_lmms_eval,
    mean_of_tasks,
    mlvu,
    motionbench,
    videomme,
)


CLIPS = {"A": "a goat jumps", "B": "a boy sings", "C": "it rains", "D": "nothing"}
REPLIES = st.text(alphabet=st.sampled_from(list("ABCDEFab (): answer.is\n")), max_size=40)


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("D", "D"),
        ("The answer is C.", "C"),
        ("Answer: C", "C"),
        ("The best option is C", "C"),
        ("Best option: C", "B"),
        ("Best answer: C", "B"),
        ("The best option isThe correct option is C", "C"),
        ("Clearly D", "C"),
        ("d", None),
        ("", None),
    ],
)
def test_the_first_capital_counts_once_known_openings_are_gone(reply, read):
    assert first_capital(reply) == read


def test_the_authors_script_knows_fewer_openings_and_longvideobench_five_options():
    assert first_capital("Answer: C", openings=OPENINGS) == "A"
    assert first_capital("E") is None
    assert first_capital("E", "ABCDE") == "E"


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("(C) rain", "C"),
        ("C) rain", "C"),
        ("C", "C"),
        ("It is C", "I"),
        ("so ( D ) or (A)", "D"),
        ("(", None),
        ("", None),
    ],
)
def test_lvbench_takes_what_is_bracketed_or_the_first_character(reply, read):
    assert bracketed_letter(reply) == read


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("b", "B"),
        ("<think>\nC? No.\n</think>\nD", "D"),
        ("the answer is: f", "F"),
        ("Answer: A dog, so E", "A"),
        ("option2d.", "D"),
        ("why", None),
        ("rock", "C"),
    ],
)
def test_motionbench_takes_a_letter_that_stands_alone_before_any_other(reply, read):
    assert lone_letter(reply) == read


@pytest.mark.parametrize(
    ("reply", "read"),
    [
        ("C", "C"),
        ("(B).", "B"),
        ("B. because of C", "B"),
        ("The correct answer is D", "D"),
        ("The answer is (B), not C", "C"),  # the last letter after the phrase
        ("My choice is B, it seems", "B"),
        ("First (B), then (D), at last nothing", "D"),
        ("答案是C吧", "C"),
        ("c", None),
        ("...", None),
        (" . . ", None),
        ("xBx", "B"),
    ],
)
def test_lmms_eval_takes_the_last_of_the_best_ranked(reply, read):
    assert best_ranked_letter(reply) == read


@given(REPLIES)
def test_whatever_the_reply_a_letter_of_the_options_is_read_or_none(reply):
    assert first_capital(reply) in {*"ABCD", None}
    assert lone_letter(reply) in {*"ABCDEF", None}
    assert best_ranked_letter(reply) in {*"ABCD", None}
    assert bracketed_letter(reply) in {*reply, None}


@pytest.mark.parametrize("scorer", [videomme, longvideobench, mlvu, lvbench, lvbench_lmms_eval, motionbench])
def test_a_bare_letter_is_read_alike_by_all(scorer):
    expected = {"answer": "C", "choices": CLIPS}
    assert scorer("C", expected)["exact"] == 1.0
    assert scorer("B", expected)["exact"] == 0.0
    assert scorer("It cannot be A, so the answer is C.", expected, strict=True)["exact"] == 1.0


@pytest.mark.parametrize("scorer", [videomme, longvideobench, mlvu])
def test_an_option_s_text_counts_where_no_letter_is_named(scorer):
    assert scorer("it rains", {"answer": "C", "choices": CLIPS})["exact"] == 1.0
    assert scorer("who knows", {"answer": "C", "choices": CLIPS})["undecided"]


def test_mlvu_takes_the_character_before_the_first_bracket():
    expected = {"answer": "C", "choices": CLIPS}
    assert mlvu("Option C) and not B)", expected)["exact"] == 1.0
    assert mlvu(") C", expected)["exact"] == 1.0  # by the rule of images


def test_a_hidden_answer_is_not_scored():
    scores = [
        motionbench("A", {"answer": "NA"}),
        motionbench("A", {"answer": "A"}),
        motionbench("why", {"answer": "A"}),
    ]
    assert scores[0]["exact"] is None
    assert known_accuracy(scores) == {"accuracy": 0.5, "answered": 1.0}


def favor(reply, **more):
    options = ["turns left", "turns left twice", "stands"]
    return favorbench(reply, {"answer": "turns left", "options": options}, **more)["exact"]


def test_favor_wants_the_option_s_text_and_no_longer_one_that_contains_it():
    assert favor("It TURNS LEFT.") == 1.0
    assert favor("It turns left twice.") == favor("A") == favor("It stands.") == 0.0
    assert favor("A", strict=True) == favor("It turns left.", strict=True) == 1.0
    assert favor("It turns left twice.", strict=True) == 0.0


def test_m_avg_is_the_mean_of_tasks_not_of_questions():
    scores = [
        {"exact": exact, "facts": {"task": task}} for exact, task in [(1.0, "order"), (0.0, "count"), (0.0, "count")]
    ]
    assert mean_of_tasks(scores) == {"m_avg": 0.5, "pooled": pytest.approx(1 / 3)}
