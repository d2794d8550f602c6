"""The ready-made behaviours as an HTTP client sees them."""

from __future__ import annotations

import asyncio
import json
from types import MappingProxyType
from typing import Any

import aiohttp
import pytest

from lmbridge.testing import ScriptedServer, answer, hang_up, raw, reply, reset, sse, stall
from tests.testing.support import Post

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 317, "b": 225}'}}


async def plain(http: aiohttp.ClientSession, server: ScriptedServer, **body: Any) -> Any:
    async with http.post(f"{server.api_base}/chat/completions", json=body) as response:
        assert response.status == 200
        assert response.content_type == "application/json"
        return await response.json()


async def stream(http: aiohttp.ClientSession, server: ScriptedServer, **body: Any) -> list[Any]:
    """Returns the chunks of a stream, which has to end with [DONE]."""
    async with http.post(f"{server.api_base}/chat/completions", json={"stream": True, **body}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        *events, last, rest = (await response.text()).split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def deltas(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in chunks]


async def test_answer_sends_a_completion(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(answer("Hello there"))
    body = await plain(http, server, model="asked")
    assert body["object"] == "chat.completion"
    assert body["model"] == "asked"
    assert body["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hello there"}, "finish_reason": "stop"}
    ]
    assert body["usage"] == {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


async def test_answer_sends_a_stream_if_the_request_asks_for_one(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    server.script(answer("Hello,  dear\nworld "))
    chunks = await stream(http, server, model="asked")
    contents = [{"content": piece} for piece in ("Hello,", "  dear", "\nworld", " ")]
    assert deltas(chunks) == [{"role": "assistant", "content": None}, *contents, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert {chunk["model"] for chunk in chunks} == {"asked"}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1


async def test_the_stream_of_answer_has_the_given_chunks(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(answer("abc", chunks=("a", "", "bc")))
    assert deltas(await stream(http, server))[1:-1] == [{"content": "a"}, {"content": ""}, {"content": "bc"}]


async def test_the_stream_of_answer_reports_usage_only_if_the_request_asks_for_it(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    server.script(answer("Hi", usage=usage), answer("Hi", usage=usage))
    assert all("usage" not in chunk for chunk in await stream(http, server))
    last = (await stream(http, server, stream_options={"include_usage": True}))[-1]
    assert (last["choices"], last["usage"]) == ([], usage)


async def test_answer_sends_the_given_fields(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    behaviour = answer("Hi", model="other", finish_reason="length", extra={"system_fingerprint": "b1"})
    server.script(behaviour, behaviour)
    body = await plain(http, server, model="asked")
    assert (body["model"], body["system_fingerprint"]) == ("other", "b1")
    assert body["choices"][0]["finish_reason"] == "length"
    chunks = await stream(http, server, model="asked")
    assert {(chunk["model"], chunk["system_fingerprint"]) for chunk in chunks} == {("other", "b1")}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_answer_can_leave_the_finish_reason_out(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(answer("Hi", finish_reason=None), answer("Hi", finish_reason=None))
    assert (await plain(http, server))["choices"][0]["finish_reason"] is None
    assert deltas(await stream(http, server)) == [{"role": "assistant", "content": None}, {"content": "Hi"}]


async def test_answer_can_contain_tool_calls(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(answer("", tool_calls=[CALL]))
    (choice,) = (await plain(http, server))["choices"]
    assert choice["message"]["tool_calls"] == [CALL]
    assert choice["finish_reason"] == "tool_calls"


async def test_the_stream_of_answer_sends_tool_calls_in_fragments(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    server.script(answer("", tool_calls=[CALL, CALL | {"id": "c2"}]))
    chunks = await stream(http, server)
    parts = [part for delta in deltas(chunks) for part in delta.get("tool_calls", ())]
    assert [part["id"] for part in parts if "id" in part] == ["c1", "c2"]
    assert parts[0] == {
        "index": 0,
        "id": "c1",
        "type": "function",
        "function": {"name": "add", "arguments": ""},
    }
    for index in (0, 1):
        fragments = [part["function"]["arguments"] for part in parts if part["index"] == index]
        assert len(fragments) > 2
        assert json.loads("".join(fragments)) == {"a": 317, "b": 225}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_answer_can_contain_reasoning(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(answer("4", reasoning="two and two"), answer("4", reasoning="two and two"))
    assert (await plain(http, server))["choices"][0]["message"]["reasoning_content"] == "two and two"
    pieces = deltas(await stream(http, server))[1:-1]
    thoughts = [{"reasoning_content": piece} for piece in ("two", " and", " two")]
    assert pieces == [*thoughts, {"content": "4"}]


async def test_a_gate_holds_a_stream_after_its_first_content(server: ScriptedServer, post: Post) -> None:
    gate = asyncio.Event()
    server.script(answer("Hello there", gate=gate))
    reader, _ = await post(server, stream=True)
    await reader.readuntil(b'"content":"Hello"')
    assert server.in_flight == 1
    gate.set()
    # The gate holds only the first content back.
    gate.clear()
    assert b'"content":" there"' in await reader.readuntil(b"[DONE]")


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_gate_holds_an_answer_without_content(server: ScriptedServer, post: Post, streamed: bool) -> None:
    gate = asyncio.Event()
    server.script(answer("", gate=gate))
    reader, _ = await post(server, stream=streamed)
    await server.wait_until(lambda: server.in_flight)
    with pytest.raises(TimeoutError):
        await server.wait_until(lambda: not server.in_flight, timeout=0.05)
    gate.set()
    await reader.readuntil(b'"stop"')


async def test_a_client_that_leaves_a_held_stream_aborts_it(server: ScriptedServer, post: Post) -> None:
    server.script(answer("Hello there", gate=asyncio.Event()))
    reader, writer = await post(server, stream=True)
    await reader.readuntil(b'"content":"Hello"')
    writer.close()
    await server.wait_until(lambda: server.aborts)


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        ({"error": "busy"}, "application/json", b'{"error":"busy"}'),
        (MappingProxyType({"a": MappingProxyType({})}), "application/json", b'{"a":{}}'),
        ([1, "é"], "application/json", '[1,"é"]'.encode()),
        ("text é", "text/plain; charset=utf-8", "text é".encode()),
        (b"\x00\xff", "application/octet-stream", b"\x00\xff"),
    ],
)
async def test_reply_sends_a_whole_response(
    server: ScriptedServer, http: aiohttp.ClientSession, body: Any, content_type: str, expected: bytes
) -> None:
    server.script(reply(503, body, {"Retry-After": "2"}))
    async with http.post(server.api_base) as response:
        assert response.status == 503
        assert response.headers == {
            "Content-Type": content_type,
            "Content-Length": str(len(expected)),
            "Retry-After": "2",
        }
        assert await response.read() == expected
    assert server.requests[0].finished


async def test_reply_can_have_another_content_type(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(reply(200, b"<html>", content_type="text/html"))
    async with http.post(server.api_base) as response:
        assert response.headers["Content-Type"] == "text/html"


async def test_reply_can_announce_a_wrong_length(server: ScriptedServer, post: Post) -> None:
    server.script(reply(200, b"abc", {"content-length": "2", "Connection": "close"}))
    reader, _ = await post(server)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"content-length: 2" in head
    assert b"Content-Length" not in head
    assert body == b"abc"


async def test_reply_with_a_status_without_a_body_announces_no_length(server: ScriptedServer, post: Post) -> None:
    server.script(reply(204), answer("next"))
    client = await post(server)
    assert b"Content-Length" not in await client[0].readuntil(b"\r\n\r\n")
    await post(server, client)
    assert (await client[0].readline()) == b"HTTP/1.1 200 OK\r\n"


async def test_sse_sends_each_event_in_a_separate_chunk(server: ScriptedServer, post: Post) -> None:
    server.script(sse({"a": 1}, "da", b"ta: x\n\n", done=True))
    reader, _ = await post(server)
    _, _, body = (await reader.readuntil(b"\r\n0\r\n\r\n")).partition(b"\r\n\r\n")
    pieces = [b'data: {"a":1}\n\n', b"da", b"ta: x\n\n", b"data: [DONE]\n\n"]
    assert body == b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


async def test_sse_can_have_another_status_and_content_type(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    server.script(sse("x", status=500, content_type="text/x"))
    async with http.post(server.api_base) as response:
        assert (response.status, response.content_type, await response.text()) == (500, "text/x", "x")


async def test_sse_can_be_broken_off(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(sse({"a": 1}, end=False))
    async with http.post(server.api_base) as response:
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert server.requests[0].finished
    assert not server.aborts


async def test_raw_sends_the_bytes_unchanged_and_hangs_up(server: ScriptedServer, post: Post) -> None:
    server.script(raw(b"HTTP/1.1 2", b"00 OK\r\n\r\nda", b"ta"))
    reader, _ = await post(server)
    assert await reader.read() == b"HTTP/1.1 200 OK\r\n\r\ndata"
    assert server.requests[0].finished


async def test_stall_sends_nothing_until_the_client_leaves(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(stall())
    request = asyncio.create_task(http.post(f"{server.api_base}/chat/completions"))
    await server.wait_until(lambda: server.in_flight)
    request.cancel()
    await asyncio.wait([request])
    await server.wait_until(lambda: server.aborts)
    assert server.open_connections == 0


async def test_stall_can_send_events_first(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(stall(after=({"a": 1}, "data: 2\n\n")))
    async with http.post(f"{server.api_base}/chat/completions") as response:
        received = b""
        while not received.endswith(b"2\n\n"):
            received += await response.content.readany()
        assert received == b'data: {"a":1}\n\ndata: 2\n\n'
        assert not server.aborts
    await server.wait_until(lambda: server.aborts)


async def test_stall_can_send_the_head_first(server: ScriptedServer, http: aiohttp.ClientSession) -> None:
    server.script(stall(after=("",)))
    async with http.post(f"{server.api_base}/chat/completions") as response:
        assert response.status == 200
    await server.wait_until(lambda: server.aborts)


async def test_reset_breaks_the_connection_without_a_reply(server: ScriptedServer, post: Post) -> None:
    server.script(reset())
    reader, _ = await post(server)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    assert not server.aborts


async def test_hang_up_closes_the_connection_without_a_reply(
    server: ScriptedServer, http: aiohttp.ClientSession
) -> None:
    server.script(hang_up())
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await http.post(server.api_base)
    assert server.requests[0].finished
    assert not server.aborts
