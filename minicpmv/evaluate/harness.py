"""Asks a model the questions of a benchmark, and turns the answers into figures.

What is special:
- every question goes through the model's own `chat()`, greedily, in batches;
- a batch depends on the samples alone, never on what a log already holds: a run that was killed and resumed asks in the
  same batches and ends with the same answers as one that ran through;
- the settings under which answers are kept include a hash of the weights and of the processor, so that a checkpoint
  that was trained on, under the same name, is another setting.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal, NamedTuple

import torch
from accelerate.utils import align_module_device
from tqdm import tqdm

from minicpmv.evaluate.benchmark import Benchmark, Metrics, Prompt, Row, UnknownRowError
from minicpmv.evaluate.sample_log import SampleKey, SampleLog, write_whole


RESULTS_FILE = "results.json"
GREEDY = {"sampling": False, "num_beams": 1, "repetition_penalty": 1.0}
# Samples held in memory to be shared out to batches by their options, as a number of batches: with more of them, rows
# of mixed options fill their batches better, but large pictures soon take a gigabyte.
BATCHES_IN_MEMORY = 2


class SampleCountError(ValueError):
    """More samples were asked for than there are, or fewer than one, or the same ones twice."""


Thinking = bool | Literal["auto"] | Sequence[str]  # a sequence: the ids of the rows that think


def settings_of(model, processor, benchmark: Benchmark, thinking: Thinking) -> dict:
    """Everything that the answers of a run depend on, apart from which samples are asked about."""
    weights = hashlib.sha256()
    for place, module in model.named_modules():
        with align_module_device(module, "cpu"):  # weights that did not fit on the accelerator lie elsewhere
            for name, tensor in module.named_parameters(recurse=False):
                weights.update(f"{place}.{name}".encode())
                weights.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    parts = [
        processor.chat_template,
        processor.image_processor.to_dict(),
        processor.video_processor.to_dict(),
        processor.tokenizer.get_vocab(),
    ]
    return {
        "benchmark": benchmark.id,
        "version": benchmark.version,
        "weights": weights.hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "processor": hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "thinking": thinking if _is_for_all(thinking) else sorted(thinking),
        **({"threshold": model.thinking_threshold} if thinking == "auto" else {}),
    }


class Question(NamedTuple):
    key: SampleKey
    prompt: Prompt


@torch.inference_mode()
def ask(model, processor, row: Row, thinks: bool | str, questions: list[Question]) -> list[dict]:
    """The log's entries for questions with equal options, asked in one batch."""
    options = dict(questions[0].prompt.options)
    if "temporal_ids" in options:
        options["temporal_ids"] = [question.prompt.options["temporal_ids"] for question in questions]
    outputs = model.chat(
        msgs=[[{"role": "user", "content": question.prompt.content}] for question in questions],
        processor=processor,
        enable_thinking=thinks,
        max_new_tokens=row.max_new_tokens + row.max_thought_tokens * bool(thinks),
        return_dict=True,
        **GREEDY,
        **options,
    )
    entries = []
    for question, output in zip(questions, outputs, strict=True):
        prompt, answer = question.prompt, output.text.strip()
        entries.append(
            {
                **question.key._asdict(),
                "question": " ".join(part for part in prompt.content if isinstance(part, str)),
                "expected": prompt.expected,
                "answer": answer,
                "thought": output.reasoning,
                "mode": output.mode,
                "need": output.need,
                "finish_reason": output.finish_reason,
                "prompt_tokens": output.prompt_tokens,
                "generated_tokens": output.generated_tokens + output.draft_tokens,
                "scores": row.scorer(answer, prompt.expected),
            }
        )
    return entries


def batches(row: Row, keys: Sequence[SampleKey], size: int) -> Iterator[list[Question]]:
    """Questions in batches of at most `size`, those with equal options together.

    Pictures are not sorted by size: the tower packs slices without padding, and sorting was no faster.
    """
    questions = [Question(key, row.prompt(row.sample(key.seed, key.index))) for key in keys]
    for _, alike in groupby(sorted(questions, key=_shared_options), key=_shared_options):
        alike = list(alike)
        yield from (alike[start : start + size] for start in range(0, len(alike), size))


def _shared_options(question: Question) -> str:
    """What has to be the same in a batch; temporal ids differ from clip to clip."""
    options = question.prompt.options
    return repr(sorted({**options, "temporal_ids": "temporal_ids" in options}.items()))


def run(
    model,
    processor,
    benchmark: Benchmark,
    output: Path,
    *,
    checkpoint: str,
    rows: list[str] | None = None,
    samples: int = 100,
    seeds: Sequence[int] = (0,),
    thinking: Thinking = False,
    batch_size: int = 50,
) -> dict:
    """Evaluate a model; goes on where an earlier run into the same folder stopped.

    Args:
        output: folder of the log (`samples.jsonl`) and the results (`results.json`).
        checkpoint: the model's name, for the record.
        rows: ids of the rows to run; all of them for None.
        samples: how many, for each row and seed.
        seeds: seeds of the samples.
        thinking: True, False or "auto" for all rows that leave it open, or the ids of those that think.
        batch_size: questions asked at once.

    Returns:
        What `results.json` holds: settings, and for each row `n` answered samples, the metrics of each seed, their
        `mean` and their `std` (sample standard deviation; None for one seed), and the mean of the generated `tokens`.

    Raises:
        UnknownRowError, SampleCountError: before anything is asked.
        SampleLogError: `output` holds answers of other settings.
    """
    if len(set(seeds)) < len(seeds):
        raise SampleCountError(f"the seeds {', '.join(map(str, seeds))} are not all different: give each once")
    chosen = benchmark.choose(rows)
    thinks = {row.id: _thinks(row, thinking) for row in benchmark.rows}
    if not _is_for_all(thinking):
        for row in benchmark.choose(list(thinking)):
            if row.thinking is False:
                raise UnknownRowError(f"{row.id} is the row without thinking: leave it out of the rows that think")
    for row in chosen:
        if not 1 <= samples <= (row.length or samples):
            raise SampleCountError(f"{samples} samples were asked for; {row.id} has 1 to {row.length or 'any number'}")
    log = SampleLog(output, settings_of(model, processor, benchmark, thinking))
    plan = [
        (row, [SampleKey(row.id, seed, index) for index in range(samples * row.questions_per_sample)])
        for row in chosen
        for seed in seeds
    ]
    with tqdm(total=sum(len(keys) for _, keys in plan), unit="question", smoothing=0.05) as bar:
        for row, keys in plan:
            bar.set_description(row.id)
            held = batch_size * BATCHES_IN_MEMORY
            for window in (keys[start : start + held] for start in range(0, len(keys), held)):
                if any(key not in log.entries for key in window):
                    for batch in batches(row, window, batch_size):
                        if any(question.key not in log.entries for question in batch):
                            entries = zip(batch, ask(model, processor, row, thinks[row.id], batch), strict=True)
                            log.append([entry for question, entry in entries if question.key not in log.entries])
                        bar.update(len(batch))
                else:
                    bar.update(len(window))
    results = {
        "checkpoint": checkpoint,
        "settings": log.settings,
        "samples": samples,
        "seeds": list(seeds),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rows": {row.id: _summary(row, log, samples, seeds) for row in chosen},
    }
    write_whole(output / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return results


def _is_for_all(thinking: Thinking) -> bool:
    return isinstance(thinking, bool) or thinking == "auto"


def _thinks(row: Row, thinking: Thinking) -> bool | str:
    if row.thinking is not None:
        return row.thinking
    return thinking if _is_for_all(thinking) else row.id in thinking


def _summary(row: Row, log: SampleLog, samples: int, seeds: Sequence[int]) -> dict:
    """Metrics of a row, seed by seed, and their mean and spread."""
    by_seed: dict[str, Metrics] = {}
    tokens = []
    for seed in seeds:
        entries = [log.entries[row.id, seed, index] for index in range(samples * row.questions_per_sample)]
        by_seed[str(seed)] = row.aggregate([entry["scores"] for entry in entries])
        tokens += [entry["generated_tokens"] for entry in entries]
    columns = {name: [metrics[name] for metrics in by_seed.values()] for name in by_seed[str(seeds[0])]}
    return {
        "title": row.title,
        "lower_is_better": row.lower_is_better,
        "n": samples * len(seeds),
        "tokens": fmean(tokens),
        "mean": {name: None if None in values else fmean(values) for name, values in columns.items()},
        "std": {
            name: None if None in values or len(values) < 2 else stdev(values) for name, values in columns.items()
        },
        "seeds": by_seed,
    }


def figures(results: dict) -> dict:
    """`{row: {metric: value, "n": samples}}`; with several seeds the mean, and `metric_std` beside it."""
    several = len(results["seeds"]) > 1
    return {
        row: {
            **summary["mean"],
            **({f"{name}_std": value for name, value in summary["std"].items()} if several else {}),
            "n": summary["n"],
        }
        for row, summary in results["rows"].items()
    }
