"""Hooks for tests between a session and its socket, and between an MCP session and the process of its server.

`lmbridge.testing` uses them to record traffic and play it back, and to refuse real requests. `AiohttpSession.send`
looks for a hook before each request that would go out over a socket. There were two alternatives. Replacing the session
of a transport when it opens misses clients that are open already, such as one that all tests share. A patch of aiohttp
may break with any release of aiohttp. The lists of hooks belong to the process and not to a context, because the
blocking classes of `lmbridge.sync` send their requests in another thread.

Only `lmbridge.testing` adds anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from lmbridge.transport.http_interface import HttpRequest, HttpResponse

Send: TypeAlias = Callable[[HttpRequest], Coroutine[Any, Any, HttpResponse]]
"""A function that sends a request over a socket, as `HttpSession.send` does."""
Interceptor: TypeAlias = Callable[[HttpRequest, Send], Coroutine[Any, Any, HttpResponse]]
"""A function that answers a request, refuses it by raising an exception, or sends it with the `Send` that it gets."""

interceptors: Final[list[Interceptor]] = []
"""The interceptors in force. The one that was added last decides alone."""

LinkMaker: TypeAlias = Callable[[str, Callable[[str], str], Callable[[], Any], Callable[[str], None]], Any]
"""A function that returns the link to the process of an MCP server. It is called with the name of the server and with
three functions. The first replaces the secrets of the server's configuration in a text. The second makes the real link.
The third has to be called with the reason when the process has ended."""

link_makers: Final[list[LinkMaker]] = []
"""The link makers in force. The one that was added last decides alone."""
