"""The road that every training command takes: options, rows, collator, training, results."""

import logging
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, TypeAlias

import datasets
from transformers import PreTrainedModel, ProcessorMixin, TrainingArguments

from minicpmv.data.collator import ConversationCollator
from minicpmv.data.formats import DataError
from minicpmv.data.load import load_conversations
from minicpmv.drawn.stream import is_description
from minicpmv.train.common.arguments import DataArguments, FreezeArguments, option
from minicpmv.train.common.errors import ArgumentsError
from minicpmv.train.common.loading import train_in_float32
from minicpmv.train.common.trainer import TrainerMixin


logger = logging.getLogger(__name__)

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset


@dataclass
class RunArguments:
    """Options of all trainers: `class SomeArguments(RunArguments, SomeConfig)` with a config of TRL."""

    _argument_group_name = "training"
    other_data_options: ClassVar[
        tuple[str, ...]
    ] = ()  # what the config offers for a reading of data that is not used here

    resume_from_checkpoint: str | None = option(
        None, "A checkpoint folder, or 'last': the newest whole one in output_dir, if there is any."
    )
    ddp_find_unused_parameters: bool | None = False  # a batch without images gives the tower a gradient of zero
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False  # a loss that is not finite is to be seen

    def __post_init__(self):
        defaults = {entry.name: entry.default for entry in fields(self) if entry.default is not MISSING}
        for name in self.other_data_options:
            if getattr(self, name) != defaults[name]:
                raise ArgumentsError(
                    f"{name} belongs to TRL's own preparation of data, which is not used here: every sample is a row of "
                    "messages that the chat template encodes. Leave it out."
                )
        super().__post_init__()


def check(data_args: DataArguments, args: TrainingArguments) -> None:
    """What the options of data and trainer have to agree on.

    Raises:
        ArgumentsError: they do not.
    """
    has_eval_data = bool(data_args.eval_dataset_name or data_args.dataset_test_split)
    if args.eval_strategy != "no" and not has_eval_data:
        raise ArgumentsError(
            f"eval_strategy is {args.eval_strategy.value!r}, but there is nothing to evaluate on. Give eval_dataset_name "
            "or dataset_test_split."
        )
    is_drawn = is_description(data_args.dataset_name)  # drawn rows are always a stream
    if (data_args.dataset_streaming or is_drawn) and args.max_steps <= 0:
        name = "dataset_streaming" if data_args.dataset_streaming else f"dataset_name {data_args.dataset_name}"
        raise ArgumentsError(f"{name} needs max_steps: a stream has no known end.")


def load_data(data_args: DataArguments) -> tuple[Rows, Rows | None]:
    """`(training rows, evaluation rows or None)`."""
    options: dict[str, Any] = {
        "image_folder": data_args.image_folder,
        "streaming": data_args.dataset_streaming,
        "on_bad_row": data_args.on_bad_row,
    }
    train = load_conversations(data_args.dataset_name, split=data_args.dataset_train_split, **options)
    if not (data_args.eval_dataset_name or data_args.dataset_test_split):
        return train, None
    source = data_args.eval_dataset_name or data_args.dataset_name
    return train, load_conversations(source, split=data_args.dataset_test_split, **options)


def usable(rows: Rows | None, collator: ConversationCollator, args: TrainingArguments) -> Rows | None:
    """The rows without those that `collator` would leave out, found before the training: the only row of a batch cannot be
    left out of it.

    Raises:
        DataError: there is no other row.
    """
    if rows is None or (collator.on_too_long != "drop" and collator.on_bad_row != "skip"):
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(collator.accepts)
    processes = args.dataloader_num_workers or None
    kept = rows.filter(collator.accepts, num_proc=processes, load_from_cache_file=False, desc="usable rows")
    if not len(kept):
        raise DataError(f"None of the {len(rows)} rows can be used; the reasons are logged above.")
    if len(kept) < len(rows):
        logger.warning("%d of %d rows are left out.", len(rows) - len(kept), len(rows))
    return kept


def collator_and_rows(
    kind: type[ConversationCollator],
    model: PreTrainedModel,
    processor: ProcessorMixin,
    data_args: DataArguments,
    args: TrainingArguments,
    found: tuple[Rows, Rows | None],
    **options: Any,
) -> tuple[ConversationCollator, Rows, Rows | None]:
    """A collator of class `kind`, and of the (training, evaluation) rows `found` those that it can use."""
    collator = kind(
        processor,
        max_length=args.max_length or model.config.max_position_embeddings,
        on_too_long=data_args.on_too_long,
        on_bad_row=data_args.on_bad_row,
        **options,
    )
    train, evaluation = (usable(rows, collator, args) for rows in found)
    return collator, train, evaluation


def set_up(trainer: TrainerMixin, freeze_args: FreezeArguments, data_args: DataArguments) -> None:
    """Give a new trainer what its config has no fields for."""
    trainer.part_learning_rates = freeze_args.learning_rates()
    trainer.dataset_name = data_args.dataset_name
    train_in_float32(trainer.model)  # TRL makes what trains beside a 4-bit model bfloat16


def train_and_evaluate(trainer: TrainerMixin, checkpoint: str | None) -> None:
    """Train, from a checkpoint or the start; then evaluate, unless that was done on the way."""
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset is not None and trainer.args.eval_strategy == "no":
        trainer.evaluate()


def save(trainer: TrainerMixin) -> None:
    """Leave model or adapter, processor and card in the output folder."""
    trainer.save_model()
    trainer.create_model_card()
