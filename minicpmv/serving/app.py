"""The server of transformers (`transformers serve`), with one model that brings its own code.

What is special:
- Routes, generation, streams and the separation of thought and answer are those of transformers. Added here: requests are
  checked, images and videos are fetched by the rules of `media`, and what a request did wrong is a 4xx in OpenAI's form.
- Answers are generated one at a time, in the order in which their inputs were ready; inputs are made meanwhile.
- An answer stops when its client has gone, streamed or not. A seed belongs to one request.
"""

import asyncio
import threading
import time
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from PIL import EpsImagePlugin
from starlette.background import BackgroundTask
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState

from minicpmv.errors import is_expected
from minicpmv.serving.media import MediaLimits, read_messages
from minicpmv.serving.request import ChatRequest


DEFAULT_MAX_TOKENS = 2048  # as in chat()
LEAST_TEMPERATURE = 0.01  # below it the likeliest token is taken: scores divided by less may overflow
ROUTES = {"/health"}  # of transformers' server; the others load other models, or take prompts with control tokens


def build_app(
    model: Any, processor: Any, name: str, think: bool = False, limits: MediaLimits | None = None
) -> FastAPI:
    """The ASGI app that answers for `model` under `name`.

    Args:
        think: whether the model thinks where a request does not say.
        limits: what images and videos of a request may take.
    """
    EpsImagePlugin.gs_binary = False  # an EPS image is a program, which Ghostscript would run
    limits = limits or MediaLimits()
    state, manager = GenerationState(), ModelManager()
    handler = ChatHandler(model, processor, name, think, limits, manager, state)
    others: Any = dict.fromkeys(
        ("completion_handler", "response_handler", "transcription_handler", "systemone_handler"), None
    )
    app = build_server(manager, handler, **others, generation_state=state)
    app.router.routes = [route for route in app.router.routes if route.path in ROUTES]
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=int(limits.megabytes * 1e6))
    started = int(time.time())

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest):
        return await handler.answer(request, body)

    @app.get("/v1/models")
    def models():
        card = {"id": name, "object": "model", "created": started, "owned_by": "minicpmv"}
        return {"object": "list", "data": [card]}

    @app.exception_handler(HTTPException)
    async def refused(request, error):
        return _refusal(error.status_code, error.detail)

    @app.exception_handler(RequestValidationError)
    async def malformed(request, error):
        reasons = [f"{'.'.join(map(str, reason['loc'][1:]))}: {reason['msg']}" for reason in error.errors()]
        return _refusal(400, "; ".join(reasons))

    return app


class ChatHandler(ChatCompletionHandler):
    """Answers requests to `/v1/chat/completions`."""

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        think: bool,
        limits: MediaLimits,
        manager: ModelManager,
        state: GenerationState,
    ) -> None:
        super().__init__(manager, state)
        self.model, self.processor, self.name = model, processor, name
        self.think, self.limits = think, limits
        self.context = model.config.max_position_embeddings

    async def answer(self, request: Request, body: ChatRequest) -> Any:
        """The response, or the stream of it.

        Raises:
            HTTPException: the request cannot be answered; the detail says why.
        """
        if body.model not in (None, self.name):
            raise HTTPException(404, f"The model {body.model!r} is not here; this server has {self.name!r}.")
        most = self.processor.image_processor.max_slice_nums
        if (body.mm_processor_kwargs.max_slice_nums or 0) > most:
            raise HTTPException(
                400, f"mm_processor_kwargs.max_slice_nums: this server cuts an image into {most} at most."
            )
        tools: Any = body.tools and [tool.model_dump(exclude_none=True) for tool in body.tools]
        try:
            messages = await read_messages(body.messages, self.limits)
            inputs = await asyncio.to_thread(self._read, messages, tools, body)
            config = self._generation_config(body, inputs["input_ids"].shape[1])
        except (ValueError, TemplateError) as error:
            if not (is_expected(error) or isinstance(error, TemplateError)):
                raise
            raise HTTPException(400, str(error)) from error
        turn = Turn(self.model, body.seed)
        arguments: Any = (request.state.request_id, turn, self.processor, self.name, inputs, config)
        manager = self.generation_state.get_manager(self.name)
        if body.stream:
            response = self._streaming(*arguments, gen_manager=manager, tools=tools)
            # The stream itself cancels the work where it is cut off; a stream that never began runs only this.
            response.background = BackgroundTask(turn.client_has_gone.set)
            return response
        answer = asyncio.ensure_future(self._non_streaming(*arguments, gen_manager=manager, tools=tools))
        leaving = asyncio.ensure_future(_disconnected(request))
        await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            turn.client_has_gone.set()
        leaving.cancel()
        return await answer

    def _read(self, messages, tools, body):
        """The model's inputs for a request."""
        asked = (body.chat_template_kwargs.enable_thinking, body.enable_thinking, self.think)
        inputs = self.processor.apply_chat_template(
            messages,
            tools=tools,
            enable_thinking=next(value for value in asked if value is not None),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            max_length=self.context - 1,
            **body.mm_processor_kwargs.model_dump(exclude_none=True),
        )
        return dict(inputs.to(self.model.device))

    def _generation_config(self, body, prompt_tokens):
        fields = body.model_dump(exclude={"seed", "messages", "tools"}, exclude_none=True)
        unknown = [token for token in fields.pop("logit_bias", {}) if not 0 <= token < self.model.config.vocab_size]
        if unknown:
            raise HTTPException(
                400, f"logit_bias: {unknown[0]} is no token; there are {self.model.config.vocab_size}."
            )
        fields.setdefault("max_tokens", DEFAULT_MAX_TOKENS)
        if body.logit_bias:
            fields["logit_bias"] = body.logit_bias
        config = self._build_generation_config(fields, self.model.generation_config)
        config.max_new_tokens = min(config.max_new_tokens, self.context - prompt_tokens)
        if body.temperature is not None:
            config.do_sample = body.temperature >= LEAST_TEMPERATURE
        for name in ("top_k", "min_p", "repetition_penalty"):
            if name in fields:
                setattr(config, name, fields[name])
        if not config.do_sample:  # else transformers warns of each of them
            config.temperature = config.top_p = config.top_k = config.min_p = None
        return config


class Turn:
    """One answer: what transformers' server takes for the model."""

    def __init__(self, model: Any, seed: int | None) -> None:
        self.model, self.seed, self.client_has_gone = model, seed, threading.Event()

    def generate(self, **inputs: Any) -> Any:
        if self.seed is not None:
            choice = self.model.seeded_choice([self.seed], inputs["input_ids"].shape[1])
            inputs["logits_processor"] = LogitsProcessorList([choice])
        return self.model.generate(**inputs, stopping_criteria=StoppingCriteriaList([self._stop]))

    def _stop(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.client_has_gone.is_set(), device=input_ids.device)


async def _disconnected(request):
    # Request.is_disconnected() misses it behind the middleware of transformers' server.
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(status, message):
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return JSONResponse({"error": error}, status_code=status)
