"""A model that is asked about images and claims: this one, any vision-language model, or a language model for text.

What is special:
- a yes-or-no question costs one pass: the probabilities of "yes" and "no" as the first token of the answer;
- models of this repository encode the images of a prompt once for all answers and all questions about them; others are
  given the images with every question.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from minicpmv.checkpoint import source_of
from minicpmv.train.common.arguments import ModelArguments
from minicpmv.train.common.errors import ArgumentsError, TrainingError


YES = ("yes", "Yes", "YES", "是", "有", "对")
NO = ("no", "No", "NO", "否", "没有", "不")
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@dataclass
class Respondent:
    model: Any
    processor: Any  # a tokenizer for a language model

    def __post_init__(self):
        self.tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.tokenizer.padding_side = "left"
        # Only processors of this repository have options for a row (slices, packs of frames) and take features back.
        self.is_native = hasattr(self.processor, "visual_input_names")

    def render(self, conversations: list[list[dict]], options: dict | None = None) -> Any:
        """Inputs of the model for a batch of conversations that end with a question, padded on the left.

        Args:
            options: of the processor; those of this model's rows are left out for another model.
        """
        options = {name: value for name, value in (options or {}).items() if self.is_native} | {"padding": True}
        if self.processor is not self.tokenizer:
            options = {"processor_kwargs": options}
        else:
            conversations = [
                [message | {"content": message["content"][0]["text"]} for message in messages]
                for messages in conversations
            ]
        if "enable_thinking" in str(self.processor.chat_template):
            options["enable_thinking"] = False
        return self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **options,
        ).to(self.model.device)

    def image_features(self, inputs: Mapping[str, Any]) -> list[torch.Tensor] | None:
        """Features of each prompt's images, one tensor [units, query_num, D] a prompt; None where there is nothing to keep."""
        if not self.is_native or "pixel_values" not in inputs:
            return None
        visual = {name: inputs[name] for name in self.processor.visual_input_names if name in inputs}
        features = self.model.get_image_features(**visual).pooler_output
        return list(features.split([len(bounds) for bounds in inputs["image_bound"]]))

    def with_features(self, inputs: Mapping[str, Any], features: list[torch.Tensor] | None) -> Mapping[str, Any]:
        """Inputs of the model with the features of [`image_features`] in place of images, if there are any."""
        if features is None:
            return inputs
        rest = {name: value for name, value in inputs.items() if name not in self.processor.visual_input_names}
        return rest | {"mm_encoder_outputs": {"image": torch.cat(features)}}

    @torch.inference_mode()
    def yes_and_no(self, conversations, options=None, features=None) -> list[tuple[float, float]]:
        """Probabilities of "yes" and of "no" as the first word of the answer to each conversation's last question."""
        inputs = self.with_features(self.render(conversations, options), features)
        output = self.model.generate(
            **inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True, **GREEDY
        )
        probabilities = output.logits[0].float().softmax(-1)
        sides = [probabilities[:, sorted(ids)].sum(-1).tolist() for ids in yes_and_no_tokens(self.tokenizer)]
        return list(zip(*sides, strict=True))

    @torch.inference_mode()
    def reply(self, texts: list[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to texts."""
        inputs = self.render([[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in texts])
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, **GREEDY)
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def yes_and_no_tokens(tokenizer) -> tuple[set[int], set[int]]:
    """First tokens of the words for yes and for no, without those that begin both.

    Raises:
        TrainingError: nothing is left on one side.
    """
    sides = []
    for words in (YES, NO):
        # With a space in front too: some vocabularies have words in that form only.
        encoded = [
            tokenizer(space + word, add_special_tokens=False)["input_ids"][0] for word in words for space in ("", " ")
        ]
        sides.append({token for token in encoded if tokenizer.decode([token]).strip()})
    yes, no = sides[0] - sides[1], sides[1] - sides[0]
    if not yes or not no:
        raise TrainingError(
            f"The tokenizer {tokenizer.name_or_path} begins yes and no with the same tokens, so its model cannot be asked "
            "for them. Choose another feedback_model."
        )
    return yes, no


def load_respondent(args: ModelArguments, trust_remote_code: bool, language_only: bool = False) -> Respondent:
    """A model in its own type, ready to be asked; over all devices, or in several processes on the one of each.

    Raises:
        ArgumentsError: its code is not trusted, or it is of another kind.
    """
    state = PartialState()
    device_map = "auto" if state.num_processes == 1 and state.device.type == "cuda" else {"": state.device}
    source = source_of(args.model_name_or_path, args.model_revision, trust_remote_code, needs_code=False)
    auto_model, auto_processor = (
        (AutoModelForCausalLM, AutoTokenizer) if language_only else (AutoModelForImageTextToText, AutoProcessor)
    )
    try:
        model = auto_model.from_pretrained(
            **source,
            dtype=args.dtype or "auto",
            attn_implementation=args.attn_implementation,
            device_map=device_map,
        )
        return Respondent(model.eval(), auto_processor.from_pretrained(**source))
    except (OSError, ValueError) as error:
        raise ArgumentsError(
            f"{args.model_name_or_path} cannot be loaded as {auto_model.__name__}: {error}"
        ) from error
