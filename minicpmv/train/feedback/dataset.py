"""From the log to the preference dataset: pairs of answers in TRL's format, and a summary of what became of every prompt."""

import json
import os
from collections import Counter
from typing import Any

import datasets

from minicpmv.data.collator import ROW_OPTIONS
from minicpmv.train.common.errors import TrainingError
from minicpmv.train.feedback.arguments import FeedbackArguments
from minicpmv.train.feedback.pairs import Pair, ScoredAnswer, balance_lengths, choose_pairs
from minicpmv.train.feedback.prompts import read_prompt


def scored(record: dict) -> list[ScoredAnswer]:
    return [ScoredAnswer(answer["text"], answer["length"], answer["errors"]) for answer in record["answers"]]


def pairs_and_summary(args: FeedbackArguments, records: list[dict]) -> tuple[list[Pair], dict[str, Any]]:
    """The balanced pairs of all prompts, and what became of every prompt, answer and claim.

    Raises:
        TrainingError: there is none.
    """
    found: list[Pair] = []
    without_pair: Counter[str] = Counter()
    for record in records:
        pairs, reason = choose_pairs(record["prompt"], scored(record), args.pairs_per_prompt)
        reason = reason if record["answers"] else "bad row"
        found += pairs
        if reason:
            without_pair[reason] += 1
    pairs = balance_lengths(found, args.length_tolerance)
    without_pair["no partner of the opposite difference in length"] = len({pair.prompt for pair in found}) - len(
        {pair.prompt for pair in pairs}
    )
    answers = [answer for record in records for answer in record["answers"]]
    claims = [claim for answer in answers for claim in answer["claims"]]
    summary = {
        "prompts": len(records),
        "prompts_with_pairs": len({pair.prompt for pair in pairs}),
        "prompts_without_pairs": {reason: count for reason, count in without_pair.items() if count},
        "answers": len(answers),
        "answers_without_score": dict(Counter(answer["reason"] for answer in answers if answer["reason"])),
        "claims": len(claims),
        "claims_rejected": sum(claim["no"] > claim["yes"] for claim in claims),
        "claims_with_unclear_verdict": sum(claim["yes"] + claim["no"] < 0.5 for claim in claims),
        "pairs": len(pairs),
        "pairs_left_out_for_balance": len(found) - len(pairs),
    }
    if not pairs:
        raise TrainingError(
            f"{len(records)} prompts gave no pair: {json.dumps(summary)}. More answers (num_answers), a higher temperature "
            "or more prompts give more pairs; claims: model reads answers that are not lists."
        )
    for side in ("chosen", "rejected"):
        sides = [getattr(pair, side) for pair in pairs]
        summary[f"{side}_mean_length"] = sum(answer.length for answer in sides) / len(pairs)
        summary[f"{side}_mean_errors"] = sum(answer.errors for answer in sides) / len(pairs)
    return pairs, summary


def pair_dataset(
    rows: datasets.Dataset, first_prompt: int, pairs: list[Pair], digests: dict[int, str]
) -> datasets.Dataset:
    """The pairs in TRL's preference format: `prompt`, `chosen`, `rejected`, `images`; the options of their rows beside it.

    Images are stored whole, videos as paths.

    Raises:
        TrainingError: a prompt is not the one that the log is about.
    """
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    messages = [{"role": datasets.Value("string"), "content": [part]}]
    features = {"prompt": messages, "chosen": messages, "rejected": messages}
    features |= {"images": [datasets.Image()], "videos": [datasets.Value("string")]}
    features |= {"chosen_errors": datasets.Value("int32"), "rejected_errors": datasets.Value("int32")}
    features |= {name: kind for name, kind in rows.features.items() if name in (*ROW_OPTIONS, "origin")}

    def convert(row, index):
        pair = pairs[index]
        prompt = read_prompt(row, pair.prompt)
        if prompt.digest != digests[pair.prompt]:
            raise TrainingError(
                f"{prompt.name} has changed since its answers were logged. Take another output_dir for other prompts."
            )
        media = {"image": [], "video": []}
        for piece in (piece for message in prompt.messages for piece in message["content"] if piece["type"] in media):
            media[piece["type"]].append(piece.pop(piece["type"]))
        answers = {
            side: [{"role": "assistant", "content": [{"type": "text", "text": getattr(pair, side).text}]}]
            for side in ("chosen", "rejected")
        }
        errors = {f"{side}_errors": getattr(pair, side).errors for side in answers}
        videos = [os.path.abspath(path) for path in media["video"]]
        return {"prompt": prompt.messages, **answers, "images": media["image"], "videos": videos, **errors}

    chosen_rows = rows.select([pair.prompt - first_prompt for pair in pairs])
    return chosen_rows.map(
        convert,
        with_indices=True,
        features=datasets.Features(features),
        remove_columns=[name for name in rows.column_names if name not in features],
        load_from_cache_file=False,
        desc="pairs",
    )
