"""What a request to `/v1/chat/completions` may hold, in the names of OpenAI and, where they have none, of vLLM.

What is special:
- A field that would change the answer but is not supported is refused unless its value is the neutral one.
- Images and videos are addresses (http, https) or data URLs. A path is neither: it would be one of the server's files.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, StrictBool


class Fields(BaseModel):
    """A misspelled name is an error, not a wish that nobody hears."""

    model_config = ConfigDict(extra="forbid")


class Address(Fields):
    url: str = Field(pattern=r"^(?i:https?://|data:)")
    detail: Literal["auto", "low", "high"] | None = None  # OpenAI's; slices follow from the size of the image


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


def _as_parts(content):
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]
Content = Annotated[list[Part], BeforeValidator(_as_parts)]


class Function(BaseModel, extra="allow"):
    """One that the model may call, or a call of one: then with `arguments`."""

    name: str
    arguments: str | dict[str, Any] | None = None


class Tool(BaseModel, extra="allow"):
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    """One turn. Unknown fields are left out: clients send back what servers of other makers told them."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[Tool] | None = None


class TemplateVariables(Fields):
    enable_thinking: StrictBool | None = None


class MediaOptions(Fields):
    """Options of the processor for the images and videos of one request."""

    max_slice_nums: PositiveInt | None = None
    fps: PositiveFloat | None = None
    num_frames: PositiveInt | None = None
    max_num_packing: PositiveInt | None = None
    force_packing: PositiveInt | None = None
    start: float | None = None
    end: float | None = None


class ChatRequest(Fields):
    """A request. `max_tokens` counts thought and answer together."""

    model: str | None = None
    messages: list[Message] = Field(min_length=1)
    stream: StrictBool | None = None
    enable_thinking: StrictBool | None = None
    chat_template_kwargs: TemplateVariables = TemplateVariables()
    mm_processor_kwargs: MediaOptions = MediaOptions()
    tools: list[Tool] | None = None

    max_tokens: PositiveInt | None = None
    max_completion_tokens: PositiveInt | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: PositiveInt | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)

    # Not supported: only what is so without them.
    stop: list[str] | None = Field(None, max_length=0)
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    tool_choice: Literal["auto"] | None = None
    # These change nothing in an answer.
    metadata: Any = None
    parallel_tool_calls: Any = None
    service_tier: Any = None
    store: Any = None
    stream_options: Any = None
    user: Any = None
