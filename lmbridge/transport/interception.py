"""What stands between a session and its socket, or an MCP server's process, in a test.

It is a recording, or a refusal of real requests.

`AiohttpSession.send` looks here before each request that would go out over a socket. The alternatives were to replace
the session of a transport when it opens, which misses clients that are open already, such as one that all tests share,
and to patch aiohttp, which breaks with any release of aiohttp. The list belongs to the process and not to a context,
because the blocking classes of `lmbridge.sync` send their requests in another thread.

Only `lmbridge.testing` adds anything here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeAlias

from lmbridge.transport.http import HttpRequest, HttpResponse

Send: TypeAlias = Callable[[HttpRequest], Coroutine[Any, Any, HttpResponse]]
"""Sends a request over a socket, as `HttpSession.send` does."""
Interceptor: TypeAlias = Callable[[HttpRequest, Send], Coroutine[Any, Any, HttpResponse]]
"""Answers a request, refuses it by raising an exception, or sends it with the function that it is given."""

interceptors: Final[list[Interceptor]] = []
"""The interceptors in force. The last one, which was added last, decides alone."""

LinkMaker: TypeAlias = Callable[[str, Callable[[str], str], Callable[[], Any], Callable[[str], None]], Any]
"""Returns the link to the process of an MCP server. It is called with the name of the server, with a function that
replaces the secrets of its configuration in a text, with one that makes the real link, and with one to call with the
reason when the process has ended."""

link_makers: Final[list[LinkMaker]] = []
"""The link makers in force. The last one, which was added last, decides alone."""
