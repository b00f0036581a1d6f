"""Log lines on stderr: for people, or, with --log-json, for programs."""

import json
import logging
import sys
import time
from typing import Any

LOGGER = logging.getLogger("based.server")


class _Lines(logging.Formatter):
    """A time, the level where it is not usual, the message; control characters as escapes, so that it is one line."""

    def __init__(self, worker: str | None = None) -> None:
        super().__init__()
        self._worker = "" if worker is None else f"{worker}: "

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        lines = [record.getMessage()]
        if record.exc_info:
            lines += self.formatException(record.exc_info).splitlines()
        shown = ("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line) for line in lines)
        return f"{when} {level}{self._worker}" + "\n".join(shown)


class _Json(logging.Formatter):
    """One object a line: time (seconds since 1970), level, message, and the fields of a request."""

    def __init__(self, worker: str | None = None) -> None:
        super().__init__()
        self._worker = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": round(record.created, 6),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        entry |= self._worker | getattr(record, "fields", {})
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up(as_json: bool, worker: str | None = None) -> None:
    """Sends the server's log, and what uvicorn and asyncio say, to stderr. worker: which process says it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json(worker) if as_json else _Lines(worker))
    LOGGER.setLevel(logging.INFO)
    for name, level in (("based.server", logging.INFO), ("uvicorn", logging.ERROR), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
    logging.getLogger("uvicorn.access").disabled = True


def info(message: str, fields: dict[str, Any] | None = None) -> None:
    """One line, with fields for programs."""
    LOGGER.info("%s", message, extra={"fields": fields or {}})
