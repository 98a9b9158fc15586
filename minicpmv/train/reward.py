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
from dataclasses import MISSING, dataclass, field, fields

from transformers import set_seed
from trl import RewardConfig, RewardTrainer

from minicpmv.data.formats import conversation_row, text_of
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
from minicpmv.train.common.loading import PartLearningRates, load_model_and_processor
from minicpmv.train.dpo import PreferenceCollator, load_pairs
from minicpmv.train.reward_model import load_reward_model
from minicpmv.train.reward_terms import final_answer
from minicpmv.train.sft import (
    EXPECTED_ERRORS,
    check,
    checkpoint_to_resume,
    collator_and_rows,
    set_up,
    train_and_evaluate,
)


# What RewardConfig offers for its own reading of data, which is not used here.
OTHER_DATA_OPTIONS = ("model_init_kwargs", "chat_template_path", "eos_token", "pad_token", "dataset_num_proc")


@dataclass
class RewardArguments(RewardConfig):
    """TRL's RewardConfig with the defaults of this model."""

    _argument_group_name = "training"

    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of prompt and answer; what the model has positions for without."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or 'last': the newest whole one in output_dir, or a start without any."
        },
    )
    ddp_find_unused_parameters: bool | None = False  # a batch without pictures gives the tower a gradient of zero
    remove_unused_columns: bool = False

    def __post_init__(self):
        defaults = {entry.name: entry.default for entry in fields(RewardConfig) if entry.default is not MISSING}
        for name in OTHER_DATA_OPTIONS:
            if getattr(self, name) != defaults[name]:
                raise ArgumentsError(
                    f"{name} is an option of RewardTrainer's own data preparation, which is not used here."
                )
        super().__post_init__()


class FinalAnswerCollator(PreferenceCollator):
    """Rows `{"prompt", "chosen", "rejected"}` -> a batch for RewardTrainer: all chosen final answers, then all rejected."""

    def encode(self, row):
        row = conversation_row(row)
        for name in row.keys() & {"chosen", "rejected"}:
            answer = final_answer(text_of(row[name][-1]))
            row[name] = [*row[name][:-1], {"role": "assistant", "content": answer}]
        return super().encode(row)

    def _pad(self, encoded):
        batch = super()._pad(encoded)
        del batch["completion_mask"]  # the score is of the whole
        return batch


class VisualRewardTrainer(PartLearningRates, RewardTrainer):
    """RewardTrainer on rows that the collator encodes, with this package's card. `processing_class` is the processor."""

    card_dataset: str | None = None

    def __init__(self, *args, processing_class, **kwargs):
        super().__init__(*args, processing_class=processing_class.tokenizer, **kwargs)
        self.processing_class = processing_class  # checkpoints hold all of it

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset

    def create_model_card(self, *args, **kwargs):
        write_card(self, "learning to score answers (Bradley-Terry)", self.card_dataset)


def train(model_args, adapter_args, freeze_args, data_args, args) -> VisualRewardTrainer:
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
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def new_reward_model(name, **kwargs):
    return load_reward_model(name, new_head=True, **kwargs)


GROUPS = (ModelArguments, AdapterArguments, FreezeArguments, DataArguments, RewardArguments)


def main(argv=None):
    with one_line_errors(*EXPECTED_ERRORS):
        train(*parse(GROUPS, argv, "A visual reward model from pairs of answers."))


if __name__ == "__main__":
    main(sys.argv[1:])
