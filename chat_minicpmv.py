"""`model.chat(...)`: questions about images and videos in one call.

The road of an answer, from top to bottom: messages -> [`ChatSettings`] -> [`Prompt`] -> generate -> [`ChatOutput`].

What is special:
- The calling style of the published code, with its positional order and defaults; every prompt goes through the
  processor's own `apply_chat_template`, so chat, sessions, training and serving agree token for token.
- Nothing is cut from a prompt and nothing from an answer but the closing token.
- What is known is not computed again: features ride on the slices that they were made of, and key-value states count
  for the next prompt as far as it begins with the same tokens and the same images.
"""

import copy
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain, islice, takewhile
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from transformers import AutoProcessor, DynamicCache, GenerationConfig, GenerationMixin, ProcessorMixin
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from .compat_minicpmv import CACHE_NAME
from .configuration_minicpmv import MiniCPMVError, check_whole, did_you_mean
from .decoding_minicpmv import (
    CLOSING,
    DEFAULT_THRESHOLD,
    DRAFT_TOKENS,
    OPENING,
    AnswerStream,
    AnswerStreamer,
    SeededChoice,
    ThoughtBudget,
    Watch,
    need_to_think,
)
from .messages_minicpmv import THINK_END


# What each way to decode means; None falls back to the library's own default.
_NO_SAMPLING: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
DECODINGS: dict[str, dict[str, Any]] = {
    "greedy": {**_NO_SAMPLING, "num_beams": 1, "repetition_penalty": 1.0},
    "beam": {**_NO_SAMPLING, "num_beams": 3, "repetition_penalty": 1.2},
    "sample": {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.03},
}
SAMPLE_THINKING = {"do_sample": True, "temperature": 0.7}
TOLERATED_ARGUMENTS = ("context",)  # VLMEvalKit passes it; it never had an effect
ROLES = ("system", "user", "assistant", "tool")


class ChatError(MiniCPMVError):
    """Messages that cannot be read, or settings that cannot be used, alone or together."""


# ---- messages ----


def read_conversations(
    msgs: Sequence | str | None, image: Any = None, system_prompt: str = ""
) -> tuple[list[list[dict]], bool]:
    """Bring the accepted forms of `msgs` to a list of conversations; also returns whether it was a batch.

    Raises ChatError, which names what is wrong with the messages.
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
    for index, (messages, own) in enumerate(zip(conversations, images, strict=True)):
        for message in messages:
            if not isinstance(message, Mapping) or message.get("role") not in ROLES:
                raise ChatError(f"A message is a dict with 'content' and one of the roles {ROLES}, not {message!r}.")
        first = next((place for place, message in enumerate(messages) if message["role"] != "system"), None)
        if first is None:
            raise ChatError(f"Conversation {index} has no message of a user.")
        if own is not None:
            content = messages[first].get("content")
            if not isinstance(content, str):
                raise ChatError("image= goes with a first message that is a string. Put images into the content list.")
            own = own if isinstance(own, (list, tuple)) else [own]
            messages[first] = {**messages[first], "content": [*own, content]}
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
    return conversations, is_batch


# ---- settings ----


@lru_cache(maxsize=1)
def generation_names() -> frozenset[str]:
    """Keyword arguments of `generate`."""
    names = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
    return frozenset(name for name in names if not name.startswith("_")) - {"self", "inputs", "kwargs"}


class ChatSettings:
    """How to answer: the arguments of `chat()`, checked, as `template` for the processor and `decoding` for `generate`.

    Raises TypeError for a keyword that neither of them knows, ChatError for values and combinations that do not exist.
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
        seed: int | str | Sequence[int | str] | None = None,
        decoding: str | None = None,
        **kwargs,
    ):
        if enable_thinking not in (True, False, "auto"):
            raise ChatError(f'enable_thinking={enable_thinking!r} does not exist: choose True, False or "auto".')
        self.thinking = enable_thinking if enable_thinking == "auto" else bool(enable_thinking)
        self.thinking_budget = thinking_budget
        self.seeds = seed if seed is None or isinstance(seed, (list, tuple)) else [f"{seed}/0"]  # one a conversation
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
        check_whole("max_new_tokens", max_new_tokens, error=ChatError)
        check_whole("min_new_tokens", min_new_tokens, 0, error=ChatError)
        if given.get("num_beams") is not None:
            check_whole("num_beams", given["num_beams"], error=ChatError)
        if enable_thinking and thinking_budget is not None:
            closing = len(processor.tokenizer(CLOSING)["input_ids"])
            hint = f"max_new_tokens={max_new_tokens} bounds thought and answer together, and closing takes {closing}"
            check_whole("thinking_budget", thinking_budget, 0, max_new_tokens - closing - 1, hint, ChatError)
        if decoding is not None and (decoding not in DECODINGS or sampling is not None):
            raise ChatError(f"decoding={decoding!r}: choose {', '.join(DECODINGS)}, and not its older name sampling=.")

        config, tokenizer = model.generation_config, processor.tokenizer
        asks_to_sample = any(given.get(name) is not None for name in ("temperature", "top_p", "top_k"))
        if decoding is None and (sampling is not None or asks_to_sample or config.do_sample):
            decoding = "beam" if sampling is False else "sample"
        self.decoding: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "tokenizer": tokenizer}
        if decoding is not None:
            self.decoding |= SAMPLE_THINKING if (self.thinking, decoding) == (True, "sample") else DECODINGS[decoding]
        self.decoding |= ({"num_beams": 1} if sampling is False and stream else {}) | given
        self.beams = self.decoding.get("num_beams") or config.num_beams or 1
        self.samples = self.decoding.get("do_sample", config.do_sample)
        if stream and self.beams > 1:
            raise ChatError(f"stream=True cannot follow {self.beams} beams: pass num_beams=1 or another decoding.")
        if seed is not None and self.beams > 1 and self.samples:
            raise ChatError(f"seed= cannot steer {self.beams} beams that sample: pass num_beams=1.")
        eos = (given.get("eos_token_id"), config.eos_token_id, tokenizer.eos_token_id)
        stop_ids = next(ids for ids in eos if ids is not None)
        self.stop_ids = list(stop_ids) if isinstance(stop_ids, (list, tuple)) else [stop_ids]
        self.decoding["eos_token_id"] = self.stop_ids

    def of_row(self, row: int, temporal_ids: Sequence | None) -> "ChatSettings":
        """Those of one conversation of a batch, to be answered alone."""
        own = copy.copy(self)
        own.template = self.template | {"temporal_ids": temporal_ids}
        own.seeds = self.seeds and self.seeds[row : row + 1]
        return own


# ---- prompt ----


class VisualUnit(NamedTuple):
    """Slices that share their slots: one of an image, or the same one of each frame in a group."""

    temporal_ids: list[int]  # one a slice, tenths of a second; [-1] for an image
    slices: tuple[torch.Tensor, ...]  # [3, P, P * patches]; empty once they have been read
    sizes: tuple[tuple[int, int], ...]  # (rows, columns) in patches

    @property
    def features(self) -> dict[Any, torch.Tensor]:
        """[Q, D] by the model that has read the unit. They ride on its first slice, and so live as long as that."""
        return vars(self.slices[0]).setdefault("features", {}).setdefault(tuple(self.temporal_ids), {})


def visual_units(inputs: Mapping[str, Any]) -> list[VisualUnit]:
    """The visual units in the processor's output, in the order of their slots."""
    slices = list(chain.from_iterable(inputs.get("pixel_values", ())))
    sizes = iter([tuple(size) for sample in inputs.get("tgt_sizes", ()) for size in sample.tolist()])
    groups = chain.from_iterable(inputs.get("temporal_ids", ([[-1]] * len(slices),)))
    rest = iter(slices)
    return [VisualUnit(ids, tuple(islice(rest, len(ids))), tuple(islice(sizes, len(ids)))) for ids in groups]


def read_units(units: list[VisualUnit], models: Sequence[Any]) -> list[torch.Tensor]:
    """Features [units, Q, D] of each of the models; a unit is encoded where it is new to the model.

    Then its pixels go, since features are a fraction of them. Raises ChatError where they had gone before.
    """
    for model in models:
        new = list({id(unit.slices[0]): unit for unit in units if model not in unit.features}.values())
        slices = [pixels.to(model.device) for unit in new for pixels in unit.slices]
        if not all(map(torch.numel, slices)):
            raise ChatError(
                "An image was encoded by another model, or as a still image, and has no pixels left: pass the image "
                "itself. An assistant_model of a session is given to all its turns."
            )
        if new:
            sizes, groups = [size for unit in new for size in unit.sizes], [unit.temporal_ids for unit in new]
            features = model.get_image_features([slices], [sizes], [groups]).pooler_output
            for unit, row in zip(new, features, strict=True):
                unit.features[model] = row.clone()
    for pixels in chain.from_iterable(unit.slices for unit in units):
        pixels.data = pixels.new_empty(0)
    return [torch.stack([unit.features[model] for unit in units]) for model in models]


class Prompt(NamedTuple):
    """What the model reads: a batch of prompts, padded on the left."""

    input_ids: torch.LongTensor  # [B, L]
    attention_mask: torch.LongTensor  # [B, L]
    units: list[VisualUnit]  # in the order of their slots
    keys: list[int]  # of the first prompt: ids of tokens, but in a slot minus the id() of its unit's slice


# ---- generate ----


def read_once() -> SimpleNamespace:
    """The `media_cache` of a single conversation: however often its prompt is written, its media are read once."""
    made: dict[str, list] = {}
    return SimpleNamespace(get=lambda kind, sources, make: made.get(kind) or made.setdefault(kind, make(sources)))


class PromptMemory:
    """What is known of a conversation's next prompt: its images and videos, and the states of its beginning.

    With "auto" a call of `chat()` has one of its own; a session brings one for all its turns. A copy goes on from the
    same states, and neither changes those of the other.
    """

    def __init__(self, media_cache: Any = None):
        self.media_cache = media_cache or read_once()  # of `MiniCPMVProcessor.__call__`
        self.keys: list[int] = []  # of the tokens whose states are known
        self._prompt: Prompt | None = None  # theirs; holds the slices, so that no others get their ids
        self._states: DynamicCache | None = None

    def cached_tokens(self, keys: list[int]) -> int:
        """Tokens whose states are known and count for a prompt; at least one of it is left to compute."""
        pairs = zip(self.keys, keys[:-1], strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))

    def generate(self, model: Any, prompt: Prompt, draft: list[int], arguments: dict[str, Any]) -> Any:
        """`model.generate` behind the prompt and the beginning of an answer. It computes what is new, and its states are
        known from then on; after an error none are. Returns its output."""
        ids = torch.tensor([[*prompt.input_ids[0].tolist(), *draft]], device=model.device)
        keys = [*prompt.keys, *draft]
        excess = len(self.keys) - self.cached_tokens(keys)
        states = DynamicCache(config=model.config) if self._states is None else copy.copy(self._states)
        states.layers = [copy.copy(layer) for layer in states.layers]  # a copy of this memory goes on from its own
        self.keys, self._prompt, self._states = [], None, None
        if excess:
            states.crop(-excess)  # a negative number means the same in every version
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments, **{CACHE_NAME: states})
        new = getattr(output, "sequences", output)[0, ids.shape[1] :].tolist()
        self.keys, self._prompt, self._states = [*keys, *new][: states.get_seq_length()], prompt, states
        return output


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
    # Seconds from the call until the inputs were ready, the images were read, the first token and the last one.
    timings: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.text


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
        memory: PromptMemory | None = None,
        features: Any = None,
        watch: Watch | None = None,
    ):
        self.model, self.processor, self.settings = model, processor, settings
        self.watch = watch or Watch(exact=True)
        self._memory = PromptMemory() if memory is None and settings.thinking == "auto" else memory
        self._conversations, self._features = conversations, features
        self.prompt = self._write(thinking=settings.thinking is True)
        self.watch.note("inputs")

    @torch.no_grad()
    def run(self, streamer: AnswerStreamer | None = None) -> list[ChatOutput]:
        """Let the model answer; one output for each conversation."""
        settings, watch, prompt = self.settings, self.watch, self.prompt
        facts: dict[str, Any] = {"cached_tokens": self._memory.cached_tokens(prompt.keys) if self._memory else 0}
        features = self._read_images()
        thinking: Any = settings.thinking
        draft: list[int] = []
        if thinking == "auto":
            thinking, draft, facts["need"], facts["draft_tokens"] = self._decide(features)
            prompt = self._write(thinking) if thinking else prompt
        if streamer is not None:
            streamer.expect(thinking, draft, settings.max_new_tokens, settings.stop_ids)
        left = settings.max_new_tokens - len(draft)
        is_whole = bool(draft) and (len(draft) < DRAFT_TOKENS or draft[-1] in settings.stop_ids or not left)
        if is_whole or watch.cancelled.is_set():
            rows = [draft]
            watch.note("first_token")
            if streamer is not None:
                streamer.end()
        else:
            arguments = self._arguments(prompt, thinking, features)
            arguments |= {"max_new_tokens": left, "streamer": streamer}
            arguments["min_new_tokens"] = max(settings.min_new_tokens - len(draft), 0) or None
            output = self._generate(prompt, draft, arguments)
            new = getattr(output, "sequences", output)[:, prompt.input_ids.shape[1] + len(draft) :].tolist()
            rows = [draft + row for row in new]
        watch.note("total")
        tokens = prompt.attention_mask.sum(-1).tolist()
        return [self._output(*pair, thinking, facts) for pair in zip(rows, tokens, strict=True)]

    def _write(self, thinking: bool) -> Prompt:
        """The prompts with the opening of the mode; of conversations that end with an answer, as far as they go."""
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
            media_cache=None if self._memory is None else self._memory.media_cache,
            **self.settings.template,
        )
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        units, slot = visual_units(inputs), self.model.config.image_token_id
        owners = iter([-id(unit.slices[0]) for unit in units for _ in range(self.model.config.query_num)])
        keys = [next(owners, slot) if token == slot else token for token in ids[0].tolist()]
        return Prompt(ids, mask, units, keys)

    def _read_images(self) -> dict[str, Any]:
        """Features of all images, as `generate` takes them: of the model, and of an assistant with a tower."""
        if self._features is not None or not self.prompt.units:
            return {} if self._features is None else {"image": self._features}
        readers = {"image": self.model, "assistant": self.settings.decoding.get("assistant_model")}
        readers = {name: model for name, model in readers.items() if hasattr(model, "get_image_features")}
        features = read_units(self.prompt.units, list(readers.values()))
        self.watch.note("vision", features[0])
        return dict(zip(readers, features, strict=True))

    def _decide(self, features: dict[str, Any]) -> tuple[bool, list[int], float, int]:
        """Let the model begin to answer without a thought. Returns whether to think, the ids of the draft to go on with,
        the need, and the number of tokens thrown away."""
        settings, prompt = self.settings, self.prompt
        arguments = self._arguments(prompt, False, features)
        for name in ("prompt_lookup_num_tokens", "assistant_model"):
            arguments.pop(name, None)
        if settings.beams > 1:
            arguments |= {"num_beams": 1, "do_sample": False}
        arguments |= {"return_dict_in_generate": True, "output_logits": True}
        arguments["max_new_tokens"] = min(DRAFT_TOKENS, settings.max_new_tokens)
        arguments["min_new_tokens"] = min(DRAFT_TOKENS, settings.min_new_tokens) or None
        output = self._generate(prompt, [], arguments)
        self.watch.timings.pop("first_token", None)  # nobody has seen it yet
        draft = output.sequences[0, prompt.input_ids.shape[1] :].tolist()
        need = need_to_think(output.logits)
        thinking = need >= self.model.thinking_threshold
        goes_on = not thinking and settings.beams == 1
        return thinking, draft if goes_on else [], need, 0 if goes_on else len(draft)

    def _arguments(self, prompt: Prompt, thinking: bool, features: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `generate` besides the ids."""
        settings, tokenizer, length = self.settings, self.processor.tokenizer, prompt.input_ids.shape[1]
        arguments = settings.decoding | ({"num_beams": settings.beams} if settings.beams > 1 else {})
        if features:
            arguments["mm_encoder_outputs"] = dict(features)
        criteria, processors = (list(arguments.get(n) or ()) for n in ("stopping_criteria", "logits_processor"))
        if thinking and settings.thinking_budget is not None:
            think_end, closing = tokenizer.convert_tokens_to_ids(THINK_END), tokenizer(CLOSING)["input_ids"]
            processors.append(ThoughtBudget(settings.thinking_budget, length, think_end, closing))
        if settings.seeds is not None and settings.samples:
            processors.append(SeededChoice(settings.seeds, length))
        arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, self.watch])
        return arguments | ({"logits_processor": LogitsProcessorList(processors)} if processors else {})

    def _generate(self, prompt: Prompt, draft: list[int], arguments: dict[str, Any]) -> Any:
        """`generate` behind the prompt and the beginning of an answer; beams begin anew."""
        if self._memory is not None and (arguments.get("num_beams") or 1) == 1:
            return self._memory.generate(self.model, prompt, draft, arguments)
        return self.model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, **arguments)

    def _output(self, ids: list[int], prompt_tokens: int, thinking: bool, facts: dict[str, Any]) -> ChatOutput:
        """[`ChatOutput`] of the generated ids of one answer."""
        tokenizer, limit = self.processor.tokenizer, self.settings.max_new_tokens
        ids = ids[:limit]  # guessed decoding may come to more (transformers 4.57, 5.0)
        length = next((place for place, token in enumerate(ids) if token in self.settings.stop_ids), None)
        answer = ids[:length]
        generated = len(answer) + (length is not None)
        finish_reason = "length" if length is None and len(ids) >= limit else "stop"  # also by a stop string
        if length is None and self.watch.cancelled.is_set():
            finish_reason = "cancelled"
        mode, opening = ("deep", OPENING) if thinking else ("fast", "")
        raw_text = opening + tokenizer.decode(answer, skip_special_tokens=False)
        reasoning, text, reasoned = None, raw_text, 0
        if thinking:
            reasoning, text = self.processor.split_thought(raw_text)
            think_end = tokenizer.convert_tokens_to_ids(THINK_END)
            reasoned = answer.index(think_end) + 1 if think_end in answer else len(answer)
        facts = facts | {"timings": dict(self.watch.timings)}
        return ChatOutput(text, reasoning, finish_reason, prompt_tokens, generated, mode, raw_text, reasoned, **facts)


# ---- methods of the model ----


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
        seed: int | str | Sequence[int | str] | None = None,
        return_dict: bool = False,
        decoding: str | None = None,
        **kwargs,
    ) -> str | list[str] | ChatOutput | list[ChatOutput] | AnswerStream:
        """Answer a conversation, or a batch of them.

        Args:
            image: older style: the image (in a batch: one a conversation) that stands before a first message
                whose content is a string.
            msgs: list of messages `{"role", "content"}`, a list of such lists (a batch), or either as a JSON string.
                Content: see `MiniCPMVProcessor.apply_chat_template`, and [`encode_images`]. An answer that ends the
                conversation is unfinished: the model goes on with it, without a thought.
            tokenizer, processor: those in the model's own folder where they are not given. Nothing is downloaded.
            vision_hidden_states: features [units, query_num, D] of each conversation, in place of encoding the
                images again; the images are still needed, for the prompt.
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
                get different answers. A list has one for each conversation, whose answer then depends on its own alone.
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
            raise ChatError("stream=True takes one conversation and no return_dict (the stream has `output`).")
        if seed is not None and not isinstance(seed, (list, tuple)):
            seed = [f"{seed}/{row}" for row in range(len(conversations))]
        if seed is not None and len(seed) != len(conversations):
            raise ChatError(f"seed has {len(seed)} entries for {len(conversations)} conversations.")
        kwargs |= {"max_slice_nums": max_slice_nums, "use_image_id": use_image_id, "temporal_ids": temporal_ids}
        kwargs |= {"enable_thinking": enable_thinking, "thinking_budget": thinking_budget, "decoding": decoding}
        kwargs |= {"seed": seed, "stream": stream}
        settings = ChatSettings(self, processor, max_new_tokens, min_new_tokens, sampling, max_inp_length, **kwargs)
        begun = {messages[-1]["role"] == "assistant" for messages in conversations}
        if True in begun and (False in begun or settings.thinking):
            raise ChatError(
                "A conversation that ends with an answer is continued, without a thought: pass enable_thinking=False, and "
                "no other conversations in the same batch."
            )
        if settings.thinking != "auto":
            turns = [Turn(self, processor, conversations, settings, features=vision_hidden_states, watch=watch)]
        elif vision_hidden_states is not None:
            raise ChatError('enable_thinking="auto" takes no vision_hidden_states: see encode_images().')
        else:  # each may think or not
            ids = temporal_ids if is_batch and temporal_ids is not None else [temporal_ids] * len(conversations)
            if len(ids) != len(conversations):
                raise ChatError(f"temporal_ids has {len(ids)} entries for {len(conversations)} conversations.")
            turns = [
                Turn(self, processor, [messages], settings.of_row(row, own), watch=None if row else watch)
                for row, (messages, own) in enumerate(zip(conversations, ids, strict=True))
            ]
        if stream:
            return AnswerStream(turns[0])
        outputs = [output for turn in turns for output in turn.run()]
        answers = outputs if return_dict else [output.raw_text for output in outputs]
        return answers if is_batch else answers[0]

    @torch.no_grad()
    def encode_images(
        self, images: Any, processor: ProcessorMixin | None = None, max_slice_nums: int | None = None
    ) -> Any:
        """Read images once, to ask about them many times.

        Args:
            images: an image, or a list of images.
            processor: that in the model's own folder where it is not given.
            max_slice_nums: see `MiniCPMVProcessor.__call__`; calls that use the images need the same.

        Returns a `SlicedImage`, for a list a list of them: they stand in messages to this model as images do.
        """
        processor = self.chat_processor(processor)
        given = list(images) if isinstance(images, (list, tuple)) else [images]
        sliced = processor.image_processor.slice_all_to_patches(given, max_slice_nums)
        pairs = [pair for each in sliced for pair in zip(each.pixel_values, each.tgt_sizes, strict=True)]
        if pairs:
            read_units([VisualUnit([-1], (pixels,), (size,)) for pixels, size in pairs], [self])
        encoded = [replace(each, image=image) for each, image in zip(sliced, given, strict=True)]
        return encoded if isinstance(images, (list, tuple)) else encoded[0]

    # ---- what sessions, training and serving are built on ----

    read_conversations, read_units = staticmethod(read_conversations), staticmethod(read_units)
    need_to_think = staticmethod(need_to_think)
    chat_settings, chat_turn, thought_budget = ChatSettings, Turn, ThoughtBudget  # the first two take the model first
    answer_stream, prompt_memory, seeded_choice = AnswerStream, PromptMemory, SeededChoice

    def chat_processor(self, processor: ProcessorMixin | None = None, tokenizer: Any = None) -> ProcessorMixin:
        """The processor that was given, or the one in the model's own folder; with `tokenizer` in place of its own.

        Raises ChatError where there is none on this machine.
        """
        if processor is None:
            processor = getattr(self, "_own_processor", None) or self._load_processor()
        if tokenizer is not None and tokenizer is not processor.tokenizer:
            processor = copy.copy(processor)
            processor.tokenizer = tokenizer
        return processor

    def _load_processor(self) -> ProcessorMixin:
        folder: str = self.config._name_or_path
        if not folder:
            raise ChatError("The model came from no folder: pass processor=AutoProcessor.from_pretrained(...).")
        where: dict[str, Any] = {}
        if not os.path.isdir(folder):
            where["revision"] = getattr(self.config, "_commit_hash", None)
            where["subfolder"] = getattr(self, "_subfolder", "")
        try:  # the folder's code already runs as the model's, so it is trusted here too
            loaded = AutoProcessor.from_pretrained(folder, trust_remote_code=True, local_files_only=True, **where)
        except (OSError, ValueError) as error:  # ValueError: the folder has a config, but no processor
            what = f"{folder!r} holds no processor, and chat() does not download one"
            raise ChatError(f"{what}: pass processor=AutoProcessor.from_pretrained(...).") from error
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
