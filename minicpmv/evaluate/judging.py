"""A language model as a judge of answers that rules alone do not score.

What is special:
- what is asked, and what a reply says, belongs to the row (`Judge`); this asks, keeps and counts;
- every reply is kept on disk under its request: another run, another machine with the same folder, or a run that was stopped
  asks for none of them twice. A further try at the same question is a request of its own;
- what it will cost is told first, for all of a run, and nothing is asked before that is confirmed;
- the name that the server says has answered is kept: one name stands for other models over the years.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.benchmark import Entry, Judge, Row, Scores, main_score
from minicpmv.evaluate.client import ChatClient, side_by_side
from minicpmv.files import DamagedFileError, read_json


THINK_END = "</think>"
CHARACTERS_A_TOKEN = 4  # of text in Latin letters; others take a token each

Pair = tuple[Row, Entry]


class JudgeError(MiniCPMVError):
    """Answers wait for a judge: the message says what asking it would cost, and how to agree to that."""


def cache_folder() -> Path:
    """Where replies are kept unless another folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "minicpmv" / "judge"


@dataclass(frozen=True)
class Estimate:
    """What judging would take, beyond the replies that are there."""

    answers: int  # to be judged anew
    most_requests: int  # if every try but the last says nothing
    prompt_tokens: int  # of one try for each; roughly, since only the judge knows its tokens
    reply_tokens: int  # at most, of one try for each
    cost: float | None = None  # of one try for each, in the unit of the prices that were given

    def __add__(self, other: "Estimate") -> "Estimate":
        costs = [cost for cost in (self.cost, other.cost) if cost is not None]
        return Estimate(
            self.answers + other.answers,
            self.most_requests + other.most_requests,
            self.prompt_tokens + other.prompt_tokens,
            self.reply_tokens + other.reply_tokens,
            sum(costs) if costs else None,
        )

    def __bool__(self) -> bool:
        return self.answers > 0

    def __str__(self) -> str:
        text = (
            f"{self.answers} request{'s' * (self.answers != 1)} (at most {self.most_requests} with further tries), about {self.prompt_tokens} tokens "
            f"to read and at most {self.reply_tokens} to write"
        )
        return text if self.cost is None else f"{text}, about {self.cost:.2f} at your prices"


NOTHING = Estimate(0, 0, 0, 0)


class JudgeModel:
    """Scores answers by asking a language model, as the rows say.

    Args:
        client: of the model that judges.
        cache: folder of the replies.
        confirmed: whether the cost has been agreed to. Without it, only what the folder knows is judged, and the rest is
            put on the bill: see `refuse_if_owing`.
        prices: of a million tokens to read and of a million to write; any currency.
    """

    def __init__(
        self,
        client: ChatClient,
        cache: Path | None = None,
        *,
        confirmed: bool = False,
        prices: tuple[float, float] | None = None,
    ):
        self.client, self.cache = client, cache or cache_folder()
        self.confirmed, self.prices = confirmed, prices
        self.name = client.model
        self._owing: list[Estimate] = []

    def settings(self) -> dict[str, Any]:
        """Who judges and how it is asked, for JSON."""
        return self.client.settings()

    def estimate(self, pairs: Iterable[Pair]) -> Estimate:
        """What `judge` would ask for these answers."""
        return self._estimate([question for question in self._questions(pairs) if not question.known()])

    def _estimate(self, open_questions: Sequence["_Question"]) -> Estimate:
        tokens = sum(token_count(message["content"]) for question in open_questions for message in question.messages)
        replies = sum(question.judge.max_tokens for question in open_questions)
        cost = None
        if self.prices is not None:
            cost = (tokens * self.prices[0] + replies * self.prices[1]) / 1e6
        tries = sum(question.judge.tries for question in open_questions)
        return Estimate(len(open_questions), tries, tokens, replies, cost)

    def judge(self, pairs: Iterable[Pair]) -> Iterator[tuple[Entry, Scores]]:
        """New scores of the answers that the judge is asked about, in any order.

        Args:
            pairs: all answers of the rows. Of a question that is asked in several rotations, all of which have to be right,
                nothing more is asked once the rules found one wrong.

        Returns:
            What the row reads from the reply, with "judge": the model that the server said has answered; None after the last
            try said nothing.

        Raises:
            EndpointError: the judge does not answer. What it said before is kept.
            DamagedFileError: a kept reply cannot be read.
        """
        questions = self._questions(pairs)
        if not self.confirmed:
            known = [question.known() for question in questions]
            self._owing.append(
                self._estimate([each for each, is_known in zip(questions, known, strict=True) if not is_known])
            )
            questions = [each for each, is_known in zip(questions, known, strict=True) if is_known]
        for question, scores in side_by_side(_Question.ask, questions, self.client.concurrency):
            yield question.entry, scores

    def refuse_if_owing(self) -> None:
        """End a run in which answers were left to a judge that nobody agreed to pay.

        Raises:
            JudgeError: with the cost of all of them.
        """
        if bill := sum(self._owing, start=NOTHING):
            raise JudgeError(
                f"the answers are stored; to judge them, {self.name} would get {bill}: run the same command with --judge-yes"
            )

    def _questions(self, pairs: Iterable[Pair]) -> list["_Question"]:
        """What is put to the judge, given all answers."""
        asked, lost = [], set()
        for row, entry in pairs:
            if row.judge is None:
                continue
            if row.judge.applies(entry):
                asked.append(_Question(row, row.judge, entry, self))
            elif main_score(entry["scores"]) == 0 and _rotations(row, entry):
                lost.add(_rotations(row, entry))
        return [question for question in asked if _rotations(question.row, question.entry) not in lost]


def _rotations(row: Row, entry: Entry) -> tuple[Any, ...] | None:
    """What the rotations of one question share; None where a question is asked once."""
    group = entry.get("facts", {}).get("group")
    return None if group is None else (row.id, entry["seed"], group)


@dataclass(frozen=True)
class _Question:
    """One answer that is put to the judge."""

    row: Row
    judge: Judge
    entry: Entry
    model: JudgeModel

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.judge.messages(self.entry)

    def tries(self) -> Iterator[tuple[dict[str, Any], Path]]:
        """The request of each try, and where its reply is kept."""
        client = self.model.client
        for attempt in range(self.judge.tries):
            temperature = self.judge.temperatures[min(attempt, len(self.judge.temperatures) - 1)]
            request = client.request(self.messages, self.judge.max_tokens, {"temperature": temperature})
            # The name stands for the whole request, whom it goes to, and which try it is.
            whole = json.dumps([client.url, attempt, request], sort_keys=True)
            digest = hashlib.sha256(whole.encode()).hexdigest()
            yield request, self.model.cache / digest[:2] / f"{digest}.json"

    def known(self) -> bool:
        """Whether kept replies are enough."""
        for _, place in self.tries():
            if (reply := _kept(place)) is None:
                return False
            if self.read(reply) is not None:
                return True
        return True

    def ask(self) -> Scores:
        said_by = None
        for request, place in self.tries():
            reply = _kept(place) or self.complete(request, place)
            said_by = reply["model"]
            if (scores := self.read(reply)) is not None:
                return scores | {"judge": said_by}
        return self.judge.give_up(self.entry) | {"judge": said_by}

    def read(self, reply: dict[str, Any]) -> Scores | None:
        # A judge that thinks may leave the thought in its reply; one that was cut off or refuses may say nothing.
        return self.judge.read((reply["text"] or "").rpartition(THINK_END)[2], self.entry)

    def complete(self, request: dict[str, Any], place: Path) -> dict[str, Any]:
        name = f"the judge's question about answer {self.entry['index']} of {self.row.id} (seed {self.entry['seed']})"
        completion = self.model.client.complete(name, request)
        reply = {"request": request, "model": completion.model, "text": completion.choices[0].message.content}
        _keep(place, reply)
        return reply


def _kept(place: Path) -> dict[str, Any] | None:
    if not place.exists():
        return None
    kept = read_json(place)
    if not all(isinstance(kept.get(name, 0), str | None) for name in ("model", "text")):
        raise DamagedFileError(f"{place} is not a judge's reply: delete it")
    return kept


def _keep(place: Path, reply: dict[str, Any]) -> None:
    """Write a reply whole, whoever else writes the same one at this moment."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_name(f"{place.stem}.{os.getpid()}-{get_ident()}.draft")
    draft.write_text(json.dumps(reply, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, place)


def token_count(text: str) -> int:
    """Roughly how many tokens a text is."""
    latin = sum(character.isascii() for character in text)
    return round(latin / CHARACTERS_A_TOKEN) + len(text) - latin
