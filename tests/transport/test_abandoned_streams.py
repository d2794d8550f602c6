"""Streams that are dropped, or whose reader is stopped: the connection is closed and the permit returned."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from typing import Any

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMError,
)
from lmbridge.testing import Exchange, MockRequest, MockTransport, ScriptedServer, stall
from tests.support import HALF, MESSAGES, in_flight, opened, turns


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
async def test_break_and_drop_closes_the_connection_even_if_warnings_are_errors(
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("ending", ["nothing", "aclose", "client.close", "both"])
@pytest.mark.parametrize("turns_before_close", range(6))
def test_asyncio_never_logs_the_exception_of_a_stream_that_nobody_reads(ending: str, turns_before_close: int) -> None:
    """Whenever the connection breaks, the stream or the client is closed, and the event loop ends."""

    async def handler(_: MockRequest) -> Any:
        async def events() -> AsyncIterator[bytes]:
            await broken.wait()
            yield b": ping\n\n"
            raise ConnectionResetError

        broken = asyncio.Event()
        asyncio.get_running_loop().call_later(0, broken.set)
        return events()

    async def main(turns_before_end: int) -> None:
        limits = Limits(max_loaded_models=1)
        client = LLMClient(model="m", transport=MockTransport(handler, limits=limits))
        stream = await opened(client)
        await turns(turns_before_close)
        closing = [asyncio.ensure_future(client.close())] if ending in ("client.close", "both") else []
        if ending in ("aclose", "both"):
            await stream.aclose()
        await turns(turns_before_end)
        kept.extend([client, stream, *closing])

    for turns_before_end in range(6):
        reports: list[str] = []
        kept: list[object] = []
        loop = asyncio.new_event_loop()
        loop.set_exception_handler(lambda _, context, reports=reports: reports.append(context["message"]))  # type: ignore[misc]  # a default for each loop
        loop.run_until_complete(main(turns_before_end))
        loop.close()
        kept.clear()
        gc.collect()
        assert not [report for report in reports if "never retrieved" in report]


@pytest.mark.parametrize("is_forwarded", [False, True])
def test_a_stream_can_be_dropped_while_another_thread_closes_its_loop(
    is_forwarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def events() -> AsyncIterator[Any]:
        yield HALF[0]
        await asyncio.Event().wait()

    async def open_stream() -> object:
        if not is_forwarded:
            return await opened(client)
        build = client._server.build_post
        return await transport.forward(build("chat completion", "/chat/completions", {"stream": True}, "m"))

    def is_closing(*_: object) -> None:
        raise RuntimeError("Event loop is closed")

    transport = MockTransport(lambda _: events())
    client = LLMClient(model="m", transport=transport)
    loop = asyncio.new_event_loop()
    references = [loop.run_until_complete(open_stream())]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "call_soon_threadsafe", is_closing)
        # An exception in `__del__` would fail the test.
        with pytest.warns(ResourceWarning, match="unclosed"):
            references.clear()
    loop.run_until_complete(transport.close())
    loop.close()


async def test_reading_again_after_an_abandoned_read_is_an_error(
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


async def test_an_abandoned_read_closes_the_connection(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    await anext(stream)
    await anext(stream)
    read = stream.__anext__()
    read.send(None)  # into its wait
    read.close()
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_a_cancel_before_a_stream_is_recognized_closes_the_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def head_only(exchange: Exchange) -> None:
        await exchange.start(content_type="text/plain")
        started.set()
        await exchange.client_left()

    started = asyncio.Event()
    scripted_server.script(head_only)
    asked = asyncio.create_task(opened(client))
    await started.wait()
    await asyncio.sleep(0.05)  # until the client has read the head
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)
