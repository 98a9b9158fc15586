"""Asks an answerer the questions of a benchmark, and turns the answers into figures.

What is special:
- every answer is logged as it comes, under the settings that it depends on: a run that was stopped goes on where it was;
- answers of public benchmarks are scored again when all are there: other rules, or another judge, ask the model nothing;
- where a launcher started several processes, each asks its share of the questions, and the main one writes the log.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minicpmv.evaluate.answerers import Answer, Answerer, Mode, Question, QuestionError
from minicpmv.evaluate.benchmark import (
    Benchmark,
    Entry,
    Metrics,
    Prompt,
    Row,
    SampleCountError,
    Scores,
    Subtitles,
    UnknownRowError,
)
from minicpmv.evaluate.gallery import keep_picture
from minicpmv.evaluate.processes import Processes
from minicpmv.evaluate.sample_log import SampleKey, SampleLog, write_scores
from minicpmv.evaluate.statistics import bootstrap_metrics
from minicpmv.files import write_whole


if TYPE_CHECKING:
    from minicpmv.evaluate.judging import JudgeModel


RESULTS_FILE = "results.json"

Thinking = Mode | Sequence[str]  # a sequence: the ids of the rows that think


def settings_of(answerer: Answerer, benchmark: Benchmark, thinking: Thinking) -> dict[str, Any]:
    """Everything that the answers of a run depend on, apart from which samples are asked about."""
    return {
        "benchmark": benchmark.id,
        "version": benchmark.version,
        "thinking": thinking if isinstance(thinking, (bool, str)) else sorted(thinking),
        **benchmark.settings,
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
    seeds: Sequence[int] | None = None,
    thinking: Thinking = False,
    judge: "JudgeModel | None" = None,
    keep_going: bool = False,
) -> dict[str, Any]:
    """Evaluate whoever answers; goes on where an earlier run into the same folder stopped.

    Started by `accelerate launch` in several processes, each with an answerer of its own, they share the questions.

    Args:
        output: folder of the log (`samples.jsonl`) and the results (`results.json`).
        name: what the model is called, for the record.
        rows: ids of the rows to run; all of them for None.
        samples: how many, for each row and seed; None: all of a data set, 100 of a row without end.
        seeds: seeds of the samples; None: 0, and as many more as a row's published figure is the mean of.
        thinking: True, False or "auto" for all rows that leave it open, or the ids of those that think.
        judge: who is asked where rules do not decide; None: what rules give is reported as such.
        keep_going: a question that cannot be asked gets an empty answer with the reason, instead of ending the run.

    Returns:
        What `results.json` holds: settings, and for each row `n` answered samples, the metrics of each seed, their
        `mean`, their `std` (sample standard deviation; None for one seed), their 95 % `interval` (bootstrap over
        questions), and the mean of the generated `tokens`.
        For public benchmarks also how answers were scored (`scoring`), and for each row the metrics `by` category, who
        decided (`judge`), how many answers stayed `undecided` or were `cut_off`, how many questions `failed`, the means of `prompt_tokens` and
        `seconds`, and which metrics are `points` instead of shares.

    Raises:
        UnknownRowError, SampleCountError: before anything is asked.
        QuestionError: one cannot be asked; what was answered before is kept.
        SampleLogError, DamagedFileError: `output` holds answers of other settings, or a file that cannot be read.
    """
    plan = _plan(benchmark, rows, samples, seeds, thinking)
    settings = settings_of(answerer, benchmark, thinking)
    processes = Processes()
    log = SampleLog(output, settings) if processes.is_main else None
    known = processes.share(set(log.entries) if log else None)
    with tqdm(total=sum(len(keys) for _, keys in plan), unit="question", smoothing=0.05, disable=not log) as bar:
        pictures = output if benchmark.scoring is not None else None
        for row, keys in plan:
            bar.set_description(row.id)
            size = answerer.window * processes.count
            for window in (keys[start : start + size] for start in range(0, len(keys), size)):
                before = bar.n
                if not known.issuperset(window):
                    questions = [Question(key, row, key in known) for key in window]
                    answers = _ask(answerer, questions, _mode(row, thinking), processes, keep_going)
                    for entries in _entries(answers, processes, pictures):
                        if log:
                            log.append(entries)
                        bar.update(len(entries))
                bar.update(before + len(window) - bar.n)  # those that were known
    if log is None:
        return processes.share(None)
    if benchmark.scoring is not None:
        score_again(plan, log, judge)
    answered: dict[str, dict[int, list[Entry]]] = {}
    for row, keys in plan:
        answered.setdefault(row.id, {})[keys[0].seed] = [log.entries[key] for key in keys]
    for row, _ in plan:
        if row.upload:
            row.upload([entry for entries in answered[row.id].values() for entry in entries], output)
    results = {
        "model": name,
        "settings": settings,
        "samples": samples,
        "seeds": sorted({keys[0].seed for _, keys in plan}) if seeds is None else list(seeds),
        "versions": answerer.versions,
        "rows": {row.id: _summary(row, answered[row.id], judge) for row in benchmark.choose(rows)},
    }
    if benchmark.scoring is not None:
        results["scoring"] = benchmark.scoring | {"judge": judge and judge.settings()}
    write_whole(output / RESULTS_FILE, json.dumps(results, indent=1) + "\n")
    return processes.share(results)


def _plan(
    benchmark: Benchmark,
    rows: Sequence[str] | None,
    samples: int | None,
    seeds: Sequence[int] | None,
    thinking: Thinking,
) -> list[tuple[Row, list[SampleKey]]]:
    """The questions of each row and seed; refuses what cannot be asked."""
    if seeds is not None and len(set(seeds)) < len(seeds):
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
        for seed in (range(row.runs) if seeds is None else seeds)
    ]


def _ask(
    answerer: Answerer, questions: Sequence[Question], mode: Mode, processes: Processes, keep_going: bool
) -> Iterator[tuple[Question, Answer]]:
    """New answers to this process's share of the questions."""
    row, mine = questions[0].row, list(questions[processes.rank :: processes.count])
    max_new_tokens = row.max_new_tokens + row.max_thought_tokens * bool(mode)
    while mine:
        try:
            for question, answer in answerer.answer(mine, mode, max_new_tokens):
                if not question.answered:
                    question.answered = True
                    yield question, answer
            return
        except QuestionError as error:
            if not keep_going:
                raise
            mine = [question for question in mine if question is not error.question]
            if not error.question.answered:
                yield error.question, Answer("", finish_reason="error", error=str(error))


def _entries(
    answers: Iterator[tuple[Question, Answer]], processes: Processes, pictures: Path | None
) -> Iterator[list[Entry]]:
    """New entries of the log: one by one, or those of all processes together."""
    entries = (_entry(question, answer, pictures) for question, answer in answers)
    if processes.count == 1:
        for entry in entries:
            yield [entry]
    else:
        yield processes.gather(list(entries))


def _entry(question: Question, answer: Answer, pictures: Path | None) -> Entry:
    """A line of the log."""
    row = question.row
    prompt = question.prompt if answer.error is None else unasked(question)
    entry = {
        **asdict(question.key),
        "question": _question(prompt.content, answer),
        "expected": prompt.expected,
        "answer": answer.text,
        "thought": answer.thought,
        "mode": answer.mode,
        "need": answer.need,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "generated_tokens": answer.generated_tokens,
        "scores": _scores(row, answer.text, prompt.expected),
    }
    if answer.error is not None:
        entry["error"] = answer.error
    if row.facts is None:
        return entry
    entry |= {"facts": row.facts(question.sample), "seconds": answer.seconds}
    if row.cut is not None:
        entry["cut"] = row.cut(answer.text)
    if answer.media is not None:
        entry["media"] = answer.media
    if pictures is not None and answer.error is None and (picture := keep_picture(question, entry, pictures)):
        entry["picture"] = picture
    return entry


def unasked(question: Question) -> Prompt:
    """The prompt of a question that could not be asked, as far as there is one."""
    if question.row.expected is not None:
        return Prompt([], question.row.expected(question.sample))
    return question.prompt


def _question(content: Sequence[Any], answer: Answer) -> str:
    """The words of a prompt, as they were read."""
    times = (answer.media or {}).get("timestamps", ())
    words = [part.shown_at(times) if isinstance(part, Subtitles) else part for part in content]
    return " ".join(part for part in words if isinstance(part, str))


def _scores(row: Row, answer: str, expected: Any) -> Scores:
    return row.scorer(row.cut(answer) if row.cut else answer, expected)


def score_again(plan: Sequence[tuple[Row, Sequence[SampleKey]]], log: SampleLog, judge: "JudgeModel | None") -> None:
    """Score answers in the log by the rows' rules of now, and by the judge; the scores that count go to a file beside it."""
    for row, keys in plan:
        for key in keys:
            entry = log.entries[key]
            if row.cut:
                entry["cut"] = row.cut(entry["answer"])
            entry["scores"] = _scores(row, entry["answer"], entry["expected"])
    if judge is not None:
        for entry, scores in judge.judge([(row, log.entries[key]) for row, keys in plan for key in keys]):
            entry["scores"] = scores
    write_scores(log.folder, {key: log.entries[key]["scores"] for _, keys in plan for key in keys})


def _mode(row: Row, thinking: Thinking) -> Mode:
    if row.thinking is not None:
        return row.thinking
    if isinstance(thinking, bool):
        return thinking
    return "auto" if thinking == "auto" else row.id in thinking


def _summary(row: Row, answered: Mapping[int, Sequence[Entry]], judge: "JudgeModel | None") -> dict[str, Any]:
    """Metrics of a row, seed by seed, and their mean and spread."""
    by_seed = {str(seed): _metrics(row, entries) for seed, entries in answered.items()}
    columns = {name: [metrics[name] for metrics in by_seed.values()] for name in next(iter(by_seed.values()))}
    entries = [entry for each in answered.values() for entry in each]
    summary = {
        "title": row.title,
        "lower_is_better": row.lower_is_better,
        "n": len(entries) // row.questions_per_sample,
        "tokens": _mean(entries, "generated_tokens"),
        "mean": {name: _of_all(fmean, values) for name, values in columns.items()},
        "std": {name: _of_all(stdev, values) if len(values) > 1 else None for name, values in columns.items()},
        "interval": _intervals(row, answered),
        "seeds": by_seed,
    }
    if row.facts is None:
        return summary
    return summary | {
        "prompt_tokens": _mean(entries, "prompt_tokens"),
        "seconds": _mean(entries, "seconds"),
        "points": list(row.points),
        "judge": _judged_by(row, entries, judge),
        "judge_returned": sorted({entry["scores"]["judge"] for entry in entries if entry["scores"].get("judge")}),
        "undecided": sum(
            1 for entry in entries if row.judge and row.judge.applies(entry) and not entry["scores"].get("judged")
        ),
        "failed": sum("error" in entry for entry in entries),
        "cut_off": sum(entry["finish_reason"] == "length" for entry in entries),
        "by": {fact: _by_fact(row, answered, fact) for fact in row.breakdowns},
        **({"video": shown} if (shown := _frames_shown(entries)) else {}),
    }


def _frames_shown(entries: Sequence[Entry]) -> dict[str, Any] | None:
    """Which frames of videos were looked at: means, and every packing that occurred; None where there are no videos."""
    media = [entry["media"] for entry in entries if "frames" in entry.get("media", {})]
    if not media:
        return None
    return {
        "fps": media[0].get("fps"),
        "frames": fmean(each["frames"] for each in media),
        "groups": fmean(each.get("groups", each["frames"]) for each in media),
        "packing": sorted({each["packing"] for each in media}),
    }


def _judged_by(row: Row, entries: Sequence[Entry], judge: "JudgeModel | None") -> str | None:
    """Who decided beside the rules; None where a row's rules decide all."""
    if row.judge is None:
        return None
    return judge.name if judge and any(entry["scores"].get("judged") for entry in entries) else "rules only"


def _intervals(row: Row, answered: Mapping[int, Sequence[Entry]]) -> dict[str, list[float]]:
    """Between which values each metric lies with 95 % confidence."""
    found = bootstrap_metrics(
        {seed: [_with_facts(row, entry) for entry in entries] for seed, entries in answered.items()}, row.aggregate
    )
    return {name: [interval.low, interval.high] for name, interval in found.items()}


def _metrics(row: Row, entries: Sequence[Entry]) -> Metrics:
    return row.aggregate([_with_facts(row, entry) for entry in entries])


def _with_facts(row: Row, entry: Entry) -> Scores:
    return entry["scores"] if row.facts is None else entry["scores"] | {"facts": entry["facts"]}


def _by_fact(row: Row, answered: Mapping[int, Sequence[Entry]], fact: str) -> dict[str, dict[str, Any]]:
    """The metrics of the answers that share a value of a fact, as means over seeds; a list of values counts under each."""
    parts: dict[str, dict[int, list[Entry]]] = {}
    for seed, entries in answered.items():
        for entry in entries:
            value = entry["facts"].get(fact)
            for name in value if isinstance(value, list) else [value]:
                if name is not None:
                    parts.setdefault(str(name), {}).setdefault(seed, []).append(entry)
    found: dict[str, dict[str, Any]] = {}
    for name, of_seeds in sorted(parts.items()):
        each = [_metrics(row, entries) for entries in of_seeds.values()]
        means = {metric: _of_all(fmean, [metrics[metric] for metrics in each]) for metric in each[0]}
        found[name] = {"n": sum(map(len, of_seeds.values())), **means}
    return found


def _mean(entries: Sequence[Entry], name: str) -> float | None:
    return _of_all(fmean, [entry[name] for entry in entries if "error" not in entry])


def _of_all(statistic: Callable[[list[float]], float], values: Sequence[float | None]) -> float | None:
    """The statistic of the values; None where one of them is missing."""
    known = [value for value in values if value is not None]
    return statistic(known) if known and len(known) == len(values) else None


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
