"""Several answers to each prompt of a batch, each with a random state of its own.

What is special:
- an answer depends on (seed, prompt, number of the answer) alone: not on the batch it was in, nor on where a run was resumed;
- all answers are drawn under the same conditions, so that they differ in what they say and not in style;
- a prompt's images are encoded once for all its answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Answer:
    text: str
    length: int  # tokens, without the closing one
    finished: bool  # False: cut at max_new_tokens


@torch.inference_mode()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Mapping[str, Any],
    prompts: list[int],
    count: int,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 512,
) -> list[list[Answer]]:
    """`count` answers to each prompt.

    Args:
        inputs: of the model, padded on the left.
        prompts: number of each prompt, from which its random state comes.
    """
    start = inputs["input_ids"].shape[1]
    seeds = [f"{seed}/{prompt}/{answer}" for prompt in prompts for answer in range(count)]
    output = model.generate(
        **inputs,
        num_return_sequences=count,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=top_p,
        logits_processor=[model.seeded_choice(seeds, start)],
    )
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    answers = []
    for ids in output[:, start:].tolist():
        length = next((place for place, token in enumerate(ids) if token in ends), None)
        written = ids[:length]
        text = tokenizer.decode(written, skip_special_tokens=True).strip()
        answers.append(Answer(text, len(written), length is not None))
    return [answers[first : first + count] for first in range(0, len(answers), count)]
