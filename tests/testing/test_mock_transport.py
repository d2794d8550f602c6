"""MockTransport: a client without a socket, with everything above the socket at work."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from lmbridge import (
    Agent,
    Limits,
    LLMClient,
    LLMClientPool,
    LLMConnectionError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    ModelLoadError,
    TaskCancelledError,
    Timeouts,
    collect,
)
from lmbridge.testing import MockRequest, MockResponse, MockTransport
from tests.support import MESSAGES, cancel_at_each_step, opened, piece, read_text, turns

COMPLETION = {"model": "test-model", "choices": [{"message": {"role": "assistant", "content": "Hello"}}]}
CHUNKS = [piece("Hel"), piece("lo", finish_reason="stop")]


def client_of(handler: Any, **options: Any) -> LLMClient:
    return LLMClient(model="test-model", transport=MockTransport(handler), **options)


async def ask(client: LLMClient) -> str:
    return (await client.chat_completion(MESSAGES))["choices"][0]["message"]["content"] or ""


# Plain replies


async def test_a_dict_is_a_reply_of_status_200() -> None:
    assert await ask(client_of(lambda _: COMPLETION)) == "Hello"


async def test_an_async_handler_is_awaited() -> None:
    async def handler(_: MockRequest) -> dict[str, Any]:
        await asyncio.sleep(0)
        return COMPLETION

    assert await ask(client_of(handler)) == "Hello"


async def test_the_handler_gets_the_request_that_would_go_out() -> None:
    transport = MockTransport(lambda _: COMPLETION, api_base="http://lm.example:1234", api_key="sk-test")
    await ask(LLMClient(model="test-model", transport=transport))
    (request,) = transport.requests
    assert (request.method, request.path) == ("POST", "/v1/chat/completions")
    assert request.url == "http://lm.example:1234/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer sk-test"
    assert request.headers["Content-Type"] == "application/json"
    assert request.json == {"model": "test-model", "messages": MESSAGES}
    assert "sk-test" not in repr(request)


async def test_lists_and_health_checks_reach_the_handler_too() -> None:
    transport = MockTransport(lambda _: {"data": [{"id": "a"}, {"id": "b"}]})
    client = LLMClient(transport=transport)
    assert await client.list_models() == ["a", "b"]
    assert await client.health_check()
    assert [(request.method, request.path, request.json) for request in transport.requests] == [
        ("GET", "/v1/models", None)
    ] * 2


async def test_an_error_status_is_the_error_that_a_server_would_cause() -> None:
    client = client_of(lambda _: MockResponse(400, json={"error": "no such thing"}))
    with pytest.raises(LLMResponseError, match="the server answered 400: no such thing") as caught:
        await ask(client)
    assert caught.value.status == 400
    client = client_of(lambda _: MockResponse(200, json={"error": "Model unloaded"}))
    with pytest.raises(ModelLoadError):
        await ask(client)


async def test_headers_of_the_response_are_read_in_any_case(no_waits: list[float]) -> None:
    client = client_of(lambda _: MockResponse(429, json={"error": "slow down"}, headers={"retry-after": "100"}))
    with pytest.raises(LLMRateLimitError) as caught:
        await ask(client)
    assert caught.value.retry_after == 100


async def test_a_body_can_be_any_text_or_bytes() -> None:
    for body in ("not JSON", b"not JSON"):
        with pytest.raises(LLMResponseError, match="not JSON"):
            await ask(client_of(lambda _, body=body: MockResponse(body=body)))


# Failures and retries


async def test_a_request_is_repeated_as_it_would_be_with_a_server(no_waits: list[float]) -> None:
    answers: Iterator[Any] = iter([MockResponse(503, json={"error": "busy"}), MockResponse(500), COMPLETION])
    client = client_of(lambda _: next(answers))
    assert await ask(client) == "Hello"
    assert len(no_waits) == 2
    assert client.stats().retries == 2


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (ConnectionRefusedError(111, "refused"), "could not connect: Connection refused"),
        (
            ConnectionResetError(104, "reset"),
            "the connection broke before the server answered: Connection reset by peer",
        ),
        (LLMConnectionError("nobody is there"), "nobody is there"),
    ],
)
async def test_a_handler_that_raises_plays_a_failed_connection(
    no_waits: list[float], failure: Exception, text: str
) -> None:
    def handler(_: MockRequest) -> dict[str, Any]:
        raise failure

    with pytest.raises(LLMConnectionError, match=text) as caught:
        await ask(client_of(handler))
    assert caught.value.context["attempts"] == 3
    assert caught.value.context["url"] == "http://llm.test/v1/chat/completions"


async def test_a_handler_that_raises_a_timeout_plays_a_connection_that_takes_too_long(no_waits: list[float]) -> None:
    def handler(_: MockRequest) -> dict[str, Any]:
        raise TimeoutError

    with pytest.raises(LLMTimeoutError, match="could not connect within 5 s") as caught:
        await ask(client_of(handler))
    assert (caught.value.phase, caught.value.context["attempts"]) == ("connect", 1)


async def test_an_error_of_ours_is_raised_at_once(no_waits: list[float]) -> None:
    async def handler(_: MockRequest) -> dict[str, Any]:
        raise ModelLoadError("out of memory")

    with pytest.raises(ModelLoadError, match="out of memory") as caught:
        await ask(client_of(handler))
    assert caught.value.context["attempts"] == 1


async def test_a_failed_assert_in_the_handler_reaches_the_caller() -> None:
    async def handler(request: MockRequest) -> dict[str, Any]:
        assert request.path == "/somewhere/else"
        return COMPLETION

    client = client_of(handler)
    with pytest.raises(AssertionError):
        await ask(client)
    assert client.stats().in_flight == 0


async def test_a_handler_that_never_returns_runs_into_the_time_limit_and_is_cancelled() -> None:
    cancelled: list[bool] = []

    async def handler(_: MockRequest) -> Any:
        try:
            return await asyncio.get_running_loop().create_future()
        finally:
            cancelled.append(True)

    with pytest.raises(LLMTimeoutError) as caught:
        await ask(client_of(handler, timeout=Timeouts(first_byte=0.05)))
    assert caught.value.phase == "first_byte"
    assert cancelled == [True]


@pytest.mark.parametrize("answer", [None, 42, "text", b"bytes"])
async def test_a_value_that_is_not_a_response_is_a_clear_error(answer: Any) -> None:
    with pytest.raises(TypeError, match=r"the handler of a MockTransport returned .* for POST /v1/chat/completions"):
        await ask(client_of(lambda _: answer))


async def test_a_piece_of_a_stream_that_cannot_be_sent_is_a_clear_error() -> None:
    stream = await opened(client_of(lambda _: [piece("a"), 42]))
    with pytest.raises(TypeError, match="consists of dicts, strings and bytes, not of 42"):
        await read_text(stream)


def test_options_are_checked_when_they_are_given() -> None:
    with pytest.raises(LLMValidationError, match="handler must be a function"):
        MockTransport("handler")  # type: ignore[arg-type]  # it is the point of the test
    with pytest.raises(LLMValidationError, match="one of json, body and events"):
        MockResponse(json={}, body="text")


# Streams


def a_list(_: MockRequest) -> list[dict[str, Any]]:
    return CHUNKS


def a_generator(_: MockRequest) -> Iterator[dict[str, Any]]:
    yield from CHUNKS


async def an_async_generator(_: MockRequest) -> AsyncIterator[dict[str, Any]]:
    for chunk in CHUNKS:
        yield chunk


async def a_generator_from_a_coroutine(request: MockRequest) -> AsyncIterator[dict[str, Any]]:
    return an_async_generator(request)


def a_response_with_events(_: MockRequest) -> MockResponse:
    return MockResponse(events=CHUNKS)


@pytest.mark.parametrize(
    "handler", [a_list, a_generator, an_async_generator, a_generator_from_a_coroutine, a_response_with_events]
)
async def test_a_stream_may_come_from_any_iterable(handler: Any) -> None:
    reply = await collect(await opened(client_of(handler)))
    assert reply["choices"][0]["message"]["content"] == "Hello"
    assert reply["choices"][0]["finish_reason"] == "stop"


async def test_text_is_an_event_and_bytes_are_sent_unchanged() -> None:
    events = [
        b": ping\n\nda",
        b'ta: {"choices":[{"delta":{"content":"a"}}]}\n\n',
        '{"choices":[{"delta":{"content":"b"}}]}',
    ]
    assert await read_text(await opened(client_of(lambda _: [*events, "[DONE]"]))) == "ab"


async def test_a_stream_without_its_end_is_cut_off() -> None:
    stream = await opened(client_of(lambda _: MockResponse(events=[piece("a")], done=False)))
    with pytest.raises(LLMStreamError, match="without") as caught:
        await read_text(stream)
    assert caught.value.partial is not None


@pytest.mark.parametrize("failure", [ConnectionResetError(104, "reset"), LLMConnectionError("it broke")])
async def test_a_generator_that_raises_plays_a_connection_that_breaks_in_mid_stream(failure: Exception) -> None:
    def handler(_: MockRequest) -> Iterator[dict[str, Any]]:
        yield piece("a")
        raise failure

    client = client_of(handler)
    with pytest.raises(LLMStreamError, match="the connection broke mid-stream") as caught:
        await read_text(await opened(client))
    assert caught.value.partial["choices"][0]["message"]["content"] == "a"
    assert client.stats().in_flight == 0


async def test_a_failed_assert_in_a_generator_reaches_the_reader() -> None:
    async def handler(_: MockRequest) -> AsyncIterator[dict[str, Any]]:
        yield piece("a")
        raise AssertionError

    with pytest.raises(AssertionError):
        await read_text(await opened(client_of(handler)))


async def test_a_generator_advances_only_when_its_stream_is_read() -> None:
    sent: list[str] = []

    def handler(_: MockRequest) -> Iterator[dict[str, Any]]:
        for text in "abc":
            sent.append(text)
            yield piece(text)

    stream = await opened(client_of(handler))
    await turns(10)
    assert sent == []
    await anext(stream)
    await turns(10)
    assert sent == ["a"]
    await stream.aclose()
    await turns(10)
    assert sent == ["a"]


class Endless:
    """A handler whose stream never ends, and which records that the stream was closed."""

    def __init__(self) -> None:
        self.closed = 0

    async def __call__(self, _: MockRequest) -> AsyncIterator[dict[str, Any]]:
        return self._chunks()

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        try:
            yield piece("a")
            yield piece("b")
            await asyncio.get_running_loop().create_future()
        finally:
            self.closed += 1


@pytest.mark.parametrize("chunks", [1, 2])
async def test_leaving_a_stream_closes_its_generator(chunks: int) -> None:
    handler = Endless()
    client = client_of(handler)
    async with await opened(client) as stream:
        for _ in range(chunks):
            await anext(stream)
    await turns(10)
    assert handler.closed == 1
    assert client.stats().in_flight == 0


async def test_a_reader_that_is_cancelled_in_mid_stream_closes_the_generator() -> None:
    handler = Endless()
    client = client_of(handler)
    reading = asyncio.create_task(collect(await opened(client)))
    await turns(20)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await turns(10)
    assert handler.closed == 1
    assert client.stats().in_flight == 0


async def test_a_stream_that_is_dropped_closes_its_generator() -> None:
    handler = Endless()
    client = client_of(handler)
    stream = await opened(client)
    await anext(stream)
    with pytest.warns(ResourceWarning, match="unclosed stream"):  # noqa: PT031 - the last reference goes in there
        del stream
        gc.collect()
    await turns(10)
    assert handler.closed == 1
    assert client.stats().in_flight == 0


async def test_a_gap_that_is_too_long_is_a_timeout() -> None:
    handler = Endless()
    with pytest.raises(LLMTimeoutError, match="no further event") as caught:
        await read_text(await opened(client_of(handler, timeout=Timeouts(idle=0.05))))
    assert caught.value.phase == "idle"
    await turns(10)
    assert handler.closed == 1


async def test_a_cancel_anywhere_leaves_nothing_behind(no_waits: list[float]) -> None:
    transport: MockTransport
    answers: Iterator[Any]

    async def handler(_: MockRequest) -> Any:
        await asyncio.sleep(0)
        return next(answers)

    async def run() -> None:
        nonlocal answers
        answers = iter([MockResponse(503), an_async_generator(transport.requests[0])])
        await collect(await client.chat_completion(MESSAGES, stream=True))

    async def after() -> None:
        nonlocal answers
        assert (transport.in_flight, transport.queued) == (0, 0)
        answers = iter([COMPLETION])
        assert await ask(client) == "Hello"

    transport = MockTransport(handler, limits=Limits(max_concurrency=1))
    client = LLMClient(model="test-model", transport=transport)
    await after()
    await cancel_at_each_step(run, after, at_least=5)
    await turns(10)
    assert len(asyncio.all_tasks()) == 1


# Closing


async def test_closing_the_transport_cancels_handlers_and_streams() -> None:
    endless = Endless()

    async def handler(request: MockRequest) -> Any:
        if request.json.get("stream"):
            return await endless(request)
        return await asyncio.get_running_loop().create_future()

    transport = MockTransport(handler)
    client = LLMClient(model="test-model", transport=transport)
    stream = await opened(client)
    await anext(stream)
    asked = asyncio.create_task(ask(client))
    await turns(10)
    await transport.close()
    with pytest.raises(TaskCancelledError):
        await asked
    with pytest.raises(TaskCancelledError):
        await read_text(stream)
    assert endless.closed == 1
    assert len(asyncio.all_tasks()) == 1


async def test_a_handler_whose_request_is_cancelled_before_it_has_begun_is_closed() -> None:
    async def handler(_: MockRequest) -> Any:
        raise AssertionError

    transport = MockTransport(handler)
    asked = asyncio.create_task(ask(LLMClient(model="test-model", transport=transport)))
    while not transport.requests:
        await turns(1)
    asked.cancel()
    await asyncio.wait({asked})
    assert asked.cancelled()
    # Python would warn here about a coroutine that was never awaited.
    gc.collect()


async def test_a_client_that_is_closed_leaves_the_transport_usable() -> None:
    transport = MockTransport(lambda _: COMPLETION)
    async with LLMClient(model="test-model", transport=transport) as client:
        await ask(client)
    assert await ask(LLMClient(model="test-model", transport=transport)) == "Hello"


async def test_a_transport_need_not_be_closed() -> None:
    await ask(client_of(lambda _: COMPLETION))
    gc.collect()


def test_a_transport_works_in_one_event_loop_after_the_other() -> None:
    transport = MockTransport(lambda _: COMPLETION)

    async def run() -> str:
        async with transport:
            return await ask(LLMClient(model="test-model", transport=transport))

    assert [asyncio.run(run()) for _ in range(2)] == ["Hello"] * 2


# Many at a time


async def test_limits_hold_for_a_hundred_requests_at_a_time() -> None:
    in_flight = most = 0

    async def handler(request: MockRequest) -> dict[str, Any]:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await turns(3)
        in_flight -= 1
        return {**COMPLETION, "model": request.json["model"]}

    transport = MockTransport(handler, limits=Limits(max_concurrency=3))
    client = LLMClient(transport=transport)
    await asyncio.gather(*(client.chat_completion(MESSAGES, model=f"m{number % 2}") for number in range(100)))
    assert most == 3


async def test_the_first_request_for_a_model_goes_alone() -> None:
    started: list[str] = []
    gate = asyncio.Event()

    async def handler(request: MockRequest) -> AsyncIterator[dict[str, Any]]:
        return chunks(request.json["messages"][0]["content"])

    async def chunks(name: str) -> AsyncIterator[dict[str, Any]]:
        started.append(name)
        await gate.wait()
        yield piece(name, finish_reason="stop")

    transport = MockTransport(handler, limits=Limits(max_loaded_models=1))
    client = LLMClient(model="test-model", transport=transport)
    first = await client.chat_completion([{"role": "user", "content": "a"}], stream=True)
    others = [
        asyncio.create_task(client.chat_completion([{"role": "user", "content": name}], stream=True)) for name in "bc"
    ]
    await turns(10)
    # It is read ahead although nobody reads it.
    assert started == ["a"]
    assert client.stats().queued == 2
    gate.set()
    texts = [await read_text(await other) for other in others]
    assert [await read_text(first), *texts] == ["a", "b", "c"]


async def test_a_pool_works_over_it() -> None:
    transport = MockTransport(lambda request: {**COMPLETION, "model": request.json["model"]})
    async with LLMClientPool(2, transport=transport) as pool:
        for model in ("a", "b"):
            async with pool.client(model) as client:
                assert await ask(client) == "Hello"
    assert [request.json["model"] for request in transport.requests] == ["a", "b"]


async def test_an_agent_works_over_it() -> None:
    def handler(request: MockRequest) -> Any:
        if request.method == "GET":
            # An agent asks for the context length of its model.
            return MockResponse(404)
        if request.json["messages"][-1]["role"] == "tool":
            return [piece(f"It is {request.json['messages'][-1]['content']}.", finish_reason="stop")]
        call = {"index": 0, "id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a":1,"b":2}'}}
        delta = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"}
        return [piece(choices=[delta])]

    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    result = await Agent(client_of(handler), tools=[add]).run("What is 1 + 2?")
    assert result.text == "It is 3."
