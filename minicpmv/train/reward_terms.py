"""The terms of the reward in reinforcement learning: pure functions of texts and numbers.

What is special:
- what counts is the final answer: a thought, even a right one, earns nothing and costs nothing by itself;
- a thought that was never closed has no final answer;
- the signature is that of TRL's reward functions: one value a completion, None where a term does not apply.

The terms are those of https://arxiv.org/abs/2509.18154: accuracy + format + repetition (TRL's own function) + 1/2 of the
standardized score of a reward model.
"""

from collections.abc import Sequence
from typing import Any

import torch

from minicpmv.data.formats import THINK_END, THINK_START


def final_answer(text: str, enable_thinking: bool = False) -> str | None:
    """The text after the last thought, stripped; None when a thought is open at the end.

    Args:
        text: what the model wrote, without its closing token.
        enable_thinking: the prompt had opened a thought, so the text begins inside it.
    """
    _thought, closed, answer = text.rpartition(THINK_END)
    if THINK_START in answer or (enable_thinking and not closed):
        return None
    return answer.strip()


def accuracy_reward(
    completions: Sequence[list[dict]], enable_thinking: Sequence[bool], answer: Sequence[str | None], **kwargs: Any
) -> list[float | None]:
    """1 when the final answer, stripped, is the expected one to the letter, else 0; None for rows without an answer."""
    return [
        None if expected is None else float(final_answer(_text(completion), thinks) == expected.strip())
        for completion, thinks, expected in zip(completions, enable_thinking, answer, strict=True)
    ]


def format_reward(completions: Sequence[list[dict]], enable_thinking: Sequence[bool], **kwargs: Any) -> list[float]:
    """1 when the text has the form of its mode, else 0.

    Deep mode: a thought that is not empty, closed once, then an answer that is not empty. Fast mode: an answer that is
    not empty, and no thought.
    """
    rewards = []
    for completion, thinks in zip(completions, enable_thinking, strict=True):
        text = _text(completion)
        thought, closed, answer = text.partition(THINK_END)
        if thinks:
            is_right = bool(closed and thought.strip() and answer.strip()) and THINK_END not in answer
        else:
            is_right = bool(text.strip()) and not closed
        rewards.append(float(is_right and THINK_START not in text))
    return rewards


def standardized(scores: torch.Tensor) -> torch.Tensor:
    """Scores [N] of one batch with mean 0 and standard deviation 1; NaN (no score) becomes 0, the mean.

    Scores that are all the same become 0.
    """
    known = scores[~scores.isnan()]
    if len(known) < 2:
        return torch.zeros_like(scores)
    deviation = (scores - known.mean()) / known.std().clamp(min=1e-6)
    return deviation.nan_to_num(nan=0.0)


def _text(completion) -> str:
    return completion[0]["content"]
