"""From an answer to its atomic claims, each with the yes-or-no question that checks it.

What is special:
- two ways: "rule" reads captions that list things ("a red circle, a blue star") and costs nothing; "model" asks a language
  model, in one prompt, for the claims of any answer and their questions;
- what cannot be read as a claim is returned beside the claims, so that nobody takes an unread answer for a right one.

Source of the division into claims and questions: RLAIF-V (https://arxiv.org/abs/2405.17220).
"""

import re
from collections import Counter
from dataclasses import dataclass, field

from minicpmv.errors import MiniCPMVError


@dataclass
class Claim:
    text: str
    question: str  # "yes" to it means that the claim is true


@dataclass
class Reading:
    """What an answer was found to say."""

    claims: list[Claim] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # parts that gave no claim


class MalformedClaimsError(MiniCPMVError):
    """A language model's list of claims cannot be read: the message shows its reply."""


# --- By rule ---

BETWEEN_CLAIMS = re.compile(r"[.!?](?=\s|$)|[。！？；;\n,，、]|\sand\s|和(?=[一两二三四五六七八九十\d])")
LEAD_IN = re.compile(r"^(?:and\s+)?(?:(?:there\s+(?:is|are)|(?:the\s+picture|it)\s+shows)\s+)?", re.IGNORECASE)
ONE_THING = re.compile(r"^(?:an?|one|another)\s+\S", re.IGNORECASE)
SEVERAL_THINGS = re.compile(r"^(?:two|three|four|five|six|seven|eight|nine|ten|several|many|\d+)\s+\S", re.IGNORECASE)
CHINESE_ONE = re.compile(r"^[一1][个只条张把辆位座本]")
CHINESE_THINGS = re.compile(r"^[\d\u4e00-\u9fff]{2,16}$")  # "有...吗" takes a name as well as a short sentence


def claims_by_rule(answer: str) -> Reading:
    """Split a caption at its commas, sentences and "and"; every "a ..." or "two ..." is the claim that it is there,
    and so is every short part in Chinese. "A ..." for the second time is the claim that it is there at least twice.

    What begins otherwise ("the circle is red") is no claim to this rule and comes back as unread.
    """
    reading = Reading()
    mentions: Counter[str] = Counter()
    for piece in BETWEEN_CLAIMS.split(answer):
        thing = LEAD_IN.sub("", piece.strip())
        if not thing:
            continue
        mentions[thing.lower()] += 1
        times = mentions[thing.lower()]
        if CHINESE_THINGS.match(thing):
            question = f"有{thing}吗？" if times == 1 else f"有至少{times}个{CHINESE_ONE.sub('', thing)}吗？"
        elif ONE_THING.match(thing):
            often = {1: "", 2: " at least twice"}.get(times, f" at least {times} times")
            question = f"Is there {thing[0].lower()}{thing[1:]}{often}?"
        elif SEVERAL_THINGS.match(thing):
            question = f"Are there {thing[0].lower()}{thing[1:]}?"
        else:
            reading.unread.append(thing)
            continue
        reading.claims.append(Claim(thing, question))
    return reading


# --- By a language model ---

NO_CLAIM = "none"
INSTRUCTION = f"""\
Below are a question about a picture or a video and an answer to it. Find what the answer claims to be visible: things, \
their number, color, place, action, relation, written text. Leave out opinions, guesses and common knowledge.

Write one line for each claim: the claim, then " | ", then a question which is answered with yes if the claim is true and \
with no if it is false. A claim says one thing only and is understood without the others. Write no other text. If the \
answer claims nothing visible, write only "{NO_CLAIM}".

An example. To the question "What is on the table?" and the answer "A white cup and two books, one of them open. How cozy!" \
you write:
There is a cup on the table. | Is there a cup on the table?
The cup is white. | Is the cup white?
There are two books on the table. | Are there two books on the table?
One of the books is open. | Is one of the books open?"""
BULLET = re.compile(r"^(?:[-*•]|\d+[.)])\s+")


def claims_prompt(question: str, answer: str) -> str:
    """What a language model is asked, to be read by [`parse_claims`]."""
    return f"{INSTRUCTION}\n\nQuestion: {question}\nAnswer: {answer}"


def parse_claims(reply: str) -> Reading:
    """Read "claim | question" lines; bullets and numbers in front of them are allowed, an opening line ending in ":" too.

    Raises:
        MalformedClaimsError: there is no such line, and the reply is not "none" either.
    """
    reading = Reading()
    lines = [BULLET.sub("", line.strip()) for line in reply.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        claim, bar, question = (part.strip() for part in line.partition("|"))
        if bar and claim and question.endswith(("?", "？")) and "|" not in question:
            reading.claims.append(Claim(claim, question))
        elif not (number == 0 and line.endswith((":", "："))):
            reading.unread.append(line)
    if not reading.claims and [line.strip(' ."').lower() for line in reading.unread] != [NO_CLAIM]:
        raise MalformedClaimsError(
            f'The reply {reply[:200]!r} has no line of the form "claim | question?". Choose another --claims_model, or '
            "--claims rule for captions that list things."
        )
    if not reading.claims:
        reading.unread.clear()
    return reading
