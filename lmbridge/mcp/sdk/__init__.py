"""The adapter to the official MCP SDK (the package `mcp`), with one interface for both of its major versions.

Only this folder imports the SDK, and only inside functions, because that import takes half a second and 60 MB. From
the rest of `lmbridge.mcp`, it imports only `config` and `jsonrpc`. On the client's side, `servers` uses the names that
are exported here, and on Windows also `sdk.sdk_stdio`. On the server's side, `bridge` and `lmbridge.mcp.__main__` use
`sdk.server_session`, and `lmbridge.mcp.__main__` also uses `sdk.http_service`.
"""

from lmbridge.mcp.sdk.client_session import UNUSABLE_REASON, McpSession, open_mcp_session
from lmbridge.mcp.sdk.message_filter import NotificationHandlers
from lmbridge.mcp.sdk.normalize import MOST_TOOLS, TOO_MANY_TOOLS
from lmbridge.mcp.sdk.package import FIRST_STATELESS_PROTOCOL, LMBRIDGE_NAME, is_v2, load_sdk
from lmbridge.mcp.sdk.sent_requests import CallListener
from lmbridge.mcp.sdk.session_errors import (
    BadReplyError,
    InvalidQuestionError,
    RefusedError,
    RequestLostError,
    RequestRejectedError,
    SessionForgottenError,
    SessionLostError,
    describe_error,
)

__all__ = [
    "FIRST_STATELESS_PROTOCOL",
    "LMBRIDGE_NAME",
    "MOST_TOOLS",
    "TOO_MANY_TOOLS",
    "UNUSABLE_REASON",
    "BadReplyError",
    "CallListener",
    "InvalidQuestionError",
    "McpSession",
    "NotificationHandlers",
    "RefusedError",
    "RequestLostError",
    "RequestRejectedError",
    "SessionForgottenError",
    "SessionLostError",
    "describe_error",
    "is_v2",
    "load_sdk",
    "open_mcp_session",
]
