"""Multiple choice about videos: each benchmark reads a letter out of a reply in its own way.

| benchmark | rule | known defects, kept |
|---|---|---|
| Video-MME, LongVideoBench | known openings are taken away, then the first capital among the options, even inside a word | two commas lack in the list of openings, so "Best option: C" is read as B; "Dora is right: B" as D |
| MLVU | the character before the first ")", or the rule of images | |
| LVBench | what is in the first brackets, else the first character of the first word | "The answer is B" is read as T |
| LVBench in lmms-eval | ranks all ways of naming an option; the last one named wins | "The answer is (C) since A is wrong" is read as A |
| MotionBench in lmms-eval | openings are taken away, then the first letter that stands alone | the article A |
| FAVOR-Bench | the text of the option is contained, and no longer option that contains it | letters are not understood |

Their strict reading is that of images: [`minicpmv.evaluate.scoring.choice.stated_choice`].
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from minicpmv.evaluate.benchmark import Metrics, Scores
from minicpmv.evaluate.scoring import Scoring
from minicpmv.evaluate.scoring.choice import choices_of, infer_choice, stated_choice
from minicpmv.evaluate.scoring.cutting import cut_thought


OPENINGS = (
    "The best answer is",
    "The correct answer is",
    "The answer is",
    "The answer",
    "The best option isThe correct option is",  # two that the reference fails to separate, and two more below
    "Best answer:Best option:",
)
VLMEVALKIT_OPENINGS = (*OPENINGS, "Answer:", "Option:")
HIDDEN = "NA"  # the answer of a question of MotionBench whose answer only its authors know


def first_capital(reply: str, letters: str = "ABCD", openings: Sequence[str] = VLMEVALKIT_OPENINGS) -> str | None:
    """Video-MME, LongVideoBench: the first of these capitals, wherever it stands, once the openings are taken away.

    Args:
        openings: VLMEvalKit's; the script of Video-MME's authors knows `OPENINGS` only.
    """
    for opening in openings:
        reply = reply.replace(opening, "")
    found = re.search(f"[{letters}]", reply)
    return found[0] if found else None


def bracketed_letter(reply: str) -> str | None:
    """LVBench's `polish_answer`: the first character in the first brackets, else of the first word."""
    words = reply.strip().split(")")[0].strip()
    if "(" in words:
        words = words.split("(")[1].strip()
    return words.split(" ")[0][:1] or None


def lone_letter(reply: str, letters: str = "ABCDEF") -> str | None:
    """MotionBench in lmms-eval: the first letter that stands alone, else one before a mark, else any. No case counts."""
    said = cut_thought(reply).upper()
    for opening in ("THE BEST ANSWER IS", "THE CORRECT ANSWER IS", "THE ANSWER IS", "BEST ANSWER:", "ANSWER:"):
        said = said.replace(opening, "")
    for pattern in (rf"\b([{letters}])\b", rf"([{letters}])[.):]", rf"([{letters}])"):
        if found := re.search(pattern, said):
            return found[1]
    return None


PHRASES = (
    *(
        f"{first}{words} is"
        for first in ("the ", "")
        for words in ("answer", "correct answer", "best answer", "choice")
    ),
    *(f"{first}{words} is" for first in ("the ", "") for words in ("correct option", "best option", "correct choice")),
    *("my answer is", "my choice is", "i choose", "i select", "i pick"),
    *("옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)
# lmms-eval ranks the ways in which a reply may name an option; higher wins, and of equals the later place.
RANKS = {"{}": 0, "{} ": 2, "{})": 3, "{}:": 4, "{}.": 5, "({})": 6, "phrase": 7, "end": 9, "start": 10}


def best_ranked_letter(reply: str, letters: str = "ABCD") -> str | None:
    """lmms-eval's `extract_mcq_answer` (0.7.3), which its task of LVBench takes."""
    said = reply.strip()
    for mark in ",.!?;:'\"":
        said = said.strip(mark)
    said = said.strip()
    if not said:
        return None
    text = f" {said} "
    lowered = text.lower()
    named: list[tuple[int, int, str]] = []  # (rank, place, letter)
    for form in ("({})", "{}.", "{}:", "{})", "{} "):
        named += [(RANKS[form], text.rfind(form.format(letter)), letter) for letter in letters]
    for phrase in PHRASES:
        if phrase in lowered:
            start = lowered.find(phrase) + len(phrase)
            named += [(RANKS["phrase"], text.find(letter, start), letter) for letter in letters]
    if said[0] in letters and not said[1:2].isalpha():
        named.append((RANKS["start"], 0, said[0]))
    if said[-1] in letters and not said[-2:-1].isalpha():
        named.append((RANKS["end"], len(text) - 1, said[-1]))
    found = [candidate for candidate in named if candidate[1] >= 0]
    found = found or [(RANKS["{}"], text.rfind(letter), letter) for letter in letters if letter in text]
    return max(found, key=lambda candidate: candidate[:2])[2] if found else None


def _score(
    answer: str, expected: Mapping[str, Any], strict: bool, read: Callable[[str, dict[str, str]], str | None]
) -> Scores:
    choices = dict(expected.get("choices") or {})
    extracted = stated_choice(answer, choices) if strict and choices else read(answer, choices)
    if expected["answer"] == HIDDEN:
        return {"exact": None, "extracted": extracted, "undecided": False}
    return {"exact": float(extracted == expected["answer"]), "extracted": extracted, "undecided": extracted is None}


def videomme(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """Video-MME. Where no capital is found, the reply is read as those about images are.

    Args:
        expected: `answer`, a letter; `choices` by letter; `question` is for the judge.
    """

    def read(reply: str, choices: dict[str, str]) -> str | None:
        return first_capital(reply) or infer_choice(reply, choices, scoring)

    return _score(answer, expected, strict, read)


def longvideobench(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """LongVideoBench: as Video-MME, with five options. `expected` is as there."""

    def read(reply: str, choices: dict[str, str]) -> str | None:
        return first_capital(reply, "ABCDE") or infer_choice(reply, choices, scoring)

    return _score(answer, expected, strict, read)


def mlvu(answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """MLVU. `expected` is as for Video-MME."""

    def read(reply: str, choices: dict[str, str]) -> str | None:
        before = reply[: reply.index(")")][-1:] if ")" in reply else reply
        return before if before == expected["answer"] else infer_choice(reply, choices, scoring)

    return _score(answer, expected, strict, read)


def lvbench(answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """LVBench by its authors' rule. `expected` is as for Video-MME."""
    return _score(answer, expected, strict, lambda reply, choices: bracketed_letter(reply))


def lvbench_lmms_eval(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """LVBench by lmms-eval's rule. `expected` is as for Video-MME."""
    return _score(answer, expected, strict, lambda reply, choices: best_ranked_letter(reply))


def motionbench(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """MotionBench by lmms-eval's rule. `expected` is as for Video-MME; an answer "NA" is hidden, and not scored."""
    return _score(answer, expected, strict, lambda reply, choices: lone_letter(reply))


def favorbench(
    answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False
) -> Scores:
    """FAVOR-Bench: the right text is contained, in any case, and no longer option that contains it is.

    Args:
        expected: `answer`, the text, and `options`, all texts.
        strict: the reply may also name the option by its letter.
    """
    said, right = answer.lower(), str(expected["answer"])
    longer = [option for option in expected["options"] if option != right and right in option]
    hit = right.lower() in said and not any(option.lower() in said for option in longer)
    if strict:
        choices = choices_of(expected["options"])
        extracted = stated_choice(answer, choices)
        return {"exact": float(choices.get(extracted or "") == right), "extracted": extracted}
    return {"exact": float(hit), "extracted": right if hit else None}


def known_accuracy(scores: list[Scores]) -> Metrics:
    """The share of right answers among those that are not hidden; `answered` is the same among those that name an option,
    as the script of Video-MME's authors counts."""
    known = [score for score in scores if score["exact"] is not None]
    answered = [score for score in known if score.get("extracted")]
    return {"accuracy": _share(known), "answered": _share(answered)}


def mean_of_tasks(scores: list[Scores]) -> Metrics:
    """MLVU's M-Avg, the mean accuracy of its seven tasks (facts: `task`), and `pooled`, VLMEvalKit's share of all."""
    tasks: dict[str, list[Scores]] = defaultdict(list)
    for score in scores:
        tasks[score["facts"]["task"]].append(score)
    return {"m_avg": fmean(_share(of_task) or 0.0 for of_task in tasks.values()), "pooled": _share(scores)}


def _share(scores: list[Scores]) -> float | None:
    return fmean(score["exact"] for score in scores) if scores else None
