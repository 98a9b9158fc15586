"""`model.chat(...)`: questions about pictures and videos in one call.

What is special:
- The calling style of the published code, with its positional order and defaults; every prompt goes through the
  processor's own `apply_chat_template`, so chat, sessions, training and serving agree token for token.
- Nothing is cut from a prompt and nothing from an answer but the closing token.
- Streams end cleanly: an error in the generating thread reaches the reader, and closing the stream stops the model.
- A seed belongs to one call: other threads and the global random state neither see nor disturb it.
"""

import copy
import difflib
import inspect
import json
import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from .conversation_cache_minicpmv import ConversationCache, Prompt, read_units, slot_keys
from .messages_minicpmv import read_part
from .streaming_minicpmv import AnswerStream, Watch, stop_ids_of
from .thinking_minicpmv import (
    CLOSED_THOUGHT,
    DRAFT_TOKENS,
    OPENING,
    THINK_END,
    ThinkingError,
    ThoughtBudget,
    least_certainty,
    need_to_think,
    split_thought,
)


# Arguments of older callers that never had an effect.
TOLERATED_ARGUMENTS = ("context",)


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
    timings: dict = field(default_factory=dict)

    def __str__(self):
        return self.text


@dataclass(frozen=True)
class ChatSettings:
    """How to answer: the arguments of `chat()` in the form in which they are used."""

    template: dict  # for apply_chat_template
    decoding: dict  # for generate, over the defaults
    thinking: bool | str
    thinking_budget: int | None
    max_new_tokens: int
    min_new_tokens: int
    sampling: bool
    stream: bool
    seed: int | None


class ChatMixin:
    """Adds `chat` to a model that has `generate`."""

    def chat(
        self,
        image=None,
        msgs=None,
        tokenizer=None,
        processor=None,
        vision_hidden_states=None,
        max_new_tokens=2048,
        min_new_tokens=0,
        sampling=True,
        max_inp_length=16384,
        system_prompt="",
        stream=False,
        max_slice_nums=None,
        use_image_id=None,
        temporal_ids=None,
        enable_thinking=False,
        thinking_budget=None,
        seed=None,
        return_dict=False,
        **kwargs,
    ):
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
            sampling: True: temperature 0.7 and, without thinking, top_p 0.8, top_k 100, repetition_penalty 1.03.
                False: 3 beams (1 when streaming), repetition_penalty 1.2. Keyword arguments override these; greedy
                search is `sampling=False, num_beams=1, repetition_penalty=1.0`.
            max_inp_length: most tokens the prompt may have; a longer one is an error.
            system_prompt: stands in front of each conversation.
            stream: return an [`AnswerStream`] of text instead of the text; closing it stops the model.
            max_slice_nums, use_image_id, temporal_ids: see `MiniCPMVProcessor.__call__`.
            enable_thinking: True lets the model think first; the text then begins with "<think>\\n". "auto" lets it
                decide for each conversation (see `thinking_minicpmv`); those of a batch are then answered one by one.
            thinking_budget: most tokens of a thought; then it is closed and the answer begins.
            seed: makes sampling repeatable, without touching the global random state.
            return_dict: return [`ChatOutput`], with the thought apart, instead of text.
            kwargs: arguments of `generate` (temperature, num_beams, stop_strings, ...), and options of the video
                processor (fps, max_num_packing, start, ...).

        Returns:
            `str`, for a batch a list of `str`, with `stream` an [`AnswerStream`]; with `return_dict` [`ChatOutput`].

        Raises:
            PromptTooLongError: the prompt has more than `max_inp_length` tokens.
            TypeError: for an unknown keyword; names the nearest.
            ValueError: for messages that cannot be read, and for combinations that do not exist.
        """
        watch = Watch()
        processor = self._chat_processor(processor, tokenizer)
        conversations, is_batch = read_conversations(msgs, image, system_prompt)
        if stream and (is_batch or return_dict):
            raise ValueError(
                "stream=True gives the text of one conversation: pass one, and no return_dict (the stream has `output`)."
            )
        settings = self._read_settings(
            processor,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=sampling,
            max_inp_length=max_inp_length,
            stream=stream,
            max_slice_nums=max_slice_nums,
            use_image_id=use_image_id,
            temporal_ids=temporal_ids,
            enable_thinking=enable_thinking,
            thinking_budget=thinking_budget,
            seed=seed,
            **kwargs,
        )
        begun = {messages[-1]["role"] == "assistant" for messages in conversations}
        if True in begun and (False in begun or settings.thinking):
            raise ValueError(
                "A conversation that ends with an answer is continued, without a thought: pass enable_thinking=False, and "
                "no other conversations in the same batch."
            )
        if settings.thinking == "auto":
            if vision_hidden_states is not None:
                raise ValueError(
                    'enable_thinking="auto" takes no vision_hidden_states: put an EncodedImage into the messages.'
                )
            groups = temporal_ids if is_batch and temporal_ids is not None else [temporal_ids] * len(conversations)
            if len(groups) != len(conversations):
                raise ValueError(f"temporal_ids has {len(groups)} entries for {len(conversations)} conversations.")
            each = [replace(settings, template=settings.template | {"temporal_ids": ids}) for ids in groups]
            answers = [
                self._prepare_turn(processor, messages, own)[1]
                for messages, own in zip(conversations, each, strict=True)
            ]
        else:
            answers = [self._prepare_batch(processor, conversations, settings, vision_hidden_states)]
        watch.note("inputs")

        def answer(watch, streamer=None):
            with seeded(seed, self.device):
                outputs = answers[0](watch, streamer)
                for following in answers[1:]:
                    outputs += following(Watch())
                return outputs

        if stream:
            return AnswerStream(answer, watch, processor.tokenizer)
        outputs = answer(watch)
        if not return_dict:
            outputs = [output.raw_text for output in outputs]
        return outputs if is_batch else outputs[0]

    # ---- one road to an answer ----

    def _prompts(self, processor, conversations, settings, thinking):
        """The processor's inputs for conversations, with the mode's opening, or all with an answer to go on with."""
        is_begun = conversations[0][-1]["role"] == "assistant"
        variables = {} if thinking is None else {"enable_thinking": thinking}
        return processor.apply_chat_template(
            conversations,
            chat_template=processor.tokenizer.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=not is_begun,
            continue_final_message=is_begun,
            **variables,
            **settings.template,
        )

    def _prepare_batch(self, processor, conversations, settings, features=None):
        """Make the inputs of a batch; returns a function (watch, streamer) -> [`ChatOutput`] list."""
        memory = ConversationCache()
        inputs = self._prompts(memory.attach(processor), conversations, settings, settings.thinking)
        units = list(chain.from_iterable(read_units(inputs)))

        def answer(watch, streamer=None):
            ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
            arguments = self._decoding_arguments(processor, settings, settings.thinking, ids.shape[1], watch)
            if features is not None:
                arguments["mm_encoder_outputs"] = {"image": features}
            elif units:
                readers = _readers(self, arguments)
                memory.encode(units, *readers.values())
                arguments["mm_encoder_outputs"] = {name: memory.rows(units, m) for name, m in readers.items()}
                watch.note("vision", arguments["mm_encoder_outputs"]["image"])
            if streamer is not None:
                streamer.expect(ids.shape[1], settings.thinking, settings.max_new_tokens)
                arguments["streamer"] = streamer
            output = self.generate(ids, attention_mask=mask, **arguments)
            rows = getattr(output, "sequences", output)[:, ids.shape[1] :].tolist()
            lengths = mask.sum(-1).tolist()
            watch.note("total")
            return [
                _read_output(processor, row, tokens, settings, settings.thinking, watch)
                for row, tokens in zip(rows, lengths, strict=True)
            ]

        return answer

    def _prepare_turn(self, processor, messages, settings, memory=None):
        """Make the prompt of one conversation, whose states are cached in `memory` (with "auto": the fast one); returns
        it, and a function (watch, streamer) -> list of one [`ChatOutput`]."""
        memory = memory or ConversationCache()
        attached = memory.attach(processor)

        @cache
        def prompt(thinking):
            inputs = self._prompts(attached, [messages], settings, thinking)
            ids, (units,) = inputs["input_ids"][0].tolist(), read_units(inputs)
            return Prompt(ids, slot_keys(ids, units, self.config.image_token_id), units)

        first = prompt(False if settings.thinking == "auto" else settings.thinking)

        def answer(watch, streamer=None):
            thinking, draft = settings.thinking, []
            facts = {"cached_tokens": memory.common_length(first.keys)}
            if first.units:
                readers = _readers(self, settings.decoding)
                memory.encode(first.units, *readers.values())
                watch.note("vision", memory.features[self, first.units[-1]])
            if thinking == "auto":
                thinking, draft, facts["need"] = self._decide(processor, messages, prompt, settings, memory, watch)
                watch.timings.pop("first_token", None)  # that of the draft, which nobody has seen yet
                if thinking:
                    facts["draft_tokens"], draft = len(draft), []
            chosen = prompt(thinking)
            arguments = self._decoding_arguments(processor, settings, thinking, len(chosen.ids), watch)
            if streamer is not None:
                streamer.expect(len(chosen.ids), thinking, settings.max_new_tokens)
            left = settings.max_new_tokens - len(draft)
            stop_ids = arguments["eos_token_id"]
            is_over = draft and (len(draft) < DRAFT_TOKENS or draft[-1] in stop_ids or not left)
            if is_over or watch.cancelled.is_set():
                new = draft
                watch.note("first_token")
                if streamer is not None:
                    streamer.put(torch.tensor([[*chosen.ids, *draft]]))
                    streamer.end()
            else:
                arguments["max_new_tokens"] = left
                arguments["min_new_tokens"] = max(settings.min_new_tokens - len(draft), 0) or None
                output = memory.generate(self, chosen, draft, **arguments, streamer=streamer)
                new = draft + getattr(output, "sequences", output)[0, len(chosen.ids) + len(draft) :].tolist()
            watch.note("total")
            return [_read_output(processor, new, len(chosen.ids), settings, thinking, watch, **facts)]

        return first, answer

    def _decide(self, processor, messages, prompt, settings, memory, watch):
        """Whether to think about this conversation: (decision, ids of a draft of the fast answer, need)."""
        fast = prompt(False)
        arguments = self._decoding_arguments(processor, settings, False, len(fast.ids), watch)
        arguments["max_new_tokens"] = min(DRAFT_TOKENS, settings.max_new_tokens)
        arguments["min_new_tokens"] = min(DRAFT_TOKENS, settings.min_new_tokens) or None
        arguments |= {"return_dict_in_generate": True, "output_logits": True}
        for name in ("prompt_lookup_num_tokens", "assistant_model"):
            arguments.pop(name, None)
        beams = arguments.get("num_beams") or 1
        if beams > 1:
            arguments |= {"num_beams": 1, "do_sample": False}
        output = memory.generate(self, fast, **arguments)
        draft = output.sequences[0, len(fast.ids) :].tolist()
        question = [message for message in messages if message["role"] == "user"][-1]
        texts, pictures = _question_size(question)
        size = len(processor.tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"])
        need = need_to_think(least_certainty(output.logits), size, pictures)
        thinking = need >= self.thinking_threshold
        return thinking, draft if thinking or beams == 1 else [], need

    # ---- arguments ----

    def _chat_processor(self, processor, tokenizer):
        """The processor that was given, or the one in the model's own folder; with `tokenizer` in place of its own."""
        if processor is None:
            processor = getattr(self, "_own_processor", None)
        if processor is None:
            folder = self.config._name_or_path
            if not folder:
                raise ValueError(
                    "This model was not loaded from a folder. Pass processor=AutoProcessor.from_pretrained(...)."
                )
            try:
                # The folder's code already runs as the model's, so it is trusted here too.
                processor = AutoProcessor.from_pretrained(
                    folder,
                    trust_remote_code=True,
                    local_files_only=True,
                    revision=None if os.path.isdir(folder) else getattr(self.config, "_commit_hash", None),
                )
            except (OSError, ValueError) as error:  # ValueError: the folder has a config, but no processor
                raise ValueError(
                    f"No processor is stored with the model in {folder!r}, and chat() does not download one. Pass "
                    "processor=AutoProcessor.from_pretrained(...)."
                ) from error
            self._own_processor = processor
        if tokenizer is not None and tokenizer is not processor.tokenizer:
            processor = copy.copy(processor)
            processor.tokenizer = tokenizer
        return processor

    def _read_settings(
        self,
        processor,
        max_new_tokens=2048,
        min_new_tokens=0,
        sampling=True,
        max_inp_length=None,
        stream=False,
        max_slice_nums=None,
        use_image_id=None,
        temporal_ids=None,
        enable_thinking=False,
        thinking_budget=None,
        seed=None,
        **kwargs,
    ):
        """[`ChatSettings`] of the arguments of `chat()`; the other keywords go to the processor or to `generate`.

        Raises:
            TypeError: for a keyword of neither; names the nearest.
            ValueError: for values and combinations that do not exist.
        """
        if enable_thinking not in (True, False, "auto"):
            raise ThinkingError(f'enable_thinking={enable_thinking!r} does not exist: choose True, False or "auto".')
        if thinking_budget is not None and enable_thinking:
            closing = len(processor.tokenizer(CLOSED_THOUGHT)["input_ids"])
            room = max_new_tokens - closing - 1
            if (
                isinstance(thinking_budget, bool)
                or not isinstance(thinking_budget, int)
                or not 0 <= thinking_budget <= room
            ):
                raise ThinkingError(
                    f"thinking_budget={thinking_budget!r} has to be a number from 0 to {room}: max_new_tokens="
                    f"{max_new_tokens} bounds thought and answer together, and closing the thought takes {closing}. Lower "
                    "the budget or raise max_new_tokens."
                )
        generation = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
        generation = {name for name in generation if not name.startswith("_")} - {"self", "inputs", "kwargs"}
        template, decoding = {}, {}
        for name, value in kwargs.items():
            if name in TOLERATED_ARGUMENTS:
                continue
            if name in generation:
                decoding[name] = value
            elif processor.is_option(name):
                template[name] = value
            else:
                known = {
                    *generation,
                    *chain(*processor.option_names.values()),
                    *inspect.signature(self.chat).parameters,
                }
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise TypeError(f"chat() got an unexpected keyword argument {name!r}.{hint}")
        if stream and decoding.get("num_beams", 1) != 1:
            raise ValueError(f"stream=True cannot follow {decoding['num_beams']} beams: pass num_beams=1.")
        template |= {
            "max_length": max_inp_length,
            "max_slice_nums": max_slice_nums,
            "use_image_id": use_image_id,
            "temporal_ids": temporal_ids,
        }
        return ChatSettings(
            template=template,
            decoding=decoding,
            thinking=enable_thinking,
            thinking_budget=thinking_budget,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            sampling=sampling,
            stream=stream,
            seed=seed,
        )

    def _decoding_arguments(self, processor, settings, thinking, prompt_length, watch):
        """Arguments of `generate` beside the prompt."""
        tokenizer = processor.tokenizer
        arguments = {
            **_decoding_defaults(settings.sampling, thinking, settings.stream),
            "max_new_tokens": settings.max_new_tokens,
            "min_new_tokens": settings.min_new_tokens or None,
            "eos_token_id": stop_ids_of(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "tokenizer": tokenizer,
            **settings.decoding,
        }
        arguments["stopping_criteria"] = StoppingCriteriaList([*(arguments.get("stopping_criteria") or []), watch])
        if thinking and settings.thinking_budget is not None:
            closing = tokenizer(CLOSED_THOUGHT)["input_ids"]
            think_end = tokenizer.convert_tokens_to_ids(THINK_END)
            budget = ThoughtBudget(settings.thinking_budget, prompt_length, think_end, closing)
            arguments["logits_processor"] = LogitsProcessorList([*(arguments.get("logits_processor") or []), budget])
        return arguments


def read_conversations(msgs, image=None, system_prompt=""):
    """Bring the accepted forms of `msgs` to a list of conversations; also returns whether it was a batch.

    Raises:
        ValueError: names what is wrong with the messages.
    """
    if isinstance(msgs, str):
        try:
            msgs = json.loads(msgs)
        except json.JSONDecodeError as error:
            raise ValueError(f"msgs is a string, but not JSON ({error}). Pass a list of messages.") from error
    if not isinstance(msgs, (list, tuple)) or not msgs:
        raise ValueError(f"msgs is a list of messages with at least one, not {msgs!r}.")
    is_batch = isinstance(msgs[0], (list, tuple))
    conversations = [list(messages) for messages in (msgs if is_batch else [msgs])]
    images = image if is_batch and image is not None else [image] * len(conversations)
    if len(images) != len(conversations):
        raise ValueError(f"image has {len(images)} entries for {len(conversations)} conversations.")
    for index, (messages, picture) in enumerate(zip(conversations, images, strict=True)):
        for message in messages:
            if not isinstance(message, Mapping) or message.get("role") not in ("system", "user", "assistant", "tool"):
                raise ValueError(
                    f"A message is a dict with 'content' and a 'role' of system, user, assistant or tool, not {message!r}."
                )
        if not messages or all(message["role"] == "system" for message in messages):
            raise ValueError(f"Conversation {index} has no message of a user.")
        if picture is not None:
            place = next(place for place, message in enumerate(messages) if message["role"] != "system")
            content = messages[place].get("content")
            if not isinstance(content, str):
                raise ValueError(
                    "image= goes with a first message whose content is a string. Put pictures into the content list."
                )
            pictures = list(picture) if isinstance(picture, (list, tuple)) else [picture]
            messages[place] = {**messages[place], "content": [*pictures, content]}
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
    return conversations, is_batch


def _read_output(processor, ids, prompt_tokens, settings, thinking, watch, **facts):
    """[`ChatOutput`] of the generated ids of one answer."""
    tokenizer = processor.tokenizer
    stop_ids = stop_ids_of(tokenizer)
    ids = ids[: settings.max_new_tokens]  # guessed decoding may come to more (transformers 4.57, 5.0)
    stops = [place for place, token in enumerate(ids) if token in stop_ids]
    answer = ids[: stops[0]] if stops else ids
    if stops:
        finish_reason = "stop"
    elif watch.cancelled.is_set():
        finish_reason = "cancelled"
    else:
        finish_reason = "length" if len(ids) >= settings.max_new_tokens else "stop"
    raw_text = (OPENING if thinking else "") + tokenizer.decode(answer, skip_special_tokens=False)
    reasoning, text, reasoning_tokens = None, raw_text, 0
    if thinking:
        reasoning, text = split_thought(raw_text)
        think_end = tokenizer.convert_tokens_to_ids(THINK_END)
        reasoning_tokens = answer.index(think_end) + 1 if think_end in answer else len(answer)
    return ChatOutput(
        text=text,
        reasoning=reasoning,
        finish_reason=finish_reason,
        prompt_tokens=prompt_tokens,
        generated_tokens=len(answer) + bool(stops),
        mode="deep" if thinking else "fast",
        raw_text=raw_text,
        reasoning_tokens=reasoning_tokens,
        timings=dict(watch.timings),
        **facts,
    )


def _decoding_defaults(sampling, enable_thinking, stream):
    """The published defaults. What is None there falls back to the library's own default."""
    if not sampling:
        off = {"temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": False, "num_beams": 1 if stream else 3, "repetition_penalty": 1.2, **off}
    if enable_thinking:
        return {"do_sample": True, "temperature": 0.7}
    return {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.03}


def _readers(model, arguments):
    """Who has to read the pictures: the model, and an assistant with a tower of its own."""
    assistant = arguments.get("assistant_model")
    readers = {"image": model}
    return readers | {"assistant": assistant} if hasattr(assistant, "get_image_features") else readers


def _question_size(message):
    """Texts, and number of pictures and clips, of a message."""
    content = message.get("content")
    parts = [read_part(part) for part in (content if isinstance(content, (list, tuple)) else [content or ""])]
    texts = [value for kind, value in parts if kind == "text"]
    return texts, len(parts) - len(texts)


class _Seeded(TorchFunctionMode):
    """Draws of this thread come from a generator of their own."""

    def __init__(self, seed, device):
        super().__init__()
        self.generator = torch.Generator(device).manual_seed(seed)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.multinomial:
            kwargs = {"generator": self.generator, **kwargs}
        return function(*args, **kwargs)


def seeded(seed, device):
    """A context whose sampling follows from `seed`, or where it is None from the global random state."""
    return nullcontext() if seed is None else _Seeded(seed, device)
