"""MathVista (Lu et al. 2023): a reply that is a bare answer is compared; out of others a judge takes the answer first.

Known defects of the reference, kept:
- answers that are lists, and free texts, can never match: the text "None" is compared with them;
- a right answer of 0 counts as not found, so that the judge is asked;
- once the rule for multiple choice finds a letter, right or wrong, the judge is not asked.
"""

import ast
from collections.abc import Mapping
from typing import Any

from minicpmv.evaluate.benchmark import Entry, Judge, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.choice import FAILED, choices_of, infer_choice, is_undecided, scored_text, stated_choice


def mathvista(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """Score a reply as far as rules can.

    Args:
        expected: `question_type` ("multi_choice" or "free_form"), `answer_type` ("integer", "float", "text", "list"),
            `answer`; of multiple choice `choices` (texts) and `answer_option` (the letter). `question` is for the judge.
        strict: texts are compared without regard to case, lists element by element, and 0 is a number.
    """
    found = read_answer(answer, expected, scoring, strict)
    if expected["question_type"] == "multi_choice":
        right = found == expected["answer_option"]
        return {"exact": float(right), "extracted": found, "undecided": found is None}
    right = is_right(answer, expected, scoring, strict)
    prefetched = right and (strict or bool(found))
    return {"exact": float(prefetched), "extracted": found if prefetched else None, "undecided": not prefetched}


def read_answer(reply: str, expected: Mapping[str, Any], scoring: Scoring = "current", strict: bool = False) -> Any:
    """The answer that a reply is, in the type of the question; None if it is of another type."""
    if expected["question_type"] == "multi_choice":
        choices = choices_of([str(text) for text in expected["choices"]])
        return stated_choice(reply, choices) if strict else infer_choice(reply, choices, scoring)
    return _value(reply, expected["answer_type"], strict)


def is_right(reply: str, expected: Mapping[str, Any], scoring: Scoring = "current", strict: bool = False) -> bool:
    """Whether a reply, or what a judge took out of it, is the right answer."""
    found = read_answer(reply, expected, scoring, strict)
    if expected["question_type"] == "multi_choice":
        return found == expected["answer_option"]
    if expected["answer_type"] in ("integer", "float"):
        return found is not None and found == _value(str(expected["answer"]), expected["answer_type"], strict)
    target = _value(str(expected["answer"]), expected["answer_type"], strict) if strict else str(expected["answer"])
    return found == target


def _value(text: str, kind: str, strict: bool) -> Any:
    try:
        if kind == "integer":
            return int(text)
        if kind == "float":
            return float(text)
    except ValueError:
        return None
    if not strict:
        return "None"
    if kind == "list":
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            return None
    return text.strip().casefold()


REQUEST = """Below are questions about images, each with a model's reply and the answer taken out of it. Take the answer out of
the last reply in the same way: write it after "Extracted answer:" and write nothing else.

Hint: Answer with an integer and give the final value, e.g., 1, 2, 3, at the end.
Question: How many marbles are missing from the third row?
Model response: Counting along the third row, five marbles are missing.
Extracted answer: 5

Hint: Answer with a floating-point number with one decimal place and give the final value, e.g., 1.2, 1.3, 1.4, at the end.
Question: What share of the cyclists wears a helmet?
Model response: Seven of the ten cyclists wear one, so the share is 0.7.
Extracted answer: 0.7

Hint: Answer with a floating-point number with two decimal places and give the final value, e.g., 1.23, 1.34, 1.45, at the end.
Question: What do a lemon tart and a ginger biscuit cost together? (Unit: $)
Model response: Together they come to $2.35.
Extracted answer: 2.35

Hint: Answer with a Python list and give the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.
Question: Between which two years does the dashed line fall most?
Model response: Its steepest fall is from 1998 to 1999.
Extracted answer: [1998, 1999]

Hint: Give the letter of the correct option, e.g., A, B, C, D, at the end.
Question: Which fraction of the disc is shaded?
Choices: (A) 2/7 (B) 5/7 (C) 3/7 (D) 4/7
Model response: Five of seven sectors are shaded, so it is 5/7.
Extracted answer: B

{question}
Model response: {reply}
Extracted answer:"""


def judge_of_mathvista(scoring: Scoring = "current", strict: bool = False) -> Judge:
    """The judge that takes the answer out of a reply: asked up to five times, but only while it does not answer."""

    def scores(taken: str, entry: Entry) -> Scores:
        right = is_right(taken, entry["expected"], scoring, strict)
        return {"exact": float(right), "extracted": taken, "undecided": False, "judged": True}

    def messages(entry: Entry) -> list[dict[str, Any]]:
        request = REQUEST.format(question=entry["expected"].get("question", ""), reply=scored_text(entry))
        return [{"role": "user", "content": request}]

    return Judge(
        model="gpt-4o-mini-2024-07-18",
        applies=is_undecided,
        messages=messages,
        read=lambda reply, entry: None if FAILED in reply else scores(reply, entry),
        give_up=lambda entry: scores("", entry),
        tries=5,
        temperatures=(0.0, 0.5, 1.0, 1.5, 2.0),
        max_tokens=128,
        required=True,
    )
