"""`model.chat(...)`: questions about pictures and videos in one call.

What is special:
- The calling style of the published code, with its positional order and defaults; every prompt goes through the
  processor's own `apply_chat_template`, so chat, training and serving agree token for token.
- Nothing is cut from a prompt and nothing from an answer but the closing token.
- Streams end cleanly: an error in the generating thread reaches the reader, and closing the stream stops the model.
"""

import copy
import difflib
import inspect
import json
import os
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain

import torch
from transformers import (
    AutoProcessor,
    GenerationConfig,
    GenerationMixin,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)


STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")
THINK_START, THINK_END = "<think>", "</think>"
# Arguments of older callers that never had an effect.
TOLERATED_ARGUMENTS = ("context",)


@dataclass
class ChatOutput:
    """An answer with what is known about it (`chat(..., return_dict=True)`)."""

    text: str  # the answer without its thought
    reasoning: str | None  # the thought; None where thinking was off
    finish_reason: str  # "stop": the model ended its answer; "length": max_new_tokens were reached
    prompt_tokens: int
    generated_tokens: int


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
                Content: see `MiniCPMVProcessor.apply_chat_template`.
            tokenizer, processor: those in the model's own folder where they are not given. Nothing is downloaded.
            vision_hidden_states: features [units, query_num, D] of each conversation, in place of encoding the
                pictures again; the pictures are still needed, for the prompt.
            max_new_tokens, min_new_tokens: bounds of the answer in tokens.
            sampling: True: temperature 0.7 and, without thinking, top_p 0.8, top_k 100, repetition_penalty 1.03.
                False: 3 beams (1 when streaming), repetition_penalty 1.2. Keyword arguments override these; greedy
                search is `sampling=False, num_beams=1, repetition_penalty=1.0`.
            max_inp_length: most tokens the prompt may have; a longer one is an error.
            system_prompt: stands in front of each conversation.
            stream: return a generator of text instead of the text; closing it stops the model.
            max_slice_nums, use_image_id, temporal_ids: see `MiniCPMVProcessor.__call__`.
            enable_thinking: True lets the model think first; the text then begins with "<think>\\n".
            thinking_budget: not yet available, nor is enable_thinking="auto": a NotImplementedError.
            seed: makes sampling repeatable, without touching the global random state.
            return_dict: return [`ChatOutput`], with the thought apart, instead of text.
            kwargs: arguments of `generate` (temperature, num_beams, stop_strings, ...), and options of the video
                processor (fps, max_num_packing, start, ...).

        Returns:
            `str`, for a batch a list of `str`, with `stream` a generator of `str`; with `return_dict` [`ChatOutput`].

        Raises:
            PromptTooLongError: the prompt has more than `max_inp_length` tokens.
            TypeError: for an unknown keyword; names the nearest.
            ValueError: for messages that cannot be read, and for combinations that do not exist.
        """
        if enable_thinking not in (True, False):
            raise NotImplementedError(
                f"enable_thinking={enable_thinking!r} is not yet available: choose True or False."
            )
        if thinking_budget is not None:
            raise NotImplementedError(
                "thinking_budget is not yet available: bound the whole answer by max_new_tokens."
            )
        processor = self._chat_processor(processor, tokenizer)
        conversations, is_batch = read_conversations(msgs, image, system_prompt)
        if stream and (is_batch or return_dict):
            raise ValueError("stream=True gives the text of one conversation: pass one, and no return_dict.")
        processor_options, generate_options = self._sort_chat_options(processor, kwargs)

        inputs = processor.apply_chat_template(
            conversations,
            chat_template=processor.tokenizer.chat_template,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
            max_length=max_inp_length,
            max_slice_nums=max_slice_nums,
            use_image_id=use_image_id,
            temporal_ids=temporal_ids,
            **processor_options,
        ).to(self.device)
        if vision_hidden_states is not None:
            for name in ("pixel_values", "tgt_sizes", "temporal_ids"):
                inputs.pop(name, None)
            generate_options["vision_hidden_states"] = vision_hidden_states

        stop_ids = [processor.tokenizer.convert_tokens_to_ids(token) for token in STOP_TOKENS]
        arguments = {
            **inputs,
            **_decoding_defaults(sampling, enable_thinking, stream),
            "max_new_tokens": max_new_tokens,
            "min_new_tokens": min_new_tokens or None,
            "eos_token_id": stop_ids,
            "pad_token_id": processor.tokenizer.pad_token_id,
            "tokenizer": processor.tokenizer,
            **generate_options,
        }
        opening = f"{THINK_START}\n" if enable_thinking else ""
        if stream:
            if arguments.get("num_beams", 1) != 1:
                raise ValueError(f"stream=True cannot follow {arguments['num_beams']} beams: pass num_beams=1.")
            return self._stream(arguments, processor.tokenizer, stop_ids, opening, seed)
        with _seeded(seed, self.device):
            output = self.generate(**arguments)
        sequences = getattr(output, "sequences", output)
        prompt_length = inputs["input_ids"].shape[1]
        prompt_tokens = inputs["attention_mask"].sum(-1).tolist()
        answers = [
            _read_answer(ids, processor.tokenizer, stop_ids, opening, tokens, return_dict)
            for ids, tokens in zip(sequences[:, prompt_length:].tolist(), prompt_tokens, strict=True)
        ]
        return answers if is_batch else answers[0]

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

    def _sort_chat_options(self, processor, kwargs):
        """Split keywords into those of the processor and those of `generate`; an unknown one is a TypeError."""
        generation = {*vars(GenerationConfig()), *inspect.signature(GenerationMixin.generate).parameters}
        generation = {name for name in generation if not name.startswith("_")} - {"self", "inputs", "kwargs"}
        processor_options, generate_options = {}, {}
        for name, value in kwargs.items():
            if name in TOLERATED_ARGUMENTS:
                continue
            if name in generation:
                generate_options[name] = value
            elif processor.is_option(name):
                processor_options[name] = value
            else:
                known = {
                    *generation,
                    *chain(*processor.option_names.values()),
                    *inspect.signature(self.chat).parameters,
                }
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
                raise TypeError(f"chat() got an unexpected keyword argument {name!r}.{hint}")
        return processor_options, generate_options

    def _stream(self, arguments, tokenizer, stop_ids, opening, seed):
        """Text as it is generated, in a thread of its own."""
        streamer = AnswerStreamer(tokenizer, stop_ids)
        cancelled, errors = threading.Event(), []
        criteria = StoppingCriteriaList([*(arguments.pop("stopping_criteria", None) or []), _StopWhenSet(cancelled)])

        def work():
            try:
                with _seeded(seed, self.device):
                    self.generate(**arguments, streamer=streamer, stopping_criteria=criteria)
            except Exception as error:  # handed to the reader, who raises it
                errors.append(error)
                streamer.text_queue.put(streamer.stop_signal)

        thread = threading.Thread(target=work, name="minicpmv-chat", daemon=True)

        def read():
            thread.start()
            try:
                if opening:
                    yield opening
                yield from (text for text in streamer if text)
                if errors:
                    raise errors[0]
            finally:
                cancelled.set()
                thread.join()

        return read()


class AnswerStreamer(TextIteratorStreamer):
    """Text of the generated tokens without the prompt and the closing token; other control tokens, such as boxes,
    belong to the answer."""

    def __init__(self, tokenizer, stop_ids):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)
        self.stop_ids = set(stop_ids)

    def put(self, value):
        if not self.next_tokens_are_prompt and int(value) in self.stop_ids:
            return
        super().put(value)


class _StopWhenSet(StoppingCriteria):
    def __init__(self, event):
        self.event = event

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.event.is_set(), dtype=torch.bool, device=input_ids.device)


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


def split_thought(text):
    """(thought, answer) of a text; a thought that was never closed is all thought, one never opened is none."""
    before, closed, answer = text.partition(THINK_END)
    if THINK_START not in before and not closed:
        return None, text
    thought = before.split(THINK_START, 1)[-1].strip("\n")
    return thought, answer.lstrip("\n")


def _read_answer(ids, tokenizer, stop_ids, opening, prompt_tokens, return_dict):
    stops = [place for place, token in enumerate(ids) if token in stop_ids]
    answer = ids[: stops[0]] if stops else ids
    text = opening + tokenizer.decode(answer, skip_special_tokens=False)
    if not return_dict:
        return text
    reasoning, text = split_thought(text) if opening else (None, text)
    finish_reason = "stop" if stops else "length"
    return ChatOutput(text, reasoning, finish_reason, prompt_tokens, len(answer) + bool(stops))


def _decoding_defaults(sampling, enable_thinking, stream):
    """The published defaults. What is None there falls back to the library's own default."""
    if not sampling:
        off = {"temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": False, "num_beams": 1 if stream else 3, "repetition_penalty": 1.2, **off}
    if enable_thinking:
        return {"do_sample": True, "temperature": 0.7}
    return {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 100, "repetition_penalty": 1.03}


@contextmanager
def _seeded(seed, device):
    """Run with a random seed of its own, if one is given."""
    if seed is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
