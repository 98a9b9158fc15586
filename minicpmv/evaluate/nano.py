"""Exact-match rates on held-out pictures that the repository draws.

    python -m minicpmv.evaluate.nano --checkpoint nano --samples 100 --seed 0 [--json FILE]

What is special:
- an answer counts when the whole of it, stripped, equals the expected one; nothing is parsed or forgiven;
- every question is asked alone, through the processor and `generate`, as a user would ask it;
- three conditions: "picture" (one view), "slices" (larger pictures, cut as the checkpoint does by default), "clip".
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor

from minicpmv.data.collate import single_turns
from minicpmv.data.synthetic import PHRASES, Mixture, Sample, make_sample


# At most as many slices as nano's own settings allow.
CONDITIONS = {
    "picture": Mixture(text=0.4, video=0.0, sliced=0.0),
    "slices": Mixture(text=0.4, video=0.0, sliced=1.0),
    "clip": Mixture(text=0.0, video=1.0, sliced=0.0),
}
CLIP_TASKS = ("move", "first", "last", "flash", "color", "only_shape")
PICTURE_TASKS = tuple(task for task in PHRASES if task not in ("move", "first", "last", "flash"))


class CheckpointError(RuntimeError):
    """The checkpoint cannot be evaluated: the message says what is missing."""


@dataclass
class Score:
    """How many answers to one task under one condition were right; the first few wrong ones are kept."""

    condition: str
    task: str
    right: int
    asked: int
    wrong: list[tuple[str, str, str]]  # question, expected, answer

    @property
    def rate(self) -> float:
        return self.right / self.asked


def exact_match(answer: str, expected: str) -> bool:
    return answer.strip() == expected


def questions(condition: str, task: str, count: int, seed: int) -> list[Sample]:
    """The first `count` questions of a task in the test split, one turn each."""
    found, index = [], 0
    while len(found) < count:
        sample = make_sample("test", seed, index, CONDITIONS[condition])
        found += [single for single in single_turns(sample) if single.turns[0].task == task]
        index += 1
    return found[:count]


@torch.inference_mode()
def answer(model, processor, samples: list[Sample]) -> list[str]:
    """Greedy answers to samples of one condition, in one batch."""
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": image} for image in sample.images]
                + [{"type": "text", "text": sample.turns[0].question}],
            }
        ]
        for sample in samples
    ]
    options = {"max_slice_nums": samples[0].max_slice_nums}
    if samples[0].temporal_ids is not None:
        options |= {"temporal_ids": [sample.temporal_ids for sample in samples], "use_image_id": False}
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        enable_thinking=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        **options,
    )
    output = model.generate(**inputs, max_new_tokens=64, do_sample=False)
    written = output[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(written, skip_special_tokens=True)]


def evaluate(model, processor, samples: int, seed: int = 0, batch_size: int = 50) -> list[Score]:
    """Ask `samples` questions of every task under every condition."""
    plan = [(condition, task) for condition in ("picture", "slices") for task in PICTURE_TASKS]
    plan += [("clip", task) for task in CLIP_TASKS]
    scores = []
    for condition, task in tqdm(plan, desc="tasks"):
        asked = questions(condition, task, samples, seed)
        answers = []
        for start in range(0, len(asked), batch_size):
            answers += answer(model, processor, asked[start : start + batch_size])
        pairs = [(sample.turns[0], given) for sample, given in zip(asked, answers, strict=True)]
        wrong = [(t.question, t.answer, given) for t, given in pairs if not exact_match(given, t.answer)]
        scores.append(Score(condition, task, len(asked) - len(wrong), len(asked), wrong[:5]))
    return scores


def load(checkpoint: str):
    if Path(checkpoint).is_dir() and not list(Path(checkpoint).glob("*.safetensors")):
        raise CheckpointError(f"{checkpoint} has no *.safetensors; train one with `python -m minicpmv.train.nano`")
    model = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def table(scores: list[Score]) -> str:
    """A Markdown table: one row a task, one column a condition; the last row is the mean over tasks."""
    by_place = {(score.task, score.condition): score for score in scores}
    lines = ["| task | picture | slices | clip |", "|---|---|---|---|"]
    for task in PHRASES:
        cells = [by_place.get((task, condition)) for condition in CONDITIONS]
        lines.append(f"| {task} | " + " | ".join(f"{cell.rate:.2f}" if cell else "" for cell in cells) + " |")
    means = []
    for condition in CONDITIONS:
        rates = [score.rate for score in scores if score.condition == condition]
        means.append(f"**{sum(rates) / len(rates):.2f}**")
    return "\n".join([*lines, "| **mean** | " + " | ".join(means) + " |"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="nano", help="model folder or Hub repository")
    parser.add_argument("--samples", type=int, default=100, help="questions for each task and condition")
    parser.add_argument("--seed", type=int, default=0, help="seed of the test pictures")
    parser.add_argument("--json", type=Path, help="also write the scores, with some wrong answers, to this file")
    args = parser.parse_args(argv)
    if args.samples < 1:
        parser.error(f"--samples {args.samples}: at least 1 question is needed")
    try:
        model, processor = load(args.checkpoint)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    scores = evaluate(model, processor, args.samples, args.seed)
    print(table(scores))
    if args.json:
        args.json.write_text(json.dumps([vars(score) for score in scores], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
