"""Short answers: relaxed accuracy, ANLS, VQA accuracy, and the normalization of the last."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.evaluate.scoring.normalization import normalize
from minicpmv.evaluate.scoring.short_answer import anls, mean_of_splits, relaxed_accuracy, vqa_accuracy


def relaxed(answer, *references, **more):
    return relaxed_accuracy(answer, {"answers": list(references)}, **more)["exact"]


@pytest.mark.parametrize("answer", ["200", "210", "190", " 205.5\n", "2e2", "+201"])
def test_a_number_within_five_percent_counts(answer):
    assert relaxed(answer, "200") == 1.0


@pytest.mark.parametrize("answer", ["211", "189", "-200", "200 km", "$200", "", "two hundred"])
def test_a_number_further_off_or_with_a_unit_does_not_count(answer):
    assert relaxed(answer, "200") == 0.0


def test_percent_is_a_hundredth():
    assert relaxed("41%", "0.41") == relaxed("41%", "41%") == 1.0
    assert relaxed("41", "41%") == 0.0


def test_texts_have_to_be_equal_but_for_case():
    assert relaxed("light BLUE", "Light blue") == relaxed("b", "a", "B") == 1.0
    assert relaxed("Light blue.", "Light blue") == 0.0


def test_nothing_is_close_to_zero_but_its_own_text():
    assert relaxed("0", "0") == 1.0
    assert relaxed("0.0", "0") == relaxed("0.001", "0") == 0.0


def test_strict_numbers_may_have_separators_and_years_may_not_be_close():
    assert relaxed("2,000,000", "2000000") == 0.0
    assert relaxed("2,000,000", "2000000", strict=True) == relaxed("$5.00.", "5", strict=True) == 1.0
    assert relaxed("1990", "1987") == 1.0
    assert relaxed("1990", "1987", strict=True) == 0.0
    assert relaxed("0.0", "0", strict=True) == 1.0


@given(st.floats(min_value=1e-3, max_value=1e6), st.floats(min_value=-0.049, max_value=0.049))
def test_five_percent_is_five_percent_of_the_reference(reference, off):
    assert relaxed(repr(reference * (1 + off)), repr(reference)) == 1.0
    assert relaxed(repr(reference * (1.06 + abs(off))), repr(reference)) == 0.0


def similarity(answer, *references, **more):
    return anls(answer, {"answers": list(references)}, **more)["score"]


def test_anls_is_the_similarity_to_the_closest_reference():
    assert similarity("invoice 12", "Invoice 12") == 1.0
    assert similarity("invoice 12", "invoice 1", "invoice 13") == pytest.approx(0.9)


def test_less_than_half_alike_is_nothing():
    assert similarity("abcd", "abxx") == 0.5
    assert similarity("abc", "axx") == 0.0
    assert similarity("", "abc") == 0.0


def test_blanks_are_collapsed_but_count_in_the_length():
    assert similarity("a    b", "a c") == pytest.approx(1 - 1 / 6)
    assert similarity("a    b", "a c", strict=True) == pytest.approx(1 - 1 / 3)


@given(st.text(max_size=20), st.text(max_size=20))
def test_similarity_is_zero_or_between_a_half_and_one(one, other):
    assert similarity(one, other) == 0.0 or 0.5 <= similarity(one, other) <= 1.0
    assert similarity(one, one, strict=True) == 1.0


def agreement(answer, *people):
    return vqa_accuracy(answer, {"answers": list(people)})["score"]


@pytest.mark.parametrize(("matches", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_three_of_the_other_nine_people_suffice(matches, score):
    assert agreement("cola", *["cola"] * matches, *["tea"] * (10 - matches)) == pytest.approx(score)


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("The  Two cats\n", "2 cats"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("a/b", "b"),  # the mark becomes a blank, and the article goes
        ("x - y", "x y"),
        ("1,000", "1000"),
        ("3.5 kg.", "3.5 kg"),
        ("no. 7", "no 7"),
        ("7.", "7."),
        ("none", "0"),
        ("an apple, the end", "apple end"),
    ],
)
def test_answers_are_compared_without_marks_articles_and_number_words(written, compared):
    assert normalize(written) == compared


@given(st.text(alphabet="ab 12,.;'-/", max_size=30))
def test_what_is_normalized_has_no_blanks_around_it_and_no_double_ones(text):
    assert normalize(text) == " ".join(normalize(text).split())


def test_both_halves_of_chartqa_weigh_the_same():
    scores = [
        {"exact": exact, "facts": {"split": split}}
        for split, exact in [("test_human", 1.0), ("test_human", 0.0), ("test_augmented", 1.0)]
    ]
    assert mean_of_splits(scores) == {"accuracy": 0.75, "human": 0.5, "augmented": 1.0}
