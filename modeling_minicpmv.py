"""MiniCPM-V 4.5: vision tower -> 3D resampler -> Qwen3.

What is special:
- One class for everything, named and laid out as the published checkpoint: `vpm`, `resampler`, `llm`.
- Image features replace the embeddings of the slot token (`config.image_token_id`) in the order of `input_ids`; frames
  of a video are images that share their slots (`temporal_ids`), so there is one modality, "image".
- `pixel_values` come as the processors give them, one list of slices a sample, or as one padded tensor.
- `base_model` is the same model without its head: it returns hidden states instead of logits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel, Qwen3ForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .chat_minicpmv import ChatMixin
from .compat_minicpmv import CACHE_NAME, CACHE_NAMES, CompatGenerationMixin, take_cache
from .configuration_minicpmv import RESAMPLER_HEAD_DIM, MiniCPMVConfig

# transformers 4 copies only the files that are named in this one.
from .decoding_minicpmv import SeededChoice  # noqa: F401
from .image_loading_minicpmv import load_image  # noqa: F401
from .messages_minicpmv import read_part  # noqa: F401
from .resampler import STILL_IMAGE_ID, Resampler
from .vision_minicpmv import MiniCPMVVisionTransformer


Nested: TypeAlias = Sequence | Tensor  # visual inputs as nested lists of tensors or as one padded tensor
VISUAL_INPUTS = ("pixel_values", "tgt_sizes", "temporal_ids")
# Processors and other software pass these along; the model finds all it needs in `input_ids` and VISUAL_INPUTS.
UNUSED_INPUTS = ("image_bound", "image_sizes", "mm_token_type_ids", "video_metadata")
TEMPORAL_PADDING_ID = -2  # fills up `temporal_ids` in tensor form


def flatten_visual_inputs(
    pixel_values: Nested, tgt_sizes: Nested, temporal_ids: Nested | None = None
) -> tuple[list[Tensor], list[tuple[int, int]], list[list[int]]]:
    """Bring every accepted layout of the visual inputs to flat lists.

    Args:
        pixel_values: one list a sample of slices [3, P, P * patches]; or a flat list of slices; or a tensor
            [slices, 3, P, W] or [B, slices, 3, P, W], padded on the right.
        tgt_sizes: (rows, columns) in patches of every slice, in the same nesting; in a padded tensor (0, 0) marks
            places without a slice.
        temporal_ids: None when all are still images; else one list a sample of units, each a list with one id a
            frame; or a tensor [B, units, frames] filled up with -2.

    Returns the slices, their sizes, and the ids of each unit; a ValueError tells when their numbers differ.
    """
    if isinstance(pixel_values, Tensor):
        slices = list(pixel_values.flatten(0, -4))
    else:
        samples = ([part] if isinstance(part, Tensor) and part.dim() == 3 else part for part in pixel_values)
        slices = [pixels for sample in samples for pixels in sample if pixels.dim() == 3]
    parts = [torch.as_tensor(part).reshape(-1, 2).long() for part in tgt_sizes]
    # One transfer for all, should they lie on an accelerator.
    sizes = [tuple(size) for size in torch.cat(parts).tolist()] if parts else []
    if len(slices) != len(sizes):
        raise ValueError(f"pixel_values hold {len(slices)} slices, but tgt_sizes {len(sizes)} sizes.")
    slices = [pixels for pixels, size in zip(slices, sizes, strict=True) if size != (0, 0)]
    sizes = [size for size in sizes if size != (0, 0)]
    if isinstance(pixel_values, Tensor):
        widths = [rows * columns * pixels.shape[-2] for pixels, (rows, columns) in zip(slices, sizes, strict=True)]
        slices = [pixels[..., :width] for pixels, width in zip(slices, widths, strict=True)]

    if temporal_ids is None:
        return slices, sizes, [[STILL_IMAGE_ID]] * len(slices)
    if isinstance(temporal_ids, Tensor):
        temporal_ids = temporal_ids.tolist()
    rows = [torch.as_tensor(unit).flatten().tolist() for unit in chain.from_iterable(temporal_ids)]
    units = [[frame for frame in row if frame != TEMPORAL_PADDING_ID] for row in rows]
    units = [unit for unit in units if unit]
    if sum(map(len, units)) != len(slices):
        raise ValueError(
            f"temporal_ids name {sum(map(len, units))} frames, but pixel_values hold {len(slices)} slices. Every slice "
            "needs an id; a still image has [-1]."
        )
    return slices, sizes, units


class MiniCPMVPreTrainedModel(PreTrainedModel):
    config_class = MiniCPMVConfig
    base_model_prefix = ""
    input_modalities = ("image", "text")
    _no_split_modules = ["Qwen3DecoderLayer", "MiniCPMVVisionEncoderLayer", "Resampler"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def _init_weights(self, module: nn.Module) -> None:
        # Only functions reached through `nn.init`: transformers guards those against overwriting loaded weights.
        std = self.config.initializer_range
        if isinstance(module, Resampler):
            nn.init.normal_(module.query, std=std)
            nn.init.normal_(module.proj, std=std)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.normal_(module.in_proj_weight, std=std)
            nn.init.zeros_(module.in_proj_bias)
        else:
            super()._init_weights(module)


class MiniCPMVModel:
    """The model without its head: called, it returns `last_hidden_state`; everything else is the model's own.

    Trainers that compute the loss in blocks ask `model.base_model(...)` for hidden states and must not pay for logits.
    It is no module, since the checkpoint has no names for its parts but those of [`MiniCPMV`], and it holds no parts of
    its own, since adapters exchange them.
    """

    def __init__(self, model: "MiniCPMV"):
        self._model = model

    def __call__(
        self, input_ids: torch.LongTensor | None = None, inputs_embeds: Tensor | None = None, **kwargs
    ) -> BaseModelOutputWithPast:
        """As `MiniCPMV.forward`, up to the last hidden states [B, L, D]."""
        inputs_embeds = self._model._embed(input_ids, inputs_embeds, self._model._take_features(kwargs))
        for name in UNUSED_INPUTS:
            kwargs.pop(name, None)
        kwargs[CACHE_NAME] = take_cache(kwargs)
        return self._model.get_decoder()(inputs_embeds=inputs_embeds, **kwargs)

    def __getattr__(self, name: str):
        if name == "_model":  # not yet there while an object is copied
            raise AttributeError(name)
        return getattr(self._model, name)


# id of a model -> its `base_model`, as long as somebody has it. A model that held it would hold itself, and outlive its
# last reference.
_BASE_MODELS: WeakValueDictionary[int, MiniCPMVModel] = WeakValueDictionary()


class MiniCPMV(ChatMixin, MiniCPMVPreTrainedModel, CompatGenerationMixin):
    """MiniCPM-V 4.5 for chat and generation over text, images and video.

    Source: https://arxiv.org/abs/2509.18154 and the card of openbmb/MiniCPM-V-4_5.
    """

    def __init__(self, config: MiniCPMVConfig):
        super().__init__(config)
        self.llm = Qwen3ForCausalLM(config)
        self.vpm = MiniCPMVVisionTransformer(config.vision_config)
        if config.drop_vision_last_layer:
            self.vpm.encoder.layers = self.vpm.encoder.layers[:-1]
        heads = config.hidden_size // RESAMPLER_HEAD_DIM
        self.resampler = Resampler(config.query_num, config.hidden_size, heads, config.vision_config.hidden_size)
        self.post_init()
        # The flat config carries the rules of its language model without the prefix; those match nothing here.
        for plan in ("_tp_plan", "_pp_plan"):
            rules = getattr(self, plan, None) or {}
            setattr(self, plan, {name: rule for name, rule in rules.items() if name.startswith("llm.")})

    # ---- parts ----

    @property
    def base_model(self) -> MiniCPMVModel:
        return _BASE_MODELS.setdefault(id(self), MiniCPMVModel(self))

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.llm.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.llm.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.llm.set_decoder(decoder)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        # For transformers and PEFT, whose own search would go from here to `base_model` and back without end.
        return self.vpm if modality in (None, "image") else self

    # ---- images ----

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: Nested,
        tgt_sizes: Nested,
        temporal_ids: Nested | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Encode images and frames (layouts: [`flatten_visual_inputs`]).

        Returns:
            [`BaseModelOutputWithPooling`]: `pooler_output` [units, query_num, D] goes into the slots, in order;
            `last_hidden_state` and `hidden_states` are the packed states of the tower [all patches, D_vision].
        """
        slices, sizes, units = flatten_visual_inputs(pixel_values, tgt_sizes, temporal_ids)
        features, outputs, start = [], [], 0
        for chunk in self._chunks(units):
            stop = start + sum(map(len, chunk))
            vision = self.vpm(slices[start:stop], sizes[start:stop], output_attentions, output_hidden_states)
            features.append(self.resampler(vision.last_hidden_state, sizes[start:stop], chunk))
            outputs.append(vision)
            start = stop
        if not outputs:
            shape = (0, self.config.query_num, self.config.hidden_size)
            return BaseModelOutputWithPooling(pooler_output=self.get_input_embeddings().weight.new_zeros(shape))

        def joined(name: str, join: Callable) -> tuple | None:
            layers = [getattr(vision, name) for vision in outputs]  # of each chunk
            return None if layers[0] is None else tuple(map(join, zip(*layers, strict=True)))

        return BaseModelOutputWithPooling(
            last_hidden_state=torch.cat([vision.last_hidden_state for vision in outputs]),
            pooler_output=torch.cat(features),
            hidden_states=joined("hidden_states", torch.cat),
            attentions=joined("attentions", lambda layer: list(chain(*layer))),
        )

    def _chunks(self, units: list[list[int]]) -> list[list[list[int]]]:
        """Split units into chunks of about `vision_batch_size` slices, which bounds the memory of the tower.

        With ZeRO-3 there is one chunk: every process has to run the tower equally often.
        """
        limit = math.inf if is_deepspeed_zero3_enabled() else self.config.vision_batch_size
        chunks: list[list[list[int]]] = []
        for unit in units:
            if not chunks or sum(map(len, chunks[-1])) + len(unit) > limit:
                chunks.append([])
            chunks[-1].append(unit)
        return chunks

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: Any, image_features: Tensor | None = None
    ) -> torch.BoolTensor:
        """Where the image slots lie: bool [B, L]. Without `input_ids`, where the embeddings are those of the slot token.

        Raises:
            ValueError: when `image_features` [rows, D] are given and their number is not that of the slots.
        """
        if input_ids is not None:
            mask = input_ids == self.config.image_token_id
        else:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        if image_features is not None and int(mask.sum()) != len(image_features):
            raise ValueError(
                f"The prompt has {int(mask.sum())} image slots (token {self.config.image_token_id}), but the images "
                f"give {len(image_features)} features. Make both with the same processor call and do not cut the ids."
            )
        return mask

    def _take_features(self, arguments: dict) -> Tensor | None:
        """Take the visual inputs out of the arguments of a call: rows [slots, D], or None where there are none."""
        visual = {name: arguments.pop(name, None) for name in VISUAL_INPUTS}
        features = (arguments.pop("mm_encoder_outputs", None) or {}).get("image")
        if visual["pixel_values"] is not None:
            if features is not None:
                raise ValueError("Pass pixel_values or mm_encoder_outputs['image'], not both.")
            features = self.get_image_features(**visual)
        return None if features is None else _feature_rows(features)

    def _embed(self, input_ids: torch.LongTensor | None, inputs_embeds: Tensor | None, rows: Tensor | None) -> Tensor:
        """Embeddings of a prompt [B, L, D] with the image features `rows` [slots, D] in their slots."""
        has_images, zero = rows is not None and len(rows) > 0, None
        if not has_images:
            # In distributed training every process has to touch every parameter that trains; with ZeRO-3 also those that
            # do not, and in evaluation. Before the embeddings, as with images, for then all gather in one order.
            parameters = chain(self.vpm.parameters(), self.resampler.parameters())
            trains = self.training and torch.is_grad_enabled() and any(p.requires_grad for p in parameters)
            if trains or is_deepspeed_zero3_enabled():
                size = self.config.patch_size
                blank = torch.zeros(self.config.vision_config.num_channels, size, size)
                zero = (self.get_image_features([[blank]], [[(1, 1)]]).pooler_output * 0).sum()
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if rows is not None:
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, rows)
            if has_images:
                return inputs_embeds.masked_scatter(mask[..., None].to(inputs_embeds.device), rows.to(inputs_embeds))
        return inputs_embeds if zero is None else inputs_embeds + zero.to(inputs_embeds)

    # ---- forward ----

    def __call__(self, *args, data: Mapping | None = None, **kwargs):
        # LLaMA-Factory and the published code give the arguments as one dict; those beside it win.
        if args and isinstance(args[0], Mapping):
            data, args = args[0], args[1:]
        if data is not None:
            kwargs = dict(data) | {name: value for name, value in kwargs.items() if value is not None}
        return super().__call__(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Nested | None = None,
        tgt_sizes: Nested | None = None,
        temporal_ids: Nested | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict | None = None,
        image_bound: list | None = None,
        image_sizes: list | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """One pass over a batch.

        Args:
            input_ids: [B, L]; image slots are `config.image_token_id`.
            pixel_values, tgt_sizes, temporal_ids: see [`flatten_visual_inputs`].
            past_key_values, cache: the key-value cache, by its older or its newer name (transformers 5.24).
            labels: [B, L], -100 where no loss is wanted.
            logits_to_keep: compute logits of the last so many positions only (0: all).
            mm_encoder_outputs: `{"image": get_image_features(...)}` instead of pixels.
            image_bound, image_sizes, mm_token_type_ids: taken because processors give them; not read.

        Raises:
            ValueError: when slots and features differ in number, or the visual inputs contradict each other.
        """
        visual = {"pixel_values": pixel_values, "tgt_sizes": tgt_sizes, "temporal_ids": temporal_ids}
        rows = self._take_features(visual | {"mm_encoder_outputs": mm_encoder_outputs})
        # By the older name too, which newer versions answer with a warning of their own.
        caches = {CACHE_NAME: cache} if past_key_values is None else {"past_key_values": past_key_values}
        return self.llm(
            inputs_embeds=self._embed(input_ids, inputs_embeds, rows),
            attention_mask=attention_mask,
            position_ids=position_ids.long() if position_ids is not None else None,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **caches,
            **kwargs,
        )

    def get_vllm_embedding(self, data: Mapping) -> tuple[Tensor, list]:
        """The older way to embed a batch, used by training frameworks; gradients flow.

        `data` holds `input_ids` and, beside other things, the visual inputs, or `vision_hidden_states` in their place.
        Returns the embeddings [B, L, D], and the features as one tensor [units, query_num, D] a sample.
        """
        input_ids, features = data["input_ids"], data.get("vision_hidden_states")
        rows = self._take_features(dict(data)) if features is None else _feature_rows(features)
        inputs_embeds = self._embed(input_ids, None, rows)
        if rows is None or not len(rows):
            return inputs_embeds, [[] for _ in input_ids]
        return inputs_embeds, self._split_by_sample(rows, input_ids)

    def _split_by_sample(self, rows: Tensor, input_ids: torch.LongTensor) -> list[Tensor]:
        """Features [slots, D] to one tensor [units, query_num, D] for each row of `input_ids`."""
        slots = (input_ids == self.config.image_token_id).sum(-1).tolist()
        return [part.view(-1, self.config.query_num, rows.shape[-1]) for part in rows.split(slots)]

    # ---- generation ----

    @torch.no_grad()
    def generate(self, inputs: torch.LongTensor | Mapping | None = None, *args, **kwargs) -> Any:
        """[`GenerationMixin.generate`] over text, images and video; the result starts with the prompt ids.

        Takes everything that the processor returns. `inputs` may also be that dict itself, and
        `vision_hidden_states=` (the older name) features computed before. Images whose slots a filled
        `past_key_values` covers are left out. `prompt_lookup_num_tokens` and `assistant_model` take images too; an
        assistant of this architecture reads them by its own tower, another one reads the text alone.
        """
        if isinstance(inputs, Mapping):
            kwargs, inputs = dict(inputs) | kwargs, None
        if inputs is not None:
            kwargs.pop("input_ids", None)  # some callers pass the same ids under both names
        if (features := kwargs.pop("vision_hidden_states", None)) is not None:
            kwargs["mm_encoder_outputs"] = {"image": features}
        for name in (*UNUSED_INPUTS, *(name for name in VISUAL_INPUTS if kwargs.get(name) is None)):
            kwargs.pop(name, None)
        if (cache := take_cache(kwargs)) is not None:
            kwargs[CACHE_NAME] = cache
        self._prefill_images(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _prefill_images(self, input_ids: torch.LongTensor | None, kwargs: dict) -> None:
        """Fit the images in `kwargs` to a filled cache. Where tokens will be guessed, put them into the cache here: the
        first guess may hold slots, which generate's own prefill would count."""
        cache, mask = kwargs.get(CACHE_NAME), kwargs.get("attention_mask")
        assistant: Any = kwargs.get("assistant_model")
        cached = 0 if cache is None else cache.get_seq_length()
        lookup = getattr(kwargs.get("generation_config"), "prompt_lookup_num_tokens", None)
        guesses = assistant is not None or kwargs.get("prompt_lookup_num_tokens", lookup)
        only_new = mask is not None and input_ids is not None and mask.shape[1] > input_ids.shape[1]
        if input_ids is None or only_new or not (cached or guesses):
            return
        visual = {name: kwargs[name] for name in VISUAL_INPUTS if name in kwargs}
        rows = self._take_features(kwargs)
        if rows is None:
            return
        outputs = {}
        if "pixel_values" in visual and hasattr(assistant, "get_image_features"):
            outputs["assistant"] = assistant.get_image_features(**visual)
        slots = self.get_placeholder_mask(input_ids, None, rows)
        is_new = torch.arange(slots.shape[1], device=slots.device).expand_as(slots) >= cached
        rows = rows[is_new[slots].to(rows.device)]
        if len(rows) and guesses:
            kwargs[CACHE_NAME] = cache = DynamicCache(config=self.config) if cache is None else cache
            self._fill_cache(self, input_ids[:, cached:-1], rows, cache)
        elif len(rows):
            outputs["image"] = rows
        if outputs:
            kwargs["mm_encoder_outputs"] = outputs

    @staticmethod
    def _fill_cache(model, input_ids, features, cache):
        # The whole model, though nobody reads its logits: hooks that unpack or fetch weights stand there.
        outputs = {"image": features}
        model(input_ids, mm_encoder_outputs=outputs, use_cache=True, logits_to_keep=1, **{CACHE_NAME: cache})

    def _get_candidate_generator(self, **kwargs):
        # The assistant cannot use this model's features, and the library would not pass it others.
        features = (kwargs["model_kwargs"].pop("mm_encoder_outputs", None) or {}).get("assistant")
        generator = super()._get_candidate_generator(**kwargs)
        if features is not None:
            assistant = kwargs["assistant_model"]
            cache = DynamicCache(config=assistant.config)
            self._fill_cache(assistant, kwargs["input_ids"][:, :-1], features, cache)
            generator.assistant_kwargs[CACHE_NAME] = cache
        return generator

    def _expand_inputs_for_generation(self, expand_size=1, *, input_ids=None, **kwargs):
        # Beams and several return sequences: the images of a sample are encoded once and repeated as a block. The
        # generic code would repeat slice by slice (AABB for ABAB), and before transformers 5.23 not know features.
        rows = self._take_features(kwargs) if expand_size > 1 else None
        if rows is not None:
            samples = self._split_by_sample(rows, input_ids)
            rows = torch.cat([sample for sample in samples for _ in range(expand_size)])
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        if rows is not None:
            kwargs["mm_encoder_outputs"] = {"image": rows}
        return input_ids, kwargs

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("use_cache", True):  # the images are in the cache from here on
            for name in (*VISUAL_INPUTS, "mm_encoder_outputs"):
                model_kwargs.pop(name, None)
        return model_kwargs


def _feature_rows(features) -> Tensor:
    """Features in any accepted form (output object, tensor [..., D], list of tensors) as rows [slots, D]."""
    features = getattr(features, "pooler_output", features)
    if not isinstance(features, Tensor):
        features = torch.cat([part.flatten(0, -2) for part in features])
    return features.flatten(0, -2)
