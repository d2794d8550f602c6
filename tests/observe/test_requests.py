"""What the observers of a client are told: each event once, on each way on which a request can end."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from lmbridge import (
    Agent,
    Limits,
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
)
from lmbridge.observe import ObservedEvent, Observer, RequestEnded, RequestQueued
from lmbridge.testing import (
    FakeChatClient,
    MockResponse,
    MockTransport,
    ScriptedServer,
    answer,
    reply,
    retry_without_waiting,
    stall,
)
from tests.support import MESSAGES, opened, piece, read_text, turns

ADMITTED = ["RequestQueued", "RequestAdmitted", "AttemptBegun"]


class Recorder:
    """Keeps all events."""

    def __init__(self) -> None:
        # Each test knows the classes of its events.
        self.events: list[Any] = []

    def on_event(self, event: ObservedEvent) -> None:
        self.events.append(event)

    @property
    def names(self) -> list[str]:
        return [type(event).__name__ for event in self.events]

    @property
    def last(self) -> Any:
        return self.events[-1]

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def observed(server: ScriptedServer, recorder: Recorder, **options: Any) -> LLMClient:
    return LLMClient(server.api_base, "test-model", observers=[recorder], **options)


@pytest.mark.parametrize("streams", [False, True])
async def test_an_answer(scripted_server: ScriptedServer, recorder: Recorder, streams: bool) -> None:
    async with observed(scripted_server, recorder) as client:
        if streams:
            await read_text(await client.chat_completion(MESSAGES, stream=True, stream_options={"include_usage": True}))
        else:
            await client.chat_completion(MESSAGES)
    assert recorder.names == [*ADMITTED, "FirstEventArrived", "RequestEnded"]
    queued, end = recorder.events[0], recorder.last
    assert isinstance(queued, RequestQueued)
    assert (queued.operation, queued.model, queued.run_id) == ("chat completion", "test-model", None)
    assert queued.url == f"{scripted_server.api_base}/chat/completions"
    assert (end.outcome, end.status, end.error, end.attempts) == ("answer", 200, None, 1)
    assert (end.prompt_tokens, end.completion_tokens) == (1, 5)
    assert len({event.request_id for event in recorder.events}) == 1
    assert [event.at for event in recorder.events] == sorted(event.at for event in recorder.events)


async def test_an_error_after_retries(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    scripted_server.default = reply(500, {"error": "broken"})
    async with observed(scripted_server, recorder) as client:
        with retry_without_waiting(), pytest.raises(LLMResponseError):
            await client.chat_completion(MESSAGES)
    retried = ["RetryPlanned", "AttemptBegun"]
    assert recorder.names == [*ADMITTED, *retried, *retried, "RequestEnded"]
    assert (recorder.last.outcome, recorder.last.status, recorder.last.attempts) == ("error", 500, 3)


async def test_a_connection_that_fails(recorder: Recorder) -> None:
    async with LLMClient("http://127.0.0.1:1", "m", max_retries=0, observers=[recorder]) as client:
        with pytest.raises(LLMConnectionError):
            await client.chat_completion(MESSAGES)
    assert recorder.names == [*ADMITTED, "RequestEnded"]
    assert (recorder.last.outcome, recorder.last.error) == ("error", "LLMConnectionError")


async def test_a_time_limit(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    scripted_server.default = stall()
    async with observed(scripted_server, recorder, max_retries=0) as client:
        with pytest.raises(LLMTimeoutError):
            await client.chat_completion(MESSAGES, timeout=0.02)
    assert recorder.names == [*ADMITTED, "RequestEnded"]
    assert (recorder.last.outcome, recorder.last.error) == ("error", "LLMTimeoutError")


async def test_a_cancellation(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    scripted_server.default = stall()
    async with observed(scripted_server, recorder) as client:
        task = asyncio.ensure_future(client.chat_completion(MESSAGES))
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert recorder.names == [*ADMITTED, "RequestEnded"]
    assert (recorder.last.outcome, recorder.last.error) == ("cancelled", None)


async def test_a_cancellation_in_the_queue(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    scripted_server.default = stall()
    async with observed(scripted_server, recorder, limits=Limits(max_concurrency=1)) as client:
        tasks = [asyncio.ensure_future(client.chat_completion(MESSAGES)) for _ in range(2)]
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        tasks[1].cancel()
        await turns()
        assert recorder.names == [*ADMITTED[:2], "RequestQueued", "AttemptBegun", "RequestEnded"] or (
            recorder.names == [*ADMITTED, "RequestQueued", "RequestEnded"]
        )
        assert (recorder.last.outcome, recorder.last.attempts) == ("cancelled", 0)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_closing_the_client(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    scripted_server.default = stall()
    client = observed(scripted_server, recorder)
    task = asyncio.ensure_future(client.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    await client.close()
    with pytest.raises(LLMError):
        await task
    assert recorder.names == [*ADMITTED, "RequestEnded"]
    assert recorder.last.outcome == "cancelled"


async def test_a_stream_that_is_left(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    scripted_server.default = stall(after=[piece("Hel")])
    async with observed(scripted_server, recorder) as client, await opened(client) as stream:
        await anext(stream)
        await stream.aclose()
        await stream.aclose()
    assert recorder.names == [*ADMITTED, "FirstEventArrived", "RequestEnded"]
    assert recorder.last.outcome == "cancelled"


async def test_a_stream_that_is_dropped(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    scripted_server.default = stall(after=[piece("Hel")])
    async with observed(scripted_server, recorder) as client:
        streams = [await opened(client)]
        await anext(streams[0])
        with pytest.warns(ResourceWarning):
            streams.clear()
    assert recorder.names == [*ADMITTED, "FirstEventArrived", "RequestEnded"]
    assert recorder.last.outcome == "dropped"


async def test_a_swap_is_reported_by_the_request_that_causes_it(
    scripted_server: ScriptedServer, recorder: Recorder
) -> None:
    async with observed(scripted_server, recorder, limits=Limits(max_loaded_models=1)) as client:
        for model in ("a", "a", "b", "b", "a"):
            await client.chat_completion(MESSAGES, model=model)
    swaps = [event for event in recorder.events if type(event).__name__ == "ModelSwapped"]
    assert [(swap.before, swap.after) for swap in swaps] == [("a", "b"), ("b", "a")]


async def test_questions_need_no_permit(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    async with observed(scripted_server, recorder) as client:
        await client.list_models()
    assert recorder.names == ["RequestQueued", "AttemptBegun", "FirstEventArrived", "RequestEnded"]


async def test_derived_clients_and_calls_have_the_same_observers(recorder: Recorder) -> None:
    transport = MockTransport(lambda _: MockResponse(json={"choices": [{"message": {"content": "Hello"}}]}))
    client = LLMClient(model="m", transport=transport, observers=[recorder])
    await client.with_options(max_retries=1).ask("?")
    await client.chat_completion(MESSAGES, timeout=5)
    await LLMClient(model="m", transport=transport).ask("?")
    assert len(recorder.of(RequestEnded)) == 2


@pytest.mark.parametrize("error", [ZeroDivisionError, asyncio.CancelledError])
async def test_an_observer_that_raises_is_logged_once_and_switched_off(
    scripted_server: ScriptedServer, recorder: Recorder, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    class Broken:
        calls = 0

        def on_event(self, event: ObservedEvent) -> None:
            self.calls += 1
            raise error

    broken = Broken()
    async with LLMClient(scripted_server.api_base, observers=[broken, recorder]) as client:
        with caplog.at_level(logging.ERROR, "lmbridge"):
            await client.ask("?")
            await client.ask("?")
    assert broken.calls == 1
    assert len(caplog.records) == 1
    assert "Broken" in caplog.text
    assert len(recorder.of(RequestEnded)) == 2


@pytest.mark.parametrize("observers", [Recorder(), [object()], [Recorder], "x", 3])
def test_something_else_than_observers_is_refused(observers: Any) -> None:
    with pytest.raises(LLMValidationError, match="on_event"):
        LLMClient(observers=observers)


class AsyncObserver:
    """An observer whose method would never be awaited."""

    async def on_event(self, event: ObservedEvent) -> None: ...


class AsyncPropagator(Recorder):
    async def trace_context(self, request_id: int | None) -> dict[str, str]:
        return {}


@pytest.mark.parametrize(("observer", "method"), [(AsyncObserver(), "on_event"), (AsyncPropagator(), "trace_context")])
def test_a_method_that_would_have_to_be_awaited_is_refused(observer: Any, method: str) -> None:
    for kind in (lambda: LLMClient(observers=[observer]), lambda: Agent(FakeChatClient([]), observers=[observer])):
        with pytest.raises(LLMValidationError, match=f"{method} of the observer .* must not be a coroutine function"):
            kind()


def test_the_interface_is_a_protocol() -> None:
    assert isinstance(Recorder(), Observer)


async def test_a_failing_request_of_a_mock_has_all_its_events(recorder: Recorder) -> None:
    def handler(_: Any) -> Any:
        raise AssertionError

    client = LLMClient(model="m", transport=MockTransport(handler), observers=[recorder])
    with pytest.raises(AssertionError):
        await client.ask("?")
    assert recorder.names == [*ADMITTED, "RequestEnded"]
    assert recorder.last.error == "AssertionError"


async def test_a_request_without_observers_has_no_watch(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base) as client, await opened(client) as stream:
        assert stream._events.call.watch is None


async def test_an_answer_that_was_read_ahead_begins_once(scripted_server: ScriptedServer, recorder: Recorder) -> None:
    scripted_server.default = answer("Hello")
    async with observed(scripted_server, recorder, limits=Limits(max_loaded_models=1)) as client:
        await read_text(await opened(client))
    assert recorder.names == [*ADMITTED, "FirstEventArrived", "RequestEnded"]
