"""What a client is told when something is wrong: OpenAI's error objects."""

import json
from typing import Any

_MOST_LETTERS = 1000  # of a message: it may quote what the client sent


class ApiError(Exception):
    """An answer that is an error.

    Attributes:
        status: The HTTP status.
        message: What was found, what was expected, what to do.
        param: The field of the request that is wrong.
        code: A word for programs.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= _MOST_LETTERS else message[:_MOST_LETTERS] + " …"
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": _kind(self.status), "param": self.param, "code": self.code}
        return {"error": error}


_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable",
}
KINDS = sorted({*_KINDS.values(), "invalid_request_error", "server_error"})
"""All that an error's `type` may be."""


def _kind(status: int) -> str:
    """The error's `type`, as OpenAI names it."""
    return _KINDS.get(status) or ("invalid_request_error" if status < 500 else "server_error")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that is wrong, status 400."""
    return ApiError(400, message, param=param, code=code)


def to_json(value: Any) -> bytes:
    """JSON in ASCII: half a surrogate pair that a client sent is an escape here, too. Raises ValueError for NaN."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
