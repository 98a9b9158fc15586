"""Every difference between the versions of transformers that this repository supports, and nothing else."""

import inspect
import warnings
from typing import Any

from transformers import ProcessorMixin, Qwen2TokenizerFast, Qwen3Model


# transformers 5.24 renamed `past_key_values` to `cache`, in calls and in outputs.
CACHE_NAME = "cache" if "cache" in inspect.signature(Qwen3Model.forward).parameters else "past_key_values"
CACHE_NAMES = ("cache", "past_key_values")


def cache_of(cache, past_key_values):
    """The key-value cache of a call that knows it by both names."""
    if past_key_values is not None and CACHE_NAME == "cache":
        warnings.warn("`past_key_values` is deprecated. Use `cache` instead.", FutureWarning, stacklevel=3)
    return past_key_values if cache is None else cache


def take_cache(arguments: dict):
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
