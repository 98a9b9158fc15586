"""Configuration of MiniCPM-V 4.5.

What is special:
- It is flat: the fields of the language model, a Qwen3, stand at the top level, and `get_text_config()` is the config itself.
- `vision_config` describes the SigLIP2 tower; `slice_config` how images are cut (read by other tools, not by the model).
- Saving writes `rope_theta` in addition to `rope_parameters`, because tools older than transformers 5 read only the former.
"""

import difflib
import math
import numbers
from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from .compat_minicpmv import DEQUANTIZE


RESAMPLER_HEAD_DIM = 128  # width of a resampler head; their number follows from `hidden_size`

# What the published checkpoint has: in its tower, in fields of its own, and in its language model.
VISION_DEFAULTS = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_channels": 3,
    "image_size": 980,
    "patch_size": 14,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
}
OWN_DEFAULTS = {
    "query_num": 64,  # tokens that one slice, or one group of packed frames, takes in the language model
    "image_size": 448,  # nominal side of a slice in pixels
    "patch_size": 14,  # side of a patch in pixels; the same in `vision_config` and `slice_config`
    "image_token_id": 128244,  # the slot token (`<unk>`) whose embeddings the image features replace
    "vision_batch_size": 16,  # slices that go through the tower at a time; bounds its memory
    "version": 4.5,  # `str(version)` is what serving engines dispatch on
    "drop_vision_last_layer": False,  # whether the tower leaves out its last layer
    "use_image_id": True,  # this and the rest: kept because other tools read them
    "slice_mode": True,
    "batch_vision_input": True,
    "batch_3d_resampler": True,
}
LANGUAGE_DEFAULTS = {
    "vocab_size": 151748,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "tie_word_embeddings": False,
}


class MiniCPMVError(ValueError):
    """Base of the errors that a caller of the model or its processor may meet.

    Remote code is loaded by path, so its classes may exist twice in one process: `is_minicpmv` tells them where
    `isinstance` cannot.
    """

    is_minicpmv = True


def shorten(value: Any) -> str:
    """`repr` for the message of an error."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the nearest of the known names, to stand behind a sentence; "" where none is near."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def check_whole(
    name: str, value: Any, least: int = 1, most: float = math.inf, hint: str = "", error: type = MiniCPMVError
) -> int:
    """`value` as an int; raises `error` where it is no whole number from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        limits = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise error(f"{name}={value!r} has to be a whole number {limits}{hint and ': '}{hint}.")
    return int(value)


class MiniCPMVVisionConfig(PretrainedConfig):
    """Configuration of the vision tower (SigLIP2-400M read as NaViT).

    `image_size` is the side in pixels of the learned position table, which has `(image_size / patch_size) ** 2` rows;
    images may have any size and aspect ratio.
    """

    model_type = "siglip"
    base_config_key = "vision_config"

    def __init__(self, **kwargs):
        for name, published in VISION_DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, published))
        super().__init__(**kwargs)


class MiniCPMVSliceConfig(PretrainedConfig):
    """How an image is cut into slices: at most `max_slice_nums` of about `scale_resolution` ** 2 pixels each."""

    model_type = "minicpmv"
    base_config_key = "slice_config"

    def __init__(self, patch_size: int = 14, max_slice_nums: int = 9, scale_resolution: int = 448, **kwargs):
        self.patch_size = patch_size
        self.max_slice_nums = max_slice_nums
        self.scale_resolution = scale_resolution
        super().__init__(**kwargs)


class MiniCPMVConfig(Qwen3Config):
    """Configuration of [`MiniCPMV`]; the defaults are those of the published MiniCPM-V 4.5 checkpoint.

    To the fields of [`Qwen3Config`] it adds those of `OWN_DEFAULTS`, the tower and the slicing.

    Raises:
        MiniCPMVError: for fields that contradict each other; the message names both.
    """

    model_type = "minicpmv"
    sub_configs = {"vision_config": MiniCPMVVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    def __init__(
        self,
        vision_config: dict | MiniCPMVVisionConfig | None = None,
        slice_config: dict | MiniCPMVSliceConfig | None = None,
        **kwargs,
    ):
        # Sub-configs stand before `super().__init__`, which hands them the attention implementation.
        self.vision_config = _sub_config(MiniCPMVVisionConfig, vision_config)
        self.slice_config = _sub_config(MiniCPMVSliceConfig, slice_config)
        for name, published in OWN_DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, published))
        if isinstance(quantization := kwargs.get("quantization_config"), dict):
            kwargs["quantization_config"] = _whole_quantization(quantization)
        if not kwargs.get("rope_parameters"):
            kwargs.setdefault("rope_theta", 1000000.0)
        super().__init__(**(LANGUAGE_DEFAULTS | kwargs))
        for name in ("query_num", "vision_batch_size"):
            check_whole(name, getattr(self, name))
        vision, patch_size = self.vision_config, self.patch_size
        for name, value in (("vision_config", vision.patch_size), ("slice_config", self.slice_config.patch_size)):
            if value != patch_size:
                raise MiniCPMVError(f"patch_size ({patch_size}) and {name}.patch_size ({value}) have to be equal.")
        multiples = (
            ("hidden_size", self.hidden_size, "the resampler's head width", RESAMPLER_HEAD_DIM),
            ("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads),
            ("vision_config.hidden_size", vision.hidden_size, "its num_attention_heads", vision.num_attention_heads),
            ("vision_config.image_size", vision.image_size, "its patch_size", vision.patch_size),
        )
        for name, value, of, step in multiples:
            if value % step:
                raise MiniCPMVError(f"{name} ({value}) has to be a multiple of {of} ({step}).")
        if not 0 <= self.image_token_id < self.vocab_size:
            token_id, limit = self.image_token_id, self.vocab_size
            raise MiniCPMVError(f"image_token_id ({token_id}) has to be below vocab_size ({limit}).")

    def get_text_config(self, *args, **kwargs) -> "MiniCPMVConfig":
        """The config itself: its Qwen3 fields stand at the top level."""
        return self

    def to_dict(self) -> dict:
        """The published flat layout, with `rope_theta` even where this version of transformers keeps it elsewhere."""
        output = super().to_dict()
        if rope_parameters := output.get("rope_parameters"):
            output["rope_theta"] = rope_parameters["rope_theta"]
        return output


def _whole_quantization(quantization: dict[str, Any]) -> dict[str, Any]:
    """The quantization of a checkpoint, with what loaders have to know of this architecture where it does not say so."""
    method = quantization.get("quant_method")
    added: dict[str, Any] = {}
    if method in ("awq", "gptq"):  # what writes these converts the layers of the language model alone
        added["modules_to_not_convert"] = ["vpm", "resampler", "lm_head"]
    if method == "gptq":
        added["block_name_to_quantize"] = "llm.model.layers"
    if method == "compressed-tensors" and not {"dequantize", "run_compressed"} & quantization.keys():
        added |= DEQUANTIZE  # else the first call of the whole model does it, and none of a part may come before
    return quantization | {name: value for name, value in added.items() if quantization.get(name) is None}


def _sub_config(config_class, value):
    """An instance of `config_class` from None, a dict or a config (perhaps of a twin class loaded from another folder)."""
    if value is None:
        return config_class()
    fields = dict(value) if isinstance(value, dict) else value.to_dict()
    fields.pop("model_type", None)
    return config_class(**fields)
