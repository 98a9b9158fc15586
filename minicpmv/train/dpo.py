"""Direct preference optimization on pairs of answers about images and videos.

    minicpmv train dpo --config recipes/dpo.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m minicpmv.train.dpo --config recipes/dpo.yaml

What is special:
- TRL's DPOTrainer with this package's data: rows `{"prompt", "chosen", "rejected"}` of `load_conversations`, both answers
  encoded as in supervised tuning, so that several images, slices and packed videos reach both alike;
- the reference is the model before training: an untouched copy of the adapter, a second model without an adapter, or
  numbers computed beforehand (`precompute_ref_log_probs`);
- images are encoded once a pair, not four times (two answers, policy and reference), where tower and resampler rest.

Sources: https://arxiv.org/abs/2305.18290 for the loss, https://arxiv.org/abs/2509.18154 for the settings of the recipe.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import set_seed
from trl import DPOConfig, DPOTrainer

from minicpmv.checkpoint import attend_without_plans
from minicpmv.data.collator import IGNORED, ConversationCollator, EncodedRow
from minicpmv.data.formats import BadRowError, conversation_row
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
from minicpmv.train.common.errors import ArgumentsError
from minicpmv.train.common.loading import load_model_and_processor, trained_parameters
from minicpmv.train.common.run import (
    Rows,
    RunArguments,
    check,
    collator_and_rows,
    load_data,
    save,
    set_up,
    train_and_evaluate,
)
from minicpmv.train.common.trainer import TrainerMixin


REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class DPOArguments(RunArguments, DPOConfig):
    """TRL's DPOConfig with the defaults of this model."""

    other_data_options = (
        "model_init_kwargs",
        "dataset_num_proc",
        "truncation_mode",
        "padding_free",
        "pad_to_multiple_of",
    )

    max_length: int | None = option(
        None, "Maximum number of tokens of prompt and answer together (default: the model's positions)."
    )


@dataclass
class EncodedPair:
    chosen: EncodedRow
    rejected: EncodedRow
    reference: dict[str, float]

    @property
    def labels(self) -> list[int]:
        return self.chosen.labels + self.rejected.labels


@dataclass
class PreferenceCollator(ConversationCollator):
    """Rows `{"prompt", "chosen", "rejected"}` -> a batch for DPOTrainer: all chosen answers, then all rejected ones.

    In place of labels the batch has a `completion_mask` [2B, L], 1 on the last assistant's turn. A pair that is too long is
    dropped whole.
    """

    pad_pixel_values: bool = False  # both answers share their images' slices; padded tensors would be copies

    def encode(self, row: dict) -> EncodedPair:  # type: ignore[override]  # two rows
        row = conversation_row(row)
        if "chosen" not in row:
            raise BadRowError(
                f"the row is not a preference, but has {sorted(row)}; it needs 'prompt', 'chosen' and 'rejected'"
            )
        prompt, *answers = (row.pop(name) for name in ("prompt", "chosen", "rejected"))
        chosen, rejected = (
            super(PreferenceCollator, self).encode(row | {"messages": prompt + answer, "train_on": "last"})
            for answer in answers
        )
        rejected.pixel_values = chosen.pixel_values
        return EncodedPair(chosen, rejected, {name: row[name] for name in REFERENCE_COLUMNS if name in row})

    def pad(self, encoded: Sequence[EncodedPair]) -> dict[str, Any]:
        batch = super().pad([pair.chosen for pair in encoded] + [pair.rejected for pair in encoded])
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        return batch | {
            name: torch.tensor([pair.reference[name] for pair in encoded]) for name in encoded[0].reference
        }


class PreferenceTrainer(TrainerMixin, DPOTrainer):
    """DPOTrainer on rows that the collator encodes."""

    method = "direct preference optimization"

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    @cached_property
    def shares_features(self) -> bool:
        """Whether policy and reference see the same image features, and the tower can be called by itself."""
        trained = trained_parameters(self.model)
        return not (trained["tower"] or trained["resampler"] or self.is_deepspeed_enabled or self.is_fsdp_enabled)

    def compute_loss(self, model: torch.nn.Module, inputs: dict, *args: Any, **kwargs: Any) -> Any:
        if "pixel_values" in inputs and self.shares_features:
            inputs = dict(inputs)
            names = self.processing_class.visual_input_names
            visual = {name: inputs.pop(name) for name in names if name in inputs}
            # The second half of the batch has the images of the first once more.
            visual = {name: value[: len(value) // 2] for name, value in visual.items()}
            with torch.no_grad():
                features = self.accelerator.unwrap_model(model).get_image_features(**visual).pooler_output
            inputs["mm_encoder_outputs"] = {"image": torch.cat([features, features])}
        return super().compute_loss(model, inputs, *args, **kwargs)


def load_pairs(data_args: DataArguments) -> tuple[Rows, Rows | None]:
    """`(training pairs, evaluation pairs or None)`.

    Raises:
        ArgumentsError: the rows are not pairs, or prompts would be shortened.
    """
    if data_args.on_too_long == "shorten":
        raise ArgumentsError(
            "on_too_long: shorten would give the two answers different prompts. Choose error or drop."
        )
    found = load_data(data_args)
    for rows in found:
        if rows is not None and "chosen" not in next(iter(rows)):
            raise ArgumentsError(
                "The rows are conversations, not pairs: they need 'prompt', 'chosen' and 'rejected'. minicpmv align feedback "
                "makes pairs."
            )
    return found


def train(
    model_args: ModelArguments,
    adapter_args: AdapterArguments,
    freeze_args: FreezeArguments,
    data_args: DataArguments,
    args: DPOArguments,
) -> PreferenceTrainer:
    """Train, evaluate, and leave in `args.output_dir` the model or adapter, processor, card and curves."""
    check(data_args, args)
    checkpoint = checkpoint_to_resume(args)
    found = load_pairs(data_args)
    set_seed(args.seed)  # an adapter starts from random weights
    model, processor = load_model_and_processor(model_args, adapter_args, freeze_args, args.trust_remote_code)
    reference = None
    if adapter_args.adapter == "none" and not args.precompute_ref_log_probs:
        reference, _ = load_model_and_processor(model_args, trust_remote_code=args.trust_remote_code)
    collator, train_dataset, eval_dataset = collator_and_rows(
        PreferenceCollator, model, processor, data_args, args, found
    )
    trainer = PreferenceTrainer(
        model=model,
        ref_model=reference,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=[LossCurves()],
    )
    set_up(trainer, freeze_args, data_args)
    train_and_evaluate(trainer, checkpoint)
    if "ref" in getattr(trainer.model, "peft_config", {}):
        trainer.model.delete_adapter("ref")  # else the reference would be saved beside the result
    save(trainer)
    return trainer


GROUPS = (ModelArguments, AdapterArguments, FreezeArguments, DataArguments, DPOArguments)


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        attend_without_plans()
        train(*parse(GROUPS, argv, "Direct preference optimization on pairs of answers."))


if __name__ == "__main__":
    main(sys.argv[1:])
