"""Requests that share a connection: which answer is whose, which may be repeated, and what a broken one affects."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from lmbridge import ToolError
from lmbridge.mcp import McpEvent
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk.http import HttpConnection
from lmbridge.mcp.sdk.http_statuses import ERROR_BODY_LIMIT
from tests.mcp.conftest import MakeHub
from tests.mcp.http_server import HttpServer, answer, body, error, event, events, text
from tests.mcp.support import Recorder, function_of

CRASHED = "the order was placed, then the browser session crashed"


async def break_off(request: web.Request, beginning: str, kind: str) -> web.StreamResponse:
    """Sends the beginning of a response, and closes its connection."""
    response = web.StreamResponse(headers={"Content-Type": kind})
    response.enable_chunked_encoding()
    await response.prepare(request)
    await response.write(beginning.encode())
    assert request.transport
    request.transport.close()
    return response


class TwoCalls:
    """Holds the first call that reaches a server until the second has been answered."""

    def __init__(self, server: HttpServer, respond: Callable[[Any, Any, web.Request], Awaitable[Any]]) -> None:
        self.first: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.release = asyncio.Event()
        self._respond = respond
        server.responses["tools/call"] = self._on_call

    async def _on_call(self, message: Any, request: web.Request) -> Any:
        if not self.first.done():
            self.first.set_result(message)
            await self.release.wait()
            return answer(message, text("first"))
        return await self._respond(message, self.first.result(), request)


def own_and(*others: Callable[[Any], Any], as_batch: bool) -> Callable[[Any, Any, web.Request], Awaitable[Any]]:
    """Answers with the answers to others first, and then with the own one."""

    async def respond(message: Any, first: Any, _: web.Request) -> Any:
        found = [*(other(first) for other in others), answer(message, text("own"))]
        return found if as_batch else events(*map(event, found))

    return respond


@pytest.mark.parametrize("as_batch", [False, True])
@pytest.mark.parametrize(
    "other",
    [
        lambda first: answer(first, text("other")),
        lambda first: {**answer(first, text("other")), "id": str(first["id"])},
        lambda first: {**answer(first, text("other")), "id": float(first["id"])},
        lambda first: {**answer(first, text("other")), "id": 1},
        lambda first: {**answer(first, text("other")), "id": None},
    ],
)
@pytest.mark.parametrize("is_over", [False, True])
async def test_a_call_gets_its_own_answer_whatever_else_its_response_brings(
    make_hub: MakeHub, server: HttpServer, other: Callable[[Any], Any], as_batch: bool, is_over: bool
) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    calls = TwoCalls(server, own_and(other, as_batch=as_batch))
    waiting = asyncio.create_task(echo())
    await calls.first
    if is_over:
        waiting.cancel()
        await asyncio.wait({waiting})
    assert await echo() == "own"
    calls.release.set()
    if not is_over:
        assert await waiting == "first"


async def test_a_resumed_stream_may_bring_answers_to_others(make_hub: MakeHub, server: HttpServer) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    calls: list[Any] = []

    def respond(message: Any, _: web.Request) -> Any:
        calls.append(message)
        return events("id: 1", "retry: 10", "data:", "")

    wrong = {**answer({"id": 5}, text("wrong"))}
    server.responses["tools/call"] = respond
    server.responses["GET"] = lambda *_: events(event(wrong), event(answer(calls[0], text("own"))))
    assert await echo() == "own"


async def test_only_the_beginning_of_a_large_body_is_quoted(
    make_hub: MakeHub, server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def quote(content: bytes) -> str:
        sizes.append(len(content))
        return "words"

    monkeypatch.setattr("lmbridge.mcp.sdk.http.quote_body", quote)
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    server.responses["tools/call"] = lambda *_: body(200, b"x" * (ERROR_BODY_LIMIT + 5), "text/plain")
    with pytest.raises(ToolError, match="not a JSON-RPC message: words"):
        await echo()
    assert sizes == [ERROR_BODY_LIMIT]


# Calls that may have run are not repeated


def busy(*_: Any) -> Any:
    return body(429, "slow down", "text/plain")


def noisy(message: Any, _: web.Request) -> Any:
    log = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"level": "info", "data": "ping"}}
    return events(event(log), event(answer(message, {})))


def failing(message: Any, _: web.Request) -> Any:
    return error(message, -32603, "out of memory")


def unsupported(message: Any, _: web.Request) -> Any:
    return body(400, error(message, -32601, "no such method"))


@pytest.mark.parametrize("pong", [busy, noisy, failing, unsupported, lambda *_: body(503, "", "text/plain")])
@pytest.mark.parametrize(
    "refuse",
    [
        lambda message: error(message, -32000, CRASHED),
        lambda message: error(message, -32001, "Session not found"),
        lambda message: error({"id": None}, -32000, CRASHED),
    ],
)
async def test_a_call_whose_error_speaks_of_a_session_is_repeated_only_if_the_server_has_forgotten_it(
    make_hub: MakeHub, server: HttpServer, refuse: Callable[[Any], Any], pong: Callable[..., Any]
) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    server.responses |= {"tools/call": lambda message, _: refuse(message), "ping": pong}
    with pytest.raises(ToolError, match=r"^-3200[01]: "):
        await echo()
    assert server.methods.count("tools/call") == 1


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-32000, CRASHED),
        (-32000, "the browser session crashed, and the page did not load"),
        (-32000, "the order did not close its session"),
        (-32001, "Request timed out"),
    ],
)
async def test_an_error_of_a_call_that_has_run_is_not_taken_for_that_of_a_forgotten_session(
    make_hub: MakeHub, server: HttpServer, code: int, words: str
) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    server.responses |= {
        "tools/call": lambda message, _: error(message, code, words),
        "ping": lambda *_: body(404, "", "text/plain"),
    }
    with pytest.raises(ToolError, match=f"{code}: {words}"):
        await echo()
    assert server.methods.count("tools/call") == 1


@pytest.mark.parametrize(
    "words",
    [
        "Session not found",
        "Session 5f3-a9 does not exist",
        "Bad Request: No valid session ID provided",
        "Mcp-Session-Id header is required",
        "No transport found for sessionId",
        "Your session has expired",
        "Bad Request: Server not initialized",
        "Unknown session: 5f3-a9",
        "Session terminated",
    ],
)
async def test_a_call_is_made_in_another_session_if_its_error_names_an_unknown_one_and_a_ping_confirms_it(
    make_hub: MakeHub, server: HttpServer, words: str
) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")

    def refuse(message: Any, request: web.Request) -> Any:
        return error(message, -32000, words) if request.headers["Mcp-Session-Id"] == "s1" else None

    server.responses |= {"tools/call": refuse, "ping": refuse}
    assert await echo() == "on"
    assert server.methods.count("tools/call") == 2


# What a failed request means for the others


async def rejected(_message: Any, _first: Any, _request: web.Request) -> Any:
    return body(401, "", "text/plain")


async def test_a_rejection_of_one_call_does_not_say_that_another_has_not_run(
    make_hub: MakeHub, server: HttpServer
) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    calls = TwoCalls(server, rejected)
    waiting = asyncio.create_task(echo())
    await calls.first
    with pytest.raises(ToolError, match="rejected the call, which has not run"):
        await echo()
    with pytest.raises(ToolError, match=r"HTTP status 401.*; the tool may or may not have run"):
        await waiting
    calls.release.set()


@pytest.mark.parametrize(("status", "words"), [(303, "may or may not have run"), (302, "not run"), (307, "not run")])
async def test_only_a_redirect_to_the_outcome_of_a_request_means_that_it_may_have_run(
    make_hub: MakeHub, server: HttpServer, status: int, words: str
) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    server.responses["tools/call"] = lambda *_: body(status, "", Location="/done")
    with pytest.raises(ToolError, match="redirects to /done") as caught:
        await echo()
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_an_answer_that_breaks_off_fails_only_its_own_call(
    make_hub: MakeHub, server: HttpServer, kind: str
) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    calls = TwoCalls(server, lambda _message, _first, request: break_off(request, '{"id": ', kind))
    waiting = asyncio.create_task(echo())
    await calls.first
    with pytest.raises(ToolError, match=r"may (or may not )?have run"):
        await echo()
    calls.release.set()
    assert await waiting == "first"


async def test_a_notification_that_fails_affects_no_call(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url}})
    echo = function_of(await hub.tools(), "echo")
    second = asyncio.Event()

    async def stall(*_: Any) -> Any:
        second.set()
        await calls.release.wait()

    async def hang_up(_: Any, request: web.Request) -> Any:
        return await break_off(request, "", "text/plain")

    calls = TwoCalls(server, stall)
    server.responses["notifications/cancelled"] = hang_up
    waiting = asyncio.create_task(echo())
    await calls.first
    other = asyncio.create_task(echo())
    await second.wait()
    other.cancel()
    await asyncio.wait({other})
    assert "notifications/cancelled" in server.methods
    calls.release.set()
    assert await waiting == "first"
    assert hub.status()["a"].starts == 1


async def test_a_call_that_could_not_be_sent_is_not_said_to_have_run(make_hub: MakeHub, server: HttpServer) -> None:
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")
    await server.stop()
    with pytest.raises(ToolError) as caught:
        await echo()
    assert "may" not in str(caught.value)


# Streams that end before the answer


async def test_a_stream_that_breaks_before_the_answer_is_resumed(make_hub: MakeHub, server: HttpServer) -> None:
    hub = make_hub({"a": {"url": server.url}})
    echo = function_of(await hub.tools(), "echo")
    calls: list[Any] = []
    asked: list[Any] = []

    async def respond(message: Any, request: web.Request) -> Any:
        calls.append(message)
        return await break_off(request, "id: 1\nretry: 10\ndata:\n\n", "text/event-stream")

    async def resume(_: Any, request: web.Request) -> Any:
        asked.append(request.headers.get("Last-Event-ID"))
        if len(asked) == 1:
            return await break_off(request, "id: 2\ndata:\n\n", "text/event-stream")
        return events(event(answer(calls[0], text("on"))))

    server.responses |= {"tools/call": respond, "GET": resume}
    assert await echo() == "on"
    assert asked == ["1", "2"]
    assert hub.status()["a"].starts == 1


async def test_a_stream_without_an_event_id_is_not_waited_for_without_end(
    make_hub: MakeHub, server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.sdk.http_streams._UNNAMED_STREAM_SECONDS", 0.01)
    echo = function_of(await make_hub({"a": {"url": server.url}}).tools(call_timeout=None), "echo")
    is_over = asyncio.Event()

    async def stay_open(_: Any, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await is_over.wait()
        return response

    server.responses |= {"tools/call": lambda *_: events("retry: 10", ""), "GET": stay_open}
    with pytest.raises(ToolError, match=r'"retry:" but gave no event id.*, and the tool may have run'):
        await echo()
    is_over.set()


# Secrets


@pytest.mark.parametrize("as_error", [True, False])
async def test_a_refused_list_does_not_show_the_headers(
    make_hub: MakeHub, server: HttpServer, caplog: pytest.LogCaptureFixture, as_error: bool
) -> None:
    hub = make_hub({"a": {"url": server.url, "headers": {"Authorization": "Bearer sk-secret-123"}}})
    echo = function_of(await hub.tools(), "echo")
    words = "bad token sk-secret-123"
    refuse = (lambda message, _: error(message, -5, words)) if as_error else (lambda *_: body(403, words, "text/plain"))
    server.responses |= {"tools/list": refuse, "tools/call": refuse}
    with caplog.at_level(logging.DEBUG):
        await hub.tools()
    assert "bad token ***" in caplog.text
    assert "sk-secret-123" not in caplog.text
    with pytest.raises(ToolError) as caught:
        await echo()
    reason: BaseException | None = caught.value
    while reason is not None:
        assert "sk-secret-123" not in str(reason)
        reason = reason.__cause__


# The stream of the server's own messages


async def test_streams_that_bring_nothing_are_opened_less_and_less_often(
    make_hub: MakeHub, server: HttpServer, recorder: Recorder[McpEvent], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    has_seen_enough = asyncio.Event()

    async def note_pause(_: int | None, empty_streams: int = 0) -> None:
        pauses.append(empty_streams)
        if len(pauses) == 3:
            has_seen_enough.set()
            await asyncio.get_running_loop().create_future()

    monkeypatch.setattr("lmbridge.mcp.sdk.http_streams.pause_before_retry", note_pause)
    server.responses["GET"] = lambda *_: events("retry: 0", "")
    await make_hub({"a": {"url": server.url}}, on_event=recorder).tools()
    await has_seen_enough.wait()
    assert pauses == [1, 2, 3]


@pytest.mark.parametrize("version", ["2025-06-18é", "2025\n06", "☃"])
async def test_a_revision_that_cannot_be_a_header_is_not_sent_as_one(
    make_hub: MakeHub, server: HttpServer, version: str
) -> None:
    def respond(message: Any, _: web.Request) -> Any:
        found = server.default(message)
        found["result"]["protocolVersion"] = version
        return json.loads(json.dumps(found))

    server.responses["initialize"] = respond
    assert await function_of(await make_hub({"a": {"url": server.url}}).tools(), "echo")() == "on"


# Tasks


async def test_closing_a_connection_cancels_all_of_its_tasks_at_once_even_if_it_is_cancelled_itself() -> None:
    connection = HttpConnection(ServerSpec(name="a", transport="http", url="http://x/"), None, print, print)
    have_begun, cancelled = asyncio.Semaphore(0), asyncio.Semaphore(0)
    release = asyncio.Event()

    async def resist() -> None:
        have_begun.release()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.release()
            await release.wait()

    tasks = [connection._start(resist()) for _ in range(3)]
    for _ in tasks:
        await have_begun.acquire()
    closing = asyncio.create_task(connection.close())
    for _ in tasks:
        await cancelled.acquire()
    closing.cancel()
    release.set()
    await asyncio.wait({closing, *tasks})
    assert closing.cancelled()
    assert connection._tasks == set()


@pytest.mark.parametrize("headers", [{}, {"mcp-protocol-version": "2026-07-28"}], ids=["older", "modern"])
async def test_a_request_that_is_cancelled_before_its_first_step_is_forgotten(headers: dict[str, str]) -> None:
    connection = HttpConnection(ServerSpec(name="a", transport="http", url="http://x/"), None, print, print)
    await connection.send({"jsonrpc": "2.0", "id": 1, "method": "tools/call"}, headers)
    await connection.close()
    assert (connection._requests, connection._modern_requests, list(connection._finished)) == ({}, set(), [1])


async def test_a_list_that_is_no_longer_wanted_is_cancelled_at_the_server(
    make_hub: MakeHub, server: HttpServer
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    await hub.tools()
    is_asked, is_over = asyncio.Event(), asyncio.Event()

    async def stall(*_: Any) -> Any:
        is_asked.set()
        await is_over.wait()

    server.responses["tools/list"] = stall
    waiting = asyncio.create_task(hub.tools())
    await is_asked.wait()
    waiting.cancel()
    await asyncio.wait({waiting})
    assert "notifications/cancelled" in server.methods
    is_over.set()


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
async def test_a_number_that_json_does_not_have_is_refused(
    make_hub: MakeHub, server: HttpServer, number: float
) -> None:
    hub = make_hub({"a": {"url": server.url}})
    await hub.tools()
    with pytest.raises(ToolError, match="the arguments cannot be sent: "):
        await hub._servers["a"].call("echo", {"x": [{"y": number}]}, is_idempotent=True, timeout=None)
    assert "tools/call" not in server.methods
