"""Preference pairs from the model's own answers, without people: RLAIF-V.

    minicpmv align feedback --model_name_or_path nano --dataset_name prompts.jsonl --output_dir round1

What is special:
- for each prompt: sample answers, split each into atomic claims, ask a feedback model about every claim; the answer with
  fewer rejected claims is preferred, and lengths are balanced (`pairs.py`);
- every prompt's answers, claims and verdicts are a line of a log, so a run that was stopped goes on where it was, and pairs
  can be chosen anew without asking again;
- nothing disappears unseen: the summary counts prompts without a pair and answers without a score, with the reasons.

Source: RLAIF-V (https://arxiv.org/abs/2405.17220). A claim is rejected when "no" is more probable than "yes".
"""

import hashlib
import json
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Literal

import datasets
import torch
from accelerate import Accelerator
from PIL import Image
from tqdm import tqdm

from minicpmv.data.collator import ROW_OPTIONS
from minicpmv.data.formats import BadRowError, conversation_row, text_of
from minicpmv.data.load import ConversationSourceError, as_dataset, load_conversations
from minicpmv.drawn.stream import SyntheticDataError
from minicpmv.errors import one_line_errors
from minicpmv.train.common.arguments import ArgumentsError, ModelArguments, option, parse
from minicpmv.train.feedback.claims import MalformedClaimsError, Reading, claims_by_rule, claims_prompt, parse_claims
from minicpmv.train.feedback.log import FeedbackLog, FeedbackLogError
from minicpmv.train.feedback.pairs import Pair, ScoredAnswer, balance_lengths, choose_pairs
from minicpmv.train.feedback.respondent import Respondent, UnsuitableModelError, load_respondent, with_features
from minicpmv.train.feedback.sampling import Answer, sample_answers


CLAIMS_TOKENS = 1024  # of a language model's list of claims
MODEL_QUESTION = " Please answer yes or no."  # after a question that a language model wrote
# What may differ between a run and the one that goes on from its log.
FREE_OPTIONS = [
    "output_dir",
    "batch_size",
    "pairs_per_prompt",
    "length_tolerance",
    "max_prompts",
    "on_bad_row",
    "use_cpu",
]


class NoPairsError(RuntimeError):
    """No prompt gave a pair: the message says why."""


@dataclass
class FeedbackArguments:
    _argument_group_name = "feedback"

    dataset_name: str = option(
        None, "Prompts: file, folder or Hub name of conversations; answers in them are left out."
    )
    output_dir: str = option(None, "Folder for the log, the pairs and the summary.")
    dataset_split: str | None = option(None, "Split of the prompts, where there are several.")
    image_folder: str | None = option(None, "Folder that paths of pictures start from; that of the file without.")
    on_bad_row: Literal["raise", "skip"] = option("raise", "A bad row ends the run, or is skipped and counted.")
    first_prompt: int = option(0, "Number of the first prompt: each round its own.")
    max_prompts: int | None = option(None, "At most so many prompts; all without.")
    num_answers: int = option(8, "Answers to sample for each prompt.")
    temperature: float = option(1.0, "Temperature of sampling.")
    top_p: float = option(1.0, "Share of the probability that sampling chooses from.")
    max_new_tokens: int = option(512, "Most tokens of an answer; one that is cut there is in no pair.")
    feedback_model: str | None = option(None, "Model that judges the claims, a folder or a Hub name; itself without.")
    feedback_model_revision: str | None = option(None, "Commit, tag or branch of the feedback model on the Hub.")
    claims: Literal["rule", "model"] = option(
        "rule", "How answers become claims: rule (captions that list things), or model (a language model is asked)."
    )
    claims_model: str | None = option(
        None, "Language model for --claims model, a folder or a Hub name; the feedback model without."
    )
    pairs_per_prompt: int = option(2, "Most pairs of one prompt.")
    length_tolerance: float = option(0.25, "How much lengths of matched pairs may differ, as a share; see pairs.py.")
    batch_size: int = option(8, "Prompts at once.")
    seed: int = option(0, "Seed of sampling.")
    use_cpu: bool = option(False, "Use the CPU even where there is something faster.")
    trust_remote_code: bool = option(False, "Run the code that models on the Hub bring with them.")

    def __post_init__(self):
        for name in ("dataset_name", "output_dir"):
            if not getattr(self, name):
                raise ArgumentsError(f"{name} is missing.")
        least = {"num_answers": 2, "max_new_tokens": 1, "pairs_per_prompt": 1, "batch_size": 1, "first_prompt": 0}
        for name, limit in least.items():
            if getattr(self, name) < limit:
                raise ArgumentsError(f"{name} is {getattr(self, name)}, but has to be at least {limit}.")
        if self.max_prompts is not None and self.max_prompts < 1:
            raise ArgumentsError(f"max_prompts is {self.max_prompts}, but has to be at least 1.")
        if self.temperature <= 0 or not 0 < self.top_p <= 1 or not 0 <= self.length_tolerance < 1:
            raise ArgumentsError(
                f"temperature {self.temperature} must be more than 0, top_p {self.top_p} more than 0 and at most 1, "
                f"length_tolerance {self.length_tolerance} from 0 to below 1."
            )
        if self.claims_model is not None and self.claims != "model":
            raise ArgumentsError("claims_model is given, but claims are made by rule. Add claims: model.")


@dataclass
class Prompt:
    number: int
    name: str
    messages: list[dict]  # up to a question
    options: dict  # of the processor, for this row

    @property
    def digest(self) -> str:
        """What the prompt says, but for its pictures."""
        said = json.dumps([self.name, [text_of(message) for message in self.messages], self.options])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def about(self, question: str) -> list[dict]:
        """A conversation that asks `question` about the pictures of this prompt."""
        media = [part for message in self.messages for part in message["content"] if part["type"] != "text"]
        return [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]


# --- Prompts ---


def load_prompts(args: FeedbackArguments) -> datasets.Dataset:
    """The rows, of any format that `load_conversations` reads, from `first_prompt` on."""
    rows = load_conversations(
        args.dataset_name, split=args.dataset_split, image_folder=args.image_folder, on_bad_row=args.on_bad_row
    )
    if isinstance(rows, datasets.IterableDataset):  # drawn rows: pairs need to be kept with their pictures
        end = None if args.max_prompts is None else args.first_prompt + args.max_prompts
        rows = as_dataset(list(rows if end is None else rows.take(end)))
    last = len(rows) if args.max_prompts is None else min(len(rows), args.first_prompt + args.max_prompts)
    if args.first_prompt >= last:
        raise ArgumentsError(f"first_prompt is {args.first_prompt}, but {args.dataset_name} has {len(rows)} prompts.")
    return rows.select(range(args.first_prompt, last))


def read_prompt(row: dict, number: int) -> Prompt:
    """The conversation of a row up to its last question."""
    row = conversation_row(row)
    messages = row.get("prompt") or row["messages"]
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    options = {name: row[name] for name in ROW_OPTIONS if name in row}
    return Prompt(number, row.get("origin") or f"prompt {number}", messages[: last + 1], options)


def open_pictures(prompt: Prompt) -> None:
    """Decode the pictures of a prompt, once for all questions about them.

    Raises:
        BadRowError: one cannot be decoded.
    """
    for part in (part for message in prompt.messages for part in message["content"] if part["type"] == "image"):
        data, path = part["image"]["bytes"], part["image"]["path"]
        if data is None and "://" in path:
            part["image"] = path  # for the processor to fetch
            continue
        try:
            part["image"] = Image.open(path if data is None else BytesIO(data))
            part["image"].load()
        except (OSError, SyntaxError, ValueError) as error:
            raise BadRowError(f"the picture {path or 'in bytes'} cannot be read: {error}") from error


def batches(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of prompts that share the options of the processor; their frames may be packed differently."""
    waiting = defaultdict(list)
    for prompt in prompts:
        shared = {key: value for key, value in prompt.options.items() if key != "temporal_ids"}
        batch = waiting[json.dumps(shared, sort_keys=True), "temporal_ids" in prompt.options]
        batch.append(prompt)
        if len(batch) == size:
            yield list(batch)
            batch.clear()
    yield from (batch for batch in waiting.values() if batch)


def shared_options(prompts: list[Prompt]) -> dict:
    """Options of the processor for a batch with one entry for each of `prompts`."""
    options = dict(prompts[0].options)
    if "temporal_ids" in options:
        options["temporal_ids"] = [prompt.options["temporal_ids"] for prompt in prompts]
    return options


# --- Answers, claims, verdicts ---


class Feedback:
    """The policy, the model that judges it, and the one that lists claims."""

    def __init__(self, args: FeedbackArguments, policy: Respondent, judge: Respondent, reader: Respondent):
        self.args, self.policy, self.judge, self.reader = args, policy, judge, reader

    def records(self, prompts: list[Prompt]) -> list[dict]:
        """What the log keeps of a batch of prompts."""
        with torch.inference_mode():
            options = shared_options(prompts)
            conversations = [prompt.messages for prompt in prompts]
            inputs = self.policy.render(conversations, options)
            features = self.policy.picture_features(inputs)
            answers = self._sample(prompts, with_features(inputs, features))
            if self.judge is not self.policy:
                features = None
                if self.judge.is_native:
                    features = self.judge.picture_features(self.judge.render(conversations, options))
            readings = self._read(prompts, answers)
            verdicts = self._judge(prompts, readings, features)
        return [
            {
                "prompt": prompt.number,
                "digest": prompt.digest,
                "answers": [
                    _answer_record(answer, reading, verdicts[place])
                    for answer, reading in zip(answers[place], readings[place], strict=True)
                ],
            }
            for place, prompt in enumerate(prompts)
        ]

    def _sample(self, prompts, inputs) -> list[list[Answer]]:
        return sample_answers(
            self.policy.model,
            self.policy.tokenizer,
            inputs,
            [prompt.number for prompt in prompts],
            self.args.num_answers,
            self.args.seed,
            self.args.temperature,
            self.args.top_p,
            self.args.max_new_tokens,
        )

    def _read(self, prompts, answers) -> list[list[Reading | None]]:
        """The claims of each answer; None where a language model's list of them cannot be read."""
        if self.args.claims == "rule":
            return [[claims_by_rule(answer.text) for answer in group] for group in answers]
        asked = [
            [claims_prompt(text_of(prompt.messages[-1]), answer.text) for answer in group]
            for prompt, group in zip(prompts, answers, strict=True)
        ]
        different = list(dict.fromkeys(chain.from_iterable(asked)))
        readings = {}
        for start in range(0, len(different), self._rows):
            texts = different[start : start + self._rows]
            for text, reply in zip(texts, self.reader.reply(texts, CLAIMS_TOKENS), strict=True):
                try:
                    readings[text] = parse_claims(reply)
                except MalformedClaimsError:
                    readings[text] = None
        return [[readings[text] for text in group] for group in asked]

    def _judge(self, prompts, readings, features) -> list[dict[str, tuple[float, float]]]:
        """For each prompt the probabilities of yes and no for every question, each asked once."""
        suffix = MODEL_QUESTION if self.args.claims == "model" else ""
        asked = [
            (place, question)
            for place, group in enumerate(readings)
            for question in {claim.question: None for reading in group if reading for claim in reading.claims}
        ]
        verdicts = [{} for _ in prompts]
        for start in range(0, len(asked), self._rows):
            part = asked[start : start + self._rows]
            probabilities = self.judge.yes_and_no(
                [prompts[place].about(question + suffix) for place, question in part],
                shared_options([prompts[place] for place, _ in part]),
                None if features is None else [features[place] for place, _ in part],
            )
            for (place, question), pair in zip(part, probabilities, strict=True):
                verdicts[place][question] = pair
        return verdicts

    @property
    def _rows(self):
        """Texts at once: as many as when answers are sampled."""
        return self.args.batch_size * self.args.num_answers


def _answer_record(answer: Answer, reading: Reading | None, verdicts: dict) -> dict:
    """An answer with its verdicts and its errors: the number of rejected claims, or None and the reason."""
    record = asdict(answer) | {"errors": None, "reason": None, "claims": [], "unread": []}
    if reading is not None:
        record["unread"] = reading.unread
        record["claims"] = [
            {"text": claim.text, "question": claim.question, "yes": yes, "no": no}
            for claim in reading.claims
            for yes, no in [verdicts[claim.question]]
        ]
    if not answer.finished:
        record["reason"] = "cut at max_new_tokens"
    elif "<think>" in answer.text or "</think>" in answer.text:
        record["reason"] = "marks of a thought"  # it would not be a row to train on
    elif reading is None:
        record["reason"] = "list of claims not readable"
    elif reading.unread:
        record["reason"] = "parts that are no claim"
    elif not reading.claims:
        record["reason"] = "no claim"
    else:
        record["errors"] = sum(claim["no"] > claim["yes"] for claim in record["claims"])
    return record


# --- Pairs ---


def scored(record: dict) -> list[ScoredAnswer]:
    return [ScoredAnswer(answer["text"], answer["length"], answer["errors"]) for answer in record["answers"]]


def pairs_and_summary(args: FeedbackArguments, records: list[dict]) -> tuple[list[Pair], dict]:
    """The balanced pairs of all prompts, and what became of every prompt, answer and claim.

    Raises:
        NoPairsError: there is none.
    """
    found, without_pair = [], Counter()
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
        raise NoPairsError(
            f"{len(records)} prompts gave no pair: {json.dumps(summary)}. More answers (num_answers), a higher temperature "
            "or more prompts give more pairs; claims: model reads answers that are no lists."
        )
    for side in ("chosen", "rejected"):
        sides = [getattr(pair, side) for pair in pairs]
        summary[f"{side}_mean_length"] = sum(answer.length for answer in sides) / len(pairs)
        summary[f"{side}_mean_errors"] = sum(answer.errors for answer in sides) / len(pairs)
    return pairs, summary


def pair_dataset(rows: datasets.Dataset, first_prompt: int, pairs: list[Pair], digests: dict) -> datasets.Dataset:
    """The pairs in TRL's preference format: `prompt`, `chosen`, `rejected`, `images`; the options of their rows beside it.

    Pictures are stored whole, videos as paths.

    Raises:
        FeedbackLogError: a prompt is not the one that the log is about.
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
            raise FeedbackLogError(
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


# --- The command ---


def settings_of(args: FeedbackArguments, model_args: ModelArguments) -> dict:
    """What decides about the content of a log."""
    settings = asdict(args) | {"model_name_or_path": model_args.model_name_or_path, "dtype": model_args.dtype}
    return {name: value for name, value in settings.items() if name not in FREE_OPTIONS}


def collect(model_args: ModelArguments, args: FeedbackArguments, rows: datasets.Dataset, log: FeedbackLog) -> None:
    """Log the answers and verdicts of all prompts that are not in the log yet; this process's share of them."""
    accelerator = Accelerator(cpu=args.use_cpu)
    numbers = range(args.first_prompt, args.first_prompt + len(rows))
    waiting = [number for number in numbers if number not in log.records]
    waiting = waiting[accelerator.process_index :: accelerator.num_processes]
    if not waiting:
        return

    def load(name, revision=None, **options):
        chosen = replace(model_args, model_name_or_path=name, model_revision=revision)
        return load_respondent(chosen, args.trust_remote_code, **options)

    policy = load(model_args.model_name_or_path, model_args.model_revision)
    judge = load(args.feedback_model, args.feedback_model_revision) if args.feedback_model else policy
    reader = load(args.claims_model, language_only=True) if args.claims_model else judge
    feedback = Feedback(args, policy, judge, reader)

    def leave_out(prompt, error):
        """The record of a prompt that cannot be used, if such are to be skipped."""
        if args.on_bad_row == "raise":
            raise BadRowError(f"{prompt.name}: {error}") from error
        tqdm.write(f"{prompt.name} is left out: {error}")
        return [{"prompt": prompt.number, "digest": prompt.digest, "answers": []}]

    def records_of(batch):
        try:
            return feedback.records(batch)
        except ValueError as error:  # of the processor: a broken video, frames that do not fit together, ...
            if len(batch) == 1:
                return leave_out(*batch, error)
            return [record for prompt in batch for record in records_of([prompt])]

    with tqdm(total=len(waiting), unit="prompt", desc="feedback", disable=not accelerator.is_main_process) as bar:

        def prompts():
            for number in waiting:
                prompt = read_prompt(rows[number - args.first_prompt], number)
                try:
                    open_pictures(prompt)
                except BadRowError as error:
                    log.add(leave_out(prompt, error))
                    bar.update()
                else:
                    yield prompt

        for batch in batches(prompts(), args.batch_size):
            log.add(records_of(batch))
            bar.update(len(batch))


def run(model_args: ModelArguments, args: FeedbackArguments) -> dict:
    """Collect feedback, choose pairs, save them as `pairs` in the output folder; returns the summary."""
    accelerator, folder = Accelerator(cpu=args.use_cpu), Path(args.output_dir)
    rows = load_prompts(args)
    settings = settings_of(args, model_args)
    log = FeedbackLog(folder, settings, accelerator.process_index)
    accelerator.wait_for_everyone()  # all have read the same logs before anybody writes
    collect(model_args, args, rows, log)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        return {}
    records = FeedbackLog(folder, settings).records
    records = [records[number] for number in sorted(records) if 0 <= number - args.first_prompt < len(rows)]
    pairs, summary = pairs_and_summary(args, records)
    dataset = pair_dataset(rows, args.first_prompt, pairs, {record["prompt"]: record["digest"] for record in records})
    unfinished, finished = folder / "pairs.unfinished", folder / "pairs"
    dataset.save_to_disk(unfinished)
    shutil.rmtree(finished, ignore_errors=True)
    os.replace(unfinished, finished)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def main(argv=None):
    of_data = (BadRowError, ConversationSourceError, SyntheticDataError)
    with one_line_errors(ArgumentsError, FeedbackLogError, NoPairsError, UnsuitableModelError, *of_data):
        model_args, args = parse([ModelArguments, FeedbackArguments], argv, "Make preference pairs (RLAIF-V).")
        summary = run(model_args, args)
        if summary:
            print(json.dumps(summary, indent=1, ensure_ascii=False))
            print(f"pairs: {Path(args.output_dir) / 'pairs'}")


if __name__ == "__main__":
    main(sys.argv[1:])
