"""The official SDK, behind one face for both of its majors; no other folder imports it, and this one when it has to."""

from lmbridge.mcp.sdk.client_session import (
    REFUSED,
    BadReplyError,
    Listeners,
    RefusedError,
    Session,
    SessionLostError,
    explain,
    open_session,
)
from lmbridge.mcp.sdk.wire import NAME, is_v2, load

__all__ = [
    "NAME",
    "REFUSED",
    "BadReplyError",
    "Listeners",
    "RefusedError",
    "Session",
    "SessionLostError",
    "explain",
    "is_v2",
    "load",
    "open_session",
]
