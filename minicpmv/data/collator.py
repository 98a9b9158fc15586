"""Conversation rows -> a batch for `model(**batch)`, with labels.

What is special:
- The prompt is the processor's: what the model sees in training is, token for token, what it sees when it is asked.
- Labels are exactly what the assistant wrote, its thought and closing token included; the empty thought before a fast
  answer is part of the prompt, and earlier turns have lost their thoughts, as the chat template has it.
- Rows may be of any kind and any format of `minicpmv.data.formats`, mixed in one batch: each is encoded alone, with its own
  options, and named when something is wrong with it.
- Over-long rows are an error, dropped, or lose the text of their oldest turns; images are never cut.
- Padding is on the right with the tokenizer's pad token, and masked by length: id 0 is "!", a word like any other.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from minicpmv.data.formats import BadRowError, DataError, conversation_row
from minicpmv.errors import is_expected


logger = logging.getLogger(__name__)

IGNORED = -100
# Columns of a row that are options of the processor, for this row alone.
ROW_OPTIONS = (
    *("max_slice_nums", "use_image_id", "temporal_ids"),
    *("fps", "num_frames", "max_num_frames", "max_num_packing", "force_packing"),
)
STILL_IMAGE = [-1]  # temporal ids of a slice that is not a frame of a video


class ConversationTooLongError(DataError):
    """A row has more tokens than allowed: the message says how many, how many of them are images, and the limit."""


@dataclass
class EncodedRow:
    """One row with its labels. Visual inputs are as the processor gives them for one prompt."""

    input_ids: list[int]
    labels: list[int]
    pixel_values: list[torch.Tensor]  # slices [3, P, P * patches]
    tgt_sizes: torch.Tensor  # [slices, 2]
    temporal_ids: list[list[int]]  # one list of ids a unit


def encoded_row(inputs: Mapping[str, Any], labels: Sequence[int] = ()) -> EncodedRow:
    """The processor's inputs of one prompt, made without tensors and padding, as an [`EncodedRow`]."""
    slices = inputs["pixel_values"][0] if "pixel_values" in inputs else []
    return EncodedRow(
        input_ids=inputs["input_ids"][0],
        labels=list(labels),
        pixel_values=slices,
        tgt_sizes=inputs["tgt_sizes"][0] if slices else torch.zeros(0, 2, dtype=torch.long),
        temporal_ids=inputs["temporal_ids"][0] if "temporal_ids" in inputs else [STILL_IMAGE] * len(slices),
    )


@dataclass
class ConversationCollator:
    """Data collator for transformers' Trainer, TRL's SFTTrainer and any DataLoader (`remove_unused_columns=False`).

    Args:
        processor: the processor of the checkpoint.
        max_length: most tokens a row may have, images included; None sets no limit.
        on_too_long: "error"; "drop" leaves the row out and counts it in `dropped`; "shorten" takes text from the oldest
            turns, the oldest first. Shortened turns give no loss; images, the system's message and the last question
            with its answer stay whole.
        on_bad_row: "raise", or "skip" to leave the row out and count it in `dropped`.
        train_on: "all" assistant turns, or the "last" one. A row's column `train_on` goes first.
        pad_to_multiple_of: pad to a multiple of this many tokens.
        pad_pixel_values: give the visual inputs as tensors with one entry a row. False gives nested lists, which take
            less memory where rows differ much; but accelerate cuts into their tensors on a streaming dataset (unless
            `accelerator_config={"dispatch_batches": False}`), as it takes the first dimension of each for the batch.
        processor_options: options of the processor for all rows, such as {"fps": 2, "max_num_packing": 6}; a row's
            columns (`ROW_OPTIONS`) go first.
    """

    processor: Any
    max_length: int | None = None
    on_too_long: str = "error"
    on_bad_row: str = "raise"
    train_on: str = "all"
    pad_to_multiple_of: int | None = None
    pad_pixel_values: bool = True
    processor_options: dict = field(default_factory=dict)
    dropped: int = field(default=0, init=False)  # by this copy: each worker of a data loader has its own

    def __post_init__(self):
        _check_choice("on_too_long", self.on_too_long, ("error", "drop", "shorten"))
        _check_choice("on_bad_row", self.on_bad_row, ("raise", "skip"))
        _check_choice("train_on", self.train_on, ("all", "last"))

    def __call__(self, rows: Sequence[dict]) -> dict[str, Any]:
        """A batch of rows.

        Returns:
            dict: `input_ids`, `attention_mask` and `labels` [B, L]. With images or videos `pixel_values`
            [B, slices, 3, P, W] and `tgt_sizes` [B, slices, 2], padded with zeros; when frames are packed, `temporal_ids`
            [B, units, frames], padded with -2. Without `pad_pixel_values`, a list a row of each.

        Raises:
            BadRowError, ConversationTooLongError: naming the row.
            DataError: every row was dropped, or none has a label, so that training on the batch would change nothing.
        """
        encoded = []
        for place, row in enumerate(rows):
            try:
                encoded.append(self.encode(row))
            except ConversationTooLongError as error:
                if self.on_too_long != "drop":
                    raise ConversationTooLongError(f"{_name(row, place)}: {error}") from error
                self._drop(row, place, error)
            except ValueError as error:  # of the processor: a broken image, ids that do not fit, ...
                if not is_expected(error):
                    raise
                if self.on_bad_row != "skip":
                    raise BadRowError(f"{_name(row, place)}: {error}") from error
                self._drop(row, place, error)
        if not encoded:
            raise DataError(
                f"All {len(rows)} rows of a batch were dropped, the last ones as logged. Use larger batches, or filter the "
                "dataset before training: dataset.filter(collator.accepts)."
            )
        if all(label == IGNORED for row in encoded for label in row.labels):
            raise DataError(
                f"None of the {len(encoded)} rows of a batch has a label. Does the chat template mark the assistant's text "
                "with {% generation %}? With on_too_long='shorten', is max_length large enough?"
            )
        return self.pad(encoded)

    def accepts(self, row: dict) -> bool:
        """Whether a row can be used: good, and not too long unless it can be shortened. For `dataset.filter`."""
        try:
            self.encode(row)
        except ValueError as error:
            if not is_expected(error):
                raise
            logger.warning("%s is left out: %s", _name(row), error)
            return False
        return True

    def encode(self, row: dict) -> EncodedRow:
        """One row, of any known format, as an [`EncodedRow`]; over-long ones shortened if so asked."""
        row = conversation_row(row)
        if "messages" not in row:
            raise BadRowError(
                f"the row is not a conversation to learn from, but has {sorted(row)}; it needs 'messages'"
            )
        options = self.processor_options | {name: row[name] for name in ROW_OPTIONS if name in row}
        train_on = row.get("train_on", self.train_on)
        _check_choice("train_on", train_on, ("all", "last"))
        messages, first_turn = row["messages"], 0
        inputs = self._process(messages, options)
        if self.on_too_long == "shorten" and self._excess(inputs) > 0:
            inputs, first_turn = self._shorten(messages, options, inputs)
        if self._excess(inputs) > 0:
            ids = inputs["input_ids"][0]
            raise ConversationTooLongError(
                f"the conversation has {len(ids)} tokens, {ids.count(self.processor.image_token_id)} of them for images; "
                f"the limit is {self.max_length}. Raise max_length, choose on_too_long='drop' or 'shorten', or give fewer "
                "or smaller images (max_slice_nums) or frames (fps, max_num_packing)."
            )
        ids, labels = inputs["input_ids"][0], [IGNORED] * len(inputs["input_ids"][0])
        turns = _runs(inputs["assistant_masks"][0])[first_turn:]
        for start, stop in turns[-1:] if train_on == "last" else turns:
            labels[start:stop] = ids[start:stop]
        return encoded_row(inputs, labels)

    def _process(self, messages, options):
        return self.processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, processor_kwargs=options
        )

    def _excess(self, inputs):
        return 0 if self.max_length is None else len(inputs["input_ids"][0]) - self.max_length

    def _shorten(self, messages, options, inputs):
        """Take text from the oldest turns until the row fits, or nothing is left to take.

        Returns the inputs, and the number of the first assistant's turn that is still as it was, question and all.
        """
        last_question = max(place for place, message in enumerate(messages) if message["role"] == "user")
        messages = [message | {"content": [dict(part) for part in message["content"]]} for message in messages]
        old = [
            (place, part)
            for place, message in enumerate(messages[:last_question])
            for part in message["content"]
            if message["role"] != "system" and part["type"] == "text"
        ]
        for place, part in old:
            if messages[place]["role"] == "assistant":  # the template leaves thoughts out of earlier turns
                part["text"] = self.processor.split_thought(part["text"])[1]
        touched = first_turn = 0
        while (excess := self._excess(inputs)) > 0 and any(part["text"] for _, part in old):
            for place, part in old:
                if excess <= 0:
                    break
                offsets = self.processor.tokenizer(
                    part["text"], add_special_tokens=False, return_offsets_mapping=True
                )["offset_mapping"]
                # At least one character: a character may be several tokens.
                part["text"] = part["text"][max(1, offsets[excess][0]) :] if excess < len(offsets) else ""
                excess -= len(offsets)
                touched = max(touched, place)
            whole = next(place for place in range(touched + 1, last_question + 1) if messages[place]["role"] == "user")
            begun = [
                message | {"content": [part for part in message["content"] if part.get("text") != ""]}
                for message in messages[:whole]
            ]
            begun = [message for message in begun if message["content"]]
            first_turn = sum(message["role"] == "assistant" for message in begun)
            inputs = self._process(begun + messages[whole:], options)
        return inputs, first_turn

    def _drop(self, row, place, error):
        self.dropped += 1
        logger.warning("%s is left out (%d so far): %s", _name(row, place), self.dropped, error)

    def pad(self, encoded: Sequence[Any]) -> dict[str, Any]:
        """A batch of encoded rows."""
        length, multiple = max(len(row.input_ids) for row in encoded), self.pad_to_multiple_of or 1
        shape = (len(encoded), -(-length // multiple) * multiple)
        batch = {
            "input_ids": torch.full(shape, self.processor.tokenizer.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for place, row in enumerate(encoded):
            batch["input_ids"][place, : len(row.input_ids)] = torch.tensor(row.input_ids)
            batch["attention_mask"][place, : len(row.input_ids)] = 1
            batch["labels"][place, : len(row.input_ids)] = torch.tensor(row.labels)
        if any(row.pixel_values for row in encoded):
            pad = self.processor.pad_visual_inputs
            batch |= pad([vars(row) for row in encoded]) if self.pad_pixel_values else _as_lists(encoded)
        return batch


def _as_lists(encoded: Sequence[EncodedRow]) -> dict[str, list]:
    names = ["pixel_values", "tgt_sizes"]
    if any(unit != STILL_IMAGE for row in encoded for unit in row.temporal_ids):
        names.append("temporal_ids")
    return {name: [getattr(row, name) for row in encoded] for name in names}


def _runs(mask):
    """[(start, stop)] of the runs of ones."""
    edges = torch.tensor([0, *mask, 0]).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def _name(row, place=None):
    """How messages call a row: by where it came from, its id, or its place in the batch."""
    found = [str(row[name]) for name in ("origin", "id") if isinstance(row, dict) and row.get(name) is not None]
    if not found and place is not None:
        found = [f"place {place} of the batch"]
    return f"Row {', '.join(found)}" if found else "A row"


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}")
