"""Someone who answers without a model, for tests of what is around it."""

import time
from dataclasses import dataclass

from minicpmv.batch.answerers import AnswererOptions, EngineError, RefusedError


class Echo:
    """Says the last text again, the slower the sooner it is asked. Refuses "bad"; ends at "gone"."""

    as_files = False

    def __init__(self, seconds=0.0):
        self.seconds, self.asked = seconds, []

    def answer(self, what, body):
        self.asked.append(body)
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        time.sleep(self.seconds / len(self.asked))
        if text == "bad":
            raise RefusedError("it is bad", "bad_request")
        if text == "gone":
            raise EngineError("the engine has stopped")
        message = {"role": "assistant", "content": text, "reasoning_content": body.get("thought")}
        usage = {"prompt_tokens": len(content), "completion_tokens": 2}
        return {"id": "chatcmpl-1", "choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}

    def close(self):
        pass


@dataclass(frozen=True)
class EchoOptions(AnswererOptions):
    """Opens an `Echo`."""

    model: str = "echo"
    concurrency: int = 4
    seconds: float = 0.0

    def open(self):
        return Echo(self.seconds)
