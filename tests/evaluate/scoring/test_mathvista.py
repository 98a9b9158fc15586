"""MathVista: bare answers, and what a judge takes out of others."""

import pytest

from minicpmv.evaluate.scoring.mathvista import judge_of_mathvista, mathvista


def free(answer, kind="integer"):
    return {"question_type": "free_form", "answer_type": kind, "answer": answer, "question": "How many?"}


CHOICE = {
    "question_type": "multi_choice",
    "answer_type": "text",
    "answer": "9 kg",
    "answer_option": "B",
    "choices": ["4 kg", "9 kg", "16 kg"],
}


@pytest.mark.parametrize(
    ("reply", "kind"), [("25", "integer"), (" 25\n", "integer"), ("25", "float"), ("2.5e1", "float")]
)
def test_a_bare_number_of_the_right_type_needs_no_judge(reply, kind):
    scores = mathvista(reply, free("25", kind))
    assert (scores["exact"], scores["undecided"]) == (1.0, False)


@pytest.mark.parametrize("reply", ["25.0", "26", "25 cm", "twenty-five", ""])
def test_any_other_reply_is_for_the_judge(reply):
    scores = mathvista(reply, free("25"))
    assert (scores["exact"], scores["undecided"]) == (0.0, True)


def test_what_the_judge_takes_out_is_compared_as_a_bare_answer_is():
    judge = judge_of_mathvista()
    entry = {"answer": "I count 25 of them.", "expected": free("25")}
    assert "I count 25 of them." in judge.messages(entry)[0]["content"]
    assert judge.read("25", entry)["exact"] == 1.0
    assert judge.read("25.0", entry)["exact"] == judge.read("many", entry)["exact"] == 0.0
    assert judge.read("Failed to obtain answer via API.", entry) is None
    assert judge.give_up(entry)["exact"] == 0.0
    assert judge.required


@pytest.mark.parametrize(("reply", "exact"), [("B", 1.0), ("9 kg", 1.0), ("C", 0.0), ("it is 16 kg", 0.0)])
def test_a_letter_decides_multiple_choice_right_or_wrong(reply, exact):
    scores = mathvista(reply, CHOICE)
    assert (scores["exact"], scores["undecided"]) == (exact, False)


def test_a_choice_that_is_not_found_is_for_the_judge():
    entry = {"answer": "the heavier", "expected": CHOICE}
    assert mathvista(entry["answer"], CHOICE)["undecided"]
    assert judge_of_mathvista().read("B", entry)["exact"] == 1.0
    assert judge_of_mathvista().read("C", entry)["exact"] == 0.0


def test_a_right_zero_is_put_to_the_judge_all_the_same():
    assert mathvista("0", free("0"))["undecided"]
    assert judge_of_mathvista().read("0", {"answer": "0", "expected": free("0")})["exact"] == 1.0
    assert mathvista("0", free("0"), strict=True) == {"exact": 1.0, "extracted": 0, "undecided": False}


@pytest.mark.parametrize(("kind", "answer"), [("list", "[2, 5]"), ("text", "Oslo")])
def test_lists_and_texts_never_match_unless_strict(kind, answer):
    entry = {"answer": answer, "expected": free(answer, kind)}
    assert judge_of_mathvista().read(answer, entry)["exact"] == 0.0
    assert judge_of_mathvista(strict=True).read(f" {answer.lower()} ", entry)["exact"] == 1.0
    assert mathvista(answer, free(answer, kind), strict=True)["exact"] == 1.0


def test_a_strict_list_is_compared_element_by_element():
    assert mathvista("[2,5.0]", free("[2, 5]", "list"), strict=True)["exact"] == 1.0
    assert mathvista("[5, 2]", free("[2, 5]", "list"), strict=True)["exact"] == 0.0
    assert mathvista("2 and 5", free("[2, 5]", "list"), strict=True)["undecided"]
