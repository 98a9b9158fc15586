"""A visual reward model from pairs of answers.

    minicpmv train reward --config recipes/reward.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m minicpmv.train.reward --config recipes/reward.yaml

What is special:
- TRL's RewardTrainer, with its Bradley-Terry loss, on `minicpmv.train.reward_model` and this package's data: rows
  `{"prompt", "chosen", "rejected"}`, as `minicpmv align feedback` makes them;
- both answers lose their thoughts, so that the model learns to judge what it will be shown: final answers;
- the value head always trains, beside an adapter too, and is saved with it. `minicpmv train rl` takes either folder.

Sources: https://arxiv.org/abs/2009.01325 for the loss, https://arxiv.org/abs/2509.18154 for a reward model that sees final
answers only.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin, set_seed
from trl import RewardConfig, RewardTrainer

from minicpmv.checkpoint import attend_without_plans
from minicpmv.data.formats import conversation_row, text_of
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
    save,
    set_up,
    train_and_evaluate,
)
from minicpmv.train.common.trainer import TrainerMixin
from minicpmv.train.dpo import EncodedPair, PreferenceCollator, load_pairs
from minicpmv.train.reward_model import RewardModel, load_reward_model
from minicpmv.train.reward_terms import final_answer


@dataclass
class RewardArguments(RunArguments, RewardConfig):
    """TRL's RewardConfig with the defaults of this model."""

    other_data_options = ("model_init_kwargs", "chat_template_path", "eos_token", "pad_token", "dataset_num_proc")

    max_length: int | None = option(
        None, "Maximum number of tokens of prompt and answer together (default: the model's positions)."
    )


class FinalAnswerCollator(PreferenceCollator):
    """Rows `{"prompt", "chosen", "rejected"}` -> a batch for RewardTrainer: all chosen final answers, then all rejected."""

    def encode(self, row: dict) -> EncodedPair:  # type: ignore[override]  # two rows
        row = conversation_row(row)
        for name in row.keys() & {"chosen", "rejected"}:
            answer = final_answer(text_of(row[name][-1]))
            row[name] = [*row[name][:-1], {"role": "assistant", "content": answer}]
        return super().encode(row)

    def pad(self, encoded: Sequence[EncodedPair]) -> dict[str, Any]:
        batch = super().pad(encoded)
        del batch["completion_mask"]  # the score is of the whole
        return batch


class VisualRewardTrainer(TrainerMixin, RewardTrainer):
    """RewardTrainer on rows that the collator encodes. `processing_class` is the processor."""

    method = "learning to score answers (Bradley-Terry)"

    def __init__(self, *args: Any, processing_class: ProcessorMixin, **kwargs: Any):
        super().__init__(*args, processing_class=processing_class.tokenizer, **kwargs)
        self.processing_class = processing_class  # checkpoints hold all of it

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def train(
    model_args: ModelArguments,
    adapter_args: AdapterArguments,
    freeze_args: FreezeArguments,
    data_args: DataArguments,
    args: RewardArguments,
) -> VisualRewardTrainer:
    """Train, evaluate, and leave in `args.output_dir` the reward model or its adapter, processor, card and curves."""
    check(data_args, args)
    checkpoint = checkpoint_to_resume(args)
    found = load_pairs(data_args)
    set_seed(args.seed)  # the head starts from random weights
    model, processor = load_model_and_processor(
        model_args, adapter_args, freeze_args, args.trust_remote_code, load=new_reward_model
    )
    padding = args.pad_to_multiple_of
    collator, train_dataset, eval_dataset = collator_and_rows(
        FinalAnswerCollator, model, processor, data_args, args, found, pad_to_multiple_of=padding
    )
    trainer = VisualRewardTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=collator,
        processing_class=processor,
        callbacks=[LossCurves()],
    )
    set_up(trainer, freeze_args, data_args)
    train_and_evaluate(trainer, checkpoint)
    save(trainer)
    return trainer


def new_reward_model(pretrained_model_name_or_path: str, **kwargs: Any) -> RewardModel:
    return load_reward_model(pretrained_model_name_or_path, new_head=True, **kwargs)


GROUPS = (ModelArguments, AdapterArguments, FreezeArguments, DataArguments, RewardArguments)


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        attend_without_plans()
        train(*parse(GROUPS, argv, "A visual reward model from pairs of answers."))


if __name__ == "__main__":
    main(sys.argv[1:])
