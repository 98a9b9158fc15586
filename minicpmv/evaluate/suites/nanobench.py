"""NanoBench: the drawn tasks as a benchmark, one row a capability.

What is special:
- all samples are of the test split; seed and index name them, so any number can be drawn anywhere;
- two rows are controls that ask the questions of another row with something taken away: `fine_print_unsliced` without
  slices, `video_order_shuffled` with the times of the frames shuffled. A model that uses slices and times does badly;
- `chinese` asks the questions of the other rows of shapes, print and clips in Chinese and, about the same images, in
  English;
- rows about pages ask what our document reader asks, or a short form of it.
"""

import random
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from statistics import fmean
from typing import Any

from minicpmv.drawn.samples import FIRST_TASKS, Sample, bench_sample, named_objects
from minicpmv.evaluate.benchmark import Benchmark, Metrics, Prompt, Row, Scores
from minicpmv.evaluate.scoring.drawn import (
    boxes_found,
    chair,
    exact_match,
    hallucinated_objects,
    printed_characters,
    same_cells,
    same_json,
    share_of_characters,
)


# Of the first version: the row `chinese` asks these, whatever comes later.
QUESTION_TASKS = tuple(task for task in FIRST_TASKS if task != "caption")


def drawn(task: str, seed: int, index: int) -> Sample:
    return bench_sample(task, split="test", seed=seed, index=index)


def with_shuffled_times(seed: int, index: int) -> Sample:
    """A clip of video_order whose frames stay in their places, while none keeps its time."""
    sample = drawn("video_order", seed, index)
    groups = sample.temporal_ids or []
    times = [time for group in groups for time in group]
    rng, shuffled = random.Random(f"shuffled times/{seed}/{index}"), list(times)
    while any(new == old for new, old in zip(shuffled, times, strict=True)):
        rng.shuffle(shuffled)
    rest = iter(shuffled)
    return replace(sample, temporal_ids=[[next(rest) for _ in group] for group in groups])


def question_of(sample: Sample) -> Prompt:
    """The sample's question, asked as it was taught: an image with its slices, or frames packed into one unit."""
    options: dict[str, Any] = {"max_slice_nums": sample.max_slice_nums}
    if sample.temporal_ids is not None:
        options |= {"temporal_ids": sample.temporal_ids, "use_image_id": sample.use_image_id}
    shown = [part for pair in zip_longest(sample.labels, sample.images) for part in pair if part is not None]
    return Prompt([*shown, sample.turns[0].question], sample.turns[0].answer, options)


def without_slices(sample: Sample) -> Prompt:
    prompt = question_of(sample)
    return Prompt(prompt.content, prompt.expected, prompt.options | {"max_slice_nums": 1})


def caption_of(sample: Sample) -> Prompt:
    prompt = question_of(sample)
    return Prompt(prompt.content, list(sample.objects), prompt.options)


def in_both_languages(seed: int, index: int) -> tuple[str, Sample]:
    """Even indices ask in Chinese, odd ones the same in English; the tasks take turns."""
    number, language = index // 2, ("zh", "en")[index % 2]
    task = QUESTION_TASKS[number % len(QUESTION_TASKS)]
    place = number // len(QUESTION_TASKS)
    return language, bench_sample(task, split="test", seed=seed, index=place, language=language)


def question_in_language(sample: tuple[str, Sample]) -> Prompt:
    language, drawn = sample
    prompt = question_of(drawn)
    return Prompt(prompt.content, {"language": language, "answer": prompt.expected}, prompt.options)


def exact_match_in_language(answer: str, expected: dict) -> Scores:
    return {expected["language"]: exact_match(answer, expected["answer"])["exact"]}


def chinese_and_english(scores: list[Scores]) -> Metrics:
    """Shares of the two languages; None where one has no answer, as in a resample of few."""
    parts = ([score[name] for score in scores if name in score] for name in ("zh", "en"))
    chinese, english = (fmean(values) if values else None for values in parts)
    difference = None if chinese is None or english is None else chinese - english
    return {"exact": chinese, "exact_english": english, "difference": difference}


def row(id: str, title: str, task: str | None = None, **changes: Any) -> Row:
    return Row(
        id=id,
        title=title,
        **{
            "sample": partial(drawn, task or id),
            "prompt": question_of,
            "scorer": exact_match,
            "max_new_tokens": 32,
            "max_thought_tokens": 256,
            **changes,
        },
    )


long_answer: dict[str, Any] = {"max_new_tokens": 192}
read_print: dict[str, Any] = {"scorer": printed_characters, "aggregate": share_of_characters}

BENCHMARK = Benchmark(
    id="nanobench",
    title="NanoBench",
    version=3,
    rows=(
        row("printed_line", "read a line of digits and capitals", **read_print),
        row("printed_line_lower", "read a line with lower case", **read_print),
        row("form_value", "find the value of a key in a form or receipt"),
        row("fine_print", "read small print on a large page, in slices"),
        row(
            "fine_print_unsliced",
            "the same pages without slices",
            "fine_print",
            prompt=without_slices,
            lower_is_better=True,
        ),
        row("colour", "color of a shape"),
        row("shape", "shape of a color"),
        row("count", "count shapes"),
        row("position", "shape at a place"),
        row("chart", "read a chart"),
        row("video_direction", "direction of motion, frames packed"),
        row("video_order", "order of events, frames packed"),
        row("video_count", "number of flashes, frames packed"),
        row(
            "video_order_shuffled",
            "the same clips, times of the frames shuffled",
            sample=with_shuffled_times,
            lower_is_better=True,
        ),
        row("multistep_deep", "questions of several steps, thinking first", "multistep", thinking=True),
        row("multistep_fast", "the same questions, answered at once", "multistep", thinking=False),
        row(
            "chair",
            "objects in captions that are not in the image",
            "caption",
            prompt=caption_of,
            scorer=hallucinated_objects(named_objects),
            aggregate=chair,
            max_new_tokens=128,
            lower_is_better=True,
        ),
        row("absent_object", "is it there, yes or no"),
        row(
            "chinese",
            "the questions of all rows in Chinese; and in English",
            sample=in_both_languages,
            prompt=question_in_language,
            scorer=exact_match_in_language,
            aggregate=chinese_and_english,
            questions_per_sample=2,
        ),
        row("two_images", "which of two images, and what is in the first or second", **long_answer),
        row("image_and_clip", "an image and a clip: what is in which, is it the same"),
        row("grounding", "where is it: boxes that cover by half", scorer=boxes_found, **long_answer),
        row("page_text", "all text of a form, a table or a text", **read_print, **long_answer),
        row("form_json", "a form as JSON that fits a schema", scorer=same_json, **long_answer),
        row("table_cells", "a table in Markdown", scorer=same_cells, **long_answer),
        row("clip_times", "when each color of a clip comes", **long_answer),
        row("refusal_photo", "say that an image is unknown that nobody drew; others are drawn", **long_answer),
    ),
)
