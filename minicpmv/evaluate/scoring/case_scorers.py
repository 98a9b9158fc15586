"""The scorers that cases name, by the names that they are given there."""

import ast
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from minicpmv.evaluate.benchmark import Entry, Judge, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.averages import opencompass_average
from minicpmv.evaluate.scoring.boxes import refcoco
from minicpmv.evaluate.scoring.choice import choice, choices_of, judge_of_choice, texts
from minicpmv.evaluate.scoring.cutting import cut_choice, cut_value
from minicpmv.evaluate.scoring.document_cases import DOCUMENT_CASES
from minicpmv.evaluate.scoring.mathvista import judge_of_mathvista, mathvista
from minicpmv.evaluate.scoring.mmhal import mmhal_score, rate
from minicpmv.evaluate.scoring.mmvet import judge_of_mmvet
from minicpmv.evaluate.scoring.objects import chair, count_hallucinated
from minicpmv.evaluate.scoring.ocrbench import ocrbench
from minicpmv.evaluate.scoring.short_answer import anls, relaxed_accuracy, vqa_accuracy
from minicpmv.evaluate.scoring.video_choice import (
    best_ranked_letter,
    bracketed_letter,
    favorbench,
    first_capital,
    lone_letter,
    mlvu,
)
from minicpmv.evaluate.scoring.yes_no import hallusion, judge_of_yes_no, mme, yes_no


Case = Mapping[str, Any]
CaseScorer = Callable[[Case, Scoring], Mapping[str, Any]]  # -> the case's result fields as we find them


def find_scorer(case: Case) -> CaseScorer | None:
    """The scorer that a case names; None if there is none of that name."""
    name = str(case["scorer"]).strip()
    return next((scorer for pattern, scorer in SCORERS.items() if re.fullmatch(pattern, name, re.I | re.S)), None)


def options(case: Case, *letters: str) -> dict[str, str]:
    """Options by letter; without texts where the case says none, at least A to D and those named here."""
    given = case.get("choices", case.get("options"))
    if isinstance(given, str):
        given = ast.literal_eval(given)
    if given:
        return {letter: str(text) for letter, text in given.items()} if isinstance(given, dict) else choices_of(given)
    return dict.fromkeys(sorted({*"ABCD", *letters}), "")


def judge_replies(case: Case) -> list[str] | None:
    """What the judge says, one reply after the other: in a field, or written out in the scorer's name."""
    given = case.get("judge_reply", case.get("judge_replies"))
    if given is None and (written := re.search(r"judge repl(?:y|ies) (\[.*\]|\".*\"|'.*')", str(case["scorer"]))):
        given = ast.literal_eval(written[1])
    return [given] if isinstance(given, str) else given


def settle(judge: Judge, entry: Entry, replies: Iterator[str]) -> Scores:
    """The scores of an entry once a judge has said this, as often as it is asked."""
    for reply in (next(replies) for _ in range(judge.tries)):
        if (scores := judge.read(reply, entry)) is not None:
            return scores
    return judge.give_up(entry)


def last_repeated(replies: Sequence[str]) -> Iterator[str]:
    yield from replies
    while True:
        yield replies[-1]


def by_rule(scorer: Callable[..., Scores], expected: Callable[[Case], Mapping[str, Any]]) -> CaseScorer:
    """A case that a scorer decides alone: its main score, and what it read."""

    def score(case: Case, scoring: Scoring) -> Mapping[str, Any]:
        scores = scorer(str(case["prediction"]), expected(case), scoring=scoring)
        return {"expected": next(iter(scores.values())), **{key: scores[key] for key in ("iou",) if key in scores}}

    return score


def by_judge(
    scorer: Callable[..., Scores], judge: Callable[[Scoring], Judge], expected: Callable[[Case], Mapping[str, Any]]
) -> CaseScorer:
    """A case that a judge decides where the scorer does not, if the case has replies of one."""

    def score(case: Case, scoring: Scoring) -> Mapping[str, Any]:
        entry = {"answer": str(case["prediction"]), "expected": expected(case)}
        scores = scorer(entry["answer"], entry["expected"], scoring=scoring)
        if scores["undecided"] and (replies := judge_replies(case)):
            scores = settle(judge(scoring), entry, last_repeated(replies))
        return {"expected": scores["exact"], "extracted": scores["extracted"]}

    return score


def by_letter(read: Callable[[str], str | None]) -> CaseScorer:
    """A case that is right if the letter read out of it is the reference."""

    def score(case: Case, scoring: Scoring) -> Mapping[str, Any]:
        extracted = read(str(case["prediction"]))
        return {"expected": float(extracted == case["reference"]), "extracted": extracted}

    return score


def expected_choice(case: Case) -> dict[str, Any]:
    answer = str(case["reference"])
    if not (case.get("choices") or case.get("options")) and "open question" in case["scorer"]:
        return {"answer": answer, "choices": {}, "question": str(case.get("question", ""))}
    return {"answer": answer, "choices": options(case, answer), "question": str(case.get("question", ""))}


def yes_no_case(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    found = by_judge(yes_no, judge_of_yes_no, lambda case: {"answer": case["reference"]})(case, scoring)
    return {**found, "extracted": found["extracted"] or "Unknown"}


def circular_group(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    """Rotations of a question: one that is decided and wrong ends it before a judge is asked about the others."""
    entries = []
    for answer, letter in zip(case["prediction"], case["reference"], strict=True):
        expected = {"answer": letter, "choices": options(case, *case["reference"]), "question": ""}
        entries.append({"answer": answer, "expected": expected, "scores": choice(answer, expected, scoring=scoring)})
    replies, judge = judge_replies(case), judge_of_choice(scoring)
    if replies and all(entry["scores"]["exact"] or entry["scores"]["undecided"] for entry in entries):
        said = last_repeated(replies)
        for entry in entries:
            if entry["scores"]["undecided"]:
                entry["scores"] = settle(judge, entry, said)
            if not entry["scores"]["exact"]:
                break
    return {"expected": min(entry["scores"]["exact"] for entry in entries)}


CUTS = {
    cut_choice: ("mmmu", "mmbench", "mmstar"),
    cut_value: ("hallusion", "mathvista", "mathvision", "mathverse", "dynamath", "logicvista", "chartqa"),
}


def cut_answer(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    benchmark, extracted = str(case["benchmark"]).lower().replace("-", ""), str(case["prediction"])
    for cut, names in CUTS.items():
        if benchmark.startswith(names):
            extracted = cut(extracted)
    return {"expected": float(extracted == case["reference"]), "extracted": extracted}


def letters_between(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    given = re.search(r"([A-Z])-([A-Z])", case["scorer"])
    last = given[2] if given else "E" if str(case["benchmark"]).startswith("LongVideo") else "D"
    return by_letter(lambda reply: first_capital(reply, f"A-{last}"))(case, scoring)


def letter_in_lmms_eval(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    return by_letter(lambda reply: best_ranked_letter(reply, "".join(options(case))))(case, scoring)


def expected_mlvu(case: Case) -> dict[str, Any]:
    """The reference is written as "(B) blue"; options that the case does not tell are of the same length."""
    letter, text = re.fullmatch(r".*?\((.)\)\s*(.*)", str(case["reference"]), re.DOTALL).groups()  # type: ignore[union-attr]
    if case.get("choices"):
        return {"answer": letter, "choices": options(case)}
    unknown = dict.fromkeys(options(case, letter), "\ufffd" * len(text))
    return {"answer": letter, "choices": unknown | {letter: text}}


def expected_mathvista(case: Case) -> dict[str, Any]:
    choices = case.get("choices")
    return {
        "question_type": case.get("question_type", "multi_choice" if choices else "free_form"),
        "answer_type": case.get("answer_type", "text"),
        "answer": case["reference"],
        "answer_option": case.get("answer_option"),
        "choices": ast.literal_eval(choices) if isinstance(choices, str) else choices or [],
        "question": str(case.get("question", "")),
    }


def mathvista_case(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    """Without a reply of the judge, it repeats the answer."""
    with_judge = {**case, "judge_reply": judge_replies(case) or [str(case["prediction"])]}
    found = by_judge(mathvista, judge_of_mathvista, expected_mathvista)(with_judge, scoring)
    return {"expected": found["expected"]}


def mmvet_case(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    replies = case["prediction"] if isinstance(case["prediction"], list) else [str(case["prediction"])]
    entry = {"answer": "", "expected": {"answer": case["reference"], "question": ""}}
    return {"expected": settle(judge_of_mmvet(), entry, last_repeated(replies))["score"]}


def mmhal_review(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    scores = rate(str(case["prediction"]))
    return {"expected": {"score": scores["rating"], "hallucination": scores["hallucination"]}}


def mmhal_reviews(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    return {"expected": mmhal_score([rate(str(review)) for review in case["prediction"]])}


def object_lists(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    """Named objects of each answer, and those that its image holds; all shares are percentages."""
    found = chair(list(map(count_hallucinated, case["prediction"], case["reference"])))
    names = {"CHAIRs": "chair_s", "CHAIRs_all_answers": "chair_s_all", "CHAIRi": "chair_i"}
    return {"expected": {name: percent(found[metric]) for name, metric in names.items()}}


def percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def parts_named(reference: Any) -> dict[str, str]:
    """What a line such as "set 0 figure 1 question 0" names."""
    return dict(re.findall(r"([a-z]\w*)[ _:=]+(\w+)", str(reference).lower()))


def hits(case: Case) -> Iterable[float]:
    return (float(bool(hit)) for hit in case["prediction"])


def hallusion_figures(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    facts = [{"l2_category": "", "set": "0", **parts_named(line)} for line in case["reference"]]
    scores = [{"exact": hit, "facts": of_answer} for hit, of_answer in zip(hits(case), facts, strict=True)]
    return {"expected": {name: percent(value) for name, value in hallusion(scores).items()}}


def mme_points(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    """Answers to two questions about each picture, in pairs unless the references name pictures."""
    scores: list[Scores] = []
    pictures: dict[str, list[float]] = {}
    for number, hit in enumerate(hits(case)):
        named = parts_named(case["reference"][number]) if isinstance(case["reference"], list) else {}
        picture = named.get("picture", named.get("image", str(number // 2)))
        category = named.get("category", named.get("subtask", str(case.get("category", "existence"))))
        scores.append({"exact": hit, "facts": {"category": category, "picture": picture}})
        pictures.setdefault(picture, []).append(hit)
    acc = 100 * fmean(score["exact"] for score in scores)
    acc_plus = 100 * fmean(min(pair) for pair in pictures.values())
    points = {"acc": acc, "acc+": acc_plus, "acc_plus": acc_plus, "score": acc + acc_plus}
    return {"expected": points | mme(scores) if isinstance(case["expected"], dict) else points["score"]}


OPENCOMPASS_NAMES = {
    r"mmbench.*en.*": "mmbench_en",
    r"mmbench.*cn.*": "mmbench_cn",
    r"mmbench.*": "mmbench",
    r"mmstar.*": "mmstar",
    r"mmmu.*": "mmmu",
    r"mathvista.*": "mathvista",
    r"hallusion.*": "hallusionbench",
    r"ai2d.*": "ai2d",
    r"ocrbench.*": "ocrbench",
    r"mm-?vet.*": "mmvet",
}


def opencompass_row(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    """Published figures of a model: percentages, and OCRBench in points of 1000, or a tenth of them as tables print it."""
    shares = {}
    for name, figure in case["prediction"].items():
        row = next((row for known, row in OPENCOMPASS_NAMES.items() if re.fullmatch(known, name.lower())), None)
        if row is None:
            raise ValueError(f"{name} is no part of the OpenCompass average")
        value = fmean(figure.values()) if isinstance(figure, dict) else float(figure)
        shares[row] = value / (1000 if row == "ocrbench" and value > 100 else 100)
    average = opencompass_average(shares)
    if average is None:
        raise ValueError(f"the OpenCompass average needs eight figures, not {', '.join(shares)}")
    return {"expected": round(100 * average, 1)}


def answers(case: Case) -> dict[str, Any]:
    return {"answers": texts(case["reference"]), "category": str(case.get("category", ""))}


def expected_box(case: Case) -> dict[str, Any]:
    width, height = case["image_size"]
    return {"box": case["reference"], "width": width, "height": height}


def expected_option(case: Case) -> dict[str, Any]:
    return {"answer": case["reference"], "options": list(options(case).values())}


# Names are regular expressions for the whole of a case's `scorer`.
SCORERS: dict[str, CaseScorer] = {
    r"relaxed_accuracy": by_rule(relaxed_accuracy, answers),
    r"anls": by_rule(anls, answers),
    r"vqa_score": by_rule(vqa_accuracy, answers),
    r"containment": by_rule(ocrbench, answers),
    r"containment of the option text": by_rule(favorbench, expected_option),
    r"acc@0\.5\b.*": by_rule(refcoco, expected_box),
    r"mcq_vanilla\b.*|can_infer\b.*": by_judge(choice, judge_of_choice, expected_choice),
    r"mcq_circular\b.*": circular_group,
    r"yorn_extraction\b.*": yes_no_case,
    r"aggregate aacc, ?facc, ?qacc.*": hallusion_figures,
    r"(aggregate |mme_rating|mme).*acc ?\+.*|mme_rating.*": mme_points,
    r"(minicpm_v_4(_5)?\.)?extract_answer\b.*": cut_answer,
    r"extract_characters_regex\b.*": letters_between,
    r"polish_answer\b.*": by_letter(bracketed_letter),
    r"extract_mcq_answer\b.*": letter_in_lmms_eval,
    r"(lmms-eval )?_extract_choice_letter\b.*": by_letter(lone_letter),
    r"check_ans_with_model\b.*": by_judge(mlvu, judge_of_choice, expected_mlvu),
    r"prefetch, else judge extraction.*": mathvista_case,
    r"judge reply -> float.*": mmvet_case,
    r"judge review -> score.*": mmhal_review,
    r"aggregate over \d+ answers": mmhal_reviews,
    r"chair over extracted objects.*": object_lists,
    r"mean of eight\b.*|the same": opencompass_row,
    **DOCUMENT_CASES,
}
