"""A visual reward model: the model of a checkpoint with a value head, one number for an answer to images and text.

What is special:
- the head reads the hidden state of the last token of the conversation; tower, resampler and language model are those of
  the checkpoint, and a folder of plain weights becomes a reward model by adding the head;
- a reward model is a `PreTrainedModel`: trainers, PEFT and `save_pretrained` take it, and its folder holds the code of the
  backbone beside weights and head;
- it sees the final answer only: thoughts are taken out before it reads, in training and in scoring.

Source: https://arxiv.org/abs/2509.18154.
"""

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import SequenceClassifierOutput

from minicpmv.checkpoint import source_of
from minicpmv.data.collator import ConversationCollator
from minicpmv.train.common.errors import TrainingError
from minicpmv.train.reward_terms import final_answer


class RewardModel(PreTrainedModel):
    """Backbone and value head. `config.num_labels` is 1, as trainers of reward models ask."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True
    _no_split_modules = ["Qwen3DecoderLayer", "MiniCPMVVisionEncoderLayer", "Resampler"]
    _keys_to_ignore_on_load_unexpected = [r"llm\.lm_head"]

    def __init__(self, config: PretrainedConfig):
        super().__init__(config)
        # The code came with the configuration, and is as trusted.
        attention = config._attn_implementation
        self.model = AutoModel.from_config(config, trust_remote_code=True, attn_implementation=attention)
        if not config.tie_word_embeddings:
            self.model.set_output_embeddings(nn.Identity())  # no loss would ever reach it
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.post_init()

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs: Any
    ) -> SequenceClassifierOutput:
        """Scores, as `logits` [B, 1]; `inputs` are the visual inputs of the backbone."""
        output = self.model.base_model(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        last = attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(1)  # padding may stand on either side
        rows = torch.arange(len(last), device=last.device)
        return SequenceClassifierOutput(logits=self.score(output.last_hidden_state[rows, last]))

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            custom_object_save(self.model, save_directory)


def load_reward_model(
    name: str, new_head: bool = False, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> RewardModel:
    """The reward model in a folder or on the Hub; of a folder with an adapter the model with the adapter merged into it.

    Args:
        new_head: begin with a random head where there is none, as at the start of training.
        revision, trust_remote_code: as in [`minicpmv.checkpoint.source_of`].
        kwargs: those of `from_pretrained`.

    Raises:
        TrainingError: there is no head, and `new_head` is False.
        CheckpointError: the code of a Hub model is not trusted.
    """
    if (Path(name).expanduser() / "adapter_config.json").is_file():
        from peft import PeftConfig, PeftModel

        adapter = PeftConfig.from_pretrained(name)
        if "score" not in (adapter.modules_to_save or ()):
            raise TrainingError(f"{name} is the adapter of another kind of model: it brings no value head (score).")
        base = adapter.base_model_name_or_path
        model = load_reward_model(base, True, adapter.revision, trust_remote_code, **kwargs)
        return PeftModel.from_pretrained(model, name).merge_and_unload(safe_merge=True)
    source = source_of(name, revision, trust_remote_code)
    config = AutoConfig.from_pretrained(**source, num_labels=1)
    del source["trust_remote_code"]  # the class is the one here; the code inside came with the configuration
    model, report = RewardModel.from_pretrained(**source, config=config, output_loading_info=True, **kwargs)
    if "score.weight" in report["missing_keys"] and not new_head:
        raise TrainingError(
            f"{name} holds no value head (score.weight), so its scores would be random. Train one first: "
            f"minicpmv train reward --model_name_or_path {name} ..."
        )
    return model


def reward_inputs(
    processor: ProcessorMixin,
    prompts: list[list[dict]],
    answers: list[str],
    options: list[dict] | None = None,
    **collator_options: Any,
) -> dict[str, Any]:
    """What the reward model reads: each prompt with its answer, the answer without thoughts; padded on the right.

    Args:
        prompts: conversations that end with a question.
        answers: texts, with or without a thought in front.
        options: one dict a prompt, options of the processor such as `max_slice_nums` or `temporal_ids`.
        collator_options: those of [`ConversationCollator`], such as `max_length`.

    Raises:
        TrainingError: an answer consists of an open thought alone.
        BadRowError, ConversationTooLongError: what [`ConversationCollator`] finds wrong.
    """
    rows = []
    for prompt, answer, own_options in zip(prompts, answers, options or [{}] * len(prompts), strict=True):
        final = final_answer(answer)
        if final is None:
            raise TrainingError(f"There is no answer after the thought in {answer[:60]!r}.")
        rows.append({**own_options, "messages": [*prompt, {"role": "assistant", "content": final}]})
    batch = ConversationCollator(processor, **collator_options)(rows)
    del batch["labels"]
    return batch


@torch.inference_mode()
def score_answers(
    model: RewardModel,
    processor: ProcessorMixin,
    prompts: list[list[dict]],
    answers: list[str],
    options: list[dict] | None = None,
    batch_size: int = 8,
) -> torch.Tensor:
    """Scores [N] of answers to prompts; for the arguments see [`reward_inputs`]."""
    was_training = model.training
    model.eval()
    options = options or [{}] * len(prompts)
    scores = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        inputs = reward_inputs(processor, prompts[rows], answers[rows], options[rows])
        scores.append(model(**send_to_device(inputs, model.device)).logits[:, 0].float())
    model.train(was_training)
    return torch.cat(scores)
