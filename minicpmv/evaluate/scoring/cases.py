"""Scorers held against cases that others decided: a file of answers with the scores that a reference gave them.

A case is an object with `id`, `benchmark`, `scorer`, `prediction`, `reference` and `expected`; some have `choices`,
`category`, `judge_reply` and the like, and further results (`extracted`, `iou`). The file is a JSON object with `cases`, a JSON
list, or JSON lines. Which scorer a case means is said by [`minicpmv.evaluate.scoring.case_scorers.SCORERS`].
"""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.case_scorers import CaseScorer, find_scorer


TOLERANCE = 5e-5  # references are written with four digits at least
FIELDS = ("id", "benchmark", "scorer", "prediction", "reference", "expected")
NOTHING = (None, "", "NaN")
SAME = "the same"  # as the scorer of the benchmark's case before


class CaseFileError(MiniCPMVError):
    """A file of cases that cannot be read."""


def read_cases(file: Path) -> list[dict[str, Any]]:
    """The cases of a file.

    Raises:
        CaseFileError: it is no JSON, or holds something else.
    """
    text = file.read_text(encoding="utf-8")
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise CaseFileError(f"{file} is neither JSON nor JSON lines: {error}") from error
    cases = found.get("cases", [found]) if isinstance(found, dict) else found
    if not isinstance(cases, list) or not cases or not all(isinstance(case, dict) for case in cases):
        raise CaseFileError(
            f"{file} holds no cases: a list of objects is wanted, or an object with such a list as cases"
        )
    return cases


def shortfalls(cases: list[dict[str, Any]], scoring: Scoring = "current") -> Iterator[str]:
    """What falls short, one line for each case that does: its id, and what was expected and what was found."""
    scorers: dict[str, CaseScorer | None] = {}  # by benchmark, the latest
    for number, case in enumerate(cases, 1):
        name = str(case.get("id", f"case {number}"))
        if lacking := [field for field in FIELDS if field not in case]:
            yield f"{name}: has no {', '.join(lacking)}"
            continue
        benchmark = str(case["benchmark"])
        scorer = find_scorer(case) if case["scorer"] != SAME else scorers.get(benchmark) or find_scorer(case)
        scorers[benchmark] = scorer
        if scorer is None:
            yield f"{name}: unknown scorer {case['scorer']!r} of {benchmark}"
            continue
        try:
            results = scorer(case, scoring)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # of a case in another form
            yield f"{name}: cannot be scored by {case['scorer']!r}: {type(error).__name__}: {error}"
            continue
        if wrong := list(differences(case, results)):
            yield f"{name}: {'; '.join(wrong)}"


def differences(case: Mapping[str, Any], results: Mapping[str, Any]) -> Iterator[str]:
    """Results that are not what the case says they are."""
    for field, found in results.items():
        if field in case and not is_same(case[field], found):
            yield f"{field} {shown(found)} instead of {shown(case[field])}"


def is_same(expected: Any, found: Any) -> bool:
    """Whether a result is the expected one: numbers to four digits, nothing however it is written, more names than asked."""
    if isinstance(expected, Mapping):
        return isinstance(found, Mapping) and all(
            name in found and is_same(value, found[name]) for name, value in expected.items()
        )
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(is_same, expected, found))
    if is_nothing(expected) or is_nothing(found):
        return is_nothing(expected) and is_nothing(found)
    if isinstance(expected, (bool, int, float)) and isinstance(found, (bool, int, float)):
        return math.isclose(expected, found, rel_tol=0, abs_tol=TOLERANCE)
    return expected == found


def is_nothing(value: Any) -> bool:
    return value in NOTHING or (isinstance(value, float) and math.isnan(value))


def shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
