"""What a request may hold, in the names of OpenAI and, where they have none, of vLLM.

What is special:
- A field that would change the answer but is not supported is refused; one that changes nothing is taken and ignored.
- Images and videos are addresses (http, https) or data URLs. A path is neither: it would be one of the server's files.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    StrictBool,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic import ValidationError as SchemaError

from minicpmv.errors import MiniCPMVError


ADDRESS = re.compile("https?://|data:", re.IGNORECASE)
MOST_MESSAGES = 1024  # also of the parts of one, of tools, and of the calls of one
MOST_CHOICES = 16
MOST_STOPS = 16
MOST_LOGPROBS = 20  # as in OpenAI's API


class RequestError(MiniCPMVError):
    """A request that is not answered: the message says why and what to do.

    Attributes:
        status: of HTTP; 4xx where the client can mend it, 503 where it can come back.
        param, code: as in OpenAI's errors.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's servers write it."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Fields(BaseModel):
    """A misspelled name is an error, not a wish that nobody hears."""

    model_config = ConfigDict(extra="forbid")


# ---- messages ----


class Address(Fields):
    url: str
    detail: Literal["auto", "low", "high"] | None = None  # "low": the image whole, without slices

    @field_validator("url")
    @classmethod
    def _is_no_path(cls, url: str, info: ValidationInfo) -> str:
        if not (info.context or {}).get("paths") and not ADDRESS.match(url):
            raise ValueError("give an http or https address, or a data: URL")
        return url


class TextPart(Fields):
    type: Literal["text"]
    text: str
    ref: str | None = None  # the name of a region to find, which follows the text


class ImagePart(Fields):
    type: Literal["image_url"]
    image_url: Address


class VideoPart(Fields):
    type: Literal["video_url"]
    video_url: Address


def _as_parts(content: Any) -> Any:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_audio", "audio_url", "file"):
            raise ValueError(f"{kind}: this model reads text, image_url and video_url, but neither sound nor files")
        # What an assistant said when it refused comes back as a part of its own.
        parts.append({"type": "text", "text": part.get("refusal")} if kind == "refusal" else part)
    return parts


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]
Content = Annotated[list[Part], Field(max_length=MOST_MESSAGES), BeforeValidator(_as_parts)]


class Function(BaseModel, extra="allow"):
    """One that the model may call, or a call of one: then with `arguments`."""

    name: StrictStr
    arguments: str | dict[str, Any] | None = None


class Tool(BaseModel, extra="allow"):
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    """One turn. Unknown fields are left out: clients send back what servers of other makers told them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[Tool] | None = Field(None, max_length=MOST_MESSAGES)

    @model_validator(mode="after")
    def _says_something(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_content)):
            raise ValueError(f"a message of role {self.role} has no content")
        return self


# ---- the shape of an answer ----


class JsonSchema(BaseModel, extra="allow"):
    name: str | None = None
    schema_: dict[str, Any] | bool = Field(True, alias="schema")


class ResponseFormat(Fields):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError('type "json_schema" and the field json_schema go together')
        return self


class NamedFunction(Fields):
    name: str


class NamedTool(Fields):
    type: Literal["function"]
    function: NamedFunction


class StreamOptions(BaseModel, extra="allow"):
    include_usage: StrictBool = False


# ---- requests ----

Thinking = StrictBool | Literal["auto"]


class TemplateVariables(Fields):
    enable_thinking: Thinking | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None


class MediaOptions(Fields):
    """Options of the processor for the images and videos of one request."""

    max_slice_nums: PositiveInt | None = None
    fps: PositiveFloat | None = None
    num_frames: PositiveInt | None = None
    max_num_packing: PositiveInt | None = None
    force_packing: PositiveInt | None = None
    start: float | None = None
    end: float | None = None


def _as_list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class GenerationRequest(Fields):
    """What requests have in common. `max_tokens` counts thought and answer together."""

    model: str | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    max_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)  # -1 and 0: all
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]] | None,
        Field(max_length=MOST_STOPS),
        BeforeValidator(_as_list),
    ] = None
    user: Any = None  # these change nothing in an answer
    metadata: Any = None
    service_tier: Any = None
    store: Any = None


class CompletionRequest(GenerationRequest):
    """A request to go on with a text, as it stands: no turns, no images."""

    prompt: str
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None


class ChatRequest(GenerationRequest):
    """A request to answer a conversation."""

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: PositiveInt | None = None
    enable_thinking: Thinking | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    chat_template_kwargs: TemplateVariables = TemplateVariables()
    mm_processor_kwargs: MediaOptions = MediaOptions()
    tools: list[Tool] | None = Field(None, max_length=MOST_MESSAGES)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    logprobs: StrictBool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: Any = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None

    @model_validator(mode="after")
    def _fits_together(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            if name not in {tool.function.name for tool in self.tools or ()}:
                raise ValueError(f"tool_choice names {name!r}, which is not among the tools")
        if self.tool_choice == "required" and not self.tools:
            raise ValueError('tool_choice "required" needs tools')
        if self.asked_format and self.must_call:
            raise ValueError("an answer is either a call (tool_choice) or in a response_format: give one of them")
        if not any(message.role == "user" for message in self.messages):
            raise ValueError("messages need one of role user")
        return self

    @property
    def asked_format(self) -> ResponseFormat | None:
        """The format that the answer has to have, if any."""
        return None if self.response_format is None or self.response_format.type == "text" else self.response_format

    @property
    def must_call(self) -> bool:
        """Whether the answer has to be a call of a tool."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def usable_tools(self) -> list[Tool]:
        return [] if self.tool_choice == "none" else self.tools or []

    def thinking(self, default: bool) -> bool | Literal["auto"]:
        """Whether to think: as the request says, else `default`."""
        effort = None if self.reasoning_effort is None else self.reasoning_effort not in ("none", "minimal")
        asked = (self.chat_template_kwargs.enable_thinking, self.enable_thinking, effort, default)
        return next(value for value in asked if value is not None)

    @property
    def budget(self) -> int | None:
        """Most tokens of a thought."""
        own = self.chat_template_kwargs.thinking_budget
        return self.thinking_budget if own is None else own


def read_request(kind: type[GenerationRequest], body: Any, paths: bool = False) -> Any:
    """A request of a kind from the bytes of a body, or from a dict.

    Args:
        paths: whether images and videos may be files.

    Raises:
        RequestError: it is not well formed; names the first field that is not.
    """
    try:
        if isinstance(body, (bytes, bytearray)):
            return kind.model_validate_json(body)
        return kind.model_validate(body, context={"paths": paths})
    except SchemaError as error:
        reasons = error.errors(include_url=False, include_context=False, include_input=False)
        shown = [
            (".".join(map(str, reason["loc"])), reason["msg"].removeprefix("Value error, ")) for reason in reasons
        ]
        message = "; ".join(f"{place}: {reason}" if place else reason for place, reason in shown[:4])
        raise RequestError(message[:1000], param=shown[0][0][:200] or None) from error
