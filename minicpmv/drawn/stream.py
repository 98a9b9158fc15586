"""The synthetic tasks as a `datasets` stream of conversation rows, for the Trainer's and TRL's training loops.

What is special:
- nothing is stored: a row is drawn when it is asked for, and follows from the split, the seed and its index alone;
- the stream has shards, so that several data loader workers or processes draw at once, each its own rows;
- a YAML file describes a stream: fields of SyntheticData, so that a recipe names it where others name a file.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import datasets
import yaml

from minicpmv.drawn.samples import SCENES, Mixture, Sample, SampleError, make_sample


@dataclass
class SyntheticData:
    """What to draw: `samples` rows of a split from index `start` on, in `shards` parts."""

    split: str = "train"
    seed: int = 0
    samples: int = 10_000
    start: int = 0
    shards: int = 8
    mixture: Mixture = field(default_factory=Mixture)

    @classmethod
    def load(cls, path: Path) -> "SyntheticData":
        """Read a YAML file. Raises SampleError for unknown fields, and for a file that is no mapping."""
        try:
            fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            return cls(**{**fields, "mixture": Mixture.read(fields.get("mixture", {}), Path(path))})
        except (TypeError, AttributeError, yaml.YAMLError) as error:
            raise SampleError(f"{path}: {error}; fields are those of SyntheticData and Mixture") from error


def is_description(source: object) -> bool:
    """Whether a source of rows is the file that describes a stream."""
    return isinstance(source, (str, os.PathLike)) and Path(source).suffix in (".yaml", ".yml")


def conversation_row(sample: Sample) -> dict[str, Any]:
    """A sample as a row: `messages`, and the options of the processor that belong to it."""
    messages: list[dict[str, Any]] = []
    if sample.system:
        messages.append({"role": "system", "content": [{"type": "text", "text": sample.system}]})
    images = iter(zip_longest(sample.images, sample.labels[: len(sample.images)]))
    counts = sample.shown or [len(sample.images)]
    for turn, count in zip(sample.turns, counts + [0] * len(sample.turns), strict=False):
        content: list[dict[str, Any]] = []
        for image, label in islice(images, count):
            content += [{"type": "text", "text": label}] if label else []
            content.append({"type": "image", "image": image})
        question = {"type": "text", "text": turn.question} | ({} if turn.ref is None else {"ref": turn.ref})
        messages.append({"role": "user", "content": [*content, question]})
        answer: dict[str, Any] = {"role": "assistant", "content": [{"type": "text", "text": turn.answer}]}
        if turn.thought is not None:
            answer["reasoning_content"] = turn.thought
        messages.append(answer)
    row: dict[str, Any] = {"messages": messages, "max_slice_nums": sample.max_slice_nums}
    if sample.temporal_ids is not None:
        row |= {"temporal_ids": sample.temporal_ids, "use_image_id": sample.use_image_id}
    return row


def synthetic_dataset(data: SyntheticData) -> datasets.IterableDataset:
    """A stream of `data.samples` rows. Raises SampleError if there is nothing to draw, or nothing of that name."""
    if data.samples < 1 or data.shards < 1:
        raise SampleError(f"samples={data.samples} and shards={data.shards} must be at least 1")
    if unknown := [scene for scene in data.mixture.scenes if scene not in SCENES]:
        raise SampleError(f"there are no scenes {', '.join(unknown)}; scenes are {', '.join(SCENES)}")
    make_sample(data.split, data.seed, data.start, data.mixture)  # raises here rather than in a worker
    shards = list(range(min(data.shards, data.samples)))
    return datasets.IterableDataset.from_generator(_draw, gen_kwargs={"data": asdict(data), "shards": shards})


def _draw(data: dict[str, Any], shards: list[int]) -> Iterator[dict[str, Any]]:
    mixture = Mixture(**data["mixture"])
    count = min(data["shards"], data["samples"])
    for shard in shards:
        for index in range(data["start"] + shard, data["start"] + data["samples"], count):
            yield conversation_row(make_sample(data["split"], data["seed"], index, mixture))
