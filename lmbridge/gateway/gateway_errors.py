"""The errors of the gateway itself, for requests that no server has answered, in the shape that clients expect.

The errors have the shape of OpenAI's API, with a `hint` beside the message, or Anthropic's below `/v1/messages`.
Inside an event stream, an error is sent as an event whose form makes the official clients of both APIs raise their
`APIError`.
"""

from __future__ import annotations

import json
import math
from typing import Any, Final

from lmbridge.errors import LLMError, LLMTimeoutError, TaskCancelledError

RETRY_AFTER: Final = 5
"""The seconds after which a client that was refused should try again."""
_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    502: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class Problem(Exception):  # noqa: N818 - it becomes a response and never reaches a user of Python
    """The reason why a request is not answered by a server.

    Args:
        status: The HTTP status.
        message: What went wrong, in a sentence.
        code: A short name of the reason, for programs.
        hint: What to do about it.
        param: The field of the request that is to blame.
        retry_after: The seconds after which the client should try again, or None if that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        hint: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.hint = hint
        self.param = param
        self.retry_after = retry_after

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response that reports the problem."""
        headers = {"Content-Type": "application/json"}
        if self.retry_after is not None:
            headers["Retry-After"] = str(math.ceil(self.retry_after))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers

    def body(self, path: str) -> bytes:
        """Returns the body of the response to a request with this path."""
        return _to_json(self._fields(path))

    def event(self, path: str) -> bytes:
        """Returns the event that reports the problem at the end of a stream, for a request with this path."""
        fields = self._fields(path)
        if path.startswith("/v1/responses"):
            fields = {"type": "error", "code": self.code, "message": self.message, "param": self.param, **fields}
        name = b"event: error\n" if path.startswith(("/v1/messages", "/v1/responses")) else b""
        return name + b"data: " + _to_json(fields) + b"\n\n"

    def _fields(self, path: str) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "api_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code, "hint": self.hint}
        return {"type": "error", "error": error} if path.startswith("/v1/messages") else {"error": error}


def problem_of(error: LLMError) -> Problem:
    """Returns the problem that an error of the transport stands for."""
    if isinstance(error, TaskCancelledError):
        return Problem(503, "the gateway is closing", code="closing", retry_after=RETRY_AFTER)
    if isinstance(error, LLMTimeoutError):
        if error.phase == "queue":
            return Problem(503, error.message, code="queue_timeout", hint="try again later", retry_after=RETRY_AFTER)
        return Problem(504, error.message, code=f"upstream_{error.phase}_timeout", hint=error.hint)
    return Problem(502, error.message, code="upstream_error", hint=error.hint)


def _to_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")
