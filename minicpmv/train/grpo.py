"""Reinforcement learning with GRPO: images and videos, thinking and fast rollouts mixed.

    minicpmv train rl --config recipes/rl.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml -m minicpmv.train.grpo --config recipes/rl.yaml

What is special:
- the reward is accuracy + format + repetition + 1/2 of the standardized score of a reward model; a term that has nothing to
  go by (rows without answers, no `reward_model`) is left out. The score is standardized over all rollouts of a batch, of all
  processes;
- the mode is chosen for each group of rollouts of one prompt, so that advantages compare like with like; half of the groups
  think (`thinking_share`). It is recorded: in the rows that reward functions see, in the completions table and the metrics;
- a prompt is encoded once for its group, by the processor, with its row's own options; images and videos go on as padded
  tensors, one entry a rollout, to `generate` and to the log-probabilities alike;
- reward functions get the text as it was written, thought included, whatever the tokenizer would parse out of it.

There is no KL term, no value network and no generalized advantage estimation here, and none is needed: the advantage of a
rollout is its reward relative to its own group (https://arxiv.org/abs/2402.03300). The last two belong to PPO.

TRL has no public hook for visual inputs that are more than a list of images, so the trainer overrides five of its private
methods; `pyproject.toml` bounds TRL for that reason.

Source: https://arxiv.org/abs/2509.18154 for hybrid modes and rewards.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import floor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin, set_seed
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import get_repetition_penalty_reward

from minicpmv.checkpoint import attend_without_plans, source_of
from minicpmv.data.collator import ROW_OPTIONS, EncodedRow, encoded_row
from minicpmv.data.formats import CONVERSATION_COLUMNS, MEDIA_COLUMNS, BadRowError, conversation_row, text_of
from minicpmv.errors import is_expected, one_line_errors
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
from minicpmv.train.common.loading import load_model_and_processor
from minicpmv.train.common.names import check_model_name
from minicpmv.train.common.run import RunArguments, check, load_data, save, set_up, train_and_evaluate
from minicpmv.train.common.trainer import TrainerMixin
from minicpmv.train.reward_model import RewardModel, load_reward_model, score_answers
from minicpmv.train.reward_terms import accuracy_reward, final_answer, format_reward, standardized


def check_rollouts(args: GRPOConfig) -> None:
    """Refuse ways to generate that cannot carry this model's visual inputs.

    Raises:
        ArgumentsError: one of them is asked for.
    """
    if args.use_vllm or args.use_transformers_continuous_batching:
        raise ArgumentsError(
            "use_vllm and use_transformers_continuous_batching cannot take this model's images and packed videos from the "
            "trainer: leave both off, so that the model's own generate makes the rollouts."
        )


@dataclass
class RLArguments(RunArguments, GRPOConfig):
    """TRL's GRPOConfig, whose defaults are without KL and entropy terms, and what this reward needs."""

    thinking_share: float = option(0.5, "Share of the prompts that are answered with a thought, from 0 to 1.")
    reward_model: str | None = option(
        None, "A reward model that `minicpmv train reward` made: its folder, or owner/name on the Hub."
    )
    repetition_ngram_size: int = option(
        40, "Length in tokens of the runs that count as repetition when they occur again; repetition costs up to 1."
    )

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


def question_row(row: dict) -> dict:
    """A row of any format of `minicpmv.data.formats` as a question: `prompt`, with its images inside, and `answer`.

    The answer is that of the row, or the last one of a whole conversation, without its thought; None where there is none.

    Raises:
        BadRowError: the row is not a question.
    """
    conversation = conversation_row(row)
    answer = row.get("answer")
    if "messages" in conversation:
        *conversation["prompt"], last = conversation["messages"]
        answer = final_answer(text_of(last)) if answer is None else answer
    if "prompt" not in conversation or "chosen" in conversation:
        raise BadRowError(
            f"the row is not a question, but has {sorted(conversation)}; it needs 'prompt' or 'messages'"
        )
    if not isinstance(answer, str | None):
        raise BadRowError(f"'answer' is text, not {answer!r}")
    taken = {*CONVERSATION_COLUMNS, *MEDIA_COLUMNS}
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {"prompt": conversation["prompt"], "answer": answer}


def reward_model_term(
    model: RewardModel, processor: ProcessorMixin, batch_size: int = 8
) -> Callable[..., list[float | None]]:
    """A reward function of TRL: the score of each final answer by a reward model, None where there is no answer."""

    def reward_model_score(prompts, completions, enable_thinking, **columns):
        scores, given = [None] * len(prompts), []
        for place, (prompt, completion, thinks) in enumerate(zip(prompts, completions, enable_thinking, strict=True)):
            answer = final_answer(completion[0]["content"], thinks)
            options = {name: columns[name][place] for name in ROW_OPTIONS if name in columns}
            if answer:
                given.append((place, prompt, answer, _given(options)))
        if given:
            places, *inputs = map(list, zip(*given, strict=True))
            found = score_answers(model, processor, *inputs, batch_size=batch_size)
            for place, score in zip(places, found.tolist(), strict=True):
                scores[place] = score
        return scores

    return reward_model_score


class HybridGRPOTrainer(TrainerMixin, GRPOTrainer):
    """[`trl.GRPOTrainer`] for this model.

    Args:
        thinking_share: share of the groups that think, 0 to 1.
        model, reward_funcs, args, kwargs: those of [`trl.GRPOTrainer`]. Rows are as [`question_row`] reads them, and may have
            options of the processor. Reward functions get `answer` and `enable_thinking` beside the other columns, and
            each completion as one message with all that was written.

    Raises:
        ArgumentsError: vLLM was asked for, or continuous batching.
    """

    method = "reinforcement learning (GRPO)"

    def __init__(
        self,
        model: PreTrainedModel,
        reward_funcs: list[Callable],
        args: GRPOConfig,
        thinking_share: float = 0.5,
        **kwargs: Any,
    ):
        check_rollouts(args)
        super().__init__(model, reward_funcs, args, **kwargs)
        self.thinking_share = thinking_share
        self._groups_begun: dict[str, int] = defaultdict(int)  # in training and in evaluation
        self._encoded: list[EncodedRow] = []  # the prompt of each rollout of the batch in work
        self._visual_inputs: dict[str, torch.Tensor] = {}  # of the same, as tensors

    # ---- rollouts ----

    def _generate_and_score_completions(self, inputs):
        rows, self._encoded, by_group = [], [], {}
        for row, group in zip(inputs, self._groups(len(inputs)), strict=True):
            row = question_row(row) | {"enable_thinking": self._thinks(group)}
            if group not in by_group:
                by_group[group] = self._encode(row)
            rows.append(row)
            self._encoded.append(by_group[group])
        # Rows of a stream may lack a column, and TRL looks at the first row alone.
        columns = dict.fromkeys(chain.from_iterable(rows))
        rows = [{name: row.get(name) for name in columns} for row in rows]
        modes = [row["enable_thinking"] for row in rows]
        self._log_completion_extra("enable_thinking", modes)
        self._log_metric("thinking_share", sum(modes) / len(modes))
        return super()._generate_and_score_completions(rows) | self._visual_inputs

    def _groups(self, rollouts: int) -> list[int]:
        """The group of each of this process's rollouts: its number since the start, over all processes."""
        mode, size = ("train", self.num_generations) if self.model.training else ("eval", self.num_generations_eval)
        first = self.accelerator.process_index * rollouts
        groups = [self._groups_begun[mode] + (first + place) // size for place in range(rollouts)]
        self._groups_begun[mode] += rollouts * self.accelerator.num_processes // size
        return groups

    def _thinks(self, group: int) -> bool:
        # Spread evenly: a group thinks where the share of all groups so far passes a whole number.
        return floor((group + 1) * self.thinking_share) > floor(group * self.thinking_share)

    def _encode(self, row) -> EncodedRow:
        try:
            return encoded_row(self._process(row))
        except ValueError as error:  # of the processor: a broken image, a prompt that is too long, ...
            if not is_expected(error):
                raise
            raise BadRowError(f"Row {row.get('origin', row['prompt'])}: {error}") from error

    def _process(self, row):
        return self.processing_class.apply_chat_template(
            row["prompt"],
            add_generation_prompt=True,
            enable_thinking=row["enable_thinking"],
            tokenize=True,
            return_dict=True,
            processor_kwargs={
                # A longer prompt is an error: it would leave no room for the answer.
                "max_length": self.model.config.max_position_embeddings - self.max_completion_length,
                **_given({name: row.get(name) for name in ROW_OPTIONS}),
            },
            **self.chat_template_kwargs,
        )

    def _tokenize_prompts(self, prompts):
        visual = self.processing_class.pad_visual_inputs([vars(row) for row in self._encoded])
        self._visual_inputs = self._prepare_input(visual)
        # No list of images: for those TRL would call the processor once more, in the way of other models.
        return [row.input_ids for row in self._encoded], None, self._visual_inputs

    # ---- log-probabilities ----

    def _compute_loss(self, model, inputs):
        self._visual_inputs = {
            name: inputs[name] for name in self.processing_class.visual_input_names if name in inputs
        }
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **kwargs
    ):
        batch_size = batch_size or len(input_ids)
        parts = []
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            seeing = partial(model, **{name: values[rows] for name, values in self._visual_inputs.items()})
            parts.append(
                super()._get_per_token_logps_and_entropies(
                    seeing, input_ids[rows], attention_mask[rows], logits_to_keep, compute_entropy=compute_entropy
                )
            )
        log_probs, entropies, _ = zip(*parts, strict=True)
        return torch.cat(log_probs), torch.cat(entropies) if compute_entropy else None, None

    # ---- rewards ----

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # TRL parses thoughts out of the text where the tokenizer knows how: the format could not be judged any more.
        texts = [self._written(ids) for ids in completion_ids_list]
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        names = self.reward_func_names
        if accuracy_reward.__name__ in names:
            first = self.accelerator.process_index * len(prompts)
            own = rewards[first : first + len(prompts), names.index(accuracy_reward.__name__)].tolist()
            for thinks, name in ((True, "deep"), (False, "fast")):
                known = [
                    value
                    for value, row in zip(own, inputs, strict=True)
                    if row["enable_thinking"] is thinks and value == value  # NaN: there was no answer to compare with
                ]
                if known:
                    self._log_metric(f"accuracy/{name}", sum(known) / len(known))
        if "reward_model_score" in names:
            column = names.index("reward_model_score")
            self._log_metric("reward_model_score/raw", rewards[:, column].nanmean().item())
            rewards[:, column] = standardized(rewards[:, column])
        return rewards

    def _written(self, ids: list[int]) -> str:
        """The text of a completion, control tokens such as boxes included, without the closing token."""
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self.eos_token_ids else ids)


def _given(options: dict) -> dict:
    return {name: value for name, value in options.items() if value is not None}


def reward_functions(
    args: RLArguments, has_answers: bool, dtype: str | None = None
) -> tuple[list[Callable], list[float]]:
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
        source = source_of(args.reward_model, trust_remote_code=args.trust_remote_code)
        trusted = args.trust_remote_code
        model = load_reward_model(args.reward_model, trust_remote_code=trusted, dtype=dtype or "auto")
        processor = AutoProcessor.from_pretrained(**source)
        terms.append(reward_model_term(model.to(args.device).eval(), processor, args.per_device_train_batch_size))
        weights.append(0.5)
    return terms, weights


def train(
    model_args: ModelArguments,
    adapter_args: AdapterArguments,
    freeze_args: FreezeArguments,
    data_args: DataArguments,
    args: RLArguments,
) -> HybridGRPOTrainer:
    """Train, evaluate, and leave in `args.output_dir` the model or adapter, processor, card and curves."""
    check(data_args, args)
    if data_args.on_too_long != "error":
        raise ArgumentsError(
            "on_too_long: a prompt is not cut or dropped on the way. Leave out what is too long before."
        )
    checkpoint = checkpoint_to_resume(args)
    train_dataset, eval_dataset = load_data(data_args)
    first: dict = next(iter(train_dataset))
    if "chosen" in first:
        raise ArgumentsError("The rows are pairs of answers. Train a reward model on them: minicpmv train reward.")
    terms, weights = reward_functions(args, "messages" in first or "answer" in first, model_args.dtype)
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
    set_up(trainer, freeze_args, data_args)
    train_and_evaluate(trainer, checkpoint)
    save(trainer)
    return trainer


GROUPS = (ModelArguments, AdapterArguments, FreezeArguments, DataArguments, RLArguments)


def main(argv: Sequence[str] | None = None) -> None:
    with one_line_errors():
        attend_without_plans()
        train(*parse(GROUPS, argv, "Reinforcement learning with GRPO, thinking and fast rollouts mixed."))


if __name__ == "__main__":
    main(sys.argv[1:])
