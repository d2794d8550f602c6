"""The three errors of a session with a server, and their descriptions in words.

The SDK raises exceptions of a dozen kinds, often in nested groups, and the kinds differ between its two majors. A
caller has to distinguish only three cases: the session is over, the server answered with an error, or its answer is not
valid. The errors are internal: `servers` turns them into the public `MCPConnectionError` and `ToolError`.
"""

from __future__ import annotations


class SessionLostError(Exception):
    """The session cannot be used any longer; the text is the reason."""


class RefusedError(Exception):
    """The server answered with an error; the text is the code and the message of that error."""


class BadReplyError(Exception):
    """The server answered with something that is not a valid reply; the text says what is wrong with it."""


def describe_error(error: BaseException) -> str:
    """Returns a description of an exception that the SDK has raised or passed on, such as "'npx' was not found".

    The SDK often wraps an exception in several nested groups. The first exception that is not a group is described.
    """
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    if (response := getattr(error, "response", None)) is not None and hasattr(response, "status_code"):
        return f"it answered with HTTP status {response.status_code}"
    if isinstance(error, FileNotFoundError):
        return f"{error.filename!r} was not found"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
