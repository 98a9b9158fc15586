"""Which two of a prompt's answers become a preference pair, and which pairs stay.

What is special:
- the answer with fewer errors is preferred, whatever else it says; answers whose errors could not be counted are in no pair;
- lengths are balanced twice: within a prompt the two answers nearest in length are taken, and over all prompts every pair
  whose chosen answer is longer needs a partner whose chosen answer is shorter by about as much. So the data cannot teach
  that short answers are good, which is the easiest way to make fewer errors.

Source: RLAIF-V (https://arxiv.org/abs/2405.17220) for the score (the number of rejected claims).
"""

from collections import deque
from dataclasses import dataclass
from itertools import permutations


@dataclass(frozen=True)
class ScoredAnswer:
    text: str
    length: int  # tokens
    errors: int | None  # None: they could not be counted


@dataclass(frozen=True)
class Pair:
    prompt: int
    chosen: ScoredAnswer
    rejected: ScoredAnswer

    @property
    def extra_length(self) -> int:
        """Tokens that the chosen answer is longer than the rejected one."""
        return self.chosen.length - self.rejected.length

    @property
    def fewer_errors(self) -> int:
        """Errors that the chosen answer has less than the rejected one."""
        return (self.rejected.errors or 0) - (self.chosen.errors or 0)


def choose_pairs(prompt: int, answers: list[ScoredAnswer], limit: int) -> tuple[list[Pair], str | None]:
    """At most `limit` pairs of one prompt, nearest in length first, then with the greatest difference in errors.

    Returns:
        The pairs, and why there is none (else None).
    """
    scored = list({answer.text: answer for answer in answers if answer.errors is not None}.values())
    if not scored:
        return [], "no answer could be scored"
    if len(scored) == 1:
        return [], "only one answer to compare"
    pairs = [pair for two in permutations(scored, 2) if (pair := Pair(prompt, *two)).fewer_errors > 0]
    if not pairs:
        return [], "all answers have as many errors"
    pairs.sort(key=lambda pair: (abs(pair.extra_length), -pair.fewer_errors))
    return pairs[:limit], None


def balance_lengths(pairs: list[Pair], tolerance: float = 0.25) -> list[Pair]:
    """The pairs that stay so that length says nothing about preference; in their old order.

    Pairs of equal length stay. Of the others, each whose chosen answer is d tokens longer is matched with one whose chosen
    answer is about d tokens shorter (`tolerance`: the two may differ by this share of the larger one); as many as possible
    are matched, and those without a partner are left out.
    """
    kept = {index for index, pair in enumerate(pairs) if pair.extra_length == 0}
    by_gap = sorted(range(len(pairs)), key=lambda index: (abs(pairs[index].extra_length), index))
    longer = deque(index for index in by_gap if pairs[index].extra_length > 0)
    shorter = deque(index for index in by_gap if pairs[index].extra_length < 0)
    while longer and shorter:
        more, less = pairs[longer[0]].extra_length, -pairs[shorter[0]].extra_length
        if abs(more - less) <= tolerance * max(more, less):
            kept |= {longer.popleft(), shorter.popleft()}
        else:  # the smaller one has no partner: those left on the other side are larger still
            (longer if more < less else shorter).popleft()
    return [pair for index, pair in enumerate(pairs) if index in kept]
