"""Preference pairs from the model's own answers, without people: RLAIF-V.

    minicpmv align feedback --model_name_or_path nano --dataset_name prompts.jsonl --output_dir round1
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m minicpmv.train.feedback --config recipes/feedback.yaml

What is special:
- for each prompt: sample answers, split each into atomic claims, ask a feedback model about every claim; the answer with
  fewer rejected claims is preferred, and lengths are balanced (`pairs.py`);
- every prompt's answers, claims and verdicts are a line of a log, so a run that was stopped goes on where it was, and pairs
  can be chosen anew without asking again;
- nothing disappears unseen: the summary counts prompts without a pair and answers without a score, with the reasons.

Source: RLAIF-V (https://arxiv.org/abs/2405.17220). A claim is rejected when "no" is more probable than "yes".
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from accelerate import Accelerator
from tqdm import tqdm

from minicpmv.checkpoint import attend_without_plans
from minicpmv.data.formats import BadRowError
from minicpmv.errors import is_expected, one_line_errors
from minicpmv.train.common.arguments import ModelArguments, parse
from minicpmv.train.common.errors import TrainingError
from minicpmv.train.feedback.arguments import FeedbackArguments, settings_of
from minicpmv.train.feedback.dataset import pair_dataset, pairs_and_summary
from minicpmv.train.feedback.judged import Feedback
from minicpmv.train.feedback.log import FeedbackLog
from minicpmv.train.feedback.prompts import batches, load_prompts, open_images, read_prompt
from minicpmv.train.feedback.respondent import load_respondent


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
    if not policy.is_native:
        raise TrainingError(
            f"model_name_or_path: {model_args.model_name_or_path} is a {type(policy.model).__name__}, but answers are sampled "
            "from MiniCPM-V 4.5 with this repository's code. (feedback_model may be any other.)"
        )
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
            if not is_expected(error):
                raise
            if len(batch) == 1:
                return leave_out(*batch, error)
            return [record for prompt in batch for record in records_of([prompt])]

    with tqdm(total=len(waiting), unit="prompt", desc="feedback", disable=not accelerator.is_main_process) as bar:

        def prompts():
            for number in waiting:
                prompt = read_prompt(rows[number - args.first_prompt], number)
                try:
                    open_images(prompt, policy.processor.load_image)
                except BadRowError as error:
                    log.add(leave_out(prompt, error))
                    bar.update()
                else:
                    yield prompt

        for batch in batches(prompts(), args.batch_size):
            log.add(records_of(batch))
            bar.update(len(batch))


def run(model_args: ModelArguments, args: FeedbackArguments) -> dict[str, Any]:
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
    logged = FeedbackLog(folder, settings).records
    records = [logged[number] for number in sorted(logged) if 0 <= number - args.first_prompt < len(rows)]
    pairs, summary = pairs_and_summary(args, records)
    dataset = pair_dataset(rows, args.first_prompt, pairs, {record["prompt"]: record["digest"] for record in records})
    unfinished, finished = folder / "pairs.unfinished", folder / "pairs"
    dataset.save_to_disk(unfinished)
    shutil.rmtree(finished, ignore_errors=True)
    os.replace(unfinished, finished)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


GROUPS = (ModelArguments, FeedbackArguments)


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        attend_without_plans()
        model_args, args = parse(GROUPS, argv, "Make preference pairs (RLAIF-V).")
        summary = run(model_args, args)
        if summary:
            print(json.dumps(summary, indent=1, ensure_ascii=False))
            print(f"pairs: {Path(args.output_dir) / 'pairs'}")
