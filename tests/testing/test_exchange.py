"""What a behaviour can do with an `Exchange`, as the bytes of the connection show it."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest

from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply
from tests.testing.support import Dial, Post

STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def payloads(data: bytes) -> list[str]:
    return [line.removeprefix("data: ") for line in data.decode().split("\r\n") if line.startswith("data: ")]


async def test_each_send_is_a_chunk_of_the_body(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b"one")
        await exchange.send(b"")
        await exchange.send(b"two and a half")
        await exchange.end()

    server.script(behave)
    reader, _ = await post(server)
    expected = STREAM_HEAD + b"3\r\none\r\n" + b"e\r\ntwo and a half\r\n" + b"0\r\n\r\n"
    assert await reader.readexactly(len(expected)) == expected
    assert server.requests[0].finished


async def test_each_piece_arrives_before_the_next_one_is_sent(server: ScriptedServer, post: Post) -> None:
    gate = asyncio.Event()

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b"first")
        await gate.wait()
        await exchange.send(b"second")

    server.script(behave)
    reader, _ = await post(server)
    await reader.readuntil(b"first")
    gate.set()
    await reader.readuntil(b"second")


async def test_small_packets_are_sent_at_once(server: ScriptedServer, post: Post) -> None:
    options = []

    async def behave(exchange: Exchange) -> None:
        transport = exchange._connection._transport
        assert transport is not None
        wire = transport.get_extra_info("socket")
        options.append(wire.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        await exchange.done()

    server.script(behave)
    reader, _ = await post(server)
    await reader.readuntil(b"[DONE]")
    assert options
    assert all(options)


async def test_a_chunk_is_an_event_and_starts_the_stream(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.chunk({"text": "é"})
        await exchange.chunk("plain")
        await exchange.chunk(b"\xff")
        await exchange.done()

    server.script(behave)
    reader, _ = await post(server)
    data = await reader.readuntil(b"0\r\n\r\n")
    events = ['data: {"text":"é"}\n\n'.encode(), b"data: plain\n\n", b"data: \xff\n\n", b"data: [DONE]\n\n"]
    assert data == STREAM_HEAD + b"".join(b"%x\r\n%b\r\n" % (len(e), e) for e in events) + b"0\r\n\r\n"


async def test_a_delta_is_a_chunk_in_the_form_of_openai(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.delta("Hi", role="assistant")
        await exchange.delta(model="other", finish_reason="stop")

    server.script(behave)
    reader, _ = await post(server, model="asked")
    first, last = (json.loads(text) for text in payloads(await reader.readuntil(b"0\r\n\r\n")))
    assert first["object"] == "chat.completion.chunk"
    assert first["id"] == last["id"]
    assert first["model"] == "asked"
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": None}]
    assert last["model"] == "other"
    assert last["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]


async def test_a_delta_names_the_first_model_if_the_request_names_none(post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.delta("Hi")

    async with ScriptedServer(models=("first", "second")) as server:
        server.script(behave)
        reader, _ = await post(server)
        assert b'"model":"first"' in await reader.readuntil(b"0\r\n\r\n")


async def test_a_body_is_ended_if_the_behaviour_does_not_end_it(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start()

    server.script(behave, answer("again"))
    client = await post(server)
    assert await client[0].readuntil(b"0\r\n\r\n") == STREAM_HEAD + b"0\r\n\r\n"
    await post(server, client)
    assert b"again" in await client[0].readuntil(b"again")
    assert server.connections == 1


async def test_a_body_without_chunks_or_length_ends_with_the_connection(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start(201, content_type=None, chunked=False)
        await exchange.send(b"body")

    server.script(behave)
    reader, _ = await post(server)
    assert await reader.read() == b"HTTP/1.1 201 Created\r\n\r\nbody"


async def test_given_header_fields_replace_the_default_ones(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start(headers={"content-type": "x/y", "X-More": "1"})

    server.script(behave)
    reader, _ = await post(server)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head == b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\ncontent-type: x/y\r\nX-More: 1\r\n\r\n"


async def test_a_connection_is_closed_if_the_reply_announces_it(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start(headers={"Connection": "close"})

    server.script(behave)
    reader, _ = await post(server)
    assert (await reader.read()).endswith(b"Connection: close\r\n\r\n0\r\n\r\n")


async def test_raw_bytes_are_sent_unframed_and_leave_the_connection_open(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n")
        await exchange.raw(b"ok")

    server.script(behave, behave)
    client = await post(server)
    assert await client[0].readuntil(b"ok") == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    await post(server, client)
    await client[0].readuntil(b"ok")
    assert [request.finished for request in server.requests] == [True, True]


async def test_hang_up_ends_the_connection_in_the_middle(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.raw(b"ff\r\nnot so long")
        exchange.hang_up()

    server.script(behave)
    reader, _ = await post(server)
    assert await reader.read() == STREAM_HEAD + b"ff\r\nnot so long"
    assert server.requests[0].finished
    assert not server.aborts


async def test_reset_breaks_the_connection(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        exchange.reset()

    server.script(behave)
    reader, _ = await post(server)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    assert not server.aborts


async def test_a_behaviour_is_cancelled_when_the_client_leaves(server: ScriptedServer, post: Post) -> None:
    seen = []

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise

    server.script(behave)
    reader, writer = await post(server)
    await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await server.wait_until(lambda: server.aborts)
    assert seen == ["cancelled"]
    assert server.aborts == server.requests
    assert server.requests[0].aborted
    assert not server.requests[0].finished
    assert server.in_flight == 0


async def test_a_behaviour_that_keeps_sending_is_cancelled_when_the_client_leaves(
    server: ScriptedServer, post: Post
) -> None:
    async def behave(exchange: Exchange) -> None:
        while True:
            await exchange.delta("more ")

    server.script(behave)
    reader, writer = await post(server)
    await reader.readuntil(b"more ")
    writer.transport.abort()
    await server.wait_until(lambda: server.aborts)


async def test_a_behaviour_can_wait_for_the_client_to_leave(server: ScriptedServer, post: Post) -> None:
    seen = []

    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.client_left()
        try:
            await exchange.send(b"to nobody")
        except ConnectionResetError:
            seen.append("reset")
            raise

    server.script(behave)
    reader, writer = await post(server)
    await reader.readuntil(b"\r\n\r\n")
    writer.close()
    await server.wait_until(lambda: server.aborts)
    assert seen == ["reset"]
    assert not server.errors


@pytest.mark.parametrize("unread", [0, 50_000_000])
async def test_a_client_that_closes_its_half_has_left(server: ScriptedServer, post: Post, unread: int) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b"x" * unread)
        await asyncio.Event().wait()

    server.script(behave)
    reader, writer = await post(server)
    await reader.readuntil(b"\r\n\r\n")
    writer.write_eof()
    await server.wait_until(lambda: server.aborts)


async def test_hanging_up_on_a_client_that_left_does_not_make_the_reply_complete(
    server: ScriptedServer, post: Post
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.client_left()
        exchange.hang_up()

    server.script(behave)
    _, writer = await post(server)
    await server.wait_until(lambda: server.in_flight)
    writer.close()
    await server.wait_until(lambda: server.aborts)
    assert not server.requests[0].finished


async def test_a_client_that_leaves_after_the_end_is_not_an_abort(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.done()
        await exchange.end()
        await exchange.client_left()

    server.script(behave)
    reader, writer = await post(server)
    await reader.readuntil(b"0\r\n\r\n")
    writer.close()
    await server.wait_until(lambda: server.requests[0].finished)
    assert not server.aborts


async def test_a_pipelined_request_is_neither_lost_nor_taken_for_leaving(server: ScriptedServer, post: Post) -> None:
    gate = asyncio.Event()
    server.script(answer("first", gate=gate), answer("second"))
    client = await post(server, stream=True)
    await client[0].readuntil(b"first")
    await post(server, client)
    gate.set()
    await client[0].readuntil(b"[DONE]")
    await client[0].readuntil(b"second")
    assert [request.connection for request in server.requests] == [1, 1]
    assert not server.aborts


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_reply_that_the_client_does_not_read_to_the_end_is_aborted(
    server: ScriptedServer, post: Post, chunked: bool
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start(chunked=chunked)
        await exchange.send(b"x" * 50_000_000)
        await exchange.end()

    server.script(behave)
    reader, writer = await post(server)
    await reader.readuntil(b"xxx")
    writer.close()
    await server.wait_until(lambda: server.aborts)
    assert not server.requests[0].finished


async def test_a_long_reply_that_the_client_reads_is_finished(server: ScriptedServer, post: Post) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start(headers={"Content-Length": "50000000"}, chunked=False)
        await exchange.send(b"x" * 50_000_000)

    server.script(behave)
    reader, _ = await post(server)
    await reader.readuntil(b"\r\n\r\n")
    assert len(await reader.readexactly(50_000_000)) == 50_000_000
    await server.wait_until(lambda: server.requests[0].finished)


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_a_reply_to_head_has_no_body(server: ScriptedServer, dial: Dial, method: str) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b"body")

    server.on_path("/x", behave)
    reader, writer = await dial(server)
    writer.write(f"{method} /x HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
    _, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert body == (b"" if method == "HEAD" else b"4\r\nbody\r\n0\r\n\r\n")


async def start_twice(exchange: Exchange) -> None:
    await exchange.start()
    await exchange.start()


async def send_before_start(exchange: Exchange) -> None:
    await exchange.send(b"x")


async def send_after_end(exchange: Exchange) -> None:
    await exchange.start()
    await exchange.end()
    await exchange.send(b"x")


async def send_after_hang_up(exchange: Exchange) -> None:
    await exchange.start()
    exchange.hang_up()
    await exchange.send(b"x")


async def no_reply(exchange: Exchange) -> None:
    pass


@pytest.mark.parametrize("behaviour", [start_twice, send_before_start, send_after_end, send_after_hang_up, no_reply])
async def test_wrong_use_of_an_exchange_is_an_error(server: ScriptedServer, post: Post, behaviour: Behaviour) -> None:
    server.script(behaviour)
    reader, _ = await post(server)
    await reader.read()
    (error,) = server.errors
    assert isinstance(error, RuntimeError)
    server.errors.clear()


async def test_a_head_that_was_cancelled_before_it_was_sent_can_be_sent_again(
    server: ScriptedServer, post: Post
) -> None:
    async def behave(exchange: Exchange) -> None:
        starting = asyncio.create_task(exchange.start())
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.wait({starting})
        await reply(200, "whole")(exchange)

    server.script(behave)
    reader, _ = await post(server)
    assert (await reader.readuntil(b"whole")).startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain")
