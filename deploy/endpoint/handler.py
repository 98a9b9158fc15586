"""A Hugging Face Inference Endpoint that answers as OpenAI's chat completions do.

Put this file and `requirements.txt` at the top of the model's repository, beside the package `minicpmv`. A request:

    {"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,..."}},
        {"type": "text", "text": "What does it say?"}]}],
     "max_tokens": 256, "temperature": 0}

Endpoints' own form works as well: `inputs` is the messages, or a question in words, and `parameters` holds the other fields.
"""

import sys
from pathlib import Path
from typing import Any


class EndpointHandler:
    def __init__(self, path: str = "") -> None:
        folder = Path(path or ".").resolve()
        sys.path.insert(0, str(folder))
        from minicpmv import checkpoint
        from minicpmv.serving.engine import LocalEngine

        self.engine = LocalEngine(*checkpoint.load(folder), folder.name)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """The chat completion, or `{"error": ...}` as OpenAI words it."""
        from minicpmv.serving.schema import RequestError

        try:
            return self.engine.answer(as_request(data))
        except RequestError as error:
            return error.body()


def as_request(data: dict[str, Any]) -> dict[str, Any]:
    """The body of a chat completion in whichever form it came."""
    if "inputs" not in data:
        return data
    inputs = data["inputs"]
    messages = inputs if isinstance(inputs, list) else [{"role": "user", "content": inputs}]
    return {"messages": messages, **(data.get("parameters") or {})}
