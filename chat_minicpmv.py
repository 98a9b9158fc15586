"""`model.chat(...)`: questions about pictures and videos in one call.

The road of an answer: settings -> prompt -> generate -> [`ChatOutput`]; [`Turn`] goes it, from top to bottom.

What is special:
- The calling style of the published code, with its positional order and defaults; every prompt goes through the
  processor's own `apply_chat_template`, so chat, sessions, training and serving agree token for token.
- Nothing is cut from a prompt and nothing from an answer but the closing token.
"""

import copy
import inspect
import json
import math
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
from transformers import (
    AutoProcessor,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    ProcessorMixin,
    StoppingCriteriaList,
)

from .compat_minicpmv import CACHE_NAME
from .configuration_minicpmv import MiniCPMVError, did_you_mean
from .decoding_minicpmv import (
    CLOSING,
    DEFAULT_THRESHOLD,
    DRAFT_TOKENS,
    OPENING,
    THINK_END,
    AnswerStream,
    AnswerStreamer,
    SeededChoice,
    ThoughtBudget,
    Watch,
    least_certainty,
    need_to_think,
)
from .messages_minicpmv import read_part


# What each way to decode means; None falls back to the library's own default.
_NO_SAMPLING: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {**_NO_SAMPLING, "num_beams": 1, "repetition_penalty": 1.0},
    "beam": {**_NO_SAMPLING, "num_beams": 3, "repetition_penalty": 1.2},
    "sample": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.03},
}
SAMPLE_THINKING = {"do_sample": True, "temperature": 0.7}
TOLERATED_ARGUMENTS = ("context",)  # VLMEvalKit passes it; it never had an effect


class ChatError(MiniCPMVError):
    """Messages that cannot be read, or settings that cannot be used, alone or together."""


@dataclass
class ChatOutput:
    """An answer with what is known about it. `str(output)` is its text."""

    text: str  # the answer without its thought
    reasoning: str | None  # the thought; None where thinking was off
    finish_reason: str  # "stop"; "length": max_new_tokens were reached; "cancelled": the reader closed the stream
    prompt_tokens: int
    generated_tokens: int  # of thought and answer, with the closing token
    mode: str = "fast"  # or "deep": it thought first
    raw_text: str = ""  # thought and answer in one, as `chat()` returns them
    reasoning_tokens: int = 0
    draft_tokens: int = 0  # what `enable_thinking="auto"` generated besides, and threw away
    need: float | None = None  # what "auto" compared with the threshold
    cached_tokens: int = 0  # of the prompt, that a session had computed before
    dropped_turns: int = 0  # oldest turns that a session dropped to make room for this one
    # Seconds from the call until the inputs were ready, the pictures were read, the first token and the last one.
    timings: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


@lru_cache(maxsize=1)
def generation_names() -> frozenset[str]:
    """Keyword arguments of `generate`."""
    names = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    return frozenset(name for name in names if not name.startswith("_")) - {"self", "inputs", "kwargs"}


class ChatSettings:
    """How to answer: the arguments of `chat()`, checked, as `template` for the processor and `decoding` for `generate`.

    Raises:
        TypeError: for a keyword that neither of them knows; names the nearest.
        ChatError: for values and combinations that do not exist.
    """

    def __init__(
        self,
        model: Any,
        processor: ProcessorMixin,
        max_new_tokens: int = 2048,
        min_new_tokens: int = 0,
        sampling: bool | None = None,
        max_inp_length: int | None = None,
        stream: bool = False,
        enable_thinking: bool | str = False,
        thinking_budget: int | None = None,
        seed: int | str | None = None,
        decoding: str | None = None,
        **kwargs,
    ):
        self.thinking, self.thinking_budget, self.seed = enable_thinking, thinking_budget, seed
        self.max_new_tokens, self.min_new_tokens = max_new_tokens, min_new_tokens
        self.template: dict[str, Any] = {"max_length": max_inp_length}
        given: dict[str, Any] = {}
        for name, value in kwargs.items():
            if name in generation_names():
                given[name] = value
            elif processor.is_option(name):
                self.template[name] = value
            elif name not in TOLERATED_ARGUMENTS:
                own = {*inspect.signature(model.chat).parameters, *chain(*processor.option_names.values())}
                hint = did_you_mean(name, own | generation_names())
                raise TypeError(f"chat() got an unexpected keyword argument {name!r}.{hint}")
        _check_number("max_new_tokens", max_new_tokens, 1)
        _check_number("min_new_tokens", min_new_tokens, 0)
        if given.get("num_beams") is not None:
            _check_number("num_beams", given["num_beams"], 1)
        if enable_thinking not in (True, False, "auto"):
            raise ChatError(f'enable_thinking={enable_thinking!r} does not exist: choose True, False or "auto".')
        if enable_thinking and thinking_budget is not None:
            closing = len(processor.tokenizer(CLOSING)["input_ids"])
            why = (
                f"max_new_tokens={max_new_tokens} bounds thought and answer together, and closing the thought takes "
                f"{closing}. Lower the budget or raise max_new_tokens."
            )
            _check_number("thinking_budget", thinking_budget, 0, max_new_tokens - closing - 1, why)
        if decoding is not None and (decoding not in DECODINGS or sampling is not None):
            known = ", ".join(DECODINGS)
            raise ChatError(f"decoding={decoding!r}: choose one of {known}, and leave away its older name sampling=.")
        config = model.generation_config
        asks_to_sample = sampling or any(given.get(name) is not None for name in ("temperature", "top_p", "top_k"))
        if decoding is None and (sampling is not None or asks_to_sample or config.do_sample):
            decoding = "beam" if sampling is False else "sample"
        thinks = enable_thinking is True and decoding == "sample"
        self.decoding: dict[str, Any] = {}
        if decoding is not None:
            self.decoding |= SAMPLE_THINKING if thinks else DECODINGS[decoding]
        if sampling is False and stream:
            self.decoding["num_beams"] = 1
        self.decoding |= given
        beams = self.decoding.get("num_beams") or config.num_beams or 1
        self.samples = self.decoding.get("do_sample", config.do_sample)
        if stream and beams > 1:
            raise ChatError(f"stream=True cannot follow {beams} beams: pass num_beams=1 or another decoding.")
        if seed is not None and beams > 1 and self.samples:
            raise ChatError(f"seed={seed} cannot steer {beams} beams that sample: pass num_beams=1.")

    @property
    def max_slice_nums(self) -> int | None:
        """That of pictures; None: the processor's own."""
        own = self.template.get("images_kwargs") or {}
        return own.get("max_slice_nums", self.template.get("max_slice_nums"))

    def of_row(self, row: int, temporal_ids: Sequence | None) -> "ChatSettings":
        """Those of one conversation of a batch, to be answered alone."""
        own = copy.copy(self)
        own.template = self.template | {"temporal_ids": temporal_ids}
        own.seed = self.seed if row == 0 or self.seed is None else f"{self.seed}/{row}"
        return own


def _check_number(name: str, value: Any, least: int, most: float = math.inf, why: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or not least <= int(value) <= most:
        limit = f" to {most}: " if most < math.inf else "."
        raise ChatError(f"{name}={value!r} has to be a whole number from {least}{limit}{why}")


# ---- pictures ----


@dataclass(frozen=True, eq=False)
class VisualUnit:
    """Slices that share their slots: one of a picture, or the same one of each frame in a group. Units are equal where
    their slices are the same objects."""

    temporal_ids: tuple[int, ...]  # one a slice, tenths of a second; (-1,) for a picture
    slices: tuple[torch.Tensor, ...]  # [3, P, P * patches]; on the meta device where features stand in for pixels
    sizes: tuple[tuple[int, int], ...]  # (rows, columns) in patches

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VisualUnit) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self):
        return self.temporal_ids, *map(id, self.slices)


def read_units(inputs: Mapping[str, Any]) -> list[list[VisualUnit]]:
    """The visual units of each sample in the processor's output."""
    samples = []
    for index, slices in enumerate(inputs.get("pixel_values") or [[]] * len(inputs["input_ids"])):
        groups = inputs["temporal_ids"][index] if "temporal_ids" in inputs else [[-1]] * len(slices)
        pairs = zip(slices, map(tuple, inputs["tgt_sizes"][index].tolist()), strict=True) if len(slices) else iter(())
        samples.append(
            [VisualUnit(tuple(group), *zip(*(next(pairs) for _ in group), strict=True)) for group in groups]
        )
    return samples


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture that a model has read (`model.encode_images`); stands in its messages where a picture may stand."""

    image: Any  # what was given
    sliced: Any  # the processor's `SlicedImage`, its slices on the meta device
    features: dict[tuple[Any, VisualUnit], torch.Tensor]  # [Q, D] each

    def slices(self, image_processor: Any, max_slice_nums: int | None) -> Any:
        """The `SlicedImage`, if the call cuts it as it was cut; else a ChatError."""
        if image_processor.get_sliced_grid(self.sliced.image_size, max_slice_nums) != self.sliced.grid:
            raise ChatError(
                f"A picture was encoded in slices {self.sliced.grid}, but max_slice_nums={max_slice_nums} cuts it "
                "otherwise. Give encode_images the same max_slice_nums."
            )
        return self.sliced


def encode(model: Any, units: list[VisualUnit]) -> torch.Tensor:
    """Features [units, Q, D] of visual units."""
    slices = [pixels for unit in units for pixels in unit.slices]
    if any(pixels.is_meta for pixels in slices):
        raise ChatError(
            "A picture was encoded by another model, or as a still picture, and has no pixels left: pass the picture "
            "itself. An assistant_model of a session is given to all its turns."
        )
    sizes = [size for unit in units for size in unit.sizes]
    groups = [list(unit.temporal_ids) for unit in units]
    return model.get_image_features([[s.to(model.device) for s in slices]], [sizes], [groups]).pooler_output


@dataclass(frozen=True)
class Prompt:
    """What the model reads: a batch of prompts, padded on the left."""

    input_ids: torch.LongTensor  # [B, L]
    attention_mask: torch.LongTensor  # [B, L]
    units: list[list[VisualUnit]]  # of each prompt, in the order of their slots


class CallMemory:
    """What one call need not compute twice: pictures that were encoded before, and with "auto" the states of the draft.

    A session brings a memory of its own with the same four methods.
    """

    def __init__(self, image_processor, max_slice_nums: int | None, keeps_states: bool):
        self._image_processor, self._max_slice_nums = image_processor, max_slice_nums
        self._features: dict[tuple[ChatMixin, VisualUnit], torch.Tensor] = {}
        self._keeps_states = keeps_states
        self._ids: list[int] = []
        self._states: Any = None

    def get(self, kind: str, sources: list, make: Callable[[list], list]) -> list:
        """What the processor makes of images or videos: the `media_cache` of `MiniCPMVProcessor.__call__`."""
        encoded = {place: source for place, source in enumerate(sources) if isinstance(source, EncodedImage)}
        made = make([source for place, source in enumerate(sources) if place not in encoded])
        for place, image in encoded.items():  # rising, so that each finds its place
            self._features |= image.features
            made.insert(place, image.slices(self._image_processor, self._max_slice_nums))
        return made

    def features(self, units: list[VisualUnit], model: Any) -> torch.Tensor:
        """Features [units, Q, D], encoded where they are new."""
        if new := [unit for unit in dict.fromkeys(units) if (model, unit) not in self._features]:
            self._features |= {(model, unit): rows for unit, rows in zip(new, encode(model, new), strict=True)}
        return torch.stack([self._features[model, unit] for unit in units])

    def cached_tokens(self, prompt: Prompt) -> int:
        """Tokens of the prompt whose states a session holds."""
        return 0

    def generate(self, model: Any, prompt: Prompt, draft: list[int], arguments: dict[str, Any]) -> Any:
        """`model.generate` behind the prompt and the beginning of an answer; returns its output."""
        if not self._keeps_states or (arguments.get("num_beams") or 1) > 1:
            return model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, **arguments)
        ids = [*prompt.input_ids[0].tolist(), *draft]
        self._states = DynamicCache(config=model.config) if self._states is None else self._states
        pairs = enumerate(zip(self._ids, ids[:-1], strict=False))
        common = next((place for place, (ours, wanted) in pairs if ours != wanted), min(len(self._ids), len(ids) - 1))
        if common < len(self._ids):
            self._states.crop(common - len(self._ids))  # a negative number means the same in every version
        given = torch.tensor([ids], device=prompt.input_ids.device)
        arguments = arguments | {"attention_mask": torch.ones_like(given), CACHE_NAME: self._states}
        output = model.generate(given, **arguments)
        self._ids = getattr(output, "sequences", output)[0, : self._states.get_seq_length()].tolist()
        return output


# ---- one answer ----


class Turn:
    """One answer in the making, to one conversation or to a batch of them.

    Attributes:
        prompt: what the model will read (with "auto": unless it thinks).
        watch: the times of its stages, and the switch that stops it.
    """

    def __init__(
        self,
        model: Any,
        processor: ProcessorMixin,
        conversations: list[list[dict]],
        settings: ChatSettings,
        memory: CallMemory | None = None,
        features: Any = None,
        watch: Watch | None = None,
    ):
        self.model, self.processor, self.settings = model, processor, settings
        self.watch = watch or Watch(exact=True)
        is_auto = settings.thinking == "auto"
        if memory is None:
            memory = CallMemory(processor.image_processor, settings.max_slice_nums, keeps_states=is_auto)
        self._memory = memory
        self._conversations, self._features = conversations, features
        self._prompts: dict[bool, Prompt] = {}
        self.prompt = self._write(False if is_auto else settings.thinking)
        self.watch.note("inputs")

    @torch.no_grad()
    def run(self, streamer: AnswerStreamer | None = None) -> list[ChatOutput]:
        """Let the model answer; one output for each conversation."""
        settings, watch = self.settings, self.watch
        facts: dict[str, Any] = {"cached_tokens": self._memory.cached_tokens(self.prompt)}
        features = self._read_pictures()
        thinking: Any = settings.thinking
        draft: list[int] = []
        if thinking == "auto":
            thinking, draft, facts["need"], facts["draft_tokens"] = self._decide(features)
        prompt = self._write(thinking)
        length, left = prompt.input_ids.shape[1], settings.max_new_tokens - len(draft)
        arguments = self._arguments(prompt, thinking, features)
        stop_ids = arguments["eos_token_id"]
        if streamer is not None:
            streamer.expect(length, thinking, settings.max_new_tokens, stop_ids)
        if (draft and (len(draft) < DRAFT_TOKENS or draft[-1] in stop_ids or not left)) or watch.cancelled.is_set():
            rows = [draft]  # the draft is the answer
            watch.note("first_token")
            if streamer is not None:
                streamer.put(torch.tensor([[*prompt.input_ids[0].tolist(), *draft]]))
                streamer.end()
        else:
            arguments |= {"max_new_tokens": left, "streamer": streamer}
            arguments["min_new_tokens"] = max(settings.min_new_tokens - len(draft), 0) or None
            output = self._memory.generate(self.model, prompt, draft, arguments)
            new = getattr(output, "sequences", output)[:, length + len(draft) :].tolist()
            rows = [draft + row for row in new]
        watch.note("total")
        tokens = prompt.attention_mask.sum(-1).tolist()
        return [self._output(*pair, thinking, stop_ids, facts) for pair in zip(rows, tokens, strict=True)]

    def stream(self, finish: Callable[[ChatOutput | None], None] = lambda output: None) -> AnswerStream:
        """`run()` in a thread, whose text comes in pieces; `finish` gets the output, None where nothing was read."""
        return AnswerStream(self, finish)

    def _write(self, thinking: Any) -> Prompt:
        """The prompts with the opening of the mode; of conversations that end with an answer, as far as they go."""
        if thinking not in self._prompts:
            is_begun = self._conversations[0][-1]["role"] == "assistant"
            inputs = self.processor.apply_chat_template(
                self._conversations,
                chat_template=self.processor.tokenizer.chat_template,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=not is_begun,
                continue_final_message=is_begun,
                enable_thinking=thinking,
                media_cache=self._memory,
                **self.settings.template,
            )
            ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
            self._prompts[thinking] = Prompt(ids, mask, read_units(inputs))
        return self._prompts[thinking]

    def _read_pictures(self) -> dict[str, Any]:
        """Features of all pictures, as `generate` takes them: of the model, and of an assistant with a tower."""
        if self._features is not None:
            return {"image": self._features}
        units = list(chain.from_iterable(self.prompt.units))
        assistant = self.settings.decoding.get("assistant_model")
        readers = {"image": self.model, "assistant": assistant}
        readers = {name: reader for name, reader in readers.items() if units and hasattr(reader, "get_image_features")}
        features = {name: self._memory.features(units, reader) for name, reader in readers.items()}
        if features:
            self.watch.note("vision", features["image"])
        return features

    def _arguments(self, prompt: Prompt, thinking: bool, features: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` besides the ids."""
        settings, config, tokenizer = self.settings, self.model.generation_config, self.processor.tokenizer
        arguments = {"pad_token_id": tokenizer.pad_token_id, "tokenizer": tokenizer, **settings.decoding}
        known = (arguments.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id)
        stop_ids = next(ids for ids in known if ids is not None)
        if (config.num_beams or 1) > 1:
            arguments.setdefault("num_beams", config.num_beams)
        arguments["eos_token_id"] = list(stop_ids) if isinstance(stop_ids, (list, tuple)) else [stop_ids]
        if features:
            arguments["mm_encoder_outputs"] = dict(features)
        criteria, processors = (list(arguments.get(n) or ()) for n in ("stopping_criteria", "logits_processor"))
        length = prompt.input_ids.shape[1]
        if thinking and settings.thinking_budget is not None:
            think_end = tokenizer.convert_tokens_to_ids(THINK_END)
            closing = tokenizer(CLOSING)["input_ids"]
            processors.append(ThoughtBudget(settings.thinking_budget, length, think_end, closing))
        if settings.seed is not None and settings.samples and arguments.get("do_sample", True):
            seeds = [f"{settings.seed}/{row}" for row in range(len(prompt.input_ids))]
            processors.append(SeededChoice(seeds, length))
        arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, self.watch])
        return arguments | ({"logits_processor": LogitsProcessorList(processors)} if processors else {})

    def _decide(self, features: dict[str, Any]) -> tuple[bool, list[int], float, int]:
        """Let the model begin to answer without a thought. Returns whether to think, the ids of the draft to go on with,
        the need, and the number of tokens thrown away."""
        settings, prompt = self.settings, self.prompt
        arguments = self._arguments(prompt, False, features)
        for name in ("prompt_lookup_num_tokens", "assistant_model"):
            arguments.pop(name, None)
        beams = arguments.get("num_beams") or 1
        if beams > 1:
            arguments |= {"num_beams": 1, "do_sample": False}
        arguments |= {"return_dict_in_generate": True, "output_logits": True}
        arguments["max_new_tokens"] = min(DRAFT_TOKENS, settings.max_new_tokens)
        arguments["min_new_tokens"] = min(DRAFT_TOKENS, settings.min_new_tokens) or None
        output = self._memory.generate(self.model, prompt, [], arguments)
        self.watch.timings.pop("first_token", None)  # nobody has seen it yet
        draft = output.sequences[0, prompt.input_ids.shape[1] :].tolist()
        question = [message for message in self._conversations[0] if message["role"] == "user"][-1]
        content = question.get("content") or ""
        parts = [read_part(part) for part in (content if isinstance(content, (list, tuple)) else [content])]
        texts = [value for kind, value in parts if kind == "text"]
        tokens = len(self.processor.tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"])
        need = need_to_think(least_certainty(output.logits), tokens, len(parts) - len(texts))
        thinking = need >= self.model.thinking_threshold
        goes_on = not thinking and beams == 1
        return thinking, draft if goes_on else [], need, 0 if goes_on else len(draft)

    def _output(
        self, ids: list[int], prompt_tokens: int, thinking: bool, stop_ids: list[int], facts: dict[str, Any]
    ) -> ChatOutput:
        """[`ChatOutput`] of the generated ids of one answer."""
        tokenizer, limit = self.processor.tokenizer, self.settings.max_new_tokens
        ids = ids[:limit]  # guessed decoding may come to more (transformers 4.57, 5.0)
        length = next((place for place, token in enumerate(ids) if token in stop_ids), None)
        answer = ids[:length]
        if length is not None:
            finish_reason = "stop"
        elif self.watch.cancelled.is_set():
            finish_reason = "cancelled"
        else:
            finish_reason = "length" if len(ids) >= limit else "stop"  # "stop" by a stop string
        raw_text = (OPENING if thinking else "") + tokenizer.decode(answer, skip_special_tokens=False)
        reasoning, text, reasoning_tokens = None, raw_text, 0
        if thinking:
            reasoning, text = self.processor.split_thought(raw_text)
            think_end = tokenizer.convert_tokens_to_ids(THINK_END)
            reasoning_tokens = answer.index(think_end) + 1 if think_end in answer else len(answer)
        return ChatOutput(
            text=text,
            reasoning=reasoning,
            finish_reason=finish_reason,
            prompt_tokens=prompt_tokens,
            generated_tokens=len(answer) + (length is not None),
            mode="deep" if thinking else "fast",
            raw_text=raw_text,
            reasoning_tokens=reasoning_tokens,
            timings=dict(self.watch.timings),
            **facts,
        )


def read_conversations(
    msgs: Sequence | str | None, image: Any = None, system_prompt: str = ""
) -> tuple[list[list[dict]], bool]:
    """Bring the accepted forms of `msgs` to a list of conversations; also returns whether it was a batch.

    Raises:
        ChatError: names what is wrong with the messages.
    """
    if isinstance(msgs, str):
        try:
            msgs = json.loads(msgs)
        except json.JSONDecodeError as error:
            raise ChatError(f"msgs is a string, but not JSON ({error}). Pass a list of messages.") from error
    if not isinstance(msgs, (list, tuple)) or not msgs:
        raise ChatError(f"msgs is a list of messages with at least one, not {msgs!r}.")
    is_batch = isinstance(msgs[0], (list, tuple))
    conversations = [list(messages) for messages in (msgs if is_batch else [msgs])]
    images = image if is_batch and image is not None else [image] * len(conversations)
    if len(images) != len(conversations):
        raise ChatError(f"image has {len(images)} entries for {len(conversations)} conversations.")
    for index, (messages, picture) in enumerate(zip(conversations, images, strict=True)):
        for message in messages:
            if not isinstance(message, Mapping) or message.get("role") not in ("system", "user", "assistant", "tool"):
                raise ChatError(
                    f"A message is a dict with 'content' and a 'role' of system, user, assistant or tool, not {message!r}."
                )
        if not messages or all(message["role"] == "system" for message in messages):
            raise ChatError(f"Conversation {index} has no message of a user.")
        if picture is not None:
            place = next(place for place, message in enumerate(messages) if message["role"] != "system")
            content = messages[place].get("content")
            if not isinstance(content, str):
                raise ChatError(
                    "image= goes with a first message whose content is a string. Put pictures into the content list."
                )
            pictures = list(picture) if isinstance(picture, (list, tuple)) else [picture]
            messages[place] = {**messages[place], "content": [*pictures, content]}
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
    return conversations, is_batch


class ChatMixin:
    """Adds `chat` and `encode_images` to a model that has `generate`, and what sessions are built on."""

    config: Any
    generation_config: Any
    draft_tokens = DRAFT_TOKENS  # of "auto", at most

    def chat(
        self,
        image: Any = None,
        msgs: Sequence | str | None = None,
        tokenizer: Any = None,
        processor: ProcessorMixin | None = None,
        vision_hidden_states: Sequence[torch.Tensor] | None = None,
        max_new_tokens: int = 2048,
        min_new_tokens: int = 0,
        sampling: bool | None = None,
        max_inp_length: int = 16384,
        system_prompt: str = "",
        stream: bool = False,
        max_slice_nums: int | None = None,
        use_image_id: bool | None = None,
        temporal_ids: Sequence | None = None,
        enable_thinking: bool | str = False,
        thinking_budget: int | None = None,
        seed: int | None = None,
        return_dict: bool = False,
        decoding: str | None = None,
        **kwargs,
    ) -> str | list[str] | ChatOutput | list[ChatOutput] | AnswerStream:
        """Answer a conversation, or a batch of them.

        Args:
            image: older style: the picture (in a batch: one a conversation) that stands before a first message
                whose content is a string.
            msgs: list of messages `{"role", "content"}`, a list of such lists (a batch), or either as a JSON string.
                Content: see `MiniCPMVProcessor.apply_chat_template`; a picture may also be an [`EncodedImage`]. An
                answer that ends the conversation is unfinished: the model goes on with it, without a thought.
            tokenizer, processor: those in the model's own folder where they are not given. Nothing is downloaded.
            vision_hidden_states: features [units, query_num, D] of each conversation, in place of encoding the
                pictures again; the pictures are still needed, for the prompt.
            max_new_tokens, min_new_tokens: bounds of thought and answer together, in tokens.
            sampling: the older name of `decoding`: True is "sample", False is "beam" (1 beam when streaming).
            max_inp_length: most tokens the prompt may have; a longer one is an error.
            system_prompt: stands in front of each conversation.
            stream: return an [`AnswerStream`] of text instead of the text; closing it stops the model.
            max_slice_nums, use_image_id, temporal_ids: see `MiniCPMVProcessor.__call__`.
            enable_thinking: True lets the model think first; the text then begins with "<think>\\n". "auto" lets it
                decide for each conversation (see `decoding_minicpmv`); those of a batch are then answered one by one.
            thinking_budget: most tokens of a thought; then it is closed and the answer begins.
            seed: makes sampling repeatable, without touching the global random state. Equal conversations of a batch
                get different answers.
            return_dict: return [`ChatOutput`], with the thought apart, instead of text.
            decoding: "greedy", "beam" (3 beams, repetition_penalty 1.2) or "sample" (temperature 0.7 and, without
                thinking, top_p 0.8, top_k 100, repetition_penalty 1.03). Without it the model's generation_config decides
                whether it samples, unless temperature, top_p or top_k ask for it.
            kwargs: arguments of `generate` (temperature, num_beams, stop_strings, ...), which count over `decoding`, and
                options of the video processor (fps, max_num_packing, start, ...).

        Returns:
            `str`, for a batch a list of `str`, with `stream` an [`AnswerStream`]; with `return_dict` [`ChatOutput`].

        Raises:
            PromptTooLongError: the prompt has more than `max_inp_length` tokens.
            ChatError: for messages that cannot be read, and for values and combinations that do not exist.
            TypeError: for an unknown keyword; names the nearest.
        """
        watch = Watch(exact=return_dict)
        processor = self.chat_processor(processor, tokenizer)
        conversations, is_batch = read_conversations(msgs, image, system_prompt)
        if stream and (is_batch or return_dict):
            raise ChatError(
                "stream=True gives the text of one conversation: pass one, and no return_dict (the stream has `output`)."
            )
        kwargs |= {"max_slice_nums": max_slice_nums, "use_image_id": use_image_id, "temporal_ids": temporal_ids}
        settings = ChatSettings(
            self,
            processor,
            max_new_tokens,
            min_new_tokens,
            sampling,
            max_inp_length,
            stream,
            enable_thinking,
            thinking_budget,
            seed,
            decoding,
            **kwargs,
        )
        begun = {messages[-1]["role"] == "assistant" for messages in conversations}
        if True in begun and (False in begun or settings.thinking):
            raise ChatError(
                "A conversation that ends with an answer is continued, without a thought: pass enable_thinking=False, and "
                "no other conversations in the same batch."
            )
        if settings.thinking != "auto":
            turns = [Turn(self, processor, conversations, settings, features=vision_hidden_states, watch=watch)]
        elif vision_hidden_states is not None:
            raise ChatError(
                'enable_thinking="auto" takes no vision_hidden_states: put an EncodedImage into the messages.'
            )
        else:  # each may think or not
            ids = temporal_ids if is_batch and temporal_ids is not None else [temporal_ids] * len(conversations)
            if len(ids) != len(conversations):
                raise ChatError(f"temporal_ids has {len(ids)} entries for {len(conversations)} conversations.")
            rows = enumerate(zip(conversations, ids, strict=True))
            each = [([messages], settings.of_row(row, own)) for row, (messages, own) in rows]
            turns = [Turn(self, processor, *pair, watch=None if row else watch) for row, pair in enumerate(each)]
        if stream:
            return turns[0].stream()
        outputs = [output for turn in turns for output in turn.run()]
        answers = outputs if return_dict else [output.raw_text for output in outputs]
        return answers if is_batch else answers[0]

    @torch.no_grad()
    def encode_images(
        self, images: Any, processor: ProcessorMixin | None = None, max_slice_nums: int | None = None
    ) -> EncodedImage | list[EncodedImage]:
        """Read pictures once, to ask about them many times.

        Args:
            images: a picture, or a list of pictures.
            processor: that in the model's own folder where it is not given.
            max_slice_nums: see `MiniCPMVProcessor.__call__`; calls that use the pictures need the same.

        Returns:
            [`EncodedImage`], for a list a list of them: they stand in messages of this model as pictures do.
        """
        processor = self.chat_processor(processor)
        is_one = not isinstance(images, (list, tuple))
        images = [images] if is_one else list(images)
        sliced = processor.image_processor.slice_all_to_patches(images, max_slice_nums)
        units = [
            VisualUnit((-1,), (pixels,), (size,))
            for picture in sliced
            for pixels, size in zip(picture.pixel_values, picture.tgt_sizes, strict=True)
        ]
        features = iter(encode(self, units) if units else ())
        encoded = []
        for image, picture in zip(images, sliced, strict=True):
            slices = [torch.empty_like(pixels, device="meta") for pixels in picture.pixel_values]
            own = [VisualUnit((-1,), (s,), (size,)) for s, size in zip(slices, picture.tgt_sizes, strict=True)]
            features_of = {(self, unit): next(features).clone() for unit in own}
            encoded.append(EncodedImage(image, replace(picture, pixel_values=slices), features_of))
        return encoded[0] if is_one else encoded

    # ---- what sessions, training and serving are built on ----

    read_conversations = staticmethod(read_conversations)
    encode_units = encode

    chat_settings, chat_turn = ChatSettings, Turn  # to be called with the model as first argument

    @staticmethod
    def seeded_choice(seeds: Sequence[int | str], prompt_length: int) -> SeededChoice:
        """A logits processor by which `generate(do_sample=True)` draws from `seeds`, one a row, and from nothing else."""
        return SeededChoice(seeds, prompt_length)

    def chat_processor(self, processor: ProcessorMixin | None = None, tokenizer: Any = None) -> ProcessorMixin:
        """The processor that was given, or the one in the model's own folder; with `tokenizer` in place of its own.

        Raises:
            ChatError: there is none on this machine.
        """
        if processor is None:
            processor = getattr(self, "_own_processor", None) or self._load_processor()
        if tokenizer is not None and tokenizer is not processor.tokenizer:
            processor = copy.copy(processor)
            processor.tokenizer = tokenizer
        return processor

    def _load_processor(self) -> ProcessorMixin:
        folder: str = self.config._name_or_path
        where: dict[str, Any] = {}
        if not folder:
            raise ChatError(
                "This model was not loaded from a folder. Pass processor=AutoProcessor.from_pretrained(...)."
            )
        if not os.path.isdir(folder):
            where = {
                "revision": getattr(self.config, "_commit_hash", None),
                "subfolder": getattr(self, "_subfolder", ""),
            }
        try:  # the folder's code already runs as the model's, so it is trusted here too
            loaded = AutoProcessor.from_pretrained(folder, trust_remote_code=True, local_files_only=True, **where)
        except (OSError, ValueError) as error:  # ValueError: the folder has a config, but no processor
            raise ChatError(
                f"No processor is stored with the model in {folder!r}, and chat() does not download one. Pass "
                "processor=AutoProcessor.from_pretrained(...)."
            ) from error
        self._own_processor = loaded
        return loaded

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args, subfolder: str = "", **kwargs) -> Any:
        """As of transformers; a subfolder is remembered, since the processor lies there too."""
        name = pretrained_model_name_or_path
        if subfolder and os.path.isdir(folder := os.path.join(name, subfolder)):
            name, subfolder = folder, ""  # where transformers would take the outer folder's generation_config.json
        loaded = super().from_pretrained(name, *args, subfolder=subfolder, **kwargs)  # type: ignore[misc]
        (loaded[0] if isinstance(loaded, tuple) else loaded)._subfolder = subfolder
        return loaded

    def _get_logits_processor(self, generation_config, *args, **kwargs) -> LogitsProcessorList:
        # A seeded choice is made from what temperature, top_p and the like leave, and so comes behind them; then nothing
        # is left to draw, and the global random state stays as it is.
        processors = super()._get_logits_processor(generation_config, *args, **kwargs)  # type: ignore[misc]
        ordered = sorted(processors, key=lambda processor: isinstance(processor, SeededChoice))
        if ordered and isinstance(ordered[-1], SeededChoice):
            generation_config.do_sample = False
        return LogitsProcessorList(ordered)

    @property
    def thinking_threshold(self) -> float:
        """Need from which `enable_thinking="auto"` thinks."""
        return getattr(self.config, "thinking_threshold", DEFAULT_THRESHOLD)

    def set_threshold(self, threshold: float) -> None:
        """Set the need, from 0 (always think) to 1 (never), from which `enable_thinking="auto"` thinks.

        It is kept in the config, so `save_pretrained` stores it.
        """
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
            raise ChatError(f"threshold={threshold!r} is no number from 0 (always think) to 1 (never think).")
        self.config.thinking_threshold = float(threshold)
