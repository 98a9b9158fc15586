"""Supervised fine-tuning on conversations with pictures and videos.

    minicpmv train sft --config recipes/sft_lora.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m minicpmv.train.sft --config recipes/sft_lora.yaml

What is special:
- TRL's SFTTrainer (a Trainer of transformers, whose loss needs no logits of the whole vocabulary at once) with this
  package's data: `load_conversations` reads the rows, `ConversationCollator` makes prompt and labels;
- a row of a batch is one conversation, whole; `padding_free: true` puts those of a batch side by side in one row;
- `resume_from_checkpoint: last` goes on from the newest whole checkpoint, or starts: the same command after every stop.
"""

import json
import logging
import re
import sys
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path

import datasets
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import SFTConfig, SFTTrainer

from minicpmv.data.collator import (
    ConversationCollator,
    ConversationTooLongError,
    EmptyBatchError,
    NothingToLearnError,
)
from minicpmv.data.formats import BadRowError
from minicpmv.data.load import ConversationSourceError, load_conversations
from minicpmv.drawn.stream import SyntheticDataError, is_description
from minicpmv.errors import one_line_errors
from minicpmv.train.common.arguments import (
    AdapterArguments,
    ArgumentsError,
    DataArguments,
    FreezeArguments,
    ModelArguments,
    parse,
)
from minicpmv.train.common.card import write_card
from minicpmv.train.common.curves import LossCurves
from minicpmv.train.common.loading import PartLearningRates, load_model_and_processor, train_in_float32


logger = logging.getLogger(__name__)

# What SFTConfig offers for its own reading of data, which is not used here.
OTHER_DATA_OPTIONS = (
    *("model_init_kwargs", "chat_template_path", "eos_token", "pad_token", "dataset_text_field", "dataset_num_proc"),
    *("truncation_mode", "shuffle_dataset", "packing", "packing_strategy", "eval_packing"),
    *("completion_only_loss", "assistant_only_loss"),
)


@dataclass
class SFTArguments(SFTConfig):
    """TRL's SFTConfig with the defaults of this model."""

    _argument_group_name = "training"

    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a sample, pictures included; what the model has positions for without."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or 'last': the newest whole one in output_dir, or a start without any."
        },
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "The samples of a batch in one row without padding; each attends to itself alone."},
    )
    # A batch without pictures gives tower and resampler a gradient of zero, so none goes unused.
    ddp_find_unused_parameters: bool | None = False
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False  # a loss that is no number is to be seen

    def __post_init__(self):
        defaults = {entry.name: entry.default for entry in fields(SFTConfig) if entry.default is not MISSING}
        for name in OTHER_DATA_OPTIONS:
            if getattr(self, name) != defaults[name]:
                raise ArgumentsError(
                    f"{name} is an option of SFTTrainer's own data preparation, which is not used here: every sample is "
                    "a row of messages, encoded by the chat template, with the loss on the assistant's text. (Instead of "
                    "packing there is padding_free.)"
                )
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


class ConversationTrainer(PartLearningRates, SFTTrainer):
    """SFTTrainer that writes this package's card where TRL would write its own."""

    card_dataset: str | None = None

    def create_model_card(self, *args, **kwargs):
        write_card(self, "supervised fine-tuning", self.card_dataset)


def check(data_args: DataArguments, args: SFTArguments) -> None:
    """What the data and the trainer's options have to agree on."""
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


def checkpoint_to_resume(args) -> str | None:
    """The checkpoint that `resume_from_checkpoint` names, or None.

    Raises:
        ArgumentsError: it is no whole checkpoint, or the output folder has some and nothing was said about them.
    """
    whole = {
        int(folder.name.removeprefix("checkpoint-")): str(folder)
        for folder in Path(args.output_dir).glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", folder.name) and is_whole(folder)
    }
    if args.resume_from_checkpoint == "last":
        return whole[max(whole)] if whole else None
    if args.resume_from_checkpoint is not None:
        if not is_whole(Path(args.resume_from_checkpoint)):
            raise ArgumentsError(
                f"resume_from_checkpoint: {args.resume_from_checkpoint} is no whole checkpoint. Name another, or 'last'."
            )
        return args.resume_from_checkpoint
    if whole:
        raise ArgumentsError(
            f"output_dir: {args.output_dir} holds checkpoints of an earlier run. Go on from them with "
            "resume_from_checkpoint: last, or take another folder."
        )
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the state of the trainer is the last file."""
    try:
        return bool(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def load_data(data_args: DataArguments):
    """`(training rows, evaluation rows or None)`."""
    options = {
        "image_folder": data_args.image_folder,
        "streaming": data_args.dataset_streaming,
        "on_bad_row": data_args.on_bad_row,
    }
    train = load_conversations(data_args.dataset_name, split=data_args.dataset_train_split, **options)
    if not (data_args.eval_dataset_name or data_args.dataset_test_split):
        return train, None
    source = data_args.eval_dataset_name or data_args.dataset_name
    return train, load_conversations(source, split=data_args.dataset_test_split, **options)


def usable(rows, collator: ConversationCollator, args):
    """The rows without those that `collator` would leave out, found before the training: the only row of a batch cannot be
    left out of it.

    Raises:
        EmptyBatchError: there is no other row.
    """
    if rows is None or (collator.on_too_long != "drop" and collator.on_bad_row != "skip"):
        return rows
    if isinstance(rows, datasets.IterableDataset):
        return rows.filter(collator.accepts)
    processes = args.dataloader_num_workers or None
    kept = rows.filter(collator.accepts, num_proc=processes, load_from_cache_file=False, desc="usable rows")
    if not len(kept):
        raise EmptyBatchError(f"None of the {len(rows)} rows can be used; the reasons are logged above.")
    if len(kept) < len(rows):
        logger.warning("%d of %d rows are left out.", len(rows) - len(kept), len(rows))
    return kept


def collator_and_rows(kind, model, processor, data_args, args, found, **options):
    """A collator of class `kind`, and of the (training, evaluation) rows `found` those that it can use."""
    collator = kind(
        processor,
        max_length=args.max_length or model.config.max_position_embeddings,
        on_too_long=data_args.on_too_long,
        on_bad_row=data_args.on_bad_row,
        **options,
    )
    return collator, *(usable(rows, collator, args) for rows in found)


def set_up(trainer, freeze_args, data_args) -> None:
    """What this package adds to a trainer of TRL."""
    trainer.part_learning_rates = freeze_args.learning_rates()
    trainer.card_dataset = data_args.dataset_name
    train_in_float32(trainer.model)  # TRL makes what trains beside a 4-bit model bfloat16


def train_and_evaluate(trainer, checkpoint: str | None) -> None:
    """Train, from a checkpoint or the start; then evaluate, if that was not done on the way."""
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.eval_dataset is not None and trainer.args.eval_strategy == "no":
        trainer.evaluate()


def join_rows(collator, rows) -> dict:
    """The batch of `collator` in one row [1, all tokens]: positions begin anew with each sample, which keeps attention apart."""
    batch = collator(rows)
    is_token = batch.pop("attention_mask").bool()
    joined = {name: batch[name][is_token][None] for name in ("input_ids", "labels")}
    joined["position_ids"] = (is_token.cumsum(1) - 1)[is_token][None]
    for name in ("pixel_values", "tgt_sizes", "temporal_ids"):
        if name in batch:
            joined[name] = batch[name].flatten(0, 1)[None]  # the model passes over the places that padding fills
    return joined


def make_trainer(model_args, adapter_args, freeze_args, data_args, args) -> ConversationTrainer:
    """Data, model and collator in a trainer that is ready to run."""
    found = load_data(data_args)
    set_seed(args.seed)  # an adapter starts from random weights
    model, processor = load_model_and_processor(model_args, adapter_args, freeze_args, args.trust_remote_code)
    padding = args.pad_to_multiple_of
    collator, train_dataset, eval_dataset = collator_and_rows(
        ConversationCollator, model, processor, data_args, args, found, pad_to_multiple_of=padding
    )
    if args.padding_free:
        collator = partial(join_rows, collator)
        args.padding_free = False  # SFTTrainer would insist on its own collator
    trainer = ConversationTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=[LossCurves()],
    )
    set_up(trainer, freeze_args, data_args)
    return trainer


def train(model_args, adapter_args, freeze_args, data_args, args) -> ConversationTrainer:
    """Train, evaluate, and leave in `args.output_dir` the model or adapter, processor, card and curves."""
    check(data_args, args)
    checkpoint = checkpoint_to_resume(args)
    trainer = make_trainer(model_args, adapter_args, freeze_args, data_args, args)
    train_and_evaluate(trainer, checkpoint)
    trainer.save_model()
    trainer.create_model_card()
    return trainer


GROUPS = (ModelArguments, AdapterArguments, FreezeArguments, DataArguments, SFTArguments)
EXPECTED_ERRORS = (
    ArgumentsError,
    BadRowError,
    ConversationSourceError,
    ConversationTooLongError,
    EmptyBatchError,
    NothingToLearnError,
    SyntheticDataError,
)


def main(argv=None):
    with one_line_errors(*EXPECTED_ERRORS):
        train(*parse(GROUPS, argv, "Supervised fine-tuning: full, LoRA, QLoRA, DoRA."))


if __name__ == "__main__":
    main(sys.argv[1:])
