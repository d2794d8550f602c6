"""The installed SDK package: loads it on first use, and says which of its two major versions it is.

Both versions are supported, because other packages in a user's environment decide which one is installed: some require
`mcp<2`, others `mcp>=2`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

LMBRIDGE_NAME: Final = "lmbridge"
"""The name that our client and our own server send when a session is opened."""
FIRST_STATELESS_PROTOCOL: Final = "2026-07-28"
"""The first protocol revision without sessions. In it, closing a response cancels its request, and a server on HTTP can
announce changes reliably while the client listens to it."""


def load_sdk() -> Any:
    """Returns the module `mcp`. The first import takes half a second, so it is best called in a thread.

    Raises:
        ImportError: The SDK is not installed; the text names the `pip install`.
    """
    try:
        import mcp
    except ImportError as exc:
        raise ImportError("MCP servers need the official SDK: pip install 'lmbridge[mcp]'") from exc
    return mcp


def is_v2() -> bool:
    """Returns True if version 2.x of the SDK is installed, and False if it is 1.x."""
    return hasattr(load_sdk(), "Client")


def known_handshake_versions() -> tuple[str, ...]:
    """Returns the protocol revisions that the SDK accepts in the answer to `initialize`, oldest first."""
    if is_v2():
        from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS

        return tuple(HANDSHAKE_PROTOCOL_VERSIONS)
    version: Any = import_module("mcp.shared.version")
    return tuple(sorted(version.SUPPORTED_PROTOCOL_VERSIONS))
