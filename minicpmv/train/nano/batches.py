"""From samples to training batches.

What is special:
- pictures go through the image processor of the checkpoint, so training sees the slices that inference sees;
- a conversation is rendered here rather than by the chat template, for speed; a test holds the two equal;
- each patch carries the class and the color of what lies under it (`kind_labels`, `color_labels`);
- a batch gathers samples of one layout, sorted: a run of equally long slices is one attention call in the tower.
"""

import random
from dataclasses import dataclass, replace

import torch

from minicpmv.drawn.drawing import patch_labels
from minicpmv.drawn.samples import CLIPS, Mixture, Sample, make_sample


IGNORED = -100
NO_THOUGHT = "<think>\n\n</think>\n\n"


@dataclass
class Example:
    """One sample, encoded. Dense labels are in the order of the patches of `pixel_values`."""

    input_ids: list[int]
    labels: list[int]
    pixel_values: list[torch.Tensor]
    tgt_sizes: torch.Tensor
    temporal_ids: list[list[int]]
    kind_labels: torch.Tensor
    color_labels: torch.Tensor


def patch_labels_of(drawing, grid, tgt_sizes, patch_size: int):
    """Labels of all slices of one picture: the source view, then the slices row by row."""
    width, height = drawing.image.size
    crops = [(0, 0, width, height)]
    if grid is not None:
        cell_w, cell_h = width / grid[0], height / grid[1]
        crops += [
            (x * cell_w, y * cell_h, (x + 1) * cell_w, (y + 1) * cell_h)
            for y in range(grid[1])
            for x in range(grid[0])
        ]
    return [patch_labels(drawing, crop, tuple(size), patch_size) for crop, size in zip(crops, tgt_sizes, strict=True)]


class ConversationEncoder:
    """Encodes samples for one checkpoint's image processor and tokenizer."""

    def __init__(self, image_processor, tokenizer):
        self.image_processor = image_processor
        self.tokenizer = tokenizer

    def placeholder(self, sample: Sample) -> str:
        make = self.image_processor.get_slice_image_placeholder
        if sample.temporal_ids is None:
            return make(sample.images[0].size, 0, max_slice_nums=sample.max_slice_nums)
        unit = make(sample.images[0].size, max_slice_nums=1, use_image_id=False)
        return "\n".join([unit] * len(sample.temporal_ids))

    def parts(self, sample: Sample) -> list[tuple[str, bool]]:
        """Pieces of the rendered conversation, and whether the model has to write them."""
        parts, question_start = [], self.placeholder(sample) + "\n"
        for turn in sample.turns:
            prompt = f"<|im_start|>user\n{question_start}{turn.question}<|im_end|>\n<|im_start|>assistant\n"
            answer = f"{turn.answer}<|im_end|>"
            if turn.thought is not None:
                answer = f"<think>\n{turn.thought}\n</think>\n\n{answer}"
            elif turn is sample.turns[-1]:  # the template cuts the thoughts of earlier turns, empty ones too
                prompt += NO_THOUGHT
            parts += [(prompt, False), (answer, True), ("\n", False)]
            question_start = ""
        return parts

    def encode(self, sample: Sample) -> Example:
        parts = self.parts(sample)
        input_ids, labels = [], []
        encoded = self.tokenizer([text for text, _ in parts], add_special_tokens=False).input_ids
        for ids, (_, written) in zip(encoded, parts, strict=True):
            input_ids += ids
            labels += ids if written else [IGNORED] * len(ids)
        batch = self.image_processor(
            images=[sample.images],
            max_slice_nums=sample.max_slice_nums,
            temporal_ids=None if sample.temporal_ids is None else [sample.temporal_ids],
        )
        sizes = batch["tgt_sizes"][0]
        grid = self.image_processor.get_sliced_grid(sample.images[0].size, sample.max_slice_nums)
        per_drawing = len(sizes) // len(sample.drawings)
        dense = []
        for i, drawing in enumerate(sample.drawings):
            own = sizes[i * per_drawing : (i + 1) * per_drawing].tolist()
            dense += patch_labels_of(drawing, grid, own, self.image_processor.patch_size)
        return Example(
            input_ids=input_ids,
            labels=labels,
            pixel_values=batch["pixel_values"][0],
            tgt_sizes=sizes,
            temporal_ids=batch["temporal_ids"][0],
            kind_labels=torch.cat([torch.from_numpy(kinds) for kinds, _ in dense]),
            color_labels=torch.cat([torch.from_numpy(colors) for _, colors in dense]),
        )


def collate(examples: list[Example], pad_token_id: int) -> dict:
    """A batch for `model(**batch)`, plus the dense labels. Padded on the right; id 0 is a word and never padding."""
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id)
    labels = torch.full((len(examples), longest), IGNORED)
    attention_mask = torch.zeros((len(examples), longest), dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        labels[row, :length] = torch.tensor(example.labels)
        attention_mask[row, :length] = 1
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "labels": labels,
        "pixel_values": [example.pixel_values for example in examples],
        "tgt_sizes": [example.tgt_sizes for example in examples],
        "temporal_ids": [example.temporal_ids for example in examples],
        "kind_labels": torch.cat([example.kind_labels for example in examples]),
        "color_labels": torch.cat([example.color_labels for example in examples]),
    }


def layout_key(example: Example) -> tuple[int, int]:
    """Sorting by this puts equally long slices side by side."""
    rows, cols = example.tgt_sizes[0].tolist()
    return len(example.tgt_sizes), rows * cols


# Scenes that take the same number of views share batches.
LAYOUTS = (("shapes", "line", "lower", "sum", "chart"), ("form",), ("page",), tuple(CLIPS))


def training_batch(encoder: ConversationEncoder, mixture: Mixture, size: int, seed: int, number: int) -> dict:
    """Batch `number` of the training split: deterministic in its arguments, so any process can make any batch.

    All its samples are of one layout (picture, sliced picture, form, page or clip) and have about as many turns, so that
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
    examples = sorted((encoder.encode(sample) for sample in samples), key=layout_key)
    return collate(examples, encoder.tokenizer.pad_token_id)


def single_turns(sample: Sample) -> list[Sample]:
    """The sample's questions, each asked alone."""
    return [replace(sample, turns=[turn]) for turn in sample.turns]
