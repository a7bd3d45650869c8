"""One JSON object per line. No prompt and no answer is ever logged."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any


class JsonLines(logging.Formatter):
    """Message, level and time, and what `extra={"fields": …}` brings."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        values: dict[str, Any] = {"at": at, "level": record.levelname.lower(), "message": record.getMessage()}
        values |= getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            values["error"] = record.exc_info[0].__name__
            # Where it happened, without the message: that may quote a prompt.
            values["trace"] = traceback.format_tb(record.exc_info[2])
        return json.dumps(values, default=str)


def log_to_stderr(level: int = logging.INFO) -> None:
    """Send the server's log, and uvicorn's errors, to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("lorasmith.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(level if name == "lorasmith.server" else logging.WARNING)
