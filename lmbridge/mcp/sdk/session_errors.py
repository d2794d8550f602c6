"""The errors of a session with a server, and their descriptions in words.

The SDK raises exceptions of a dozen kinds, often in nested groups, and the kinds differ between its two major versions.
A caller has to distinguish only three cases: the session is over, one request failed, or the answer to it is not
valid. The errors are internal: `servers` turns them into the public `MCPConnectionError` and `ToolError`.
"""

from __future__ import annotations

from typing import Any


class SessionLostError(Exception):
    """The session cannot be used any longer; the text is the reason."""


class RefusedError(Exception):
    """A request failed for a reason that does not end the session.

    The text is the code and the message of the server's error, or else the reason, such as an answer that broke off.
    """


class UrlsRequiredError(RefusedError):
    """The server has not processed a call, because the user has to visit URLs first.

    Args:
        reason: The code and the message of the server's error.
        questions: The questions with the URLs, as the server sent them.
    """

    def __init__(self, reason: str, questions: list[Any]) -> None:
        super().__init__(reason)
        self.questions: list[Any] = questions


class InvalidQuestionError(Exception):
    """A server has asked the user a question that is not valid; the text says what is wrong with it."""


class BadReplyError(Exception):
    """The server answered with something that is not a valid reply; the text says what is wrong with it."""


class RequestRejectedError(SessionLostError):
    """The server rejected a request in a way that ends the session. The request has not run; the text is the reason.

    Args:
        reason: The reason, as a clause about the server.
        words: What the server said, or an empty string.
        hint: What the user can do, or an empty string.
    """

    def __init__(self, reason: str, words: str = "", hint: str = "") -> None:
        super().__init__(reason)
        self.words: str = words
        self.hint: str = hint


class SessionForgottenError(RequestRejectedError):
    """The request has not run and can be sent in another session, usually because the server has forgotten this one."""


class RequestLostError(SessionLostError):
    """The connection of one request broke, so that request may or may not have run. Other requests are not affected."""


def describe_error(error: BaseException) -> str:
    """Returns a description of an exception that the SDK has raised or passed on, such as "'npx' was not found".

    The SDK often wraps an exception in several nested groups. The first exception that is not a group is described.
    """
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    if isinstance(error, FileNotFoundError):
        return f"{error.filename!r} was not found"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    # The errors of pydantic are listings of many lines.
    if isinstance(error, ValueError) and hasattr(error, "errors"):
        listing: Any = error
        first = listing.errors()[0]
        return f"its answer is not valid: {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error) or type(error).__name__
