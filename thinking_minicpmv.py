"""Thinking: when the model should think before it answers, for how long, and what is thought and what is answer.

What is special:
- "auto" looks before it thinks. The model begins to answer fast; where one of its first tokens was a guess, or the
  question is long, the draft is thrown away and it thinks. Else the draft is the beginning of the answer.
- The rule has one number, the threshold, which is stored in the model's config; `minicpmv evaluate calibrate` finds it.
- A budget closes the thought, not the answer.
"""

import math

import torch
from transformers import LogitsProcessor

from .configuration_minicpmv import MiniCPMVError


THINK_START, THINK_END = "<think>", "</think>"
OPENING = f"{THINK_START}\n"  # of the answer that thinks
CLOSED_THOUGHT = f"\n{THINK_END}\n\n"  # as the template writes the end of a thought
DRAFT_TOKENS = 8  # tokens of the fast answer that "auto" looks at
COMPLEXITY_SHARE = 0.2  # of the need to think; the rest is uncertainty
DEFAULT_THRESHOLD = 0.5  # not calibrated: what pays differs between checkpoints and uses


class ThinkingError(MiniCPMVError):
    """A threshold or a budget that cannot be used."""


def split_thought(text):
    """(thought, answer) of a text; a thought that was never closed is all thought, one never opened is none."""
    before, closed, answer = text.partition(THINK_END)
    if THINK_START not in before and not closed:
        return None, text
    thought = before.split(THINK_START, 1)[-1].strip("\n")
    return thought, answer.lstrip("\n")


class ThoughtBudget(LogitsProcessor):
    """Closes a thought that is still open after `budget` tokens, in each row of a batch by itself.

    Args:
        budget: most tokens of a thought.
        prompt_length: tokens (with padding) before the thought.
        think_end: id of `</think>`.
        closing: ids that close a thought; `think_end` among them.
    """

    def __init__(self, budget, prompt_length, think_end, closing):
        self.budget, self.prompt_length = budget, prompt_length
        self.think_end, self.closing = think_end, closing

    def __call__(self, input_ids, scores):
        step = input_ids.shape[1] - self.prompt_length - self.budget
        if not 0 <= step < len(self.closing):
            return scores
        thought = input_ids[:, self.prompt_length : self.prompt_length + self.budget]
        is_open = (thought != self.think_end).all(-1, keepdim=True)
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.closing[step]] = 0
        return torch.where(is_open, forced, scores)


def complexity(question_tokens, pictures):
    """How much a question asks for, from 0 to 1: its tokens, where a picture or a clip counts as 32, on a log scale.

    480 are 1, 96 are a half, 32 are a quarter.
    """
    return min(1.0, math.log2(1 + (question_tokens + 32 * pictures) / 32) / 4)


def need_to_think(certainty, question_tokens, pictures):
    """Need from 0 to 1: four parts uncertainty, one part complexity.

    `certainty` is the lowest of the probabilities that the model gave the likeliest token at each place of its draft:
    an answer is as certain as its weakest token.
    """
    return (1 - COMPLEXITY_SHARE) * (1 - certainty) + COMPLEXITY_SHARE * complexity(question_tokens, pictures)


def least_certainty(logits):
    """The lowest of the greatest probabilities over the steps of a draft; `logits`: one tensor [1, V] a step."""
    return torch.cat(list(logits)).float().softmax(-1).amax(-1).min().item()


class ThinkingMixin:
    """The threshold of a model that decides for itself whether to think."""

    draft_tokens = DRAFT_TOKENS

    @property
    def thinking_threshold(self):
        """Need from which `enable_thinking="auto"` thinks."""
        return getattr(self.config, "thinking_threshold", DEFAULT_THRESHOLD)

    def set_threshold(self, threshold):
        """Set the need, from 0 (always think) to 1 (never), from which `enable_thinking="auto"` thinks.

        It is kept in the config, so `save_pretrained` stores it.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise ThinkingError(f"threshold={threshold!r} is no number from 0 (always think) to 1 (never think).")
        self.config.thinking_threshold = float(threshold)
