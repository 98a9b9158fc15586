"""Reinforcement learning with GRPO, thinking and fast rollouts mixed.

    minicpmv train rl --config recipes/rl.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m minicpmv.train.rl --config recipes/rl.yaml

What is special:
- the reward is accuracy + format + repetition + 1/2 of the standardised score of a reward model; a term that has nothing to
  go by (rows without answers, no `reward_model`) is left out;
- rows are prompts with an `answer`, or conversations as supervised tuning reads them, whose last answer is the expected one;
- half of the prompts of a batch are answered with a thought, half without (`thinking_share`);
- no KL term and no entropy term, so no second model in memory; no value network and no generalised advantage estimation,
  as GRPO takes the mean of a prompt's rollouts for the baseline.

Source: https://arxiv.org/abs/2509.18154.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoProcessor, set_seed
from trl import GRPOConfig
from trl.rewards import get_repetition_penalty_reward

from minicpmv.errors import one_line_errors
from minicpmv.train.common.arguments import (
    AdapterArguments,
    ArgumentsError,
    DataArguments,
    FreezeArguments,
    ModelArguments,
    check_model_name,
    parse,
)
from minicpmv.train.common.curves import LossCurves
from minicpmv.train.common.loading import load_model_and_processor, locate, train_in_float32
from minicpmv.train.grpo import HybridGRPOTrainer, check_rollouts, reward_model_term
from minicpmv.train.reward_model import RewardModelError, load_reward_model
from minicpmv.train.reward_terms import accuracy_reward, format_reward
from minicpmv.train.sft import EXPECTED_ERRORS, check, checkpoint_to_resume, load_data


@dataclass
class RLArguments(GRPOConfig):
    """TRL's GRPOConfig, whose defaults are without KL and entropy terms, and what this reward needs."""

    _argument_group_name = "training"

    thinking_share: float = field(default=0.5, metadata={"help": "Share of the prompts answered with a thought."})
    reward_model: str | None = field(
        default=None, metadata={"help": "What `minicpmv train reward` has left: a folder, or owner/name on the Hub."}
    )
    repetition_ngram_size: int = field(
        default=40, metadata={"help": "Runs of so many tokens that come again are a repetition, which costs up to 1."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "A checkpoint folder, or 'last': the newest whole one in output_dir, or a start without any."
        },
    )
    ddp_find_unused_parameters: bool | None = False  # a batch without pictures gives the tower a gradient of zero

    def __post_init__(self):
        check_rollouts(self)
        if not 0 <= self.thinking_share <= 1:
            raise ArgumentsError(f"thinking_share is {self.thinking_share}, but a share is from 0 to 1.")
        if self.repetition_ngram_size < 1:
            raise ArgumentsError(f"repetition_ngram_size is {self.repetition_ngram_size}, but has to be at least 1.")
        if self.reward_model is not None and not is_adapter(self.reward_model):
            check_model_name(self.reward_model)
        super().__post_init__()
        if "enable_thinking" in (self.chat_template_kwargs or {}):
            raise ArgumentsError("chat_template_kwargs: enable_thinking is chosen by thinking_share. Leave it out.")


def is_adapter(name: str) -> bool:
    return (Path(name).expanduser() / "adapter_config.json").is_file()


def reward_terms(args: RLArguments, has_answers: bool, dtype: str | None = None):
    """`(reward functions, weights)`: accuracy, format, repetition, and half the score of a reward model.

    Raises:
        ArgumentsError: nothing says what a good answer is.
    """
    if not (has_answers or args.reward_model):
        raise ArgumentsError(
            "Nothing says what a good answer is: the rows have neither an 'answer' nor an assistant's last message, and "
            "there is no reward_model."
        )
    terms = [format_reward, get_repetition_penalty_reward(args.repetition_ngram_size)]
    if has_answers:
        terms.insert(0, accuracy_reward)
    weights = [1.0] * len(terms)
    if args.reward_model:
        if is_adapter(args.reward_model):
            name, source = str(Path(args.reward_model).expanduser()), {"trust_remote_code": True}
        else:
            name, source = locate(ModelArguments(args.reward_model), args.trust_remote_code)
        model = load_reward_model(name, dtype=dtype or "auto", **source).to(args.device).eval()
        batch_size = args.per_device_train_batch_size
        terms.append(reward_model_term(model, AutoProcessor.from_pretrained(name, **source), batch_size))
        weights.append(0.5)
    return terms, weights


def train(model_args, adapter_args, freeze_args, data_args, args) -> HybridGRPOTrainer:
    """Train, evaluate, and leave in `args.output_dir` the model or adapter, processor, card and curves."""
    check(data_args, args)
    if data_args.on_too_long != "error":
        raise ArgumentsError(
            "on_too_long: a prompt is not cut or dropped on the way. Leave out what is too long before."
        )
    checkpoint = checkpoint_to_resume(args)
    train_dataset, eval_dataset = load_data(data_args)
    first = next(iter(train_dataset))
    if "chosen" in first:
        raise ArgumentsError("The rows are pairs of answers. Train a reward model on them: minicpmv train reward.")
    terms, weights = reward_terms(args, "messages" in first or "answer" in first, model_args.dtype)
    args.reward_weights = args.reward_weights or weights
    # With a KL term TRL loads the reference by itself, from the same folder.
    args.trust_remote_code = args.trust_remote_code or Path(model_args.model_name_or_path).expanduser().is_dir()
    set_seed(args.seed)  # an adapter starts from random weights
    model, processor = load_model_and_processor(model_args, adapter_args, freeze_args, args.trust_remote_code)
    trainer = HybridGRPOTrainer(
        model=model,
        reward_funcs=terms,
        args=args,
        thinking_share=args.thinking_share,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processor,
        callbacks=[LossCurves()],
    )
    trainer.part_learning_rates = freeze_args.learning_rates()
    trainer.card_dataset = data_args.dataset_name
    train_in_float32(trainer.model)  # GRPOTrainer makes what trains beside a 4-bit model bfloat16
    trainer.train(resume_from_checkpoint=checkpoint)
    if eval_dataset is not None and args.eval_strategy == "no":
        trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


GROUPS = (ModelArguments, AdapterArguments, FreezeArguments, DataArguments, RLArguments)


def main(argv=None):
    with one_line_errors(*EXPECTED_ERRORS, RewardModelError):
        train(*parse(GROUPS, argv, "Reinforcement learning with GRPO, thinking and fast rollouts mixed."))


if __name__ == "__main__":
    main(sys.argv[1:])
