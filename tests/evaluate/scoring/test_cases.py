"""Cases that others decided, and what is said about those that our scorers decide otherwise."""

import json

import pytest

from minicpmv.evaluate.scoring.cases import CaseFileError, is_same, read_cases, shortfalls


COLORS = {"A": "deep red", "B": "pale green", "C": "navy blue", "D": "lemon yellow"}
PAIRS = ["picture 0 question 0", "picture 0 question 1", "picture 1 question 0", "picture 1 question 1"]
FIGURES = ["set 1 figure 0 question 0", "set 1 figure 0 question 1", "set 2 figure 0 question 0"]

# benchmark, scorer, prediction, reference, expected, further fields
CASES = [
    ("ChartQA", "relaxed_accuracy", "105", "100", 1.0, {}),
    ("ChartQA", "relaxed_accuracy", "b", ["a", "B"], 1.0, {}),
    ("DocVQA", "anls", "Lot 7", "['lot 8', 'bay 7']", 0.8, {}),
    ("TextVQA", "vqa_score", "stop", ["stop"] * 3 + ["halt"] * 7, 0.9, {}),
    ("OCRBench", "containment", "EXIT 4", ["exit"], 1.0, {"category": "Regular Text Recognition"}),
    ("MMStar", "mcq_vanilla (no judge)", "(C)", "C", 1.0, {"choices": COLORS, "extracted": "C"}),
    ("AI2D", "mcq_vanilla (no judge)", "deep red", "A", 1.0, {"choices": list(COLORS.values())}),
    ("RealWorldQA", "mcq_vanilla (no judge)", "B", "B", 1.0, {}),
    ("MMT-Bench", 'mcq_vanilla with judge replies ["B"]', "greenish", "B", 1.0, {"choices": COLORS}),
    ("MMMU val", 'mcq_vanilla; open question -> A: answer, B: "Other Answers"', "it is 7.5", "7.5", 1.0, {}),
    ("MMBench V1.1", "mcq_circular (no judge)", ["A", "B"], ["A", "B"], 1.0, {}),
    ("MMBench V1.1", "mcq_circular (no judge)", ["A", "hm"], ["A", "B"], 0.0, {}),
    ("MMBench V1.1", 'mcq_circular with judge replies ["well", "B"]', ["A", "hm"], ["A", "B"], 1.0, {}),
    ("MMBench V1.1", 'mcq_circular with judge replies ["B"]', ["C", "hm"], ["A", "B"], 0.0, {}),
    ("HallusionBench", "YOrN_Extraction == reference", "no", "No", 1.0, {"extracted": "No"}),
    ("MME", "YOrN_Extraction == reference", "perhaps", "No", 0.0, {"extracted": "Unknown"}),
    ("HallusionBench", "YOrN_Extraction == reference", "perhaps", "No", 1.0, {"judge_reply": ["Unknown", "No"]}),
    (
        "HallusionBench",
        "aggregate aAcc,fAcc,qAcc; score = mean of the three",
        [True, False, True],
        FIGURES,
        {"aAcc": 66.6667, "fAcc": 50.0, "qAcc": 66.6667, "mean": 61.1111},
        {},
    ),
    ("MME", "MME_rating: acc + acc+", [1, 1, 1, 0], PAIRS, 125.0, {}),
    ("MME", "MME_rating: acc + acc+", [1, 1, 1, 0], None, {"acc": 75.0, "acc+": 50.0}, {"category": "count"}),
    ("MMMU val", "MiniCPM_V_4.extract_answer (cuts the reply)", "So.\nAnswer: E", "E", 1.0, {"extracted": "E"}),
    ("ChartQA", "MiniCPM_V_4.extract_answer (cuts the reply)", "So.\nAnswer: 3 m", "3 m", 1.0, {}),
    ("OCRBench", "MiniCPM_V_4.extract_answer (cuts the reply)", "Answer: 3", "Answer: 3", 1.0, {}),
    ("MM-Vet", "MiniCPM_V_4.extract_answer (cuts the reply)", "Answer: 3", "Answer: 3", 1.0, {}),
    (
        "MathVista testmini",
        "prefetch, else judge extraction, then compare",
        "8",
        "8",
        1.0,
        free := {"question_type": "free_form", "answer_type": "integer"},
    ),
    ("MathVista testmini", "prefetch, else judge extraction, then compare", "eight", "8", 0.0, free),
    (
        "MathVista testmini",
        "prefetch, else judge extraction, then compare",
        "eight",
        "8",
        1.0,
        {**free, "judge_reply": "8"},
    ),
    ("MM-Vet", "judge reply -> float in [0,1], 5 tries, else 0", ["good", "2", "0.4"], "x", 0.4, {}),
    ("MM-Vet", "judge reply -> float in [0,1], 5 tries, else 0", ["good"], "x", 0.0, {}),
    (
        "MMHal-Bench",
        "judge review -> score 0..6; hallucination = score < 3",
        "Rating: 4",
        None,
        {"score": 4.0, "hallucination": 0.0},
        {},
    ),
    (
        "MMHal-Bench",
        "aggregate over 96 answers",
        ["Rating: 6", "?"],
        None,
        {"score": 3.0, "hallucination_rate": 0.5},
        {},
    ),
    (
        "Object HalBench",
        "CHAIR over extracted objects; and so on",
        [["puppy", "cab"], ["mist"]],
        [["dog"], ["boat"]],
        {"CHAIRs": 100.0, "CHAIRs_all_answers": 50.0, "CHAIRi": 50.0},
        {},
    ),
    ("RefCOCO", "Acc@0.5; and so on", "0 0 500 1000", [0, 0, 32, 64], 1.0, {"image_size": [64, 64], "iou": 1.0}),
    ("Video-MME", "extract_characters_regex == reference", "Answer: C", "C", 1.0, {"extracted": "C"}),
    ("Video-MME", "extract_characters_regex == reference", "E", "E", 0.0, {"extracted": ""}),
    ("LongVideoBench", "extract_characters_regex A-E", "E", "E", 1.0, {}),
    ("MLVU", "check_ans_with_model (no judge)", "C) it", "(C) a storm", 1.0, {}),
    ("MLVU", "check_ans_with_model (no judge)", "I see a storm", "(C) a storm", 1.0, {}),
    ("MLVU", "check_ans_with_model (no judge)", "B", "(C) a storm", 0.0, {}),
    ("LVBench", "polish_answer == reference", "(D)", "D", 1.0, {}),
    ("LVBench (lmms-eval)", "extract_mcq_answer", "The answer is D", "D", 1.0, {}),
    ("MotionBench", "lmms-eval _extract_choice_letter", "answer: f", "F", 1.0, {}),
    ("FAVOR-Bench", "containment of the option text", "It stands.", "stands", 1.0, {"choices": ["stands", "sits"]}),
    (
        "OpenCompass average",
        "the same",
        {
            "MMBench V1.1": 80,
            "MMStar": 60,
            "MMMU": 60,
            "MathVista": 60,
            "HallusionBench": 60,
            "AI2D": 80,
            "OCRBench": 800,
            "MM-Vet": 60,
        },
        None,
        67.5,
        {},
    ),
]


def as_case(number, benchmark, scorer, prediction, reference, expected, more):
    fields = {"benchmark": benchmark, "scorer": scorer, "prediction": prediction, "reference": reference}
    return {"id": f"case_{number}", **fields, "expected": expected, **more}


@pytest.mark.parametrize(
    "case", [as_case(number, *case) for number, case in enumerate(CASES)], ids=lambda case: case["id"]
)
def test_a_case_that_follows_from_the_rules_does_not_fall_short(case):
    assert list(shortfalls([case])) == []


@pytest.mark.parametrize(
    "case", [as_case(number, *case) for number, case in enumerate(CASES)], ids=lambda case: case["id"]
)
def test_a_case_that_expects_something_else_falls_short(case):
    def other(value):
        return {name: other(one) for name, one in value.items()} if isinstance(value, dict) else value + 0.25

    assert [line.split(":")[0] for line in shortfalls([{**case, "expected": other(case["expected"])}])] == [case["id"]]


def test_another_extract_falls_short_even_if_the_score_is_right():
    case = as_case(1, "Video-MME", "extract_characters_regex == reference", "b", "B", 0.0, {"extracted": "C"})
    assert list(shortfalls([case])) == ['case_1: extracted null instead of "C"']


def test_a_scorer_that_nobody_knows_is_named():
    case = as_case(1, "ChartQA", "relaxed_accuracy of our own", "1", "1", 1.0, {})
    assert list(shortfalls([case])) == ["case_1: unknown scorer 'relaxed_accuracy of our own' of ChartQA"]


def test_the_same_means_the_scorer_of_the_benchmark_s_case_before():
    cases = [
        as_case(1, "ChartQA", "relaxed_accuracy", "1", "1", 1.0, {}),
        as_case(2, "ChartQA", "the same", "2", "1", 1.0, {}),
    ]
    assert list(shortfalls(cases)) == ["case_2: expected 0.0 instead of 1.0"]


def test_a_case_of_another_form_is_named_and_those_after_it_are_scored():
    cases = [
        {"id": "bare"},
        as_case(1, "RefCOCO", "Acc@0.5", "1 2 3 4", [0, 0, 1, 1], 0.0, {}),
        as_case(2, "ChartQA", "relaxed_accuracy", "2", "1", 1.0, {}),
    ]
    lines = list(shortfalls(cases))
    assert lines[0] == "bare: has no benchmark, scorer, prediction, reference, expected"
    assert lines[1].startswith("case_1: cannot be scored by 'Acc@0.5': KeyError: 'image_size'")
    assert lines[2].startswith("case_2")


def test_the_version_of_the_rules_can_be_chosen():
    reply = "The answer is C, though at first sight one might well think of another"
    case = as_case(1, "MMStar", "mcq_vanilla (no judge)", reply, "C", 1.0, {"choices": COLORS})
    assert list(shortfalls([case])) == []
    assert list(shortfalls([case], "2025-09")) == ["case_1: expected 0.0 instead of 1.0"]


def test_numbers_are_compared_to_four_digits_and_nothing_is_nothing():
    assert is_same(0.923077, 12 / 13) and is_same(True, 1.0) and is_same("", None)
    assert not is_same(0.9231, 0.92325) and not is_same(0.0, None) and not is_same([1], [1, 2])


@pytest.mark.parametrize("form", ["object", "list", "lines"])
def test_cases_are_an_object_a_list_or_json_lines(tmp_path, form):
    cases = [as_case(number, *case) for number, case in enumerate(CASES)]
    file = tmp_path / "cases.json"
    texts = {
        "object": json.dumps({"about": "what they are", "cases": cases}),
        "list": json.dumps(cases),
        "lines": "\n".join(map(json.dumps, cases)),
    }
    file.write_text(texts[form])
    assert read_cases(file) == cases


@pytest.mark.parametrize("text", ["", "no JSON", "[]", "[1]", '{"cases": {}}', '{"a": 1}\nx'])
def test_a_file_without_cases_is_refused(tmp_path, text):
    file = tmp_path / "cases.json"
    file.write_text(text)
    with pytest.raises(CaseFileError, match=r"cases\.json"):
        read_cases(file)
