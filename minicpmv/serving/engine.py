"""Answers to requests, in this process: the same for the HTTP server and for whoever has requests in a file."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from transformers import DynamicCache

from minicpmv.errors import is_expected
from minicpmv.serving.grammar import Grammars
from minicpmv.serving.limits import Limits, Room, check_request, no_memory
from minicpmv.serving.media import MediaError, check_media, read_messages
from minicpmv.serving.prompts import Prompt, PromptReader
from minicpmv.serving.responses import ChatResponse, CompletionResponse
from minicpmv.serving.sampling import Sampler, Sampling
from minicpmv.serving.scheduler import Event, Finish, Job, Scheduler
from minicpmv.serving.schema import ChatRequest, CompletionRequest, GenerationRequest, RequestError, read_request
from minicpmv.serving.states import PrefixMemory
from minicpmv.serving.writing import THINK_END, AnswerWriter, Piece


DEFAULT_MAX_TOKENS = 2048  # as in chat()
DEFAULT_COMPLETION_TOKENS = 16  # as in OpenAI's API
READERS = 2  # requests whose images and videos are decoded at the same time: bounds the memory that takes
WAIT_SECONDS = 0.02  # between two looks at what waits
CPU_ALLOCATOR = "DefaultCPUAllocator"  # in the plain RuntimeError of a torch that gets no memory of the CPU
SHARE_OF_MEMORY = 0.35  # of what is free, for the states of a batch; a row that joins makes a copy of all for a moment


class Stats(NamedTuple):
    """What an engine is doing."""

    running: int  # answers
    waiting: int  # requests that were read and wait for room
    prefix_bytes: int
    is_alive: bool


class Post:
    """Brings events from the thread of the model to event loops: each loop is woken once a round, not for every token."""

    def __init__(self) -> None:
        self._letters: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Event], Event]]] = {}

    def to(self, loop: asyncio.AbstractEventLoop, queue: "asyncio.Queue[Event]") -> Callable[[Event], None]:
        """What takes the events for a queue."""
        return lambda event: self._letters.setdefault(loop, []).append((queue, event))

    def deliver(self) -> None:
        """Bring all that were taken."""
        letters, self._letters = self._letters, {}
        for loop, batch in letters.items():
            with suppress(RuntimeError):  # the loop is closed: nobody reads on
                loop.call_soon_threadsafe(_put_all, batch)


def _put_all(batch: "list[tuple[asyncio.Queue[Event], Event]]") -> None:
    for queue, event in batch:
        queue.put_nowait(event)


class LocalEngine:
    """Answers OpenAI's requests with a model in this process. All requests share one running batch.

    Args:
        model, processor: what `minicpmv.load` gives.
        name: what the model is called in requests and answers.
        think: whether the model thinks where a request does not say.
        limits: what requests may take.
        max_rows: most answers that are written at the same time.
        prefix_megabytes: how much of earlier prompts' states to keep.
        max_tokens: most tokens of all rows together; by default what fits into the memory that is free.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        think: bool = False,
        limits: Limits | None = None,
        max_rows: int = 16,
        prefix_megabytes: float = 2048,
        max_tokens: int | None = None,
    ) -> None:
        self.model, self.processor, self.name = model, processor, name
        self.limits = limits or Limits()
        self.context: int = model.config.max_position_embeddings
        self.on_finish: Callable[[Finish], None] = lambda finish: None
        self._prompts = PromptReader(model, processor, think)
        self._memory, self._post = PrefixMemory(prefix_megabytes), Post()
        _warm_up(model, max_rows)
        self._scheduler = Scheduler(
            model, max_rows, max_tokens or _fitting_tokens(model), self._memory, self._post.deliver
        )
        self._grammars = Grammars(model, processor, self._scheduler.stop_ids)
        self._requests = Room(self.limits.requests, f"{self.limits.requests} requests at work")
        # Also takes the bodies of requests, as long as the server holds them.
        self.bytes = Room(self.limits.total_megabytes * 1e6, "as many bytes of images and videos as fit")
        self._unread: dict[int, Prompt] = {}  # id of a job -> the prompt, whose slices may not be read yet
        self._is_closed = False
        self._pools = [ThreadPoolExecutor(READERS, "minicpmv-text"), ThreadPoolExecutor(READERS, "minicpmv-media")]
        self._think_end = processor.tokenizer.convert_tokens_to_ids(THINK_END)
        closing = processor.write_thought("").partition("\n")[2]  # what follows the opening tag
        self._closing: list[int] = processor.tokenizer(closing, add_special_tokens=False)["input_ids"]
        self._max_rows = max_rows

    def close(self) -> None:
        """Stop; what is not answered is cancelled."""
        self._is_closed = True
        self._scheduler.close()
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "LocalEngine":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def stats(self) -> Stats:
        scheduler = self._scheduler
        return Stats(scheduler.running, scheduler.waiting, self._memory.bytes, scheduler.failure is None)

    # ---- asking ----

    def answer(self, body: dict[str, Any] | ChatRequest, local_files: Path | None = None) -> dict[str, Any]:
        """The whole answer to a request for a chat, in the form of OpenAI's API. Ask from several threads at once: their
        answers are written together. Not for a thread that runs an event loop.

        Args:
            body: `stream` is not read.
            local_files: a folder; images and videos may then be files in it.

        Raises:
            RequestError: the request is not well formed, or cannot be answered.
        """
        request = body
        if not isinstance(request, ChatRequest):
            request = read_request(ChatRequest, body, paths=local_files is not None)
        return asyncio.run(self.chat(request, local_files))

    async def chat(self, request: GenerationRequest, local_files: Path | None = None) -> dict[str, Any]:
        """The whole answer to a request; when the task is cancelled, so is the work.

        Raises:
            RequestError: the request cannot be answered.
        """
        async with aclosing(self._events(request, local_files)) as events:
            response = self._response(request)
            async for index, event in events:
                if isinstance(event, Finish):
                    response.add_end(index, event)
                else:
                    response.add(index, event)
        return response.complete()

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks of the answer to a request; when it is closed, the work ends.

        Raises:
            RequestError: the request cannot be answered; before the first chunk, unless the model fails later.
        """
        response = self._response(request)
        is_open = False
        async with aclosing(self._events(request, None)) as events:
            async for index, event in events:
                if not is_open:
                    is_open = True
                    for chunk in response.opening():
                        yield chunk
                if isinstance(event, Finish):
                    yield response.end_of(index, event)
                else:
                    yield response.chunk_of(index, event)
        for chunk in response.closing():
            yield chunk

    def _response(self, request: GenerationRequest) -> ChatResponse:
        kind = CompletionResponse if isinstance(request, CompletionRequest) else ChatResponse
        return kind(request, self.name, request.n or 1, lambda token: self.processor.tokenizer.decode([token]))

    async def _events(
        self, request: GenerationRequest, local_files: Path | None
    ) -> AsyncGenerator[tuple[int, Piece | Finish], None]:
        """What comes of the answers to a request."""
        if request.model not in (None, "", self.name):
            raise RequestError(
                f"The model {request.model!r} is not here; this server has {self.name!r}.",
                status=404,
                param="model",
                code="model_not_found",
            )
        choices = request.n or 1
        if choices > self._max_rows:
            raise RequestError(f"n={choices}: this server writes {self._max_rows} answers at a time.", param="n")
        queue = asyncio.Queue[Event]()
        with self._requests.taking(1):
            try:
                job = await self._prepare(request, local_files)
            except MemoryError as error:
                raise no_memory() from error
            job.send = self._post.to(asyncio.get_running_loop(), queue)
            left = choices
            with self._submitted(job):
                while left:
                    index, event = await queue.get()
                    if isinstance(event, BaseException):
                        raise _as_refusal(event)
                    if isinstance(event, Finish):
                        left -= 1
                        self.on_finish(event)
                    yield index, event

    @contextmanager
    def _submitted(self, job: Job) -> Iterator[None]:
        self._unread[id(job)] = job.prompt
        try:
            self._scheduler.submit(job)
            yield
        finally:
            job.cancel()
            del self._unread[id(job)]

    # ---- preparing ----

    async def _prepare(self, request: GenerationRequest, local_files: Path | None) -> Job:
        loop = asyncio.get_running_loop()
        assert isinstance(request, (ChatRequest, CompletionRequest))
        check_request(request, self.limits.text_bytes(self.context))
        if isinstance(request, CompletionRequest):
            return await loop.run_in_executor(self._pools[0], self._prepare_text, request)
        try:
            messages, fetched = await read_messages(request.messages, self.limits, self.bytes, local_files)
        except MediaError as error:
            raise RequestError(str(error), param="messages") from error
        has_media = any(part.type != "text" for message in request.messages for part in message.content or ())
        try:
            return await loop.run_in_executor(self._pools[has_media], self._prepare_chat, request, messages)
        finally:
            self.bytes.give_back(fetched)

    def _prepare_text(self, request: CompletionRequest) -> Job:
        prompt = self._prompts.write_plain(request.prompt)
        return self._job(request, prompt, request.max_tokens or DEFAULT_COMPLETION_TOKENS)

    def _prepare_chat(self, request: ChatRequest, messages: list[dict]) -> Job:
        try:
            self._prompts.check_images(request, *check_media(messages, self.limits))
        except MediaError as error:
            raise RequestError(str(error), param="messages") from error
        # Before more is decoded, the model reads what waits.
        while sum(prompt.bytes for prompt in list(self._unread.values())) > self.limits.slice_megabytes * 1e6:
            if self._is_closed:
                raise RuntimeError("the engine is closed")
            time.sleep(WAIT_SECONDS)
        thinking = request.thinking(self._prompts.think)
        if messages[-1]["role"] == "assistant":
            if request.thinking(False):
                raise RequestError(
                    "A conversation that ends with an answer is continued, without a thought: leave out enable_thinking.",
                    param="enable_thinking",
                )
            thinking = False
        grammar = self._grammars.of(request)
        prompt = self._prompts.write(request, messages, thinking is True)
        deep = self._prompts.write(request, messages, True) if thinking == "auto" else None
        room = request.max_completion_tokens or request.max_tokens or DEFAULT_MAX_TOKENS
        return self._job(request, prompt, room, thinking is True, deep, grammar)

    def _job(
        self,
        request: CompletionRequest | ChatRequest,
        prompt: Prompt,
        room: int,
        thinking: bool = False,
        deep: Prompt | None = None,
        grammar: str | None = None,
    ) -> Job:
        model, tokenizer = self.model, self.processor.tokenizer
        settings = Sampling.of(request, model.generation_config, model.config.vocab_size)
        room = min(room, self.context - max(len(prompt.ids), len(deep.ids) if deep else 0))
        budget = request.budget if isinstance(request, ChatRequest) else None
        with_calls = isinstance(request, ChatRequest) and bool(request.usable_tools)

        def make_sampler(choice: int, prompt: Prompt, thinking: bool) -> Sampler:
            bound = None
            if thinking and budget is not None:
                bound = model.thought_budget(budget, len(prompt.ids), self._think_end, self._closing)
            matcher = None if grammar is None else self._grammars.matcher(grammar)
            closing = self._closing if thinking else ()
            return Sampler(model, settings, choice, prompt.ids, room, bound, matcher, closing, self._think_end)

        def make_writer(thinking: bool) -> AnswerWriter:
            return AnswerWriter(tokenizer, thinking, request.stop or (), with_calls)

        return Job(
            prompt,
            lambda event: None,
            make_sampler,
            make_writer,
            room,
            choices=request.n or 1,
            thinking=thinking,
            deep=deep,
        )


def _as_refusal(error: BaseException) -> BaseException:
    """An error of the model as one that a client understands, where it is one."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or CPU_ALLOCATOR in str(error):
        return no_memory()
    return RequestError(str(error), status=500) if is_expected(error) else error


@torch.no_grad()
def _warm_up(model: Any, rows: int) -> None:
    """Write a token in all rows: llama.cpp makes room for them, and would read all it knows again if more came later."""
    ids = torch.full((rows, 1), model.config.image_token_id, device=model.device)
    model(input_ids=ids, attention_mask=torch.ones_like(ids), cache=DynamicCache(), use_cache=True, logits_to_keep=1)


def _fitting_tokens(model: Any) -> int:
    """How many tokens' states fit into the memory that is free, with room for copies of them."""
    config, device = model.config, model.device
    width = config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim
    bytes_of_token = width * next(model.parameters()).element_size()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return max(config.max_position_embeddings, int(SHARE_OF_MEMORY * free / bytes_of_token))
