"""Supervised fine-tuning on conversations with images and videos.

    minicpmv train sft --config recipes/sft_lora.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m minicpmv.train.sft --config recipes/sft_lora.yaml

What is special:
- TRL's SFTTrainer (a Trainer of transformers, whose loss needs no logits of the whole vocabulary at once) with this
  package's data: `load_conversations` reads the rows, `ConversationCollator` makes prompt and labels;
- a row of a batch is one whole conversation; `padding_free: true` puts those of a batch side by side in one row;
- `resume_from_checkpoint: last` goes on from the newest whole checkpoint, or starts: the same command after every stop.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from minicpmv.checkpoint import attend_without_plans
from minicpmv.data.collator import ConversationCollator
from minicpmv.errors import one_line_errors
from minicpmv.train.common.arguments import (
    AdapterArguments,
    DataArguments,
    FreezeArguments,
    ModelArguments,
    option,
    parse,
)
from minicpmv.train.common.checkpoints import checkpoint_to_resume
from minicpmv.train.common.curves import LossCurves
from minicpmv.train.common.loading import load_model_and_processor
from minicpmv.train.common.run import (
    RunArguments,
    check,
    collator_and_rows,
    load_data,
    save,
    set_up,
    train_and_evaluate,
)
from minicpmv.train.common.trainer import TrainerMixin


@dataclass
class SFTArguments(RunArguments, SFTConfig):
    """TRL's SFTConfig with the defaults of this model."""

    other_data_options = (
        *(
            "model_init_kwargs",
            "chat_template_path",
            "eos_token",
            "pad_token",
            "dataset_text_field",
            "dataset_num_proc",
        ),
        *("truncation_mode", "shuffle_dataset", "packing", "packing_strategy", "eval_packing"),
        *("completion_only_loss", "assistant_only_loss"),
    )

    max_length: int | None = option(
        None, "Maximum number of tokens of a sample, those of images included (default: the model's positions)."
    )
    padding_free: bool = option(
        False, "Put the samples of a batch into one row without padding; each still attends only to itself."
    )

    def __post_init__(self):
        self.dataset_kwargs = {"skip_prepare_dataset": True}
        super().__post_init__()


class ConversationTrainer(TrainerMixin, SFTTrainer):
    """SFTTrainer on rows that the collator encodes."""

    method = "supervised fine-tuning"


def join_rows(collator: ConversationCollator, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    """The batch of `collator` in one row [1, all tokens]: positions begin anew with each sample, which keeps attention apart."""
    batch = collator(rows)
    is_token = batch.pop("attention_mask").bool()
    joined = {name: batch[name][is_token][None] for name in ("input_ids", "labels")}
    joined["position_ids"] = (is_token.cumsum(1) - 1)[is_token][None]
    for name in collator.processor.visual_input_names:
        if name in batch:
            joined[name] = batch[name].flatten(0, 1)[None]  # the model passes over the places that padding fills
    return joined


def make_trainer(
    model_args: ModelArguments,
    adapter_args: AdapterArguments,
    freeze_args: FreezeArguments,
    data_args: DataArguments,
    args: SFTArguments,
) -> ConversationTrainer:
    """Data, model and collator in a trainer that is ready to run."""
    found = load_data(data_args)
    set_seed(args.seed)  # an adapter starts from random weights
    model, processor = load_model_and_processor(model_args, adapter_args, freeze_args, args.trust_remote_code)
    padding = args.pad_to_multiple_of
    collator, train_dataset, eval_dataset = collator_and_rows(
        ConversationCollator, model, processor, data_args, args, found, pad_to_multiple_of=padding
    )
    joins, args.padding_free = args.padding_free, False  # SFTTrainer would insist on its own collator
    trainer = ConversationTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=partial(join_rows, collator) if joins else collator,
        processing_class=processor,
        callbacks=[LossCurves()],
    )
    set_up(trainer, freeze_args, data_args)
    return trainer


def train(
    model_args: ModelArguments,
    adapter_args: AdapterArguments,
    freeze_args: FreezeArguments,
    data_args: DataArguments,
    args: SFTArguments,
) -> ConversationTrainer:
    """Train, evaluate, and leave in `args.output_dir` the model or adapter, processor, card and curves."""
    check(data_args, args)
    checkpoint = checkpoint_to_resume(args)
    trainer = make_trainer(model_args, adapter_args, freeze_args, data_args, args)
    train_and_evaluate(trainer, checkpoint)
    save(trainer)
    return trainer


GROUPS = (ModelArguments, AdapterArguments, FreezeArguments, DataArguments, SFTArguments)


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        attend_without_plans()
        train(*parse(GROUPS, argv, "Supervised fine-tuning: full, LoRA, QLoRA, DoRA."))


if __name__ == "__main__":
    main(sys.argv[1:])
