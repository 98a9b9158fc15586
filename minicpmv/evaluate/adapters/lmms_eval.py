"""The model of lmms-eval that is called `minicpmv`: images, several images, packed video, thinking, batches.

    lmms-eval --model minicpmv --model_args pretrained=openbmb/MiniCPM-V-4_5,trust_remote_code=True --tasks mmstar

What is special:
- videos go to the model's own processor, which samples and packs them; lmms-eval's own frames are not used;
- an answer counts without its thought. A task's limit, often 16 tokens, is for the answer; thoughts have their own;
- an error ends the run. Other adapters there log it and go on with an empty answer.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from minicpmv.checkpoint import load
from minicpmv.errors import MiniCPMVError


DEFAULT_ANSWER_TOKENS = 1024  # where a task does not limit them
PARAGRAPH = "\n\n"  # lmms-eval's default end of an answer, meant for base models
# Of chat(), for every question; what a task says about decoding comes on top.
OPTIONS = (
    "max_slice_nums",
    "use_image_id",
    "max_inp_length",
    "thinking_budget",
    "fps",
    "max_num_frames",
    "num_frames",
    "max_num_packing",
    "force_packing",
)


class AdapterError(MiniCPMVError):
    """Something that the other harness asks for does not exist here."""


class MiniCPMV45(lmms):
    """MiniCPM-V 4.5, or another checkpoint of its architecture.

    Args:
        pretrained, revision, trust_remote_code: as `minicpmv.load` takes them.
        device: such as "cuda:1" or "cpu"; "auto": where there is room, or under `accelerate launch` each process's own.
        batch_size: questions asked at once; those with a video go one by one.
        thinking: True, False or "auto".
        thought_tokens: most tokens of a thought, beyond those of the answer.
        system_prompt: stands in front of every question.
        options: those named in `OPTIONS`.

    Raises:
        AdapterError: an option does not exist.
        MiniCPMVError: whatever `minicpmv.load` raises.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "openbmb/MiniCPM-V-4_5",
        *,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = "auto",
        batch_size: int | str | None = 1,
        thinking: bool | str = False,
        thought_tokens: int = 8192,
        system_prompt: str = "",
        max_batch_size: int | str | None = None,  # lmms-eval sends it to all
        **options: Any,
    ):
        super().__init__()
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise AdapterError(f"model_args: no option {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
        if not str(batch_size).isdigit() or int(batch_size or 0) < 1:
            raise AdapterError(f"batch_size={batch_size!r} is not a number from 1 on")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place: Any = device or "auto"
        if self._world_size > 1:
            place = {"": self.accelerator.device}
        elif place != "auto":
            place = {"": place}
        self.model, self.processor = load(
            pretrained, revision=revision, trust_remote_code=trust_remote_code, device_map=place
        )
        self.batch_size, self.options = int(batch_size or 1), options
        self.thinking, self.thought_tokens, self.system_prompt = thinking, thought_tokens, system_prompt

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise AdapterError(
            "tasks that compare likelihoods cannot be run with this model: choose a generate_until task"
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        raise AdapterError("tasks of several rounds cannot be run with this model: choose a generate_until task")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests, without thoughts."""
        found: list[GenerationResult] = []
        with tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar:
            for batch in self._batches([request.args for request in requests]):
                found += self._answer(batch)
                bar.update(len(batch))
        return found

    def _batches(self, requests: Sequence[tuple]) -> Iterator[list[tuple[dict[str, Any], list[Any], tuple]]]:
        """(generation arguments, messages, request) of neighbors that can be asked at once."""

        def prepared() -> Iterator[tuple[dict[str, Any], list[Any], tuple]]:
            for request in requests:
                _, to_messages, arguments, doc, task, split = request
                messages = ChatMessages(messages=to_messages(self.task_dict[task][split][doc])).messages
                yield generation_arguments(arguments), messages, request

        for _, group in groupby(prepared(), key=lambda item: (repr(sorted(item[0].items())), shows_video(item[1]))):
            batch: list[Any] = []
            for item in group:
                batch.append(item)
                if len(batch) == self.batch_size or shows_video(item[1]):
                    yield batch
                    batch = []
            if batch:
                yield batch

    def _answer(self, batch: Sequence[tuple[dict[str, Any], list[Any], tuple]]) -> list[GenerationResult]:
        options = dict(batch[0][0])
        until = options.pop("until")
        options["max_new_tokens"] += self.thought_tokens if self.thinking else 0
        conversations: list[Any] = []
        excerpt: dict[str, float] = {}
        for _, messages, _ in batch:
            conversation, excerpt = as_conversation(messages)
            conversations.append(conversation)
        with torch.inference_mode():
            outputs = self.model.chat(
                msgs=conversations,
                processor=self.processor,
                system_prompt=self.system_prompt,
                enable_thinking=self.thinking,
                return_dict=True,
                **self.options | excerpt | options,
            )
        found = []
        for output, (_, _, request) in zip(outputs, batch, strict=True):
            text = output.text.strip()
            for end in until:
                text = text.split(end)[0]
            count = TokenCounts(input_tokens=output.prompt_tokens, output_tokens=output.generated_tokens)
            found.append(GenerationResult(text=text, token_counts=count))
            self.cache_hook.add_partial("generate_until", (request[0], request[2]), text)
        return found


def generation_arguments(task: dict[str, Any]) -> dict[str, Any]:
    """A task's `generation_kwargs` as arguments of chat(), and "until", the words that end an answer."""
    task = dict(task)
    until = task.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    found = {
        "until": [end for end in until if end and end != PARAGRAPH],
        "max_new_tokens": task.pop("max_new_tokens", None) or DEFAULT_ANSWER_TOKENS,
    }
    temperature = task.pop("temperature", None) or 0
    samples = task.pop("do_sample", temperature > 0) and temperature > 0
    found |= {"decoding": "sample", "temperature": temperature} if samples else {"decoding": "greedy"}
    for name in ("top_p", "top_k", "num_beams", "repetition_penalty"):
        value = task.pop(name, None)
        if value is not None and (samples or not name.startswith("top_")):
            found[name] = value
    return found


def shows_video(messages: Sequence[Any]) -> bool:
    return any(part.type == "video" for message in messages for part in message.content)


def as_conversation(messages: Sequence[Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """lmms-eval's messages as chat() takes them, and which part of the video is to be seen.

    Raises:
        AdapterError: a part is neither text, image nor video, or several videos are shown in part.
    """
    found, excerpts = [], []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message.content:
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
            elif part.type in ("image", "video"):
                content.append({"type": part.type, part.type: part.url})
            else:
                raise AdapterError(f"a question holds {part.type}, which this model does not take: leave the task out")
            if part.type == "video":
                times = {"start": part.start_time, "end": part.end_time}
                excerpts.append({name: time for name, time in times.items() if time is not None})
        found.append({"role": message.role, "content": content})
    if len(excerpts) > 1 and any(excerpts):
        raise AdapterError("a question shows parts of several videos; the part of one can be chosen")
    return found, excerpts[0] if excerpts else {}
