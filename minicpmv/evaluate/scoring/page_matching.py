"""Which element of a reply stands for which of the reference: OmniDocBench's quick match, and the simple one for tables.

What is special:
- elements are merged where one stands for several: first parts of the reply that together are nearer to a reference's text,
  then references that are found inside one part of the reply;
- kept defects, which a strict match mends: a reference that nothing is left for counts twice; a part of the reply may count
  by itself and in a run; parts of the reply that are left over when references are left over too are dropped.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    import numpy as np

NEAR = 0.25  # edit distance below which two elements belong together without doubt
FAR = 0.7  # above it they do not
PART = 0.6  # a part of the reply may be a piece of a reference's text
INSIDE = 0.4  # a reference's text may stand inside a part of the reply


@dataclass(frozen=True)
class Match:
    """Places in the lists of references and of the reply's elements; one of the two may be empty."""

    references: tuple[int, ...]
    answers: tuple[int, ...]


def simple_match(references: Sequence[str], answers: Sequence[str]) -> list[Match]:
    """One element of the reply, at most, for each reference, so that all edit distances together are least."""
    if not answers:
        return [Match((place,), ()) for place in range(len(references))]
    pairs = dict(zip(*_assigned(_distances(references, answers)), strict=True))
    return [Match((place,), (pairs[place],) if place in pairs else ()) for place in range(len(references))]


def quick_match(references: Sequence[str], answers: Sequence[str], strict: bool = False) -> list[Match]:
    """Matches that cover all references; what is left of the reply only where no reference is left, unless strict."""
    if not references:
        return [Match((), (place,)) for place in range(len(answers))]
    if not answers:
        return [Match((place,), ()) for place in range(len(references))]
    if len(references) == len(answers) == 1:
        return [Match((0,), (0,))]
    groups = _merged_answers(references, answers)
    rows, columns, costs = _best(references, [" ".join(answers[place] for place in group) for group in groups])
    matched: dict[tuple[int, ...], list[int]] = {}  # places in the reply -> references
    unmatched = set(range(len(references)))
    for row, column, cost in zip(rows, columns, costs, strict=True):
        if cost <= FAR:
            matched.setdefault(tuple(groups[column]), []).append(row)
            unmatched.discard(row)
    _add_contained(matched, unmatched, references, answers, strict)
    return _with_rest(matched, references, answers, strict)


def _add_contained(
    matched: dict[tuple[int, ...], list[int]],
    unmatched: set[int],
    references: Sequence[str],
    answers: Sequence[str],
    strict: bool,
) -> None:
    """References that stand inside an element of the reply; such an element counts as used, even if another had them."""
    taken: set[int] = set()
    for place, answer in enumerate(answers):
        inside = [row for row in sorted(unmatched) if _share_of_edits(answer, references[row]) < INSIDE]
        if inside:
            run = next((places for places in matched if strict and place in places), (place,))
            matched.setdefault(run, []).extend(row for row in inside if row not in taken)
            taken.update(inside)


def _with_rest(
    matched: dict[tuple[int, ...], list[int]], references: Sequence[str], answers: Sequence[str], strict: bool
) -> list[Match]:
    found = {places: sorted(rows) for places, rows in matched.items() if rows}
    rows_left = set(range(len(references))) - {row for rows in matched.values() for row in rows}
    used = found if strict else matched
    places_left = set(range(len(answers))) - {place for places in used for place in places}
    rest: list[Match] = []
    if places_left and rows_left:
        from rapidfuzz.distance import Levenshtein

        rows, places = list(rows_left), list(places_left)
        edits = [[Levenshtein.distance(references[row], answers[place]) for place in places] for row in rows]
        for row, place in zip(*_assigned(edits), strict=True):
            found[places[place],] = [rows[row]]
            rows_left.discard(rows[row])
            places_left.discard(places[place])
        if strict and places_left:
            rest.append(Match((), tuple(places_left)))
    elif places_left:
        rest.append(Match((), tuple(places_left)))
    elif not strict:
        rest += [Match((row,), ()) for row in rows_left]
    rest += [Match((row,), ()) for row in sorted(rows_left)]
    return [Match(tuple(rows), places) for places, rows in found.items()] + rest


# --- Parts of the reply that belong together ---


def _merged_answers(references: Sequence[str], answers: Sequence[str]) -> list[list[int]]:
    """Places of the reply's elements, those together that are pieces of one reference."""
    near = _distances(references, answers) < NEAR
    open_rows = [row for row in range(len(references)) if not near[row].any()]
    taken = {place for place in range(len(answers)) if near[:, place].any()}
    pieces: list[tuple[list[int], float]] = []
    for row in open_rows:
        runs = [_run(references[row], answers, place, taken) for place in range(len(answers)) if place not in taken]
        if runs:
            costs = [_distance(references[row], " ".join(answers[place] for place in run)) for run in runs]
            best = min(range(len(runs)), key=costs.__getitem__)
            pieces.append((runs[best], costs[best]))
    groups: list[list[int]] = [[place] for place in range(len(answers))]
    for run in _without_overlaps(pieces):
        first = groups.index([run[0]])
        groups[first : first + len(run)] = [run]
    return groups


def _run(reference: str, answers: Sequence[str], first: int, taken: set[int]) -> list[int]:
    """Elements from `first` on, as many as bring the text nearer to the reference."""
    run = [first]
    while (following := run[-1] + 1) < len(answers) and following not in taken:
        before, last = [answers[place] for place in run], answers[following]
        longer = " ".join([*before, last])
        if _distance(reference, longer) > _distance(reference, " ".join(before)):
            break
        if any(_share_of_edits(reference, text) > PART for text in before) or _share_of_edits(reference, last) >= PART:
            break
        run.append(following)
        if len(longer) > len(reference):
            break
    return run


def _without_overlaps(pieces: Sequence[tuple[list[int], float]]) -> list[list[int]]:
    """Of runs that overlap, the combination of the least mean cost."""
    clusters: list[list[tuple[list[int], float]]] = []
    for piece in sorted(pieces, key=lambda piece: piece[0][0]):
        if clusters and any(set(piece[0]) & set(other[0]) for other in clusters[-1]):
            clusters[-1].append(piece)
        else:
            clusters.append([piece])
    return [run for cluster in clusters for run in _cheapest(cluster)]


def _cheapest(cluster: Sequence[tuple[list[int], float]]) -> list[list[int]]:
    paths = [[cluster[0]]]
    for piece in cluster[1:]:
        is_new = True
        for path in paths:
            same = next((other for other in path if other[0] == piece[0]), None)
            if same is not None:
                is_new = False
                if same[1] > piece[1]:
                    path.remove(same)
                    path.append(piece)
            elif not any(set(other[0]) & set(piece[0]) for other in path):
                path.append(piece)
                is_new = False
        if is_new:
            paths.append([piece])
    best = min(paths, key=lambda path: sum(cost for _, cost in path) / len(path))
    return [run for run, _ in best]


# --- Distances ---


def _distance(text: str, other: str) -> float:
    """Edits over the longer length."""
    from rapidfuzz.distance import Levenshtein

    return Levenshtein.normalized_distance(text, other)


def _distances(texts: Sequence[str], others: Sequence[str]) -> "np.ndarray":
    import numpy as np

    return np.array([[_distance(text, other) for other in others] for text in texts]).reshape(len(texts), len(others))


@lru_cache(maxsize=4096)  # a reply that repeats itself asks the same again and again
def _share_of_edits(text: str, piece: str) -> float:
    """The least edits of a piece to a stretch of the text as long as the piece, over that length.

    1 where the piece is longer than the text; only exact up to PART, above which nobody looks.
    """
    from rapidfuzz.distance import Levenshtein

    if not piece or len(piece) > len(text):
        return 1.0
    least = math.ceil(PART * len(piece)) + 1
    for start in range(len(text) - len(piece) + 1):
        edits = Levenshtein.distance(text[start : start + len(piece)], piece, score_cutoff=least - 1)
        least = min(least, edits)
        if least == 0:
            break
    return least / len(piece)


def _assigned(costs) -> tuple[list[int], list[int]]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(costs)
    return rows.tolist(), columns.tolist()


def _best(references: Sequence[str], answers: Sequence[str]) -> tuple[list[int], list[int], list[float]]:
    costs = _distances(references, answers)
    rows, columns = _assigned(costs)
    return rows, columns, [float(costs[row, column]) for row, column in zip(rows, columns, strict=True)]


def most_frequent(kinds: Sequence[str], ignored: Sequence[str]) -> str:
    """The kind of merged references: the most frequent of those that count, else of all; the first of several."""
    return Counter([kind for kind in kinds if kind not in ignored] or kinds).most_common(1)[0][0]
