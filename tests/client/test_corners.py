"""Corners in which a review found a place lost, a loop, a secret or a bare exception."""

from __future__ import annotations

import asyncio
import gc
import pickle
import warnings
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    ModelMismatchError,
    TaskCancelledError,
    Timeouts,
    collect,
)
from lmbridge.testing import Behaviour, ScriptedServer, answer, hang_up, raw, reply, sse, stall
from tests.support import HALF, MESSAGES, piece, read_text


async def test_a_stream_that_was_the_result_of_a_task_can_be_dropped(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    asked = asyncio.create_task(client.chat_completion(MESSAGES, stream=True))
    await asyncio.wait([asked])
    with pytest.warns(ResourceWarning, match="unclosed stream"):  # noqa: PT031 - the last reference goes in there
        del asked
        gc.collect()
    assert client._server.transport.in_flight == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_stream_in_the_traceback_of_a_failed_task_can_be_dropped(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))

    async def fail() -> None:
        stream = await client.chat_completion(MESSAGES, stream=True)
        await anext(stream)
        raise KeyError

    failing = asyncio.create_task(fail())
    await asyncio.wait([failing])
    assert isinstance(failing.exception(), KeyError)
    with pytest.warns(ResourceWarning, match="unclosed stream"):  # noqa: PT031 - the last reference goes in there
        del failing
        gc.collect()
    assert client._server.transport.in_flight == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_break_and_drop_closes_the_connection_even_where_warnings_are_errors(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))

    async def take_one() -> None:
        async for _ in await client.chat_completion(MESSAGES, stream=True):
            break

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        await take_one()
    assert client._server.transport.in_flight == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_after_a_read_that_was_thrown_away_the_next_is_an_error_and_no_endless_loop(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await client.chat_completion(MESSAGES, stream=True)
    await anext(stream)
    await anext(stream)
    read = stream.__anext__()
    read.send(None)
    read.close()
    with pytest.raises(LLMError) as caught:
        await anext(stream)
    assert caught.value.partial["choices"][0]["message"]["content"] == "Hello"


async def test_the_whole_has_a_limit_also_where_the_server_is_faster_than_the_reader(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(answer("", chunks=["a" * 2000] * 1000))  # more than can arrive at a time
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(total=1)) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)

        async def read_slowly() -> None:
            async for _ in stream:
                await asyncio.sleep(0.01)  # the reader's own time

        with pytest.raises(LLMTimeoutError) as caught:
            await read_slowly()
    assert caught.value.phase == "total"


@pytest.mark.parametrize("stream", [True, False])
async def test_broken_framing_is_a_broken_connection_and_not_waited_for(
    scripted_server: ScriptedServer, client: LLMClient, stream: bool
) -> None:
    kind = b"text/event-stream" if stream else b"application/json"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nTransfer-Encoding: chunked\r\n\r\n" % kind
    scripted_server.script(raw(head, b"2\r\n{}\r\n", b"zz\r\nno chunk\r\n"))

    async def ask() -> None:
        async with asyncio.timeout(5):
            if stream:
                await read_text(await client.chat_completion(MESSAGES, stream=True))
            else:
                await client.chat_completion(MESSAGES)

    with pytest.raises(LLMStreamError if stream else LLMConnectionError, match="broke in"):
        await ask()


@pytest.mark.parametrize("cut", [1, 4, 5])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n", "\r\n"])
async def test_a_stream_under_another_name_may_be_cut_anywhere(
    scripted_server: ScriptedServer, client: LLMClient, before: str, cut: int
) -> None:
    body = before.encode() + b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n'
    scripted_server.script(sse(body[:cut], body[cut:], done=True, content_type="text/plain"))
    assert await read_text(await client.chat_completion(MESSAGES, stream=True)) == "Hi"


async def test_what_collect_raises_of_its_own_has_what_had_arrived() -> None:
    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        yield piece("a")
        yield piece(choices="none")

    with pytest.raises(LLMStreamError) as caught:
        await collect(chunks())
    assert caught.value.partial["choices"][0]["message"]["content"] == "a"


async def test_close_ends_what_waits_for_a_connection_without_a_cancel(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", stall())
    client = LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1))
    lists = [asyncio.create_task(client.list_models()) for _ in range(4)]
    await scripted_server.wait_until(lambda: len(scripted_server.requests) == 3)
    await client.close()
    results = await asyncio.gather(*lists, return_exceptions=True)
    assert [type(result) for result in results] == [TaskCancelledError] * 4


async def test_close_ends_the_look_up_of_a_name_without_a_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    looking, never = asyncio.Event(), asyncio.Event()

    async def look_up(*_: object, **__: object) -> object:
        looking.set()
        return await never.wait()

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", look_up)
    client = LLMClient("http://slow.example")
    asked = asyncio.create_task(client.chat_completion(MESSAGES))
    await looking.wait()
    await client.close()
    with pytest.raises(TaskCancelledError):
        await asked


async def test_several_tasks_may_find_several_old_servers_idle(scripted_server: ScriptedServer) -> None:
    async with ScriptedServer() as second, ScriptedServer() as third, LLMClient(scripted_server.api_base) as client:
        gate = asyncio.Event()
        asked = []
        for server, following in ((scripted_server, second), (second, third)):
            server.script(answer("x", gate=gate))
            asked.append(asyncio.create_task(client.chat_completion(MESSAGES)))
            await server.wait_until(lambda server=server: server.in_flight)  # type: ignore[misc]  # mypy infers no lambda with defaults
            client.api_base = following.api_base
        gate.set()
        await asyncio.gather(*asked)
        await asyncio.gather(*[client.chat_completion(MESSAGES) for _ in range(4)])


async def test_a_key_of_the_environment_stays_when_the_server_changes(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_API_TOKEN", "key-at-the-start")
    async with LLMClient("http://127.0.0.1:1") as client:
        monkeypatch.delenv("LM_API_TOKEN")
        client.api_base = scripted_server.api_base
        await client.chat_completion(MESSAGES)
    assert scripted_server.requests[0].headers["authorization"] == "Bearer key-at-the-start"


async def test_a_get_is_not_sent_again_on_a_fresh_connection(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/v1/models", hang_up())
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        with pytest.raises(LLMConnectionError):
            await client.list_models()
        assert await client.health_check() is False
    assert len(scripted_server.requests) == 2


async def test_a_kept_connection_that_dies_in_a_reply_is_not_replaced_silently(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        await client.chat_completion(MESSAGES)
        scripted_server.script(raw(b"HTTP/1.1 200 OK\r\nContent-Le"))
        with pytest.raises(LLMConnectionError):
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 2


@pytest.mark.parametrize(
    ("key", "behaviour"),
    [
        ("sk+a/secret", reply(401, rb'{"error": "Incorrect API key: sk\u002Ba\/secret"}')),
        ("sk-a-secret", raw(b"sk-a-secret\r\n\r\n")),
        ("sk-a-secret", raw(b"HTTP/1.1 200 OK\r\nsk-a-secret\r\n\r\n")),
    ],
)
async def test_a_key_that_is_repeated_in_other_ways_is_not_shown(
    scripted_server: ScriptedServer, key: str, behaviour: Behaviour
) -> None:
    scripted_server.script(behaviour)
    async with LLMClient(scripted_server.api_base, api_key=key, max_retries=0) as client:
        with pytest.raises(LLMError) as caught:
            await client.chat_completion(MESSAGES)
    assert "secret" not in f"{caught.value} {vars(caught.value)} {caught.value.__cause__!r}"
    assert b"secret" not in pickle.dumps(caught.value)
    assert "[api_key]" in str(caught.value)


@pytest.mark.parametrize("target", ["http://other/#token=secret", "http://user:p@secret@other/v1"])
async def test_no_part_of_a_target_that_may_be_secret_is_named(scripted_server: ScriptedServer, target: str) -> None:
    scripted_server.script(reply(307, b"", {"Location": target}))
    async with LLMClient(scripted_server.api_base) as client:
        with pytest.raises(LLMResponseError, match="http://other/") as caught:
            await client.chat_completion(MESSAGES)
    assert "secret" not in str(caught.value)


async def test_a_mismatch_has_the_body_of_the_reply(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("x", model="other")
    async with LLMClient(scripted_server.api_base, "m", model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.body is not None
    assert '"other"' in caught.value.body


@pytest.mark.parametrize("url", ["http://a..b", "http://..", f"http://{'a' * 70}.com"])
def test_a_host_that_can_be_none_is_refused_when_the_client_is_made(url: str) -> None:
    with pytest.raises(LLMValidationError, match="is not a valid URL"):
        LLMClient(url)
