"""GRPO with pictures and clips, thinking and fast rollouts mixed: TRL's trainer with what this model needs beside it.

What is special:
- the mode is chosen for each group of rollouts of one prompt, so that advantages compare like with like; it alternates over
  the groups, and is recorded: in the rows that reward functions see, in the completions table and in the metrics;
- a prompt is encoded once for its group, by the processor, with its row's own options; pictures and clips go on as padded
  tensors, one entry a rollout, to `generate` and to the log-probabilities alike;
- reward functions get the text as it was written, thought included, whatever the tokenizer would parse out of it;
- the score of a reward model is standardised over all rollouts of a batch, of all processes.

There is no value network and no generalised advantage estimation here, and none is needed: the advantage of a rollout is
its reward relative to its own group (https://arxiv.org/abs/2402.03300). Both belong to PPO.

Source: https://arxiv.org/abs/2509.18154 for hybrid modes and rewards.
"""

from collections import defaultdict
from functools import partial
from itertools import chain
from math import floor

import torch
from trl import GRPOTrainer

from minicpmv.data.collator import ROW_OPTIONS, EncodedRow, encoded_row, padded_visual_inputs
from minicpmv.data.formats import CONVERSATION_COLUMNS, MEDIA_COLUMNS, BadRowError, conversation_row, text_of
from minicpmv.train.common.card import write_card
from minicpmv.train.common.loading import PartLearningRates
from minicpmv.train.reward_model import score_answers
from minicpmv.train.reward_terms import accuracy_reward, final_answer, standardised


VISUAL_INPUTS = ("pixel_values", "tgt_sizes", "temporal_ids")


class UnsupportedRolloutError(ValueError):
    """A way to generate rollouts that cannot carry this model's visual inputs."""


def check_rollouts(args) -> None:
    """Refuse ways to generate that TRL has for other models."""
    if args.use_vllm or args.use_transformers_continuous_batching:
        raise UnsupportedRolloutError(
            "use_vllm and use_transformers_continuous_batching cannot take this model's pictures and packed clips from the "
            "trainer: leave both off, so that the model's own generate makes the rollouts."
        )


def question_row(row: dict) -> dict:
    """A row of any format of `minicpmv.data.formats` as a question: `prompt`, with its pictures inside, and `answer`.

    The answer is that of the row, or the last one of a whole conversation, without its thought; None where there is none.

    Raises:
        BadRowError: the row is no question.
    """
    conversation = conversation_row(row)
    answer = row.get("answer")
    if "messages" in conversation:
        *conversation["prompt"], last = conversation["messages"]
        answer = final_answer(text_of(last)) if answer is None else answer
    if "prompt" not in conversation or "chosen" in conversation:
        raise BadRowError(f"the row is no question, but has {sorted(conversation)}; it needs 'prompt' or 'messages'")
    if not isinstance(answer, str | None):
        raise BadRowError(f"'answer' is text, not {answer!r}")
    taken = {*CONVERSATION_COLUMNS, *MEDIA_COLUMNS}
    rest = {name: value for name, value in row.items() if name not in taken}
    return rest | {"prompt": conversation["prompt"], "answer": answer}


def reward_model_term(model, processor, batch_size: int = 8):
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


class HybridGRPOTrainer(PartLearningRates, GRPOTrainer):
    """[`trl.GRPOTrainer`] for this model.

    Args:
        thinking_share: share of the groups that think, 0 to 1.
        model, reward_funcs, args, kwargs: those of [`trl.GRPOTrainer`]. Rows are as [`question_row`] reads them, and may have
            options of the processor. Reward functions get `answer` and `enable_thinking` beside the other columns, and
            each completion as one message with all that was written.

    Raises:
        UnsupportedRolloutError: vLLM was asked for, or continuous batching.
    """

    card_dataset: str | None = None

    def __init__(self, model, reward_funcs, args, thinking_share: float = 0.5, **kwargs):
        check_rollouts(args)
        super().__init__(model, reward_funcs, args, **kwargs)
        self.thinking_share = thinking_share
        self._groups_begun = defaultdict(int)  # in training and in evaluation
        self._encoded = []  # the prompt of each rollout of the batch in work
        self._visual_inputs = {}  # of the same, as tensors

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
        except ValueError as error:  # of the processor: a broken picture, a prompt that is too long, ...
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
        has_pictures = any(row.pixel_values for row in self._encoded)
        self._visual_inputs = self._prepare_input(padded_visual_inputs(self._encoded)) if has_pictures else {}
        # No list of pictures: for those TRL would call the processor once more, in the way of other models.
        return [row.input_ids for row in self._encoded], None, self._visual_inputs

    # ---- log-probabilities ----

    def _compute_loss(self, model, inputs):
        self._visual_inputs = {name: inputs[name] for name in VISUAL_INPUTS if name in inputs}
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
            rewards[:, column] = standardised(rewards[:, column])
        return rewards

    def _written(self, ids: list[int]) -> str:
        """The text of a completion, control tokens such as boxes included, without the closing token."""
        return self._tokenizer.decode(ids[:-1] if ids and ids[-1] in self.eos_token_ids else ids)

    def create_model_card(self, *args, **kwargs):
        write_card(self, "reinforcement learning (GRPO)", self.card_dataset)


def _given(options: dict) -> dict:
    return {name: value for name, value in options.items() if value is not None}
