"""The error for a missing model suggests close matches, from a list that one more request gets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any

import pytest

from lmbridge import LLMClient, ModelNotFoundError, Transport
from lmbridge.client import api_requests, model_lists
from lmbridge.testing import MockRequest, MockTransport, ScriptedServer, reply, sse, stall
from tests.support import MESSAGES, cancel_at_each_step, in_flight, piece

MISSING = {"error": {"message": "model 'qwen3-4' not found", "code": 404}}
NOT_FOUND = reply(404, MISSING)
FAILED_RESPONSE = b'event: response.failed\ndata: {"type": "response.failed", "response": {"error": %b}}\n\n' % (
    b'{"code": "model_not_found", "message": "model \'qwen3-4\' not found"}'
)
CLOSE_MATCH = "model 'qwen3-4' not found (did you mean 'qwen3-4b'?); the server has: qwen3-4b, phi-4"

Calling = Callable[[LLMClient], Awaitable[Any]]


@pytest.fixture
def server(scripted_server: ScriptedServer) -> ScriptedServer:
    scripted_server.models = ["qwen3-4b", "phi-4"]
    return scripted_server


@pytest.fixture
def client(server: ScriptedServer, client: LLMClient) -> LLMClient:
    server.script(NOT_FOUND)
    return client.with_options(model="qwen3-4")


async def read(opening: Awaitable[AsyncIterable[Any]]) -> None:
    async for _ in await opening:
        pass


async def error_of(calling: Awaitable[Any]) -> ModelNotFoundError:
    with pytest.raises(ModelNotFoundError) as caught:
        await calling
    return caught.value


def look_ups(server: ScriptedServer) -> int:
    return [request.path for request in server.requests].count("/v1/models")


CALLS: dict[str, Calling] = {
    "chat": lambda client: client.chat_completion(MESSAGES),
    "chat, streamed": lambda client: client.chat_completion(MESSAGES, stream=True),
    "chat, with a timeout": lambda client: client.chat_completion(MESSAGES, timeout=None),
    "ask": lambda client: client.ask("?"),
    "parse": lambda client: client.parse(MESSAGES, list[int]),
    "raw": lambda client: client.with_raw_response.chat_completion(MESSAGES),
    "text": lambda client: client.text_completion("Once"),
    "text, streamed": lambda client: client.text_completion("Once", stream=True),
    "embeddings": lambda client: client.embeddings("cat"),
    "response": lambda client: client.create_response("Hello"),
    "response, streamed": lambda client: client.create_response("Hello", stream=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_every_endpoint_suggests_close_matches(client: LLMClient, server: ScriptedServer, call: Calling) -> None:
    error = await error_of(call(client))
    assert (error.message, error.available_models) == (CLOSE_MATCH, ["qwen3-4b", "phi-4"])
    assert (error.status, error.args[0]) == (404, error.message)
    assert (look_ups(server), in_flight(client)) == (1, 0)


STREAMS: dict[str, tuple[Any, Calling]] = {
    "chat": (sse(MISSING), lambda client: read(client.chat_completion(MESSAGES, stream=True))),
    "chat, after a chunk": (
        sse(piece("Hel"), piece("lo"), MISSING),
        lambda client: read(client.chat_completion(MESSAGES, stream=True)),
    ),
    "text": (sse(MISSING), lambda client: read(client.text_completion("Once", stream=True))),
    "response": (sse(FAILED_RESPONSE), lambda client: read(client.create_response("Hello", stream=True))),
}


@pytest.mark.parametrize(("events", "call"), STREAMS.values(), ids=STREAMS)
async def test_an_error_inside_a_stream_suggests_close_matches(
    server: ScriptedServer, events: Any, call: Calling
) -> None:
    server.script(events)
    async with LLMClient(server.api_base, "qwen3-4") as client:
        error = await error_of(call(client))
    assert error.message == CLOSE_MATCH


async def test_a_stream_that_is_read_again_raises_the_same_error_without_another_look_up(
    server: ScriptedServer,
) -> None:
    server.script(sse(MISSING))
    async with LLMClient(server.api_base, "qwen3-4") as client:
        stream = await client.chat_completion(MESSAGES, stream=True)
        assert await error_of(anext(stream)) is await error_of(anext(stream))
    assert look_ups(server) == 1


async def test_a_model_to_load_is_compared_with_the_downloaded_models(
    server: ScriptedServer, client: LLMClient
) -> None:
    models = [{"type": "llm", "key": "qwen3-4b-2507", "loaded_instances": []}]
    server.on_path("/api/v1/models", reply(200, {"models": models}))
    server.on_path("/api/v1/models/load", reply(404, MISSING))
    error = await error_of(client.lmstudio.load("qwen3-4"))
    assert error.available_models == ["qwen3-4b-2507"]


async def test_the_models_in_the_message_of_the_server_remain(server: ScriptedServer, client: LLMClient) -> None:
    text = 'Invalid model identifier "x". Please specify a valid downloaded model (e.g., qwen3-14b, phi-4, ...).'
    server.script(reply(400, {"error": text}), reply(400, {"error": text}))
    await error_of(client.chat_completion(MESSAGES))
    assert (await error_of(client.chat_completion(MESSAGES))).available_models == ["qwen3-14b", "phi-4", "qwen3-4b"]


FAILURES: dict[str, Any] = {
    "error": reply(500, {"error": "no"}),
    "refused": reply(401, {"error": "no"}),
    "not JSON": reply(200, b"<html>"),
    "no models": reply(200, {"data": []}),
    "too long": reply(200, {"data": [{"id": "x" * 5000}]}),
    "silent": stall(),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
async def test_a_failed_look_up_does_not_hide_the_error(
    server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch, failure: Any, stream: bool
) -> None:
    monkeypatch.setattr(model_lists, "LOOK_UP_SECONDS", 0.05)
    monkeypatch.setattr(api_requests, "PROBE_BYTES", 4000)
    server.on_path("/v1/models", failure)
    error = await error_of(client.chat_completion(MESSAGES, stream=stream))
    assert (error.message, error.available_models) == ("model 'qwen3-4' not found", [])
    assert error.hint == "list_models() returns the models that the server has"


async def test_the_handler_of_a_mock_transport_does_not_need_a_list_of_models() -> None:
    def handler(request: MockRequest) -> Any:
        assert request.path == "/v1/chat/completions"
        return {"error": {"message": "model 'qwen3-4' not found"}}

    error = await error_of(LLMClient(transport=MockTransport(handler)).chat_completion(MESSAGES))
    assert error.message == "model 'qwen3-4' not found"


@pytest.mark.parametrize("events", [NOT_FOUND, sse(piece("Hel"), MISSING)], ids=["status", "event"])
async def test_a_caller_that_is_cancelled_during_the_look_up_gets_its_cancellation(
    server: ScriptedServer, events: Any
) -> None:
    async with LLMClient(server.api_base, "qwen3-4") as client:

        async def run() -> None:
            server.script(events)
            await error_of(read(client.chat_completion(MESSAGES, stream=True)))

        async def check() -> None:
            assert in_flight(client) == 0

        await cancel_at_each_step(run, check, at_least=2)


async def test_a_client_that_is_closed_during_the_look_up_stays_closed(
    server: ScriptedServer, client: LLMClient
) -> None:
    asked = asyncio.Event()

    async def silent(exchange: Any) -> None:
        asked.set()
        await stall()(exchange)

    server.on_path("/v1/models", silent)
    running = asyncio.create_task(client.chat_completion(MESSAGES))
    await asyncio.wait_for(asked.wait(), 5)
    await client._server.transport.close()
    assert (await error_of(running)).available_models == []
    assert client._server.transport.closing is None


async def test_a_stream_of_a_closed_client_looks_nothing_up(server: ScriptedServer) -> None:
    transport = Transport(server.api_base)
    client = LLMClient(model="qwen3-4", transport=transport)
    error = ModelNotFoundError("qwen3-4", context={"url": f"{server.api_base}/chat/completions"})
    await client._server.complete_error(error)
    assert (server.requests, transport.closing) == ([], None)


async def test_the_list_of_another_server_is_not_used(server: ScriptedServer, client: LLMClient) -> None:
    await client.list_models()
    error = ModelNotFoundError("qwen3-4", context={"url": "http://127.0.0.1:1/v1/chat/completions"})
    await client._server.complete_error(error)
    assert error.available_models == []


async def test_a_model_that_is_listed_all_the_same_is_not_suggested(server: ScriptedServer, client: LLMClient) -> None:
    server.models = ["qwen3-4", "qwen3-4b"]
    error = await error_of(client.chat_completion(MESSAGES))
    assert error.message == "model 'qwen3-4' not found, although the server lists it; the server has: qwen3-4, qwen3-4b"


async def test_a_long_list_is_shortened_in_the_text_and_complete_in_the_attribute(
    server: ScriptedServer, client: LLMClient
) -> None:
    server.models = [f"model-{number}" for number in range(3000)] + ["x" * 10_000, "qwen3-4b"]
    error = await error_of(client.chat_completion(MESSAGES))
    assert "(did you mean 'qwen3-4b'?)" in error.message
    assert error.message.endswith("model-18, model-19 and 2982 more")
    assert len(error.available_models) == 3002
