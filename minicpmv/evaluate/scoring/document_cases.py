"""The scorers of OCRBench v2 and OmniDocBench that cases name, by the names that they are given there."""

from collections.abc import Callable, Mapping
from typing import Any

from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring import ocrbench_v2 as v2
from minicpmv.evaluate.scoring.omnidocbench import KINDS, omnidocbench, omnidocbench_distance


Case = Mapping[str, Any]


def expected_of(case: Case) -> dict[str, Any]:
    """What a rule compares with: the reference, with what the case says beside it."""
    reference = case["reference"]
    named = reference if isinstance(reference, dict) and reference.keys() & {"answers", "bbox", "content"} else {}
    answers = reference if isinstance(reference, list) else [named.get("answer", reference)]
    beside = {name: case[name] for name in ("question", "eval", "bbox", "content") if name in case}
    return {"question": "", "answers": answers, **beside, **named}


def by(rule: Callable[[str, Any], float], **more: Any) -> Callable[[Case, Scoring], Mapping[str, Any]]:
    """A case of OCRBench v2 that names a rule."""

    def score(case: Case, scoring: Scoring) -> Mapping[str, Any]:
        return {"expected": rule(str(case["prediction"]), {**expected_of(case), **more})}

    return score


def by_type(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    """A case of OCRBench v2 that names a type of question, as its scorer or beside it."""
    kind = next(case[name] for name in ("type", "category", "scorer") if case.get(name) in v2.ABILITY_OF)
    scores = v2.ocrbench_v2(str(case["prediction"]), {**expected_of(case), "type": kind}, scoring=scoring)
    return {"expected": scores["score"]}


def abilities(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    """Scores of several questions by type, or with their types as the reference: means over abilities."""
    given, types = case["prediction"], case["reference"]
    pairs = given.items() if isinstance(given, dict) else zip(types, given, strict=True)
    means = v2.ocrbench_v2_score([{"score": float(score), "type": kind} for kind, score in pairs])
    language = "cn" if means["en"] is None else "en"
    return {"expected": means if isinstance(case["expected"], dict) else means[language]}


def page(case: Case, scoring: Scoring) -> Mapping[str, Any]:
    """A page, or several with a reply for each; distances by kind, as the reference writes them."""
    several = isinstance(case["prediction"], list)
    replies, pages = (
        (case["prediction"], case["reference"]) if several else ([case["prediction"]], [case["reference"]])
    )
    scores = [omnidocbench(reply, page, scoring=scoring) for reply, page in zip(replies, pages, strict=True)]
    found = omnidocbench_distance(scores)
    distances: dict[str, Any] = {kind: {"Edit_dist": found[kind]} for kind in KINDS}
    distances["table"] |= {"TEDS": found["teds"], "TEDS_structure_only": found["teds_structure"]}
    return {"expected": distances | {"overall": found["overall"]}}


# Names are regular expressions for the whole of a case's `scorer`.
DOCUMENT_CASES: dict[str, Callable[[Case, Scoring], Mapping[str, Any]]] = {
    "|".join(v2.ABILITY_OF): by_type,
    r"vqa_evaluation\b.*": by(v2.vqa),
    r"cn_vqa_evaluation\b.*": by(v2.chinese_vqa),
    r"(vqa_evaluation_)?case[_ ]sensitive.*": by(v2.case_sensitive),
    r"multiple choice.*|mcq: letters of the reply.*": by(v2.multiple_choice),
    r"counting_evaluation exact.*": by(v2.counting, eval="exact match"),
    r"counting_evaluation regression.*": by(v2.counting, eval="regression"),
    r"cn_math_expression_evaluation\b.*": by(v2.chinese_formula),
    r"math_expression_evaluation\b.*": by(v2.formula),
    r"(text grounding )?iou.*|calculate_iou.*": by(v2.grounding),
    r"vqa.with.position.*|0\.5.*content.*iou.*": by(v2.answer_with_box),
    r"(text )?spotting.*": by(v2.spotting),
    r"(compute_)?f1.*|(kie|key information).*": by(v2.key_information),
    r"(cal_per_metrics|.*bleu.*meteor.*|full-page.*|text translation.*)": by(v2.prose),
    r"doc_parsing_evaluation.*|document parsing.*": by(v2.document),
    r"chart parsing.*": by(v2.chart),
    r".*markdown.*teds.*|teds.*markdown.*": by(v2.table, question="markdown"),
    r"teds.*|table parsing.*": by(v2.html_table),
    r"(aggregate|mean of abilities|en = mean).*": abilities,
    r"end-to-end quick_match.*|end2end.*": page,
}
