"""The server's log: one JSON object a line. Whatever a client sends stays inside a string of it."""

import json
import logging
import sys
import time
from typing import Any


class JsonLines(logging.Formatter):
    """A record as one line of ASCII; `extra={"facts": {...}}` of a call stands beside the message."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str).replace("\x7f", "\\u007f")


def configure() -> dict[str, Any]:
    """Send all logs of this process to stderr in lines of JSON. Returns the same as a configuration for uvicorn."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in ("httpcore", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    transformers = logging.getLogger("transformers")
    transformers.handlers.clear()
    transformers.propagate = True
    return {"version": 1, "disable_existing_loggers": False}
