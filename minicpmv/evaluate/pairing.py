"""Two runs on the same questions: how far apart they are, and which questions flipped. Quantized against full, say.

A question that is asked in rotations counts once, as its worst answer. Of several seeds, each is a question of its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.benchmark import Entry, main_score
from minicpmv.evaluate.sample_log import read_scored
from minicpmv.evaluate.statistics import TOGETHER, Pairing, pair


class PairingError(MiniCPMVError):
    """Two runs have not a single question in common."""


@dataclass(frozen=True)
class Flip:
    """A question that just one of two runs has right."""

    first: Entry
    second: Entry
    gained: bool  # whether it is the second one


@dataclass(frozen=True)
class RowPair:
    """A row that two runs share."""

    row: str
    pairing: Pairing
    flips: list[Flip]
    alone: int  # questions of either run that the other was not asked, or that have no score


def pair_runs(first: Path, second: Path) -> list[RowPair]:
    """The rows that two runs share, in the order of the first run's log.

    Args:
        first, second: folders of runs, of one benchmark or of a group.

    Raises:
        PairingError: they share no question.
        DamagedFileError: a log cannot be read.
    """
    runs = _questions(read_scored(first)), _questions(read_scored(second))
    rows = []
    for row in dict.fromkeys(key[0] for key in runs[0]):
        mine, theirs = ({key: entry for key, entry in run.items() if key[0] == row} for run in runs)
        if shared := [key for key in mine if key in theirs]:
            entries = [(mine[key], theirs[key]) for key in shared]
            scores = [[_score(entry) for entry in side] for side in zip(*entries, strict=True)]
            pairing = pair(*scores, groups=[_together(entry) for entry, _ in entries])
            flips = [
                Flip(*entries[place], gained=gained)
                for places, gained in ((pairing.only_first, False), (pairing.only_second, True))
                for place in places
            ]
            rows.append(RowPair(row, pairing, flips, len(mine) + len(theirs) - 2 * len(shared)))
    if not rows:
        raise PairingError(
            f"{first} and {second} have no question in common: compare runs of one benchmark over the same data"
        )
    return rows


def _questions(entries: Sequence[Entry]) -> dict[tuple[Any, ...], Entry]:
    """The scored answers by what makes a question the same one in another run; of rotations the worst."""
    found: dict[tuple[Any, ...], Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry["index"]):
        facts = entry.get("facts", {})
        name: tuple[Any, ...] = (facts.get("id", entry["index"]), json.dumps(entry.get("expected"), sort_keys=True))
        if facts.get("group") is not None:
            name = ("group", *(str(facts.get(fact)) for fact in ("category", "group")))
        key = (entry["row"], entry["seed"], *name)
        if main_score(entry["scores"]) is not None and (key not in found or _score(entry) < _score(found[key])):
            found[key] = entry
    return found


def _score(entry: Entry) -> float:
    return float(main_score(entry["scores"]) or 0)


def _together(entry: Entry) -> tuple[Any, ...]:
    """What questions share that were not drawn independently."""
    facts = entry.get("facts", {})
    name = next((name for name in TOGETHER if name in facts), None)
    if name is None:
        return (entry["seed"], entry["index"])
    return (facts.get("category"), facts.get("l2_category"), str(facts[name]))
