"""What every judge keeps to: its scores are the scorer's own, and everything can be logged."""

import json

import pytest

from minicpmv.evaluate.benchmark import main_score
from minicpmv.evaluate.scoring import SCORINGS
from minicpmv.evaluate.scoring.choice import choice, judge_of_choice
from minicpmv.evaluate.scoring.mathvista import judge_of_mathvista, mathvista
from minicpmv.evaluate.scoring.mmhal import judge_of_mmhal, mmhal
from minicpmv.evaluate.scoring.mmvet import judge_of_mmvet, mmvet
from minicpmv.evaluate.scoring.objects import judge_of_objects, objhal
from minicpmv.evaluate.scoring.yes_no import judge_of_yes_no, yes_no


FREE = {"question_type": "free_form", "answer_type": "integer", "answer": "3", "question": "How many?"}
# scorer, judge, expected, a reply of the judge that decides, and the main score that it gives
JUDGES = [
    (choice, judge_of_choice, {"answer": "B", "choices": {"A": "up", "B": "down"}, "question": "Where?"}, "B", 1.0),
    (choice, judge_of_choice, {"answer": "7.5", "choices": {}, "question": "How much?"}, "A", 1.0),
    (yes_no, judge_of_yes_no, {"answer": "No", "question": "Is it"}, "Yes", 0.0),
    (mathvista, judge_of_mathvista, FREE, "3", 1.0),
    (mmvet, judge_of_mmvet, {"answer": "a<OR>b", "question": "What?"}, "0.7", 0.7),
    (mmhal, judge_of_mmhal, {"answer": "A", "question": "What?", "contents": ["Cup"]}, "Rating: 3", 0.5),
    (objhal, judge_of_objects, {"objects": ["cup"], "question": "Describe it."}, '["mug", "cup", "bus"]', 0.0),
]
ANSWER = "that is hard to say from here"


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("scorer", "judge_of", "expected", "reply", "score"), JUDGES)
def test_a_judged_answer_has_the_scorer_s_scores_and_more(scorer, judge_of, expected, reply, score, scoring, strict):
    judge = judge_of(scoring, strict)
    scores = scorer(ANSWER, expected, scoring=scoring, strict=strict)
    entry = {"answer": ANSWER, "expected": expected, "scores": scores}
    assert judge.applies(entry) == scores["undecided"]
    request = judge.messages(entry)
    assert [set(message) for message in request] == [{"role", "content"}] and ANSWER in request[0]["content"]
    judged = judge.read(reply, entry)
    assert main_score(judged) == score
    for found in (judged, judge.give_up(entry)):
        assert next(iter(found)) == next(iter(scores)) and found.keys() >= scores.keys() and found["judged"]
        json.dumps(found)
    assert not judge.applies({**entry, "scores": judged})
