"""The log of a service: one JSON object a line."""

from __future__ import annotations

import logging
import sys
import time

import orjson


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, event, and the fields of the record. No ids of users or items."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        } | getattr(record, "fields", {})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def log_as_json() -> None:
    """Make every logger of the process write JSON lines to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    ours = logging.getLogger("twotower")
    ours.handlers.clear()  # the command line's, which prints messages as plain lines and hands none on
    ours.propagate = True
    root.setLevel(logging.INFO)
    # Below errors uvicorn logs every client that sends no valid HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    # Below warnings FAISS logs which of its libraries this processor does not use.
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)
