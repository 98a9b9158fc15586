"""Several answers to each prompt of a batch, each with a random state of its own.

What is special:
- an answer depends on (seed, prompt, number of the answer) alone: not on the batch it was in, nor on where a run was resumed;
- all answers are drawn under the same conditions, so that they differ in what they say and not in style;
- a prompt's pictures are encoded once for all its answers.
"""

import random
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper


@dataclass
class Answer:
    text: str
    length: int  # tokens, without the closing one
    finished: bool  # False: cut at max_new_tokens


class SeededChoice(LogitsProcessor):
    """Choose the token where the cumulated probability passes a given random number, in place of torch's global state.

    Args:
        numbers: [rows, steps], uniform in [0, 1).
        prompt_length: tokens before the first step.
    """

    def __init__(self, numbers: torch.Tensor, prompt_length: int):
        self.numbers = numbers
        self.prompt_length = prompt_length

    def __call__(self, input_ids, scores):
        numbers = self.numbers[:, input_ids.shape[1] - self.prompt_length, None].to(scores.device)
        cumulated = scores.double().softmax(-1).cumsum(-1)  # [rows, vocabulary]
        # The last entry is 1 but for rounding: a number beyond it must not fall off the vocabulary.
        chosen = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(-1, chosen, 0.0)


def seeded_numbers(seed: int, prompt: int, answer: int, count: int) -> list[float]:
    rng = random.Random(f"{seed}/{prompt}/{answer}")
    return [rng.random() for _ in range(count)]


@torch.inference_mode()
def sample_answers(
    model,
    tokenizer,
    inputs: dict,
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
    numbers = [seeded_numbers(seed, prompt, answer, max_new_tokens) for prompt in prompts for answer in range(count)]
    start = inputs["input_ids"].shape[1]
    choice = [TemperatureLogitsWarper(temperature)]
    if top_p < 1:
        choice.append(TopPLogitsWarper(top_p))
    choice.append(SeededChoice(torch.tensor(numbers, dtype=torch.float64), start))
    output = model.generate(
        **inputs,
        num_return_sequences=count,
        max_new_tokens=max_new_tokens,
        logits_processor=LogitsProcessorList(choice),
        # SeededChoice leaves one token; nothing may happen to the scores after it.
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
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
