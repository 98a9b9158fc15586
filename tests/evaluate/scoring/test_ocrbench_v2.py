"""OCRBench v2: a rule for each type of question, and means over abilities."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicpmv.evaluate.scoring.ocrbench_v2 import ABILITIES, ABILITY_OF, RULES, iou, ocrbench_v2, ocrbench_v2_score


def score(kind, answer, *answers, **more):
    expected = {"type": kind, "question": more.pop("question", "q"), "answers": list(answers), **more}
    return ocrbench_v2(answer, expected)["score"]


def test_there_are_30_types_in_8_english_and_5_chinese_abilities():
    assert len(ABILITY_OF) == 30 and set(RULES) == set(ABILITY_OF)
    assert [sum(name.startswith(language) for name in ABILITIES) for language in ("en", "cn")] == [8, 5]
    with pytest.raises(ValueError, match="no questions of type 'poetry en'"):
        score("poetry en", "x", "y")


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("The total is 12.50 EUR", "12.50", 1.0),
        ("one two three four fife", "one two three four five", 0.956522),
        ("ONE TWO\nTHREE four five", "one two three four five", 1.0),
        ("something else entirely", "one two three four five", 0.0),  # under one half
    ],
)
def test_short_texts_are_contained_and_long_ones_similar(answer, reference, expected):
    assert score("reasoning VQA en", answer, reference) == pytest.approx(expected, abs=1e-6)


def test_how_a_question_is_scored_may_be_said_with_it():
    assert score("text recognition en", "abc", "ABC") == 1
    assert score("text recognition en", "abc", "ABC", eval="case sensitive") == 0
    assert score("science QA en", "(B)", "B", eval="multiple choice") == 1
    assert score("science QA en", "B. blue", "B", eval="multiple choice") == 0  # all letters count
    assert score("cognition VQA cn", "答案：红 色", "红色") == 1
    assert score("cognition VQA cn", "a,b,c,x", "a,b,c,d") == pytest.approx(6 / 7)  # four parts: similar


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("25", "10", 0),
        ("4", "10", 0),
        ("8", "10", 0.8),
        ("10", "10", 1),
        ("There are 12.", "10", 0.8),
        ("0", "3", 0),
        ("none", "3", 0),
    ],
)
def test_counts_are_as_good_as_they_are_close(answer, reference, expected):
    assert score("text counting en", answer, reference, eval="regression") == pytest.approx(expected)


def test_exact_counts_are_looked_for_anywhere_unless_one_is_strict():
    asked = {"type": "text counting en", "question": "", "answers": ["1"], "eval": "exact match"}
    assert ocrbench_v2("12", asked)["score"] == 1
    assert ocrbench_v2("12", asked, strict=True)["score"] == 0
    assert ocrbench_v2("It is 1", asked, strict=True)["score"] == 1


def test_formulas_are_compared_without_blanks_and_chinese_ones_without_text_commands():
    assert score("formula recognition en", "$ x ^ 2 + 1 $", "x^2+1") == 1
    assert score("formula recognition cn", r"\text{红}=3", "红 = 3") == 1
    assert score("formula recognition en", r"\text{a}", "a+") == 0


def test_choices_written_by_hand_may_be_separated_in_any_way():
    for answer in ("ABD", "A、B、D", "A, B, D", "A和B和D", "答案：A B D"):
        assert score("handwritten answer extraction cn", answer, "ABD") == 1
    assert score("handwritten answer extraction cn", "BAD", "ABD") == 0


def test_prose_is_scored_by_bleu_meteor_f_and_edits():
    assert score("full-page OCR en", "one two three four five six", "one two three four five six") > 0.99
    assert score("full-page OCR en", "", "one two") == 0
    assert 0 < score("full-page OCR cn", "红色的圆形和蓝色的方形", "红色的圆形和绿色的方形") < 1
    assert ocrbench_v2("x", {"type": "text translation cn", "question": "", "answers": [""]})["ignored"]


def test_keys_and_values_agree_or_not():
    wanted = {"company": ["Foo Bar"], "total": ["12"]}
    for reply in (
        '{"company": "foo bar", "total": "12"}',
        "{'company': 'FooBar', 'total': 12}",
        "```json\n" + json.dumps({"company": "Foo Bar", "total": "12"}) + "\n```",
        "company: Foo Bar\ntotal: 12",
    ):
        assert score("key information extraction en", reply, wanted) == 1
    assert score("key information extraction en", '{"company": "foo bar", "date": "1"}', wanted) == pytest.approx(
        1 / 3
    )
    assert score("key information extraction en", "[1, 2]", wanted) == 0
    either = {"total": ["12", "12.00"]}
    assert score("key information mapping en", '{"total": "12.00"}', either) == 1
    assert score("key information extraction cn", "{'total': '12'}", "{'total': '12'}") == 1


def test_the_last_box_in_thousandths_counts():
    answer = "first [1,1,5,5] then (50, 50, 150, 150)"
    assert score("text grounding en", answer, 60, 60, 140, 140) == pytest.approx(0.64)
    assert score("text grounding en", answer + " [0, 0, 2000, 1]", 60, 60, 140, 140) == pytest.approx(0.64)
    assert score("text grounding en", "nowhere", 60, 60, 140, 140) == 0


def test_an_answer_with_its_box_counts_half_for_each():
    reply = '{"answer": "hello", "bbox": [0, 0, 10, 10]}'
    assert score("VQA with position en", reply, "hello", bbox=[0, 0, 10, 20]) == 0.75
    assert score("VQA with position en", '{"answer": "hello"}', "hello", bbox=[0, 0, 10, 20]) == 0.5
    assert score("VQA with position en", "no", "hello", bbox=[0, 0, 10, 20]) == 0


def spotted(reply, boxes, texts):
    corners = [[x1, y1, x2, y1, x2, y2, x1, y2] for x1, y1, x2, y2 in boxes]
    return score("text spotting en", reply, "", bbox=corners, content=texts)


def test_spotted_print_needs_its_box_and_its_text():
    boxes = [(0, 0, 100, 100), (200, 0, 300, 100)]
    assert spotted("[(0,0,100,100,'Hi'), (200,0,300,100,'you')]", boxes, ["hi", "you!"]) == 1
    assert spotted("(0,0,100,100,hi)\n(200,0,300,100,me)", boxes, ["hi", "you"]) == 0.5
    assert spotted("[[0, 0, 10, 100, 'hi']]", boxes, ["hi", "you"]) == 0
    assert spotted("[[0, 0, 100, 100, 'hi']]", boxes, ["hi", "###"]) == 1
    assert spotted("[[0, 0, 100, 100, 'hi'], [210, 0, 300, 100, 'x']]", boxes, ["hi", "###"]) == 1  # not counted
    assert spotted("nothing", boxes, ["hi", "you"]) == 0


def test_tables_charts_and_documents_are_compared_as_trees():
    table = "<table><tr><td>a</td><td>b</td></tr></table>"
    assert score("table parsing en", "Here: " + table, table, question="as HTML") == 1
    assert score("table parsing cn", "no table", table) == 0
    assert score(
        "table parsing en",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "| a | b |\n|---|---|\n| 1 | 3 |",
        question="as Markdown",
    ) == pytest.approx(5 / 6)
    assert score("chart parsing en", "data = {'A': 1}  # bars", {"A": 1}) == 1
    assert score("chart parsing en", "A is 1", {"A": 1}) == 0
    asked = {"type": "chart parsing en", "question": "", "answers": [{"A": 12}]}
    kept, strict = (ocrbench_v2("{'A': 13}", asked, strict=strict)["score"] for strict in (False, True))
    assert (kept, strict) == (pytest.approx(1 - 1 / 9), pytest.approx(1 - 1 / 6))  # a third of "1 2", half of "12"
    assert score("document parsing en", "# Other\nlines", "# Title\ntext") == 1  # only the outline counts
    assert score("document parsing en", "lines\nmore", "# Title\ntext") < 1


def test_means_are_taken_over_abilities_and_languages_apart():
    scores = [
        {"score": 1.0, "type": "text recognition en"},
        {"score": 0.0, "type": "full-page OCR en"},
        {"score": 1.0, "type": "text spotting en"},
        {"score": 0.2, "type": "cognition VQA cn"},
        {"score": 0.0, "type": "text translation cn", "ignored": True},
    ]
    means = ocrbench_v2_score(scores)
    assert (means["en"], means["cn"]) == (0.75, 0.2)
    assert means["en_text_recognition"] == 0.5 and means["cn_knowledge_reasoning"] is None


corner = st.integers(0, 1000)
boxes = st.tuples(corner, corner, corner, corner).map(lambda c: (min(c[::2]), min(c[1::2]), max(c[::2]), max(c[1::2])))


@given(boxes, boxes)
def test_iou_is_symmetric_and_a_share(one, other):
    assert iou(one, other) == iou(other, one)
    assert 0 <= iou(one, other) <= 1
    if one[0] < one[2] and one[1] < one[3]:
        assert iou(one, one) == 1


@given(st.sampled_from(sorted(ABILITY_OF)), st.text(max_size=60))
def test_no_reply_is_too_strange_to_be_scored(kind, reply):
    answers = {"key": ["a"]} if "key information" in kind else "<table><tr><td>a</td></tr></table>"
    answers = {"A": 1} if kind.startswith("chart") else "7" if "counting" in kind else answers
    answers = "{'key': 'a'}" if kind == "key information extraction cn" else answers
    given = [0, 0, 10, 10] if kind == "text grounding en" else [answers]
    expected = {
        "type": kind,
        "question": "html",
        "answers": given,
        "bbox": [0, 0, 10, 10],
        "content": ["a"],
        "eval": "",
    }
    if kind == "text spotting en":
        expected["bbox"] = [[0, 0, 10, 0, 10, 10, 0, 10]]
    assert -1 <= ocrbench_v2(reply, expected)["score"] <= 1
