"""Servers on HTTP that do not quite follow the protocol: bodies, forgotten sessions, streams that end, and refusals."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from lmbridge import MultiMCPError, ToolError
from lmbridge.mcp import McpEvent, ServerState, UnexpectedMessage
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk.http_client import connection_errors
from lmbridge.mcp.sdk.sse_transport import SseStream
from tests.mcp.conftest import MakeHub
from tests.mcp.http_server import HttpServer, answer, body, error, event, events, text
from tests.mcp.support import Recorder, function_of, names

# Bodies


def endless(piece: bytes, content_type: str, **headers: str) -> Callable[[Any, web.Request], Any]:
    """Returns a response that repeats a piece until the client has gone."""

    async def respond(_: Any, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type, **headers})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(piece)
        return response

    return respond


BOMB = gzip.compress(b" " * 40_000_000)
"""A body of 39 KB that becomes 40 MB."""


@pytest.mark.parametrize(
    "respond",
    [
        endless(b" " * 65_536, "application/json"),
        endless(b"data: " + b" " * 65_536, "text/event-stream"),
        endless(b"data: x\n" * 8_192, "text/event-stream"),
        lambda *_: web.Response(body=BOMB, headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}),
        lambda *_: web.Response(body=BOMB, headers={"Content-Type": "text/event-stream", "Content-Encoding": "gzip"}),
    ],
    ids=["body", "line", "event", "compressed body", "compressed line"],
)
async def test_a_message_without_end_is_an_error_that_names_the_limit(
    make_hub: MakeHub, server: HttpServer, respond: Callable[[Any, web.Request], Any]
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.responses["tools/call"] = respond
    with pytest.raises(ToolError, match="it sent a message of more than 16,777,216 bytes"):
        await function_of(lease, "echo")()
    del server.responses["tools/call"]
    assert await function_of(lease, "echo")() == "on"


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip"])
async def test_a_compression_that_was_not_asked_for_is_refused(
    make_hub: MakeHub, server: HttpServer, encoding: str
) -> None:
    lease = await make_hub({"a": {"url": server.url}}).tools()
    headers = {"Content-Type": "application/json", "Content-Encoding": encoding}
    server.responses["tools/call"] = lambda *_: web.Response(body=b"{}", headers=headers)
    with pytest.raises(ToolError, match=r"it compressed its answer .*, which was not asked for"):
        await function_of(lease, "echo")()
    assert server.requests[-1].headers["Accept-Encoding"] == "gzip, deflate"


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"id": "x"},
        {"id": 1},
        {"id": [1]},
        {"jsonrpc": None},
        {"error": None},
        {"result": {"structuredContent": None, "content": "on"}},
    ],
)
@pytest.mark.parametrize("as_events", [False, True])
async def test_an_answer_belongs_to_the_request_in_whose_response_it_arrives(
    make_hub: MakeHub, server: HttpServer, change: dict[str, Any], as_events: bool
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()

    def respond(message: Any, _: web.Request) -> Any:
        changed = answer(message, text("on")) | change
        return events(event(changed)) if as_events else changed

    server.responses["tools/call"] = respond
    assert await function_of(lease, "echo")() == "on"
    assert hub.status()["a"].starts == 1


async def test_every_message_of_a_server_may_have_a_wrong_id(
    make_hub: MakeHub, server: HttpServer, recorder: Recorder[McpEvent]
) -> None:
    for method in ("server/discover", "initialize", "tools/list", "tools/call"):
        server.responses[method] = lambda message, _: {**server.default(message), "id": 1}
    lease = await make_hub({"a": {"url": server.url}}, on_event=recorder).tools()
    assert await function_of(lease, "echo")() == "on"
    kinds = [each.kind for each in recorder.seen if isinstance(each, UnexpectedMessage)]
    assert kinds == ["an answer with a wrong id"]


@pytest.mark.parametrize(
    "respond",
    [
        lambda message: [answer(message, text("on"))],
        lambda message: [{"jsonrpc": "2.0", "method": "vendor/x"}, answer(message, text("on"))],
        lambda message: [None, 5, [answer(message, text("off"))], answer(message, text("on")), None],
        lambda message: body(200, answer(message, text("on")), "text/plain"),
        lambda message: body(200, b"\xef\xbb\xbf" + json.dumps(answer(message, text("on"))).encode()),
        lambda message: body(200, json.dumps(answer(message, text("on")))[:-1] + ', "x": NaN}'),
        lambda message: {"id": message["id"], "result": text("on")},
        lambda message: events(": hello", "", "event: ping", "data: {}", "", event(answer(message, text("on")))),
        lambda message: events("data: not json\n", event([answer(message, text("on"))])),
        lambda message: events(event({"jsonrpc": "2.0", "method": "vendor/x"}), event(answer(message, text("on")))),
        lambda message: body(
            200,
            f"id: 1\r\nevent: message\r\ndata:{json.dumps(answer(message, text('on')))}\r\n\r\n",
            "text/event-stream",
        ),
        lambda message: events(
            *(f"data: {line}" for line in json.dumps(answer(message, text("on")), indent=1).split("\n")), ""
        ),
    ],
)
async def test_an_answer_in_an_irregular_body_is_read(
    make_hub: MakeHub, server: HttpServer, respond: Callable[[Any], Any]
) -> None:
    lease = await make_hub({"a": {"url": server.url}}).tools(call_timeout=10)
    server.responses["tools/call"] = lambda message, _: respond(message)
    assert await function_of(lease, "echo")() == "on"


@pytest.mark.parametrize(
    ("response", "words"),
    [
        (
            lambda _: body(200, "<html><title>Sign in</title></html>", "text/html"),
            "answered with text/html .*: Sign in",
        ),
        (lambda _: body(200, "hello", "application/json"), "answered with application/json .*: hello"),
        (lambda _: body(200, "", "application/json"), "its answer broke off, and the tool may have run"),
        (lambda _: body(202, "", "application/json"), "its answer broke off, and the tool may have run"),
        (lambda _: body(204, "", "application/json"), "its answer broke off, and the tool may have run"),
        (lambda message: {"jsonrpc": "2.0", "id": message["id"]}, "neither a result nor an error"),
        (lambda message: {"id": message["id"]}, "neither a result nor an error"),
        (lambda _: {}, "neither a result nor an error"),
        (lambda _: {"error": "it is full"}, "^it is full$"),
        (lambda _: [], "answered with application/json that is not a JSON-RPC message"),
        (lambda _: events("data: hello\n"), "its answer broke off, and the tool may have run"),
        (lambda message: body(500, error(message, -5, "it is full")), "^-5: it is full$"),
        (lambda _: body(503, "try later", "text/plain"), "HTTP status 503: try later"),
        (lambda _: body(403, {"detail": "not for you"}), "HTTP status 403: not for you"),
        (lambda _: body(429, {"error": "slow down"}), "HTTP status 429: slow down; it limits how often"),
    ],
)
async def test_a_call_without_an_answer_fails_at_once_and_the_session_stays_open(
    make_hub: MakeHub, server: HttpServer, response: Callable[[Any], Any], words: str
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.responses["tools/call"] = lambda message, _: response(message)
    with pytest.raises(ToolError, match=words):
        await function_of(lease, "echo")()
    del server.responses["tools/call"]
    assert await function_of(lease, "echo")() == "on"
    assert hub.status()["a"].starts == 1


async def test_an_answer_to_another_request_is_ignored(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    first = asyncio.get_running_loop().create_future()
    second_has_ended = asyncio.Event()

    async def respond(message: Any, _: web.Request) -> Any:
        if not first.done():
            first.set_result(message)
            await second_has_ended.wait()
            return answer(message, text("own"))
        return answer(first.result(), text("forged"))

    server.responses["tools/call"] = respond
    waiting = asyncio.create_task(function_of(lease, "echo")())
    await first
    with pytest.raises(ToolError, match="its answer broke off"):
        await function_of(lease, "echo")()
    second_has_ended.set()
    assert await waiting == "own"


# Sessions that the server has forgotten

WORDINGS: list[Callable[[Any], Any]] = [
    lambda _: body(404, ""),
    lambda _: body(404, "Not Found", "text/plain"),
    lambda _: body(404, {"jsonrpc": "2.0", "id": None, "error": {"code": -32001, "message": "Session not found"}}),
    lambda _: body(404, {"jsonrpc": "2.0", "id": "server-error", "error": {"code": -32600, "message": "?"}}),
    lambda message: body(404, error(message, -32001, "Session not found")),
    lambda _: body(400, {"jsonrpc": "2.0", "id": None, "error": {"code": -32000, "message": "No valid session ID"}}),
    lambda _: body(400, {"jsonrpc": "2.0", "error": {"code": -32000, "message": "Bad Request"}}),
    lambda _: body(400, "Invalid session", "text/plain"),
    lambda _: body(410, ""),
    lambda message: error(message, -32001, "unknown"),
    lambda message: error(message, -32000, "Server not initialized"),
    lambda _: {"jsonrpc": "2.0", "id": None, "error": {"code": -32001, "message": "Session not found"}},
    lambda message: events(event(error(message, -32600, "Session terminated"))),
]


def forget_first_session(server: HttpServer, refuse: Callable[[Any], Any]) -> None:
    """Makes a server refuse everything that names the first session, as a restarted server does."""

    def respond(message: Any, request: web.Request) -> Any:
        is_first = request.headers.get("Mcp-Session-Id") == "s1"
        return refuse(message) if is_first and "id" in (message or {}) else None

    for method in ("ping", "tools/list", "tools/call"):
        server.responses[method] = respond


@pytest.mark.parametrize("refuse", WORDINGS)
async def test_a_forgotten_session_is_opened_anew_and_the_call_is_made_in_it(
    make_hub: MakeHub, server: HttpServer, refuse: Callable[[Any], Any]
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    forget_first_session(server, refuse)
    assert await function_of(lease, "echo")() == "on"
    assert (hub.status()["a"].starts, server.sessions) == (2, 2)
    assert server.methods.count("tools/call") == 2


async def test_many_calls_share_the_new_session(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    forget_first_session(server, WORDINGS[0])
    assert await asyncio.gather(*(function_of(lease, "echo")() for _ in range(10))) == ["on"] * 10
    assert server.sessions == 2


async def test_a_session_that_is_forgotten_again_is_not_opened_a_third_time(
    make_hub: MakeHub, server: HttpServer
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.responses["tools/call"] = lambda *_: body(404, "no such tenant", "text/plain")
    with pytest.raises(ToolError, match=r"rejected the call, which has not run: .*: no such tenant"):
        await function_of(lease, "echo")()
    assert (server.sessions, server.methods.count("tools/call")) == (2, 2)


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (lambda message: body(404, error(message, -32602, "no such file")), "^-32602: no such file$"),
        (lambda message: body(400, error(message, -32602, "no such file")), "^-32602: no such file$"),
        # The server still answers a ping in this session.
        (lambda message: body(404, error({"id": None}, -32602, "no such file")), "^-32602: no such file$"),
        (lambda message: body(400, error({"id": None}, -32602, "no such file")), "^-32602: no such file$"),
        (lambda message: error(message, -32001, "Session not found"), "^-32001: Session not found$"),
        (lambda message: error(message, -32600, "Session terminated"), "^-32600: Session terminated$"),
        (lambda message: body(400, "no such file", "text/plain"), "HTTP status 400: no such file"),
    ],
)
async def test_an_error_within_a_session_is_that_error_and_so_is_each_later_one(
    make_hub: MakeHub, server: HttpServer, refuse: Callable[[Any], Any], words: str
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.responses["tools/call"] = lambda message, _: refuse(message)
    with pytest.raises(ToolError, match=words):
        await function_of(lease, "echo")()
    server.responses["tools/call"] = lambda message, _: error(message, -7, "another one")
    with pytest.raises(ToolError, match=r"^-7: another one$"):
        await function_of(lease, "echo")()
    assert hub.status()["a"].starts == 1


@pytest.mark.parametrize("pong", [lambda *_: events(""), lambda *_: body(202, ""), lambda *_: events("data: {", "")])
async def test_a_ping_without_an_answer_does_not_hide_the_error(
    make_hub: MakeHub, server: HttpServer, pong: Callable[..., Any]
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    server.responses |= {"ping": pong, "tools/call": lambda message, _: error(message, -32001, "Session not found")}
    with pytest.raises(ToolError, match="Session not found"):
        await function_of(lease, "echo")()


async def test_a_session_that_was_forgotten_between_two_runs_is_opened_by_the_second(
    make_hub: MakeHub, server: HttpServer
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    await hub.tools()
    forget_first_session(server, WORDINGS[0])
    owner = hub._servers["a"]._session
    assert owner
    owner._on_tools_changed()
    assert names((await hub.tools()).tools) == ["echo"]
    assert server.sessions == 2


async def test_the_headers_of_a_session_are_those_that_the_server_named(make_hub: MakeHub, server: HttpServer) -> None:
    handshake = {"protocolVersion": "2099-01-01", "capabilities": {}, "serverInfo": {"name": "n", "version": "1"}}
    server.responses["initialize"] = lambda message, _: body(
        200, answer(message, handshake), **{"Mcp-Session-Id": "abc"}
    )
    hub = make_hub({"a": {"url": server.url}})
    await function_of(await hub.tools(), "echo")()
    sent = server.requests[-1].headers
    assert (sent["Mcp-Session-Id"], sent["MCP-Protocol-Version"]) == ("abc", "2099-01-01")
    await hub.close()
    assert server.methods[-1] == "DELETE"


# Streams that end before the answer, and are polled


def poll(server: HttpServer, begin: list[str], *resumed: Callable[[], web.Response]) -> list[str | None]:
    """Makes a server end the stream of a call, and answer when it is asked again; returns the ids it was asked for."""
    calls: list[Any] = []
    asked: list[str | None] = []
    rest = list(resumed)

    def respond_to_call(message: Any, _: web.Request) -> Any:
        calls.append(message)
        return events(*begin)

    def respond_to_get(_: Any, request: web.Request) -> Any:
        if not calls:
            return web.Response(status=405)
        asked.append(request.headers.get("Last-Event-ID"))
        return rest.pop(0)() if rest else events("id: 9", event(answer(calls[0], text("on"))))

    server.responses |= {"tools/call": respond_to_call, "GET": respond_to_get}
    return asked


@pytest.mark.parametrize(
    ("begin", "asked_for"),
    [
        (["id: 1", "retry: 10", "data:", ""], "1"),
        (["id: 1", "data: ", "", "retry: 10", ""], "1"),
        (["retry: 10", ""], None),
        (["id: 1", "retry: 0", "data: ", "", "id: 2", 'data: {"jsonrpc": "2.0", "method": "vendor/x"}', ""], "2"),
    ],
)
async def test_a_stream_that_ends_before_the_answer_is_polled(
    make_hub: MakeHub, server: HttpServer, begin: list[str], asked_for: str | None
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    asked = poll(server, begin)
    assert await function_of(lease, "echo")() == "on"
    assert asked == [asked_for]
    assert hub.status()["a"].starts == 1


async def test_a_stream_is_polled_until_the_answer_arrives(make_hub: MakeHub, server: HttpServer) -> None:
    lease = await make_hub({"a": {"url": server.url}}).tools()
    later = [lambda: events("id: 2", "data: ", ""), lambda: body(503, ""), lambda: events(": nothing", "")]
    asked = poll(server, ["id: 1", "retry: 10", "data: ", ""], *later, *[lambda: events("")] * 5)
    assert await function_of(lease, "echo")() == "on"
    assert asked == ["1", *["2"] * 8]


async def test_a_stream_that_cannot_be_polled_fails_the_call(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url}})
    lease = await hub.tools()
    asked = poll(server, ["id: 1", "retry: 10", "data: ", ""], *[lambda: body(405, "")] * 5)
    with pytest.raises(ToolError, match="its answer broke off, and the tool may have run"):
        await function_of(lease, "echo")()
    assert len(asked) == 3
    assert hub.status()["a"].starts == 1


async def test_the_time_limit_of_a_call_includes_polling(make_hub: MakeHub, server: HttpServer) -> None:
    lease = await make_hub({"a": {"url": server.url}}).tools(call_timeout=0.2)
    poll(server, ["id: 1", "retry: 99999999999999999999", "data: ", ""])
    with pytest.raises(ToolError, match="did not answer within"):
        await function_of(lease, "echo")()
    assert "notifications/cancelled" in server.methods


# Refusals


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (401, r'give it a token with "headers": \{"Authorization": "Bearer \$\{TOKEN\}"\}'),
        (403, r'it may need a token in "headers"'),
        (404, r"check the path of its URL, which often ends with /mcp"),
        (405, r'its URL does not accept the requests of this transport \("type"\); check the path'),
        (407, r"a proxy in front of it wants credentials"),
        (429, r"it limits how often it is called"),
        (500, r"the fault is on its side"),
    ],
)
async def test_a_refused_start_names_the_reason_and_what_to_do(
    make_hub: MakeHub, server: HttpServer, status: int, hint: str
) -> None:
    for method in ("server/discover", "initialize"):
        server.responses[method] = lambda *_: body(status, "because", "text/plain")
    with pytest.raises(MultiMCPError, match=rf"it answered with HTTP status {status}; it said: because; {hint}"):
        await make_hub({"a": {"url": server.url}}).tools()


@pytest.mark.parametrize(
    ("content", "kind", "words"),
    [
        (
            {"jsonrpc": "2.0", "id": None, "error": {"code": -1, "message": "why"}},
            "application/json",
            "it said: -1: why;",
        ),
        ({"error": "invalid_token", "error_description": "why"}, "application/json", "it said: why;"),
        ({"error": {"message": "why"}}, "application/json", r"it said: why;"),
        ("<html><head><TITLE>why</TITLE></head>...", "text/html", "it said: why;"),
        ("<html>...", "text/html", "HTTP status 401; give"),
        ("", "text/plain", "HTTP status 401; give"),
        (b"\x00\xff", "application/octet-stream", "HTTP status 401; give"),
        ("why\n  not", "text/plain", "it said: why not;"),
    ],
)
async def test_a_refusal_is_quoted(make_hub: MakeHub, server: HttpServer, content: Any, kind: str, words: str) -> None:
    for method in ("server/discover", "initialize"):
        server.responses[method] = lambda *_: body(401, content, kind)
    with pytest.raises(MultiMCPError, match=words):
        await make_hub({"a": {"url": server.url}}).tools()


async def test_a_refused_token_is_blamed_and_not_shown(make_hub: MakeHub, server: HttpServer) -> None:
    for method in ("server/discover", "initialize"):
        server.responses[method] = lambda *_: body(401, "bad token sk-123456", "text/plain")
    entry = {"url": server.url, "headers": {"Authorization": "Bearer sk-123456"}}
    with pytest.raises(MultiMCPError, match=r'said: bad token \*\*\*; the value of "Authorization" .* has expired'):
        await make_hub({"a": entry}).tools()


async def test_a_server_that_wants_oauth_says_so(make_hub: MakeHub, server: HttpServer) -> None:
    challenge = {"WWW-Authenticate": 'Bearer resource_metadata="http://x/.well-known/oauth-protected-resource"'}
    for method in ("server/discover", "initialize"):
        server.responses[method] = lambda *_: body(401, "", **challenge)
    with pytest.raises(MultiMCPError, match='it offers OAuth, for which lmbridge needs "clientCredentials"'):
        await make_hub({"a": {"url": server.url}}).tools()


async def test_a_token_that_expires_is_blamed_and_the_call_has_not_run(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url, "headers": {"authorization": "Bearer 123456"}}})
    lease = await hub.tools()
    server.responses["tools/call"] = lambda *_: body(401, {"error": "token expired"})
    with pytest.raises(ToolError) as caught:
        await function_of(lease, "echo")()
    assert str(caught.value) == (
        "the MCP server 'a' rejected the call, which has not run: it answered with HTTP status 401: token expired; the "
        'value of "Authorization" in its "headers" is wrong or has expired; put a valid one there'
    )
    assert (hub.status()["a"].state, hub.status()["a"].error) == (
        ServerState.LOST,
        "it answered with HTTP status 401",
    )
    del server.responses["tools/call"]
    assert await function_of(lease, "echo")() == "on"


@pytest.mark.parametrize("method", ["initialize", "tools/list"])
@pytest.mark.parametrize(
    "content", [{"result": {"protocolVersion": {}, "tools": 5}}, {"result": 5}, {"error": {}}, "text", ["text"], [[]]]
)
async def test_no_error_of_a_start_is_a_listing_of_the_sdk(
    make_hub: MakeHub, server: HttpServer, method: str, content: Any
) -> None:
    server.responses[method] = lambda *_: content
    with contextlib.suppress(MultiMCPError):
        await make_hub({"a": {"url": server.url}}).tools()
        return
    with pytest.raises(MultiMCPError) as caught:
        await make_hub({"a": {"url": server.url}}).tools()
    assert "validation error" not in str(caught.value)
    assert "\n" not in str(caught.value)


# The older SSE transport


class SseServer(HttpServer):
    """A server of the older SSE transport, at the same path as streamable HTTP."""

    def __init__(self, status: int = 405) -> None:
        super().__init__()
        self.endpoint = "/messages?session=1"
        self.is_over = asyncio.Event()
        self._stream: web.StreamResponse | None = None
        self.responses["GET"] = self._open
        for method in ("server/discover", "initialize", "tools/list", "tools/call", "notifications/initialized"):
            self.responses[method] = lambda message, request: self._receive(message, request, status)

    async def _open(self, _: Any, request: web.Request) -> web.StreamResponse:
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        await stream.write(f"event: endpoint\ndata: {self.endpoint}\n\n".encode())
        self._stream = stream
        await self.is_over.wait()
        return stream

    async def _receive(self, message: Any, request: web.Request, status: int) -> web.StreamResponse:
        if request.path != "/messages":
            return web.Response(status=status, text="not here")
        if "id" in message and self._stream is not None:
            await self._stream.write(f"event: message\n{event(self.default(message))}\n".encode())
        return web.Response(status=202, text="Accepted")

    async def stop(self) -> None:
        self.is_over.set()
        await super().stop()


@pytest_asyncio.fixture
async def make_sse_server() -> AsyncIterator[Callable[[int], Any]]:
    servers: list[SseServer] = []

    async def make(status: int) -> SseServer:
        servers.append(SseServer(status))
        await servers[-1].start()
        return servers[-1]

    yield make
    for each in servers:
        await each.stop()


@pytest.mark.parametrize("status", [400, 404, 405, 406, 415])
@pytest.mark.parametrize("kind", ["http", "sse"])
async def test_a_server_of_the_older_transport_is_used_whatever_the_path_is(
    make_hub: MakeHub, make_sse_server: Callable[[int], Any], status: int, kind: str
) -> None:
    server = await make_sse_server(status)
    hub = make_hub({"a": {"url": server.url, "type": kind}})
    lease = await hub.tools()
    assert await function_of(lease, "echo")() == "on"
    assert hub.status()["a"].starts == 1
    await hub.close()


async def test_an_event_stream_that_ends_loses_the_session(
    make_hub: MakeHub, make_sse_server: Callable[[int], Any]
) -> None:
    server = await make_sse_server(404)
    hub = make_hub({"a": {"url": server.url, "type": "sse"}})
    lease = await hub.tools()
    server.responses["tools/call"] = lambda *_: server.is_over.set()
    with pytest.raises(ToolError, match=r"lost during the call \(it closed its event stream\)"):
        await function_of(lease, "echo")()
    await hub.close()


async def test_an_event_stream_that_ends_between_two_calls_is_opened_anew(
    make_hub: MakeHub, make_sse_server: Callable[[int], Any], recorder: Recorder[McpEvent]
) -> None:
    server = await make_sse_server(404)
    hub = make_hub({"a": {"url": server.url, "type": "sse"}}, on_event=recorder)
    lease = await hub.tools()
    assert await function_of(lease, "echo")() == "on"
    server.is_over.set()
    await recorder.wait_for(lambda each: getattr(each, "state", None) == ServerState.LOST)
    server.is_over.clear()
    assert await function_of(lease, "echo")() == "on"
    assert hub.status()["a"].starts == 2
    await hub.close()


async def test_an_endpoint_at_another_origin_is_not_used(
    make_hub: MakeHub, make_sse_server: Callable[[int], Any]
) -> None:
    server = await make_sse_server(404)
    server.endpoint = "http://127.0.0.1:9/messages"
    with pytest.raises(MultiMCPError, match="it names an endpoint at another origin"):
        await make_hub({"a": {"url": server.url, "type": "sse"}}).tools()


@pytest.mark.parametrize("endpoint", ["http://[", "http://127.0.0.1:x/messages", "http://127.0.0.1:99999/"])
async def test_an_endpoint_that_is_not_valid_is_named(
    make_hub: MakeHub, make_sse_server: Callable[[int], Any], endpoint: str
) -> None:
    server = await make_sse_server(404)
    server.endpoint = endpoint
    with pytest.raises(MultiMCPError, match="it names an endpoint that is not a valid URL, 'http://"):
        await make_hub({"a": {"url": server.url, "type": "sse"}}).tools()


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("https://example.com/sse", "https://example.com:443/messages"),
        ("http://example.com:80/sse", "http://EXAMPLE.com/messages"),
        ("http://user:word@example.com/sse", "HTTP://example.com/messages"),
    ],
)
async def test_an_origin_may_be_written_in_another_way(url: str, endpoint: str) -> None:
    async def ignore(_: object) -> None: ...

    stream = SseStream(ServerSpec(name="a", transport="sse", url=url), None, ignore, lambda _: None)
    assert stream._endpoint_url(endpoint).lower() == endpoint.lower()


async def test_a_stream_that_fails_after_it_was_given_up_does_not_end_the_connection() -> None:
    is_read = asyncio.Event()
    ends: list[object] = []

    class FailingClient:
        """A client whose stream fails when it is cancelled."""

        @contextlib.asynccontextmanager
        async def stream(self, *_: object, **__: object) -> AsyncIterator[None]:
            is_read.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError as exc:
                raise OSError("the connection broke") from exc
            yield

    async def ignore(_: object) -> None: ...

    spec = ServerSpec(name="a", transport="sse", url="http://example.com/sse")
    stream = SseStream(spec, FailingClient(), ignore, ends.append)
    # The first call imports the HTTP client, which must not be done in the event loop.
    await asyncio.to_thread(connection_errors)
    opening = asyncio.create_task(stream.open())
    await is_read.wait()
    opening.cancel()
    await asyncio.wait({opening})
    assert opening.cancelled()
    assert ends == []


async def test_a_server_of_the_newer_transport_says_that_its_type_is_wrong(
    make_hub: MakeHub, server: HttpServer
) -> None:
    server.responses["GET"] = lambda *_: body(200, "hello", "text/plain")
    with pytest.raises(MultiMCPError, match='does not use the SSE transport; use "type": "http"'):
        await make_hub({"a": {"url": server.url, "type": "sse"}}).tools()
    server.responses["GET"] = lambda *_: body(401, "who", "text/plain")
    with pytest.raises(MultiMCPError, match="HTTP status 401; it said: who; give it a token"):
        await make_hub({"a": {"url": server.url, "type": "sse"}}).tools()


# The stream of the server's own messages


async def test_what_a_server_sends_on_its_own_account_arrives_however_often_its_stream_ends(
    make_hub: MakeHub, server: HttpServer, recorder: Recorder[McpEvent]
) -> None:
    notes = iter(range(100))

    def respond(_: Any, request: web.Request) -> Any:
        if (number := next(notes)) == 3:
            return web.Response(status=405)
        log = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": number}}
        assert request.headers.get("Last-Event-ID") == (str(number - 1) if number else None)
        return events("retry: 10", f"id: {number}", event(log))

    server.responses["GET"] = respond
    hub = make_hub({"a": {"url": server.url}}, on_event=recorder)
    lease = await hub.tools()
    await recorder.wait_for(lambda each: getattr(each, "data", None) == 2)
    assert await function_of(lease, "echo")() == "on"
    await hub.close()


@pytest.mark.parametrize("method", ["GET", "tools/call"])
async def test_a_stream_that_floods_its_client_delays_no_other_call(
    make_hub: MakeHub, server: HttpServer, method: str
) -> None:
    begun, is_over = asyncio.Event(), asyncio.Event()

    async def flood(message: Any, request: web.Request) -> Any:
        if message is not None and message["params"]["arguments"]:
            return None
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await stream.prepare(request)
        data = event({"jsonrpc": "2.0", "method": "vendor/x"}) + "\n"
        with contextlib.suppress(ConnectionError):
            while not is_over.is_set():
                await stream.write(data.encode() * 100)
                begun.set()
                await asyncio.sleep(0)
        return stream

    server.responses[method] = flood
    hub = make_hub({"a": {"url": server.url}, "b": {"tools": ["echo"]}})
    lease = await hub.tools(call_timeout=20)
    flooded = asyncio.create_task(function_of(lease, "echo", "a")()) if method != "GET" else None
    await begun.wait()
    for _ in range(3):
        assert await function_of(lease, "echo", "b")(text="on") == "on"
        assert await function_of(lease, "echo", "a")(text="on") == "on"
    if flooded is not None:
        flooded.cancel()
        await asyncio.wait([flooded])
    is_over.set()
    await hub.close()
