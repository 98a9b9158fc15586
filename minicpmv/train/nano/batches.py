"""From samples to training batches.

What is special:
- conversations go through the processor of the checkpoint, by the same collator as in fine-tuning, so training sees what
  inference sees. Writing the prompts by hand instead would save 0.4 ms of the 16 to 107 ms that a sample takes;
- each patch carries the class, the color and the box of what lies under it (`patch_labels`);
- a batch gathers samples of one layout, sorted: a run of equally long slices is one attention call in the tower.
"""

import random
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import ProcessorMixin

from minicpmv.data.collator import IGNORED, ConversationCollator, EncodedRow
from minicpmv.drawn.drawing import Drawing, patch_labels
from minicpmv.drawn.samples import CLIPS, PAPERS, Mixture, Sample, make_sample
from minicpmv.drawn.stream import conversation_row


@dataclass
class Example(EncodedRow):
    """One sample, encoded. Dense labels are in the order of the patches of `pixel_values`."""

    patch_labels: dict[str, torch.Tensor]  # by what they name, as the heads do: "kind", "color", "box"


def patch_labels_of(
    drawing: Drawing, grid: tuple[int, int] | None, tgt_sizes: list[list[int]], patch_size: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Labels of all slices of one image: the source view, then the slices row by row."""
    width, height = drawing.image.size
    crops: list[tuple[float, float, float, float]] = [(0, 0, width, height)]
    if grid is not None:
        cell_w, cell_h = width / grid[0], height / grid[1]
        crops += [
            (x * cell_w, y * cell_h, (x + 1) * cell_w, (y + 1) * cell_h)
            for y in range(grid[1])
            for x in range(grid[0])
        ]
    return [
        patch_labels(drawing, crop, (rows, cols), patch_size)
        for crop, (rows, cols) in zip(crops, tgt_sizes, strict=True)
    ]


class SampleEncoder:
    """Encodes samples for one checkpoint's processor, labels of patches included."""

    def __init__(self, processor: ProcessorMixin):
        self.collator = ConversationCollator(processor, pad_pixel_values=False)

    def encode(self, sample: Sample) -> Example:
        row = self.collator.encode(conversation_row(sample))
        image_processor = self.collator.processor.image_processor
        sizes = iter(torch.as_tensor(row.tgt_sizes).tolist())
        dense = []
        for drawing in sample.drawings:
            grid = None
            if sample.temporal_ids is None:
                grid = image_processor.get_sliced_grid(drawing.image.size, sample.max_slice_nums)
            views = 1 if grid is None else 1 + grid[0] * grid[1]
            dense += patch_labels_of(drawing, grid, list(islice(sizes, views)), image_processor.patch_size)
        kinds, colors, boxes = (torch.from_numpy(np.concatenate(labels)) for labels in zip(*dense, strict=True))
        return Example(**vars(row), patch_labels={"kind": kinds, "color": colors, "box": boxes})

    def batch(self, examples: list[Example]) -> dict[str, Any]:
        """A batch for `model(**batch)`, with the dense labels."""
        return self.collator.pad(examples) | {
            "temporal_ids": [example.temporal_ids for example in examples],
            "patch_labels": joined_labels(examples),
        }


def joined_labels(examples: list[Example]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([example.patch_labels[name] for example in examples]) for name in examples[0].patch_labels}


def mean_weights(labels: dict[str, torch.Tensor], batches: int = 1) -> dict[str, torch.Tensor]:
    """The weight of each label in the mean over those of its batch that count, and over the batches of a step."""
    counts = {name: values != IGNORED for name, values in labels.items()}
    return {name: count.float() / (count.sum().clamp(min=1) * batches) for name, count in counts.items()}


def layout_key(example: Example) -> tuple[int, int]:
    """Sorting by this puts equally long slices side by side."""
    rows, cols = example.tgt_sizes[0].tolist()
    return len(example.tgt_sizes), rows * cols


# Scenes that take the same number of views share batches.
LAYOUTS = (
    ("shapes", "repeated", "line", "lower", "sum", "chart", "photo"),
    ("pair",),
    ("form", *PAPERS),
    ("page", "pages"),
    (*CLIPS, "clip_times", "mixed"),
)


def training_batch(encoder: SampleEncoder, mixture: Mixture, size: int, seed: int, number: int) -> dict[str, Any]:
    """The [`training_examples`] of batch `number`, for `model(**batch)`."""
    return encoder.batch(training_examples(encoder, mixture, size, seed, number))


def training_examples(encoder: SampleEncoder, mixture: Mixture, size: int, seed: int, number: int) -> list[Example]:
    """Batch `number` of the training split: deterministic in its arguments, so any process can make any batch.

    All its samples are of one layout (image, sliced image, form, page or video) and have about as many turns, so that
    little is padded; layouts are drawn by the shares of the mixture. A batch of pages is half as large.
    """
    rng = random.Random(f"batch/{seed}/{number}")
    shares = [sum(mixture.scenes.get(scene, 0) for scene in scenes) for scenes in LAYOUTS]
    layout = rng.choices(LAYOUTS, shares)[0]
    alike = replace(
        mixture,
        scenes={scene: share for scene, share in mixture.scenes.items() if scene in layout},
        sliced=float(rng.random() < mixture.sliced),
        turns=(rng.randint(*mixture.turns),) * 2,
    )
    taken = size // 2 if "page" in layout else size
    samples = (make_sample("train", seed, number * size + i, alike) for i in range(taken))
    return sorted((encoder.encode(sample) for sample in samples), key=layout_key)


@dataclass
class DrawnBatches(torch.utils.data.Dataset):
    """Batches `first` to `first + count` of a stage, drawn when they are asked for."""

    encoder: SampleEncoder
    mixture: Mixture
    size: int
    seed: int
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, Any]:
        return training_batch(self.encoder, self.mixture, self.size, self.seed, self.first + place)


def single_turns(sample: Sample) -> list[Sample]:
    """The sample's questions, each asked alone, about what was shown by then."""
    singles = []
    for number, turn in enumerate(sample.turns, 1):
        count = sum(sample.shown[:number]) or len(sample.drawings)
        singles.append(replace(sample, turns=[turn], drawings=sample.drawings[:count], shown=[]))
    return singles
