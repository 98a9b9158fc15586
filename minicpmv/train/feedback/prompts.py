"""The prompts that feedback starts from: conversations up to a question, with their images and videos."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
from PIL import Image

from minicpmv.data.collator import ROW_OPTIONS
from minicpmv.data.formats import BadRowError, conversation_row, text_of
from minicpmv.data.load import as_dataset, load_conversations
from minicpmv.errors import is_expected
from minicpmv.train.common.errors import ArgumentsError
from minicpmv.train.feedback.arguments import FeedbackArguments


@dataclass
class Prompt:
    number: int
    name: str
    messages: list[dict]  # up to a question
    options: dict  # of the processor, for this row

    @property
    def digest(self) -> str:
        """What the prompt says, but for its images."""
        said = json.dumps([self.name, [text_of(message) for message in self.messages], self.options])
        return hashlib.sha256(said.encode()).hexdigest()[:16]

    def about(self, question: str) -> list[dict]:
        """A conversation that asks `question` about the images of this prompt."""
        media = [part for message in self.messages for part in message["content"] if part["type"] != "text"]
        return [{"role": "user", "content": [*media, {"type": "text", "text": question}]}]


def load_prompts(args: FeedbackArguments) -> datasets.Dataset:
    """The rows, of any format that `load_conversations` reads, from `first_prompt` on."""
    rows = load_conversations(
        args.dataset_name, split=args.dataset_split, image_folder=args.image_folder, on_bad_row=args.on_bad_row
    )
    if isinstance(rows, datasets.IterableDataset):  # drawn rows: pairs need to be kept with their images
        end = None if args.max_prompts is None else args.first_prompt + args.max_prompts
        rows = as_dataset(list(rows if end is None else rows.take(end)))
    last = len(rows) if args.max_prompts is None else min(len(rows), args.first_prompt + args.max_prompts)
    if args.first_prompt >= last:
        raise ArgumentsError(f"first_prompt is {args.first_prompt}, but {args.dataset_name} has {len(rows)} prompts.")
    return rows.select(range(args.first_prompt, last))


def read_prompt(row: dict, number: int) -> Prompt:
    """The conversation of a row up to its last question."""
    row = conversation_row(row)
    messages = row.get("prompt") or row["messages"]
    last = max(place for place, message in enumerate(messages) if message["role"] == "user")
    options = {name: row[name] for name in ROW_OPTIONS if name in row}
    return Prompt(number, row.get("origin") or f"prompt {number}", messages[: last + 1], options)


def open_images(prompt: Prompt, load_image: Callable[[Any], Image.Image]) -> None:
    """Decode the images of a prompt, once for all questions about them.

    Args:
        load_image: that of a processor.

    Raises:
        BadRowError: one cannot be decoded.
    """
    for part in (part for message in prompt.messages for part in message["content"] if part["type"] == "image"):
        try:
            part["image"] = load_image(part["image"])
        except ValueError as error:
            if not is_expected(error):
                raise
            raise BadRowError(str(error)) from error


def batches(prompts: Iterator[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Batches of prompts that share the options of the processor; their frames may be packed differently."""
    waiting: dict[tuple[str, bool], list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        shared = {key: value for key, value in prompt.options.items() if key != "temporal_ids"}
        batch = waiting[json.dumps(shared, sort_keys=True), "temporal_ids" in prompt.options]
        batch.append(prompt)
        if len(batch) == size:
            yield list(batch)
            batch.clear()
    yield from (batch for batch in waiting.values() if batch)


def shared_options(prompts: list[Prompt]) -> dict:
    """Options of the processor for a batch with one entry for each of `prompts`."""
    options = dict(prompts[0].options)
    if "temporal_ids" in options:
        options["temporal_ids"] = [prompt.options["temporal_ids"] for prompt in prompts]
    return options
