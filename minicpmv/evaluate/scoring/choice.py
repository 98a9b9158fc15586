"""Multiple choice: which option a reply means (MMBench, MMStar, MMMU, AI2D, RealWorldQA, MMT-Bench).

Known defects of the reference, kept:
- the article A counts as option A, as in "A banana is yellow";
- since 2026-06, "answer is a banana" is read as A and "answer is blue" as B: the pattern knows no case and no end of word;
- a letter that stands both early and late in a reply counts as early only;
- an open question of MMMU becomes a choice between the answer (A) and "Other Answers" (B), so a bare "A" is right;
- where the judge is no help either, an option is drawn by lot. Here the lot is the same in every run.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from statistics import fmean
from string import ascii_uppercase
from typing import Any

from minicpmv.evaluate.benchmark import Entry, Judge, Metrics, Scores
from minicpmv.evaluate.scoring import Scoring


REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"  # what VLMEvalKit writes in place of a reply
NONE_OF_THEM = "Z"
PUNCTUATION = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
CHINESE = re.compile("[\u4e00-\u9fff]")

STATED = re.compile(
    r"(?:(?i:\b(?:answer|option|choice)(?:\s+is|\s*[:：]))|答案[是为]?|选项?)\s*[:：]?[\s*(\[\"'`]*"
    r"([A-Z])(?![0-9A-Za-z_'])(?!\s+[a-z])"
)
FIRST = re.compile(r"[\s*(\[\"'`]*(?i:option\s+)?([A-Z])(?:[\s*\])\"'`]*$|[*\])\"'`]*[.):：,、。])")
LAST = re.compile(r"(?:^|[\s:：(*\[])([A-Z])[\W_]*$")


def infer_choice(reply: str, choices: Mapping[str, str], scoring: Scoring = "current") -> str | None:
    """The letter of the option that a reply means, "Z" if it refuses or says none, None if it does not decide.

    Args:
        choices: letters and texts of the options.
    """
    return _by_letter(reply, choices, scoring) or _by_text(reply, choices, scoring)


def _by_letter(reply: str, choices: Mapping[str, str], scoring: Scoring) -> str | None:
    if FAILED in reply:
        return None
    if any(refusal in reply for refusal in REFUSALS):
        return NONE_OF_THEM
    tokens = reply.translate(PUNCTUATION).split()
    named = [letter for letter in choices if letter in tokens]
    if len(named) == 1:
        if scoring == "2025-07" or tokens.index(named[0]) >= len(tokens) - 4:
            return named[0]
    elif not named and NONE_OF_THEM in tokens:
        return NONE_OF_THEM
    if scoring == "current" and (found := ANSWER_IS.search(reply)) and found[1].upper() in choices:
        return found[1].upper()
    return None


def _by_text(reply: str, choices: Mapping[str, str], scoring: Scoring) -> str | None:
    reply = reply.lower()
    if scoring != "2025-07" and len(reply) > 2 * sum(len(str(text)) for text in choices.values()):
        return None
    contained = [letter for letter, text in choices.items() if str(text).lower() in reply]
    return contained[0] if len(contained) == 1 else None


def stated_choice(reply: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that a reply states, by stricter reading; None if it states none, or more than one.

    In this order: what it last calls its answer, a letter that it begins with, the one option whose words it holds (the
    longest, of several that contain each other), a letter that it ends with.
    """
    found = [letter for letter in STATED.findall(reply) if letter in choices]
    if found:
        return found[-1]
    if (first := FIRST.match(reply)) and first[1] in choices:
        return first[1]
    named = {letter: text for letter, text in choices.items() if text and _has_words(reply, str(text))}
    named = {
        letter: text
        for letter, text in named.items()
        if not any(text != other and _has_words(str(other), str(text)) for other in named.values())
    }
    if named:
        return next(iter(named)) if len(named) == 1 else None
    last = LAST.search(reply)
    return last[1] if last and last[1] in choices else None


def _has_words(text: str, words: str) -> bool:
    """Whether a text holds these words, in any case: not as parts of others, nor a number as a part of another one."""
    words = words.strip()
    before = r"(?<![-.])" if words[:1].isdigit() else ""
    after = r"(?!\.\d)" if words[-1:].isdigit() else ""
    pattern = rf"(?<![0-9A-Za-z_]){before}{re.escape(words)}{after}(?![0-9A-Za-z_])"
    return re.search(pattern, text, re.IGNORECASE) is not None


def choices_of(texts: Sequence[str]) -> dict[str, str]:
    """Letters, from A on, for the options of a list."""
    return dict(zip(ascii_uppercase, texts, strict=False))


def texts(answers: Any) -> list[str]:
    """Answers as a list: given as one, written as one in Python, or a single text."""
    if isinstance(answers, str) and answers.startswith("["):
        try:
            answers = ast.literal_eval(answers)
        except (SyntaxError, ValueError):  # a text that begins with a bracket
            return [answers]
    return [str(one) for one in answers] if isinstance(answers, list) else [str(answers)]


def as_choice(expected: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Options and right letter; those of an open question, which has none, are its answer and "Other Answers"."""
    answer = str(expected["answer"])
    if choices := expected.get("choices"):
        return dict(choices), answer
    return {"A": answer, "B": "Other Answers"}, answer if answer in tuple(ascii_uppercase) else "A"


def choice(answer: str, expected: Mapping[str, Any], *, scoring: Scoring = "current", strict: bool = False) -> Scores:
    """Score a reply to a multiple choice question.

    Args:
        expected: `answer`, the letter, and `choices` by letter; an open question has no choices, and its answer (one, or a
            list) is a text. `question` is for the judge.
        strict: read with [`stated_choice`]; an open question is right if the reply holds one of the answers as words.
    """
    choices, letter = as_choice(expected)
    if strict and not expected.get("choices"):
        right = any(_has_words(answer, one) for one in texts(expected["answer"]))
        return {"exact": float(right), "extracted": answer, "undecided": False}
    extracted = stated_choice(answer, choices) if strict else infer_choice(answer, choices, scoring)
    return {"exact": float(extracted == letter), "extracted": extracted, "undecided": extracted is None}


def accuracy(scores: list[Scores]) -> Metrics:
    return {"accuracy": fmean(score["exact"] for score in scores)}


def circular(scores: list[Scores]) -> Metrics:
    """Circular evaluation (MMBench): a question counts if it is answered right with its options in every rotation.

    Each score's facts name the question's `group`. `rotations` is the plain share of right replies.
    """
    groups = defaultdict(list)
    for score in scores:
        groups[score["facts"]["group"]].append(score["exact"])
    return {
        "accuracy": fmean(min(group) for group in groups.values()),
        "rotations": fmean(score["exact"] for score in scores),
    }


INSTRUCTION = (
    "You match a reply with the options of a single-choice question. You are given the question, its options and the "
    "reply. Decide which option is closest to the reply in meaning. If the reply means something clearly different from "
    "every option, the output is Z. Output one capital letter and nothing else: A, B, C, D (those that are options), or Z.\n"
)
EXAMPLES = (
    "Example 1:\nQuestion: Which animal is on the sofa?\nOptions: A. cat B. parrot C. tortoise D. goat\n"
    "Reply: a sleeping kitten\nYour output: A\n"
    "Example 2:\nQuestion: Which animal is on the sofa?\nOptions: A. cat B. parrot C. tortoise D. goat\n"
    "Reply: a bicycle\nYour output: Z\n"
)
TASK = "Example 3:\nQuestion: {question}?\nOptions: {options}\nReply: {reply}\nYour output: "
CHINESE_INSTRUCTION = (
    "你负责把一条回复与单选题的选项对应起来。你会看到问题、选项和回复。请判断哪个选项的意思与回复最接近。"
    "如果回复的意思与每个选项都明显不同，输出 Z。只输出一个大写字母：A、B、C、D（须是有效选项）或 Z。\n"
)
CHINESE_EXAMPLES = (
    "例 1：\n问题：沙发上是什么动物？\n选项：A. 猫 B. 鹦鹉 C. 乌龟 D. 山羊\n回复：一只睡着的小猫\n输出：A\n"
    "例 2：\n问题：沙发上是什么动物？\n选项：A. 猫 B. 鹦鹉 C. 乌龟 D. 山羊\n回复：一辆自行车\n输出：Z\n"
)
CHINESE_TASK = "例 3：\n问题：{question}？\n选项：{options}\n回复：{reply}\n输出："


def matching_request(question: str, choices: Mapping[str, str], reply: str) -> str:
    """What a judge is asked about a reply that the rules do not decide, in Chinese if the question is."""
    options = "\n".join(f"{letter}. {text}" for letter, text in choices.items())
    chinese = CHINESE.search(question)
    parts = (CHINESE_INSTRUCTION, CHINESE_EXAMPLES, CHINESE_TASK) if chinese else (INSTRUCTION, EXAMPLES, TASK)
    return parts[0] + parts[1] + parts[2].format(question=question, options=options, reply=reply)


def draw_lot(choices: Mapping[str, str], seed: str) -> str:
    """One of the options or "Z", always the same for the same seed."""
    options = [*choices, NONE_OF_THEM]
    return options[int.from_bytes(sha256(seed.encode()).digest()[:8], "big") % len(options)]


def matching_model(scoring: Scoring) -> str:
    """The judge that VLMEvalKit takes unless it is told, to match replies with options."""
    return "gpt-4o-mini-2024-07-18" if scoring == "current" else "gpt-3.5-turbo-0125"


def judge_of_choice(scoring: Scoring = "current", strict: bool = False) -> Judge:
    """The judge of replies that name no option: asked three times, then an option is drawn by lot (`strict`: wrong)."""

    def scores(letter: str, entry: Entry) -> Scores:
        right = as_choice(entry["expected"])[1]
        return {"exact": float(letter == right), "extracted": letter, "undecided": False, "judged": True}

    def messages(entry: Entry) -> list[dict[str, Any]]:
        choices, _ = as_choice(entry["expected"])
        request = matching_request(entry["expected"].get("question", ""), choices, scored_text(entry))
        return [{"role": "user", "content": request}]

    def read(reply: str, entry: Entry) -> Scores | None:
        letter = infer_choice(reply, as_choice(entry["expected"])[0], scoring)
        return scores(letter, entry) if letter and FAILED not in reply else None

    def give_up(entry: Entry) -> Scores:
        choices, _ = as_choice(entry["expected"])
        if strict:
            return scores(NONE_OF_THEM, entry)
        return scores(draw_lot(choices, messages(entry)[0]["content"]), entry) | {"lot": True}

    return Judge(
        model=matching_model(scoring),
        applies=is_undecided,
        messages=messages,
        read=read,
        give_up=give_up,
        tries=3,
    )


def is_undecided(entry: Entry) -> bool:
    return bool(entry["scores"].get("undecided"))


def scored_text(entry: Entry) -> str:
    """The part of a logged answer that is scored."""
    return entry.get("cut") or entry["answer"]
