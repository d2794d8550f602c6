"""Models of LangChain, pydantic-ai and openai-agents on an `LLMClient`, with the real frameworks."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

import pytest

from lmbridge import ContextLengthExceededError, LLMClient, LLMError, LLMStreamError, Timeouts
from lmbridge.testing import Behaviour, ScriptedServer, answer, reply, sse, stall
from tests.interop.frameworks import City, Framework, add
from tests.support import HALF, in_flight

pytestmark = [
    # Importing the frameworks takes seconds.
    pytest.mark.slow,
    # What the frameworks and their libraries deprecate is not ours.
    pytest.mark.filterwarnings("default"),
]

TOO_LONG = {"error": {"message": "the request exceeds the available context size", "type": "exceed_context_size_error"}}


def call(name: str, arguments: dict[str, Any]) -> Behaviour:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return answer("", tool_calls=[{"id": "call_1", "type": "function", "function": function}])


async def test_an_answer(framework: Framework, client: LLMClient, scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("Hello there")
    assert await framework.ask(client, "Say hello.") == "Hello there"
    request = scripted_server.requests[-1]
    assert request.json["model"] == "test-model"
    assert request.json["messages"] == [{"role": "user", "content": "Say hello."}]
    assert request.headers["User-Agent"].startswith("lmbridge/")
    assert not [name for name in request.headers if name.lower().startswith(("x-stainless", "openai", "authorization"))]


async def test_a_stream_arrives_piece_by_piece(
    framework: Framework, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer("Hello there you", gate=gate)
    pieces = []
    async with aclosing(framework.stream(client, "Say hello.")) as stream:
        async for piece in stream:
            pieces.append(piece)
            # The server holds the rest back until the first piece has arrived.
            gate.set()
    assert pieces == ["Hello", " there", " you"]


async def test_tools_are_called_and_the_model_gets_the_result(
    framework: Framework, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    scripted_server.script(call("add", {"a": 2, "b": 3}), answer("It is 5."))
    assert await framework.ask(client, "What is 2 + 3?", [add]) == "It is 5."
    first, second = (request.json for request in scripted_server.requests)
    assert first["tools"][0]["function"]["name"] == "add"
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "tool"]
    result = second["messages"][2]
    # LangChain adds the name of the tool.
    result.pop("name", None)
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "5"}


async def test_structured_output(framework: Framework, client: LLMClient, scripted_server: ScriptedServer) -> None:
    city = {"name": "Oslo", "country": "Norway"}

    async def answer_as_asked(exchange: Any) -> None:
        tools = exchange.request.json.get("tools")
        if tools:
            await call(tools[0]["function"]["name"], city)(exchange)
        else:
            assert exchange.request.json["response_format"]["type"] == "json_schema"
            await answer(json.dumps(city))(exchange)

    scripted_server.default = answer_as_asked
    assert await framework.city(client, "Where?") == City(name="Oslo", country="Norway")


def cause_of(error: BaseException) -> LLMError:
    """Returns the error of lmbridge behind an error of a framework."""
    current: BaseException | None = error
    while current is not None and not isinstance(current, LLMError):
        current = current.__cause__
    assert isinstance(current, LLMError)
    return current


@pytest.mark.parametrize(
    ("behaviour", "place"),
    [(reply(400, TOO_LONG), 0), (reply(429, {"error": "slow"}), 1), (reply(401, {"error": "no"}), 2)],
    ids=["context", "429", "401"],
)
async def test_an_error_of_the_server_is_the_frameworks_own(
    framework: Framework, client: LLMClient, scripted_server: ScriptedServer, behaviour: Behaviour, place: int
) -> None:
    scripted_server.default = behaviour
    with pytest.raises(framework.error(place)) as caught:
        await framework.ask(client, "Hello?")
    assert cause_of(caught.value).status in {400, 401, 429}
    assert len(scripted_server.requests) == 1
    if place == 0:
        assert type(cause_of(caught.value)) is ContextLengthExceededError


async def test_a_time_limit_is_the_frameworks_own_error(framework: Framework, scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall()
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.05), max_retries=0) as client:
        with pytest.raises(framework.error(3)):
            await framework.ask(client, "Hello?")
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_half_an_answer_is_an_error_and_not_an_answer(
    framework: Framework, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    scripted_server.default = sse(*HALF)
    pieces: list[str] = []

    async def read() -> None:
        async for piece in framework.stream(client, "Hello?"):
            pieces.append(piece)  # noqa: PERF401 - what arrives before the error is kept

    with pytest.raises(framework.error(4)) as caught:
        await read()
    assert pieces == ["Hel", "lo"]
    error = cause_of(caught.value)
    assert type(error) is LLMStreamError
    assert error.partial["choices"][0]["message"]["content"] == "Hello"


async def test_cancelling_a_request_reaches_the_server(
    framework: Framework, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    scripted_server.default = stall()
    task = asyncio.create_task(framework.ask(client, "Hello?"))
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert in_flight(client) == 0


async def test_cancelling_the_reader_of_a_stream_reaches_the_server(
    framework: Framework, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    scripted_server.default = stall(after=HALF)
    begun = asyncio.Event()

    async def read() -> None:
        async for _ in framework.stream(client, "Hello?"):
            begun.set()

    task = asyncio.create_task(read())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert in_flight(client) == 0


async def test_leaving_a_stream_reaches_the_server(
    framework: Framework, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    scripted_server.default = stall(after=HALF)
    async with aclosing(framework.stream(client, "Hello?")) as stream:
        async for _ in stream:
            break
    await scripted_server.wait_until(lambda: scripted_server.aborts)
