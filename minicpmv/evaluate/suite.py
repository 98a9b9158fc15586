"""Public benchmarks: what a file in `suites/` declares, and how that becomes rows of a [`Benchmark`].

A suite's file is a card: which data set, which words, which decoding, which scorer, and where all of that comes from.
Opening the suite binds the card to the data and to the settings of the run.

What is special:
- two ways to ask. *Plain*: greedy, the evaluation kit's general prompt, nothing done to images or answers: for comparing
  models. *As published*: what the authors' own class does (their prompts, thinking, sampling or beams, small images
  enlarged, answers cut): for comparing with their figures;
- everything that is drawn by chance about a question (the width of an enlarged image, sampled tokens) comes from the
  question's own key, so that neither the order nor the batch decides;
- nothing of a data set is read before its questions are asked, but for the columns that choose them.
"""

import io
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from PIL import Image

from minicpmv.errors import MiniCPMVError
from minicpmv.evaluate.benchmark import (
    Benchmark,
    Entry,
    Facts,
    Judge,
    Metrics,
    Prompt,
    Row,
    Scores,
    UnknownRowError,
    main_score,
)
from minicpmv.evaluate.data_sets import Data, MissingDataError, Record, Records, open_data
from minicpmv.evaluate.scoring import Scoring


ENLARGED = 1344 * 1344  # pixels below which the authors' class enlarges an image
VIDEO_PROMPT_TOKENS = 32768  # most tokens of a prompt with a video: 180 groups of 64, and subtitles


class SuiteError(MiniCPMVError):
    """A suite cannot be opened with these settings."""


@dataclass(frozen=True)
class VideoSetting:
    """How videos are looked at. The published figures do not say; these are the model card's defaults.

    With `packings`, each video row is asked once for each: the same frames of the same videos, at most
    `max_num_frames`, with so many of them in a group of 64 tokens.
    """

    fps: float = 5
    max_num_frames: int = 180  # groups, before frames are packed more tightly
    max_num_packing: int = 3
    packings: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if wrong := [packing for packing in self.packings if not 1 <= packing <= 6]:
            raise SuiteError(f"packing {wrong[0]} does not exist: give numbers from 1 to 6, such as 1,3,6")
        if len(set(self.packings)) < len(self.packings):
            raise SuiteError(f"packings {', '.join(map(str, self.packings))}: give each once")

    def options(self, packing: int | None) -> dict[str, Any]:
        """Of the video processor."""
        if packing is None:
            return {
                "fps": self.fps,
                "max_num_frames": self.max_num_frames,
                "max_num_packing": self.max_num_packing,
                "max_inp_length": VIDEO_PROMPT_TOKENS,
            }
        # The recipe allows `max_num_frames` groups of `max_num_packing`: six a group, so that every packing gets the same.
        return {
            "fps": self.fps,
            "max_num_frames": max(1, self.max_num_frames // 6),
            "max_num_packing": 6,
            "force_packing": packing,
            "max_inp_length": VIDEO_PROMPT_TOKENS,
        }


@dataclass(frozen=True)
class Setting:
    """How a suite is asked and scored."""

    as_published: bool = False
    scoring: Scoring | None = None  # None: the rules of the published figures as published, else today's
    strict: bool = False  # rules that mend the reference's defects: figures are not comparable with published ones
    video: VideoSetting = field(default_factory=VideoSetting)
    max_new_tokens: int | None = None  # most tokens of thought and answer together, below the suites' own

    @property
    def rules(self) -> Scoring:
        return self.scoring or ("2025-09" if self.as_published else "current")


@dataclass(frozen=True)
class Decoding:
    """How an answer is made."""

    max_new_tokens: int  # of thought and answer together, where the row thinks
    options: Mapping[str, Any] = field(default_factory=dict)  # of chat(), over greedy
    thinking: bool | None = None  # None: as the run is set
    enlarge: bool = False  # small images, to a random width
    runs: int = 1  # of which the mean is published


@dataclass(frozen=True)
class Sample:
    """A question of a data set."""

    record: Record
    data: Data
    key: str  # seeds all that is drawn by chance about this question

    def __getitem__(self, column: str) -> Any:
        return self.record[column]

    def get(self, column: str, default: Any = None) -> Any:
        return self.record.get(column, default)

    @property
    def images(self) -> list[Image.Image]:
        """Those of the question, which may have none.

        Raises:
            SuiteError: one of them is no image.
        """
        images: list[Image.Image] = []
        for number, file in enumerate(self.record.get("image", ()), start=1):
            try:
                image = Image.open(io.BytesIO(file))
                image.load()
            except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for broken files
                raise SuiteError(
                    f"image {number} of question {self.key} in {self.data.id} cannot be read ({error}): fetch the data "
                    "anew"
                ) from error
            images.append(image)
        return images

    def video(self, name: str) -> dict[str, Any]:
        """A part of a message."""
        return {"type": "video", "video": str(self.data.media(name))}


@dataclass(frozen=True)
class Asking:
    """One way to ask a task's questions."""

    content: Callable[[Sample], list[Any]]  # of the user's message
    decoding: Decoding
    cut: Callable[[str], str] | None = None  # takes from the answer what is scored


def mean_score(scores: list[Scores]) -> Metrics:
    """The mean of the main score over the answers that have one."""
    known = [value for value in map(main_score, scores) if value is not None]
    return {next(iter(scores[0]), "exact"): fmean(known) if known else None}


@dataclass(frozen=True)
class Task:
    """A row of a public benchmark, before it is bound to its data."""

    id: str
    title: str
    data: str  # id of the data set
    plain: Asking
    published: Asking
    expected: Callable[[Sample], Any]  # for the scorer
    facts: Callable[[Sample], Facts]  # "id" always: what the data set calls the question
    scorer: Callable[..., Scores]  # (answer, expected, *, scoring, strict)
    aggregate: Callable[[list[Scores]], Metrics] = mean_score  # each with the question's "facts"
    keep: Callable[[Record], bool] | None = None  # which records are questions of this row
    order: Callable[[Record], Any] | None = None  # sorts them, so that those of a group stand together
    breakdowns: tuple[str, ...] = ()
    points: tuple[str, ...] = ()
    lower_is_better: bool = False
    judge: Callable[[Scoring, bool], Judge] | None = None  # of these rules, strict or not
    upload: Callable[[list[Entry], Path], None] | None = None  # writes a file for those who know the answers
    is_video: bool = False

    def bind(self, data: Data, setting: Setting, packing: int | None = None) -> Row:
        """The row of a benchmark that asks these data."""
        asking = self.published if setting.as_published else self.plain
        decoding, records = asking.decoding, data.records
        places = self._places(records)
        if not places:
            raise SuiteError(f"{data.id} holds no question of {self.id}: is it the right file?")
        limit = min(decoding.max_new_tokens, setting.max_new_tokens or decoding.max_new_tokens)
        options = dict(decoding.options) | (setting.video.options(packing) if self.is_video else {})

        def sample(seed: int, index: int) -> Sample:
            return Sample(records[places[index]], data, f"{self.id}/{seed}/{index}")

        def prompt(sample: Sample) -> Prompt:
            content = asking.content(sample)
            if decoding.enlarge:
                rng = random.Random(f"width of {sample.key}")
                content = [enlarged(part, rng) if isinstance(part, Image.Image) else part for part in content]
            seed = {"seed": sample.key} if options.get("decoding") == "sample" else {}
            return Prompt(content, self.expected(sample), options | seed)

        return Row(
            id=self.row_id(packing),
            title=self.title if packing is None else f"{self.title}, {packing} frames in a group",
            sample=sample,
            prompt=prompt,
            scorer=partial(self.scorer, scoring=setting.rules, strict=setting.strict),
            aggregate=self.aggregate,
            max_new_tokens=limit,
            max_thought_tokens=0 if decoding.thinking else 4 * limit,
            thinking=decoding.thinking,
            lower_is_better=self.lower_is_better,
            length=len(places),
            facts=self.facts,
            expected=self.expected,
            cut=asking.cut,
            judge=self.judge and self.judge(setting.rules, setting.strict),
            breakdowns=self.breakdowns,
            points=self.points,
            upload=self.upload,
            runs=decoding.runs,
        )

    def row_id(self, packing: int | None) -> str:
        return self.id if packing is None else f"{self.id}_packing{packing}"

    def _places(self, records: Records) -> Sequence[int]:
        """Where the records of this row are, in the order in which they are asked."""
        if self.keep is None and self.order is None:
            return range(len(records))
        kept = [
            (self.order(record) if self.order else place, place)
            for place, record in enumerate(records.without_images())
            if self.keep is None or self.keep(record)
        ]
        return [place for _, place in sorted(kept)]


@dataclass(frozen=True)
class Suite:
    """A public benchmark."""

    id: str
    title: str
    version: int  # counted up with every change of prompts, decoding or choice of questions
    tasks: tuple[Task, ...]

    @property
    def data(self) -> list[str]:
        """The ids of its data sets."""
        return list(dict.fromkeys(task.data for task in self.tasks))

    @property
    def has_videos(self) -> bool:
        return any(task.is_video for task in self.tasks)

    def plan(self, setting: Setting) -> list[tuple[str, Task, int | None]]:
        """Its rows: id, task, and how many frames to a group, where that is compared."""
        return [
            (task.row_id(packing), task, packing)
            for task in self.tasks
            for packing in (setting.video.packings if task.is_video and setting.video.packings else (None,))
        ]

    def open(
        self,
        setting: Setting | None = None,
        *,
        folder: Path | None = None,
        fixtures: bool = False,
        rows: Sequence[str] | None = None,
    ) -> Benchmark:
        """The benchmark, ready to be asked.

        Args:
            folder: where the data are; the cache by default.
            fixtures: take the few drawn questions that come with the package, instead of the data.
            rows: ids of the rows whose data are needed; all by default.

        Raises:
            SuiteError, UnknownRowError: for settings and rows that do not exist.
            MiniCPMVError: the data are not there, or not what they should be.
        """
        setting = setting or Setting()
        if setting.video.packings and not self.has_videos:
            raise SuiteError(f"{self.id} has no videos to be packed")
        planned = self.plan(setting)
        if unknown := [name for name in rows or () if name not in (known := [row for row, _, _ in planned])]:
            raise UnknownRowError(f"{self.id} has no row {', '.join(unknown)}; its rows are {', '.join(known)}")
        opened: dict[str, Data] = {}
        bound = []
        for name, task, packing in planned:
            if rows is None or name in rows:
                if task.data not in opened:
                    opened[task.data] = open_data(task.data, folder=folder, fixtures=fixtures)
                bound.append(task.bind(opened[task.data], setting, packing))
        settings: dict[str, Any] = {
            "as_published": setting.as_published,
            "data": {name: data.fingerprint for name, data in opened.items()},
        }
        if fixtures:
            settings["fixtures"] = True
        if self.has_videos:
            settings["video"] = setting.video.options(None) | {"packings": list(setting.video.packings)}
        if setting.max_new_tokens is not None:
            settings["max_new_tokens"] = setting.max_new_tokens
        scoring = {"version": setting.rules, "strict": setting.strict}
        return Benchmark(self.id, self.title, self.version, tuple(bound), settings, scoring)


def check_videos(benchmark: Benchmark, samples: int | None = None) -> None:
    """Look for the videos of the first `samples` questions of each row, or of all, before a model is loaded.

    Raises:
        MissingDataError: says of a row how many are not there, and which is the first.
    """
    for row in benchmark.rows:
        count = min(samples or row.length or 0, row.length or 0)
        if not count or "video" not in row.sample(0, 0).record:
            continue
        missing = {}
        for index in range(count):
            sample = row.sample(0, index)
            try:
                sample.data.media(sample["video"])
            except MissingDataError as error:
                missing[sample["video"]] = error
        if missing:
            raise MissingDataError(
                f"{row.id}: {len(missing)} videos are not there ({next(iter(missing.values()))}); with --keep-going "
                "questions about them count as wrong"
            )


def enlarged(image: Image.Image, rng: random.Random) -> Image.Image:
    """A small image in a width drawn between its own and the one that makes it 1344 x 1344 pixels large.

    Source: class MiniCPM_V_4_5 of VLMEvalKit, added by the model's authors.
    """
    width, height = image.size
    if width * height >= ENLARGED:
        return image
    new_width = rng.randint(width, int(width * math.sqrt(ENLARGED / (width * height))))
    return image.convert("RGB").resize((new_width, max(1, int(new_width / width * height))))
