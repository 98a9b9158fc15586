"""Every difference between the versions of transformers that this repository supports, and nothing else."""

import inspect
from typing import Any

from transformers import BatchFeature, Cache, GenerationMixin, ProcessorMixin, Qwen2TokenizerFast, Qwen3Model
from transformers.utils import is_torch_available
from transformers.utils.quantization_config import CompressedTensorsConfig


# transformers 5.24 renamed `past_key_values` to `cache`, in calls and in outputs.
_is_new = is_torch_available() and "cache" in inspect.signature(Qwen3Model.forward).parameters
CACHE_NAME = "cache" if _is_new else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")
# It also renamed how `quantization_config` says that compressed weights become whole while they are loaded.
_DEQUANTIZES = "dequantize" in inspect.signature(CompressedTensorsConfig).parameters
DEQUANTIZE = {"dequantize": True} if _DEQUANTIZES else {"run_compressed": False}


def take_cache(arguments: dict) -> Cache | None:
    """Take the key-value cache out of keyword arguments, whichever name the caller gave it; None where there is none."""
    given = [arguments.pop(name, None) for name in CACHE_NAMES]
    return next((cache for cache in given if cache is not None), None)


class ProcessorBase(ProcessorMixin):
    """`ProcessorMixin` with what transformers 4 reads from the class."""

    attributes = ["image_processor", "tokenizer", "video_processor"]
    audio_tokenizer = None


class TokenizerBase(Qwen2TokenizerFast):
    """`Qwen2TokenizerFast` without the advice that some versions of transformers 5 give for a large vocabulary: they take
    it for a Mistral one, and want its regex changed."""

    @classmethod
    def _patch_mistral_regex(cls, tokenizer: Any, *args: Any, **kwargs: Any) -> Any:
        return tokenizer


class CompatGenerationMixin(GenerationMixin):
    """[`GenerationMixin`] with what some versions of it need."""

    def prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs) -> dict[str, Any]:
        # Before its first guess, assisted decoding passes the whole prompt even where its beginning is cached
        # (transformers 5.10 to 5.24; earlier ones have no `next_sequence_length`).
        cache = kwargs.get(CACHE_NAME)
        if cache is not None and kwargs.get("next_sequence_length", 0) is None:
            whole = kwargs.get("position_ids") if attention_mask is None else attention_mask
            if whole is not None and whole.shape[-1] == input_ids.shape[1]:
                kwargs["next_sequence_length"] = input_ids.shape[1] - cache.get_seq_length()
        return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)


class NestedBatchFeature(BatchFeature):
    """`BatchFeature` whose `to()` reaches the tensors inside nested lists, as that of transformers 5 does."""

    def to(self, *args: Any, **kwargs: Any) -> "NestedBatchFeature":
        """Move all tensors to a device and cast the floating-point ones, as `torch.Tensor.to`; returns self."""
        device = kwargs.get("device")
        if device is None and args and not hasattr(args[0], "is_floating_point"):  # which a dtype has
            device = args[0]

        def move(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return type(value)(move(item) for item in value)
            if not hasattr(value, "is_floating_point"):
                return value
            if value.is_floating_point():
                return value.to(*args, **kwargs)
            return value if device is None else value.to(device, non_blocking=kwargs.get("non_blocking", False))

        self.data: dict[str, Any] = {name: move(value) for name, value in self.data.items()}
        return self
