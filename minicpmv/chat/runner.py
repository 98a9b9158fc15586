"""An exported model without PyTorch: numpy, the checkpoint's own processor, and a loop over tokens.

What is special:
- Prompts, slices and packed videos come from the processor, as everywhere; transformers gives it arrays where torch is not
  installed.
- A conversation keeps the keys and values of what it has read, and of each image and video its features: a turn reads what
  is new. What is known is recognized by the tokens and by the bytes of the slices.

```python
runner = Runner("nano-onnx")
conversation = runner.conversation()
for piece in conversation.stream([Path("cat.jpg"), "What is this?"]):
    print(piece, end="", flush=True)
print(conversation.send("What color is it?").text)
```
"""

import itertools
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers.decoders import DecodeStream

from minicpmv.chat.cache import MediaCache
from minicpmv.runtimes.graph_engines import GraphError
from minicpmv.runtimes.graphs import Graphs, Unit


CHUNK = 1024  # tokens that are read at a time, which bounds the memory of a long prompt
THINK_OPENING = "<think>\n"  # as the chat template opens a thought
STILL = [-1]  # temporal ids of an image


@dataclass(frozen=True)
class Choice:
    """How a token is chosen: the most likely one, unless there is a temperature.

    Raises:
        GraphError: a value is out of range.
    """

    temperature: float = 0
    top_p: float = 1
    top_k: int = 0  # 0: all
    repetition_penalty: float = 1

    def __post_init__(self) -> None:
        limits = {"temperature": self.temperature >= 0, "top_p": 0 < self.top_p <= 1, "top_k": self.top_k >= 0}
        for name, is_right in (limits | {"repetition_penalty": self.repetition_penalty > 0}).items():
            if not is_right:
                raise GraphError(f"{name}={getattr(self, name)} is out of range: leave it out, or take another")

    def token(self, logits: np.ndarray, ids: Sequence[int], random: np.random.Generator) -> int:
        """An id by the logits [V] behind `ids`."""
        scores = logits.astype(np.float64)
        if self.repetition_penalty != 1:
            seen = np.unique(np.asarray(ids))
            scores[seen] *= np.where(scores[seen] < 0, self.repetition_penalty, 1 / self.repetition_penalty)
        if not self.temperature:
            return int(scores.argmax())
        order = np.argsort(-scores, kind="stable")[: self.top_k or None]
        shares = np.exp((scores[order] - scores[order[0]]) / self.temperature)
        shares /= shares.sum()
        kept = shares.cumsum() - shares < self.top_p  # all that are needed to reach it
        return int(random.choice(order[kept], p=shares[kept] / shares[kept].sum()))


CHOICE_NAMES = [field.name for field in fields(Choice)]


class Answer(NamedTuple):
    """What the model wrote."""

    text: str  # without the thought
    reasoning: str | None  # None where it did not think
    finish_reason: str  # "stop", or "length"
    prompt_tokens: int
    cached_tokens: int  # of the prompt, which were not read again
    generated_tokens: int  # of thought and answer, with the closing token


class Runner:
    """A folder of graphs, ready to answer.

    Args:
        folder: what `minicpmv export onnx` or `openvino` wrote.
        threads: those of the CPU; as many as the software likes for None.

    Raises:
        GraphError: the folder is not whole.
        MissingPackageError: the software is not installed.
    """

    def __init__(self, folder: str | Path, threads: int | None = None):
        folder = Path(folder).expanduser()
        self.graphs = Graphs(folder, threads)
        from transformers import AutoProcessor

        self.processor = AutoProcessor.from_pretrained(str(folder.resolve()), trust_remote_code=True)
        file = folder / "generation_config.json"
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        stops = settings.get("eos_token_id", self.processor.tokenizer.eos_token_id)
        self.stops = set(stops) if isinstance(stops, list) else {stops}
        names = CHOICE_NAMES if settings.get("do_sample") else []
        self.defaults = {name: settings[name] for name in names if settings.get(name) is not None}  # of `Choice`
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.max_tokens: int = config["max_position_embeddings"]  # of prompt and answer together

    def conversation(self, system_prompt: str = "", **options: Any) -> "Conversation":
        """A conversation that goes on; `options` are those of `Conversation.stream`, for all its turns."""
        return Conversation(self, system_prompt, options)

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> Answer:
        """Answer a list of messages, as `chat()` of a model takes them; `options` as of `Conversation.stream`."""
        conversation = self.conversation()
        conversation.messages = [dict(message) for message in messages[:-1]]
        return conversation.send(messages[-1]["content"], **options)


class Conversation:
    """Messages, and what the model knows of them already.

    Attributes:
        messages: the history; may be changed between two turns.
    """

    def __init__(self, runner: Runner, system_prompt: str, options: dict[str, Any]):
        self.runner, self.options = runner, options
        self.messages: list[dict[str, Any]] = [{"role": "system", "content": system_prompt}] if system_prompt else []
        self._keys: list[int] = []  # of what the states are those of
        self._states = runner.graphs.no_states()
        self._features: dict[int, np.ndarray] = {}  # number of a unit -> [Q, D]
        self._media = MediaCache()

    def send(self, content: Any, **options: Any) -> Answer:
        """`stream`, read to its end."""
        stream = self.stream(content, **options)
        while True:
            try:
                next(stream)
            except StopIteration as end:
                return end.value

    def stream(self, content: Any, **options: Any) -> Generator[str, None, Answer]:
        """Ask, and read the answer in pieces. Once it has been read to its end, question and answer belong to the history.

        Args:
            content: text, an image, or a list of parts, as in a message of `chat()`.
            options: over those of the conversation. enable_thinking (then the pieces begin with the thought),
                max_new_tokens, seed; those of `Choice`, by default what the checkpoint says; and those of the processor:
                max_slice_nums, fps, ...

        Raises:
            TypeError, GraphError: an option does not exist, or is out of range.
            ValueError: of the processor, for what cannot be read.
        """
        runner, options = self.runner, self.options | options
        thinks, most = options.pop("enable_thinking", False), options.pop("max_new_tokens", 2048)
        random = np.random.default_rng(options.pop("seed", None))
        own = {name: options.pop(name) for name in CHOICE_NAMES if name in options}
        choice = Choice(**runner.defaults | own)
        if most < 1:
            raise GraphError(f"max_new_tokens={most} has to be at least 1")
        for name in options:
            if not runner.processor.is_option(name):
                raise TypeError(f"there is no option {name!r} of images, videos, prompts or choices: leave it out")
        messages = [*self.messages, {"role": "user", "content": content}]
        prompt = self._read(messages, options | {"enable_thinking": thinks})
        room = runner.max_tokens - len(prompt.ids)
        if room < 1:
            raise GraphError(
                f"the prompt has {len(prompt.ids)} tokens, and the model reads {runner.max_tokens}: ask about fewer or smaller "
                "images (max_slice_nums) or frames (fps), or begin a new conversation"
            )
        most = min(most, room)
        cached = self._forget_others(prompt)
        logits = self._compute(prompt.ids[cached:], prompt.keys[cached:], prompt.slots)
        decode, ids, finish = DecodeStream(skip_special_tokens=False), list(prompt.ids), "length"
        text = THINK_OPENING if thinks else ""
        if text:
            yield text
        while len(ids) < len(prompt.ids) + most:
            token = choice.token(logits, ids, random)
            if token in runner.stops:
                finish = "stop"
                break
            ids.append(token)
            if piece := decode.step(runner.processor.tokenizer.backend_tokenizer, token):
                text += piece
                yield piece
            if len(ids) < len(prompt.ids) + most:
                logits = self._compute([token], [token], prompt.slots)
        # Marks of a thought that was not asked for are text, as in `chat()` of a model.
        thought, answer = runner.processor.split_thought(text) if thinks else (None, text)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        self._media.keep_only(prompt.units)
        count = len(ids) - len(prompt.ids) + (finish == "stop")
        return Answer(answer, thought, finish, len(prompt.ids), cached, count)

    def _read(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> "_Prompt":
        """Ids of a prompt, and features of its images and videos, of those computed that are new."""
        runner = self.runner
        inputs = runner.processor.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
            media_cache=self._media,
            **options,
        )
        strips = iter(inputs["pixel_values"][0] if "pixel_values" in inputs else [])
        sizes = iter(np.asarray(inputs["tgt_sizes"][0]).tolist() if "tgt_sizes" in inputs else [])
        units = []
        for temporal_ids in inputs["temporal_ids"][0] if "temporal_ids" in inputs else itertools.repeat(STILL):
            if not (slices := list(itertools.islice(strips, len(temporal_ids)))):
                break
            size, *_ = [tuple(next(sizes)) for _ in slices]
            units.append(_Unit(slices, Unit([np.asarray(strip) for strip in slices], size, temporal_ids)))
        numbers = [unit.number for unit in units]
        new = {unit.number: unit.unit for unit in units if unit.number not in self._features}
        if new:
            self._features |= dict(zip(new, runner.graphs.encode(list(new.values())), strict=True))
        self._features = {number: self._features[number] for number in numbers}
        ids = inputs["input_ids"][0].tolist()
        query_num, slot = runner.processor.image_processor.image_feature_size, runner.processor.image_token_id
        slots = iter(number for number in numbers for _ in range(query_num))
        keys = [-next(slots) if token == slot else token for token in ids]
        return _Prompt(ids, keys, units, [row for number in numbers for row in self._features[number]])

    def _forget_others(self, prompt: "_Prompt") -> int:
        """Cut the states to those of the beginning of a prompt. Returns its tokens that need not be read again."""
        pairs = zip(self._keys, prompt.keys[:-1], strict=False)
        count = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        self._keys, self._states = self._keys[:count], [states[:, :, :count] for states in self._states]
        return count

    def _compute(self, ids: list[int], keys: list[int], slots: list[np.ndarray]) -> np.ndarray:
        """Read tokens behind what is known; logits [V] behind the last one. `slots` are the features [D] of all slots."""
        graphs = self.runner.graphs
        for start in range(0, len(ids), CHUNK):
            past, some = len(self._keys), keys[start : start + CHUNK]
            rows = graphs.embed(np.array([ids[start : start + CHUNK]]))
            places = np.flatnonzero(np.array(some) < 0)
            if len(places):  # none in an answer
                taken = sum(key < 0 for key in self._keys)
                rows[0, places] = slots[taken : taken + len(places)]
            logits, self._states = graphs.decode(
                rows,
                np.ones((1, past + len(some)), np.int64),
                np.arange(past, past + len(some))[None],
                np.array([len(some) - 1]),
                self._states,
            )
            self._keys = self._keys + some
        return logits[0, -1]


class _Unit:
    """A visual unit with the number by which it is known again."""

    def __init__(self, slices: list[Any], unit: Unit):
        self.slices, self.unit = slices, unit  # the processor's own objects, and the same as arrays
        digest = blake2b(repr((unit.size, list(unit.temporal_ids))).encode(), digest_size=7)
        for strip in unit.strips:
            digest.update(strip.tobytes())
        self.number = int.from_bytes(digest.digest(), "big") + 1


class _Prompt(NamedTuple):
    ids: list[int]
    keys: list[int]  # ids, but in a slot minus the number of its unit
    units: list[_Unit]
    slots: list[np.ndarray]  # features [D], in the order of the slots
