"""The part of a reply that is scored."""

from hypothesis import given
from hypothesis import strategies as st

from minicpmv.evaluate.scoring.cutting import cut_choice, cut_thought, cut_value


def test_a_choice_is_the_letter_after_the_last_answer():
    assert cut_choice("Answer: A is tempting.\nAnswer:  C.") == "C"
    assert cut_choice("Answer: i") == "i"  # as it is written


def test_a_letter_that_begins_a_word_is_no_choice():
    assert cut_choice("Answer: Apricot") == "Answer: Apricot"
    assert cut_choice("Answer: J") == "Answer: J"


def test_a_value_is_everything_after_the_first_answer():
    assert cut_value("We count.\nAnswer: 12 cm\n") == "12 cm\n"
    assert cut_value("Answer: 3? No.\nAnswer: 4") == "3? No.\nAnswer: 4"


def test_a_thought_is_cut_at_its_last_end():
    assert cut_thought("<think>\nAnswer: 3\n</think>\n\nAnswer: 4") == "Answer: 4"
    assert cut_thought("no thought") == "no thought"


@given(st.text(alphabet=st.characters(exclude_characters=":")))
def test_a_reply_without_answer_is_not_cut(reply):
    assert cut_choice(reply) == cut_value(reply) == reply


@given(st.text(), st.sampled_from("ABCDEFGHI"))
def test_what_stands_before_does_not_change_a_choice(before, letter):
    assert cut_choice(f"{before}\nAnswer: {letter}") == letter
