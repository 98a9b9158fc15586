"""Asks an answerer the questions of a benchmark, and turns the answers into figures.

What is special:
- every answer is logged as it comes, under the settings that it depends on: a run that was stopped goes on where it was;
- where a launcher started several processes, each asks its share of the questions, and the main one writes the log.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

from minicpmv.evaluate.answerers import Answer, Answerer, Mode, Question
from minicpmv.evaluate.benchmark import Benchmark, Metrics, Row, SampleCountError, UnknownRowError
from minicpmv.evaluate.processes import Processes
from minicpmv.evaluate.sample_log import SampleKey, SampleLog
from minicpmv.files import write_whole


RESULTS_FILE = "results.json"

Thinking = Mode | Sequence[str]  # a sequence: the ids of the rows that think


def settings_of(answerer: Answerer, benchmark: Benchmark, thinking: Thinking) -> dict[str, Any]:
    """Everything that the answers of a run depend on, apart from which samples are asked about."""
    return {
        "benchmark": benchmark.id,
        "version": benchmark.version,
        "thinking": thinking if isinstance(thinking, (bool, str)) else sorted(thinking),
        **answerer.settings(thinking),
    }


def measure(
    answerer: Answerer,
    benchmark: Benchmark,
    output: Path,
    *,
    name: str,
    rows: Sequence[str] | None = None,
    samples: int | None = None,
    seeds: Sequence[int] = (0,),
    thinking: Thinking = False,
) -> dict[str, Any]:
    """Evaluate whoever answers; goes on where an earlier run into the same folder stopped.

    Started by `accelerate launch` in several processes, each with an answerer of its own, they share the questions.

    Args:
        output: folder of the log (`samples.jsonl`) and the results (`results.json`).
        name: what the model is called, for the record.
        rows: ids of the rows to run; all of them for None.
        samples: how many, for each row and seed; None: all of a data set, 100 of a row without end.
        seeds: seeds of the samples.
        thinking: True, False or "auto" for all rows that leave it open, or the ids of those that think.

    Returns:
        What `results.json` holds: settings, and for each row `n` answered samples, the metrics of each seed, their
        `mean` and their `std` (sample standard deviation; None for one seed), and the mean of the generated `tokens`.

    Raises:
        UnknownRowError, SampleCountError: before anything is asked.
        SampleLogError, DamagedFileError: `output` holds answers of other settings, or a file that cannot be read.
    """
    plan = _plan(benchmark, rows, samples, seeds, thinking)
    settings = settings_of(answerer, benchmark, thinking)
    processes = Processes()
    log = SampleLog(output, settings) if processes.is_main else None
    known = processes.share(set(log.entries) if log else None)
    with tqdm(total=sum(len(keys) for _, keys in plan), unit="question", smoothing=0.05, disable=not log) as bar:
        for row, keys in plan:
            bar.set_description(row.id)
            size = answerer.window * processes.count
            for window in (keys[start : start + size] for start in range(0, len(keys), size)):
                before = bar.n
                if not known.issuperset(window):
                    questions = [Question(key, row, key in known) for key in window]
                    for entries in _ask(answerer, questions, _mode(row, thinking), processes):
                        if log:
                            log.append(entries)
                        bar.update(len(entries))
                bar.update(before + len(window) - bar.n)  # those that were known
    if log is None:
        return processes.share(None)
    results = {
        "model": name,
        "settings": settings,
        "samples": samples,
        "seeds": list(seeds),
        "versions": answerer.versions,
        "rows": {row.id: _summary(row, log, row.count(samples), seeds) for row in benchmark.choose(rows)},
    }
    write_whole(output / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return processes.share(results)


def _plan(
    benchmark: Benchmark,
    rows: Sequence[str] | None,
    samples: int | None,
    seeds: Sequence[int],
    thinking: Thinking,
) -> list[tuple[Row, list[SampleKey]]]:
    """The questions of each row and seed; refuses what cannot be asked."""
    if len(set(seeds)) < len(seeds):
        raise SampleCountError(f"the seeds {', '.join(map(str, seeds))} are not all different: give each once")
    if isinstance(thinking, str) and thinking != "auto":
        raise UnknownRowError(f"thinking={thinking!r} is not True, False, 'auto' or a list of rows")
    if not isinstance(thinking, (bool, str)):
        for row in benchmark.choose(thinking):
            if row.thinking is False:
                raise UnknownRowError(f"{row.id} is the row without thinking: leave it out of the rows that think")
    return [
        (row, [SampleKey(row.id, seed, index) for index in range(row.count(samples) * row.questions_per_sample)])
        for row in benchmark.choose(rows)
        for seed in seeds
    ]


def _ask(
    answerer: Answerer, questions: Sequence[Question], mode: Mode, processes: Processes
) -> Iterator[list[dict[str, Any]]]:
    """New entries of the log: one by one, or those of all processes together."""
    row = questions[0].row
    mine = questions[processes.rank :: processes.count]
    max_new_tokens = row.max_new_tokens + row.max_thought_tokens * bool(mode)
    answers = answerer.answer(mine, mode, max_new_tokens) if mine else ()
    entries = (_entry(question, answer) for question, answer in answers if not question.answered)
    if processes.count == 1:
        for entry in entries:
            yield [entry]
    else:
        yield processes.gather(list(entries))


def _entry(question: Question, answer: Answer) -> dict[str, Any]:
    """A line of the log."""
    prompt = question.prompt
    return {
        **asdict(question.key),
        "question": " ".join(part for part in prompt.content if isinstance(part, str)),
        "expected": prompt.expected,
        "answer": answer.text,
        "thought": answer.thought,
        "mode": answer.mode,
        "need": answer.need,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "scores": question.row.scorer(answer.text, prompt.expected),
    }


def _mode(row: Row, thinking: Thinking) -> Mode:
    if row.thinking is not None:
        return row.thinking
    if isinstance(thinking, bool):
        return thinking
    return "auto" if thinking == "auto" else row.id in thinking


def _summary(row: Row, log: SampleLog, samples: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Metrics of a row, seed by seed, and their mean and spread."""
    by_seed: dict[str, Metrics] = {}
    tokens = []
    for seed in seeds:
        entries = [log.entries[SampleKey(row.id, seed, index)] for index in range(samples * row.questions_per_sample)]
        by_seed[str(seed)] = row.aggregate([entry["scores"] for entry in entries])
        tokens += [entry["generated_tokens"] for entry in entries]
    columns = {name: [metrics[name] for metrics in by_seed.values()] for name in by_seed[str(seeds[0])]}
    return {
        "title": row.title,
        "lower_is_better": row.lower_is_better,
        "n": samples * len(seeds),
        "tokens": _of_all(fmean, tokens),
        "mean": {name: _of_all(fmean, values) for name, values in columns.items()},
        "std": {name: _of_all(stdev, values) if len(values) > 1 else None for name, values in columns.items()},
        "seeds": by_seed,
    }


def _of_all(statistic: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """The statistic of the values; None where one of them is missing."""
    known = [value for value in values if value is not None]
    return statistic(known) if len(known) == len(values) else None


def figures(results: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """`{row: {metric: value, "n": samples}}`; with several seeds the mean, and `metric_std` too."""
    several = len(results["seeds"]) > 1
    return {
        row: {
            **summary["mean"],
            **({f"{name}_std": value for name, value in summary["std"].items()} if several else {}),
            "n": summary["n"],
        }
        for row, summary in results["rows"].items()
    }
