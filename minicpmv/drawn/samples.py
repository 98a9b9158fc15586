"""Questions about drawn pictures: seeded samples for training, without end, and the questions of NanoBench.

What is special:
- sample `index` of a split depends on (split, seed, index) alone: training resumes anywhere, and no state is shared;
- the splits never share a random state, and printed text of three or more characters belongs to one split each,
  so that reading a test picture cannot be remembered from training;
- a training sample carries several questions, asked as turns of one conversation: one encoded picture teaches several
  answers. The last turn may think first;
- a sample may show several pictures, at once or turn by turn, or a picture and a clip.
"""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from minicpmv.drawn import photos
from minicpmv.drawn.drawing import Drawing
from minicpmv.drawn.papers import NUMBERED, page_labels, pages_scene, paper_scene
from minicpmv.drawn.scenes import (
    FRAMES,
    Fact,
    chart_scene,
    clip_scene,
    form_scene,
    line_scene,
    page_scene,
    picture_size,
    shapes_scene,
    sum_scene,
    times_fact,
)
from minicpmv.drawn.several import mixed_scene, pair_scene
from minicpmv.drawn.wording import WORDINGS, Wording
from minicpmv.errors import MiniCPMVError


SPLITS = ("train", "validation", "test")
# How many slices it takes at most to read an image, with slices as small as those of the model in nano/.
SLICES = 4
PAGE_SLICES = 9
PAGE_SIDE = 336  # pixels of a page of fine print: 3 x 3 slices of 112
MOST_DRAWN = 200  # scenes for one sample, where few have a question of the kind that is asked for
CLIPS = {"clip_move": "move", "clip_order": "order", "clip_flash": "flash"}
PAPERS = {"paper_form": "form", "paper_table": "table", "paper_words": "words"}
SCENES = ("shapes", "repeated", "line", "lower", "sum", "form", "page", "chart", *CLIPS)
SCENES += ("clip_times", "pair", "mixed", *PAPERS, "pages", "photo")
TIME_STEPS = (2, 5, 10)  # tenths of a second between the frames of a clip that is asked for times
# Questions that a picture of anything might be asked, for photographs.
OPEN_TASKS = ("refusal", "refusal", "caption", "count", "printed_line", "only_shape", "page_text", "page_markdown")
PLAIN_TASKS = ("page_", "grounding", "where")  # answers that a system's message leaves as they are

# The questions of NanoBench: the scene, and which of its facts are asked for (one kind after the other).
BENCH_TASKS = {
    "printed_line": ("line", ("printed_line",)),
    "printed_line_lower": ("lower", ("printed_line",)),
    "form_value": ("form", ("form_value",)),
    "fine_print": ("page", ("form_value",)),
    "colour": ("shapes", ("colour",)),
    "shape": ("shapes", ("shape",)),
    "count": ("shapes", ("count",)),
    "position": ("shapes", ("position",)),
    "chart": ("chart", ("chart_value", "chart_highest", "chart_lowest")),
    "video_direction": ("clip_move", ("video_direction",)),
    "video_order": ("clip_order", ("video_order",)),
    "video_count": ("clip_flash", ("video_count",)),
    "multistep": ("sum|shapes", ("multistep_sum", "multistep_price")),
    "caption": ("shapes", ("caption",)),
    "absent_object": ("shapes", ("absent_object",)),
}
FIRST_TASKS = tuple(BENCH_TASKS)
# Those that came later: all that the scene's own wording has, in the scene's own times.
BENCH_TASKS |= {
    "two_images": ("pair", ("pair_which", "pair_colour", "pair_count", "pair_text", "pair_more", "pair_same")),
    "image_and_clip": ("mixed", ("mixed_same", "mixed_colour", "mixed_clip_direction", "mixed_clip_shape")),
    "grounding": ("shapes", ("where",)),
    "page_text": ("paper_form|paper_table|paper_words", ("page_text",)),
    "form_json": ("paper_form", ("page_json",)),
    "table_cells": ("paper_table", ("page_markdown",)),
    "clip_times": ("clip_times", ("clip_times",)),
    # Every second image is a drawn one, so that refusing is not always right.
    "refusal_photo": (
        "photo|shapes",
        ("refusal", "count", "caption", "caption", "only_shape", "only_shape", "printed_line", "colour"),
    ),
}


class SampleError(MiniCPMVError):
    """There is nothing to draw by this description: the message names what it asks for, and what there is."""


@dataclass
class Turn:
    task: str
    question: str
    answer: str
    thought: str | None = None
    ref: str | None = None  # a name that follows the question between ref tags


@dataclass
class Sample:
    """Pictures, or the frames of a clip, or a picture and then a clip; and the turns asked about them.

    temporal_ids: None for pictures, else groups of frame times in tenths of a second (one pack each; [-1] is a picture).
    max_slice_nums: how many slices a picture may be cut into; a clip is never cut.
    objects: in the words of the language, what there is to see in a scene of shapes.
    shown: how many of the drawings come with each turn; all with the first, if empty.
    labels: what stands before each drawing.
    system: the system's message.
    use_image_id: whether what comes with a clip is numbered.
    """

    drawings: list[Drawing]
    turns: list[Turn]
    temporal_ids: list[list[int]] | None = None
    max_slice_nums: int = 1
    language: str = "en"
    objects: list[str] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    system: str = ""
    use_image_id: bool = False

    @property
    def images(self) -> list[Image.Image]:
        return [drawing.image for drawing in self.drawings]


@dataclass
class Mixture:
    """What a stream is made of.

    scenes: relative shares of SCENES.
    sliced: share of the scenes of shapes and lines that are larger and cut into slices.
    chinese: share of the samples in Chinese.
    thinking: share of those last turns that think first, where a thought would help.
    turns: fewest and most questions a sample.
    characters: fewest and most characters of a printed line.
    tasks: ask only questions of these kinds (keys of `Wording.phrases`), more often of those that are named several
        times; all kinds alike for None.
    systems: share of the samples with a message of the system, friendly or concise.
    """

    scenes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SCENES, 1.0))
    sliced: float = 0.15
    chinese: float = 0.2
    thinking: float = 0.3
    turns: tuple[int, int] = (1, 4)
    characters: tuple[int, int] = (1, 12)
    tasks: list[str] | None = None
    systems: float = 0.0

    @classmethod
    def read(cls, described: dict[str, Any] | str, file: Path) -> "Mixture":
        """What a YAML file has as its mixture: the fields, or the name of a YAML file beside it that holds them.

        Raises:
            SampleError: that file is not there.
            TypeError, yaml.YAMLError: there are other fields, or it is no YAML.
        """
        if not isinstance(described, str):
            return cls(**described)
        other = file.parent / described
        if not other.is_file():
            raise SampleError(f"mixture: there is no {other}")
        return cls(**yaml.safe_load(other.read_text(encoding="utf-8")))


def sample_rng(split: str, *key) -> random.Random:
    """The random state of one sample; another split or key is another state (the text is hashed whole)."""
    if split not in SPLITS:
        raise SampleError(f"split {split!r} is none of {', '.join(SPLITS)}")
    return random.Random("/".join(map(str, (split, *key))))


def named_objects(caption: str, language: str = "en") -> list[str]:
    """The names in a caption such as "a red circle, a blue star"."""
    names = (name.strip() for name in caption.split(WORDINGS[language].comma.strip()))
    if WORDINGS[language].article:
        names = (name.removeprefix("a ").removeprefix("an ") for name in names)
    return [name for name in names if name]


def draw_scene(
    scene: str, rng: random.Random, say: Wording, split: str, mixture: Mixture
) -> tuple[Sample, list[Fact]]:
    """A sample of one scene, without turns yet, and the facts to ask for."""
    drawings, temporal_ids, max_slice_nums = None, None, 1
    if scene in CLIPS:
        drawings, facts = clip_scene(rng, say, picture_size(rng, (96, 140)), CLIPS[scene])
        temporal_ids = frame_groups(rng)
    elif scene == "clip_times":
        drawings, facts = clip_scene(rng, say, picture_size(rng, (96, 140)), "order")
        step = rng.choice(TIME_STEPS)
        temporal_ids = [[step * i for i in range(FRAMES)]]
        facts.append(times_fact(drawings, temporal_ids[0], say))
    elif scene == "mixed":
        drawings, facts = mixed_scene(rng, say)
        temporal_ids = [[-1], *frame_groups(rng)]
    elif scene == "pair":
        drawings, facts = pair_scene(rng, say, split)
    elif scene in PAPERS:
        drawing, facts = paper_scene(rng, say, split, PAPERS[scene])
        max_slice_nums = SLICES
    elif scene == "pages":
        drawings, facts = pages_scene(rng, say, split)
        max_slice_nums = SLICES
    elif scene == "photo":
        size = picture_size(rng, (96, 160))
        drawing = Drawing(photos.photo(rng, size, split), Image.new("L", size, 0))
        facts = [Fact(task, "shape", say.refusal) for task in OPEN_TASKS]
    elif scene == "form":
        drawing, facts = form_scene(rng, say, split)
        max_slice_nums = SLICES
    elif scene == "page":
        drawing, facts = page_scene(rng, say, split, PAGE_SIDE)
        max_slice_nums = PAGE_SLICES
    elif scene == "chart":
        drawing, facts = chart_scene(rng, say)
    elif scene == "sum":
        drawing, facts = sum_scene(rng, say)
    elif scene in ("shapes", "repeated"):
        sliced = rng.random() < mixture.sliced
        max_slice_nums = SLICES if sliced else 1
        drawing, facts = shapes_scene(
            rng, say, picture_size(rng, (160, 300) if sliced else (96, 200)), repeated=scene == "repeated"
        )
    else:
        max_slice_nums = SLICES if rng.random() < mixture.sliced else 1
        fewest, most = mixture.characters
        drawing, facts = line_scene(rng, say, split, (fewest, most), lower=scene == "lower")
    sample = Sample(drawings or [drawing], [], temporal_ids, max_slice_nums)
    sample.use_image_id = scene == "mixed" and rng.random() < 0.5
    if scene in ("shapes", "repeated"):
        sample.objects = [say.named(thing.color, thing.kind) for thing in drawing.things]
    return sample, facts


def frame_groups(rng: random.Random, size: int | None = None) -> list[list[int]]:
    """Times of a clip's frames in tenths of a second, cut into packs of `size` (drawn, mostly 6, if not given)."""
    step, start = rng.uniform(1, 6), rng.uniform(0, 3)
    times = [int(start + step * i) for i in range(FRAMES)]
    size = size or rng.choice((1, 2, 3, 6, 6, 6, 6))
    return [times[i : i + size] for i in range(0, FRAMES, size)]


def make_turn(fact: Fact, say: Wording, rng: random.Random, thinking: bool = False) -> Turn:
    subjects = (fact.subject,) if isinstance(fact.subject, str) else fact.subject
    question = rng.choice(say.phrases[fact.task]).format(*map(say.subject, subjects))
    ref = subjects[0] if fact.task == "grounding" else None
    return Turn(fact.task, question, fact.answer, fact.thought if thinking else None, ref)


def show_in_turn(sample: Sample, chosen: list[Fact]) -> list[Fact]:
    """Where a question is about the first of several pictures, ask it first and show the others with the next turn."""
    for fact in chosen:
        if len(chosen) > 1 and "first" in (fact.subject, fact.subject[:1][0] if fact.subject else ""):
            sample.shown = [1, len(sample.drawings) - 1]
            return [fact, *(other for other in chosen if other is not fact)]
    return chosen


def answer_in_style(sample: Sample, say: Wording, style: str) -> None:
    """Give the system's message, and the answers that follow it: a friendly one begins so, a concise caption has no articles."""
    sample.system = say.systems[style]
    for turn in sample.turns:
        if style == "friendly":
            turn.answer = say.friendly.format(turn.answer)
        elif turn.task == "caption" and sample.objects:
            turn.answer = say.comma.join(named_objects(turn.answer, sample.language))


def make_sample(split: str, seed: int, index: int, mixture: Mixture) -> Sample:
    """Sample `index` of a split: deterministic in (split, seed, index) for one mixture.

    Raises:
        SampleError: there is no such split, or none of the mixture's scenes has a question of its tasks.
    """
    rng = sample_rng(split, seed, index)
    language = "zh" if rng.random() < mixture.chinese else "en"
    say = WORDINGS[language]
    for _ in range(MOST_DRAWN):
        scene = rng.choices(tuple(mixture.scenes), tuple(mixture.scenes.values()))[0]
        sample, facts = draw_scene(scene, rng, say, split, mixture)
        facts = [fact for fact in facts if mixture.tasks is None or fact.task in mixture.tasks]
        if facts:
            break
    else:
        raise SampleError(f"no question of {mixture.tasks} about {MOST_DRAWN} scenes of {list(mixture.scenes)}")
    sample.language = language
    # Tasks first, then facts, so that tasks with many facts are not asked more often than others.
    count = rng.randint(*mixture.turns)
    here = {fact.task for fact in facts}
    tasks = sorted(here) if mixture.tasks is None else [task for task in mixture.tasks if task in here]
    rng.shuffle(tasks)
    chosen = []
    for task in tasks[:count]:
        if left := [fact for fact in facts if fact.task == task and fact not in chosen]:
            chosen.append(rng.choice(left))
    # Forms and pages have few tasks and many facts: ask on.
    rest = [fact for fact in facts if fact not in chosen]
    chosen += rng.sample(rest, min(len(rest), count - len(chosen)))
    chosen.sort(key=lambda fact: fact.thought is not None)  # a turn that can think comes last
    thinking = rng.random() < mixture.thinking
    if scene == "pair" and rng.random() < 0.3:
        chosen = show_in_turn(sample, chosen)
    sample.turns = [make_turn(fact, say, rng, thinking and fact is chosen[-1]) for fact in chosen]
    if chosen[0].task in NUMBERED:
        sample.labels = page_labels(len(sample.drawings))
    if rng.random() < mixture.systems and not any(fact.task.startswith(PLAIN_TASKS) for fact in chosen):
        answer_in_style(sample, say, rng.choice(tuple(say.systems)))
    return sample


def bench_sample(task: str, split: str = "test", seed: int = 0, index: int = 0, language: str = "en") -> Sample:
    """Question `index` of a NanoBench task: one turn, with the thought that leads to the answer where it takes steps.

    Deterministic in its arguments; the other language gives the same picture and the same question in its own words.

    Raises:
        SampleError: there is no such task, language or split.
    """
    if task not in BENCH_TASKS or language not in WORDINGS:
        raise SampleError(f"{task!r} in {language!r} is none of {', '.join(BENCH_TASKS)} in {', '.join(WORDINGS)}")
    say = WORDINGS[language]
    either, kinds = BENCH_TASKS[task]
    scenes = either.split("|")
    kind, scene = kinds[index % len(kinds)], scenes[index % len(scenes)]
    plain = Mixture(sliced=0.0, characters=(4, 12))
    attempt = 0
    while True:  # not every scene has a fact of the kind
        rng = sample_rng(split, "bench", task, seed, index, attempt)
        sample, facts = draw_scene(scene, rng, say, split, plain)
        facts = [fact for fact in facts if fact.task == kind]
        if task == "count":  # most other counts are one or two
            facts = facts[:1] if rng.random() < 0.6 else facts[1:]
        if facts:
            break
        attempt += 1
    fact = rng.choice(facts)
    if scene in CLIPS:
        sample.temporal_ids = frame_groups(rng, FRAMES)
    if kind in NUMBERED:
        sample.labels = page_labels(len(sample.drawings))
    sample.turns = [make_turn(fact, say, random.Random(f"{index}/{language}"), thinking=True)]
    sample.language = language
    return sample
