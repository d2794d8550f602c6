"""The events about a prompt that is processed and a model that is loaded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import Agent, LLMClient, ModelLoading, PromptProgress
from lmbridge.observe import FirstEventArrived, ModelLoadProgressed, ObservedEvent, PromptProgressed, RequestQueued
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply, sse
from tests.agent.support import collect_events, our_tasks, sent
from tests.observe.test_requests import Recorder, recorder
from tests.support import piece

__all__ = ["recorder"]


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        yield client


def with_progress(*steps: tuple[int, int, int]) -> Behaviour:
    """Returns a streamed answer that begins with the progress of its prompt, as llama.cpp sends it."""
    start = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]}
    chunks = [
        {**start, "prompt_progress": {"processed": processed, "total": total, "cache": cached, "time_ms": 1}}
        for processed, total, cached in steps
    ]
    return sse(*chunks, piece("Hello."), piece(finish_reason="stop"), done=True)


def llama_cpp(server: ScriptedServer, status: str | None = None) -> None:
    """Makes a server answer like llama.cpp, or like its router if there is a status of the model."""
    entry: dict[str, Any] = {"id": "test-model", "owned_by": "llamacpp"}
    if status is not None:
        entry["status"] = {"value": status}
    server.on_path("/v1/models", reply(200, {"data": [entry]}))
    server.on_path("/props", reply(200, {"total_slots": 1}))


async def test_a_listener_gets_the_progress_of_the_prompt(scripted_server: ScriptedServer, client: LLMClient) -> None:
    llama_cpp(scripted_server)
    scripted_server.script(with_progress((0, 721, 0), (512, 721, 0), (721, 721, 0)))
    events = await collect_events(Agent(client))
    assert [event for event in events if isinstance(event, PromptProgress)] == [
        PromptProgress(0, 721, 0),
        PromptProgress(512, 721, 0),
        PromptProgress(721, 721, 0),
    ]
    assert events[-1].result.text == "Hello."
    assert sent(scripted_server)["return_progress"] is True


async def test_nothing_is_asked_for_without_a_listener_or_of_another_server(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    await collect_events(Agent(client))
    assert "return_progress" not in sent(scripted_server)
    llama_cpp(scripted_server)
    await Agent(client).run("Hi.")
    assert "return_progress" not in sent(scripted_server)


async def test_a_load_that_a_run_waits_for_is_reported(scripted_server: ScriptedServer, client: LLMClient) -> None:
    llama_cpp(scripted_server, "unloaded")
    reported = asyncio.Event()
    progress = {"stages": ["text_model"], "current": "text_model", "value": 0.5}
    loading = {"model": "test-model", "event": "status_change", "data": {"status": "loading", "progress": progress}}

    async def answer_after_load(exchange: Exchange) -> None:
        await reported.wait()
        llama_cpp(scripted_server, "loaded")
        await answer("Hello.")(exchange)

    scripted_server.on_path("/models/sse", sse({**loading, "model": "other"}, loading, loading))
    scripted_server.script(answer_after_load, answer("Again."))
    agent, seen = Agent(client), []
    async for event in agent.stream("Hi."):
        if isinstance(event, ModelLoading):
            seen.append(event)
            if event.fraction is not None:
                reported.set()
    assert seen == [ModelLoading("test-model", None), ModelLoading("test-model", 0.5)]
    assert not [event for event in await collect_events(agent) if isinstance(event, ModelLoading)]


@pytest.mark.parametrize("watched", [reply(404), sse(end=False)], ids=["no events", "broken events"])
async def test_a_run_does_not_depend_on_the_events_of_the_router(
    scripted_server: ScriptedServer, client: LLMClient, watched: Behaviour
) -> None:
    llama_cpp(scripted_server, "unloaded")
    scripted_server.on_path("/models/sse", watched)
    events = await collect_events(Agent(client))
    assert events[-1].result.text == "Hello from the scripted server."


async def test_a_run_that_is_cancelled_while_a_model_loads_leaves_nothing_behind(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    llama_cpp(scripted_server, "unloaded")

    async def wait(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(b": nothing yet\n\n")
        await exchange.client_left()

    scripted_server.on_path("/models/sse", wait)
    scripted_server.script(wait)
    handle = Agent(client).start("Hi.")
    events = handle.events()
    reading = asyncio.create_task(anext_of_kind(events))
    assert await reading == ModelLoading("test-model", None)
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    handle.cancel()
    await scripted_server.wait_until(lambda: not scripted_server.in_flight)
    await asyncio.wait([*our_tasks(), reading])
    assert not [task for task in asyncio.all_tasks() if "_report_loading" in repr(task)]


# Observers


class AwaitedRecorder(Recorder):
    """A recorder whose events can be awaited."""

    def __init__(self) -> None:
        super().__init__()
        self._changed = asyncio.Event()

    def on_event(self, event: ObservedEvent) -> None:
        super().on_event(event)
        self._changed.set()

    async def wait_for(self, kind: type[Any], count: int) -> None:
        while len(self.of(kind)) < count:
            self._changed.clear()
            await self._changed.wait()


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_observer_gets_the_progress_of_the_prompt_once(
    scripted_server: ScriptedServer, recorder: Recorder, is_streamed: bool
) -> None:
    llama_cpp(scripted_server)
    scripted_server.script(with_progress((0, 721, 100), (721, 721, 100)))
    async with LLMClient(scripted_server.api_base, "test-model", observers=[recorder]) as client:
        agent = Agent(client, observers=[recorder])
        if is_streamed:
            events = await collect_events(agent)
            assert [event for event in events if isinstance(event, PromptProgress)] == [
                PromptProgress(0, 721, 100),
                PromptProgress(721, 721, 100),
            ]
        else:
            assert (await agent.run("Hi.")).text == "Hello."
    assert sent(scripted_server)["return_progress"] is True
    seen = recorder.of(PromptProgressed)
    assert [(each.processed, each.total, each.cached) for each in seen] == [(0, 721, 100), (721, 721, 100)]
    assert {each.run_id for each in seen} == {recorder.last.run_id}
    assert recorder.names.index("RoundBegun") < recorder.names.index("PromptProgressed")


def first_events(recorder: Recorder) -> list[FirstEventArrived]:
    """Returns the events that say that the reply to the chat completion has begun."""
    [queued] = [each for each in recorder.of(RequestQueued) if each.operation == "chat completion"]
    return [each for each in recorder.of(FirstEventArrived) if each.request_id == queued.request_id]


async def test_the_progress_of_a_prompt_is_not_the_first_event_of_a_reply(scripted_server: ScriptedServer) -> None:
    llama_cpp(scripted_server)
    recorder = AwaitedRecorder()
    had_begun: list[bool] = []

    async def answer_in_pieces(exchange: Exchange) -> None:
        for number, processed in enumerate((0, 512), 1):
            progress = {"processed": processed, "total": 512, "cache": 0, "time_ms": 1}
            await exchange.chunk({**piece(), "prompt_progress": progress})
            await recorder.wait_for(PromptProgressed, number)
            had_begun.append(bool(first_events(recorder)))
        await exchange.send(b"".join(map(as_event, (piece("Hello."), piece(finish_reason="stop")))))

    scripted_server.script(answer_in_pieces)
    async with LLMClient(scripted_server.api_base, "test-model", observers=[recorder]) as client:
        assert (await Agent(client, observers=[recorder]).run("Hi.")).text == "Hello."
    assert had_begun == [False, False]
    assert len(first_events(recorder)) == 1


async def test_a_reply_that_arrives_together_with_its_progress_has_begun(
    scripted_server: ScriptedServer, recorder: Recorder
) -> None:
    llama_cpp(scripted_server)
    progress = {**piece(), "prompt_progress": {"processed": 9, "total": 9, "cache": 0}}
    events = (progress, piece("Hello."), piece(finish_reason="stop"))
    scripted_server.script(sse(b"".join(map(as_event, events)), done=True))
    async with LLMClient(scripted_server.api_base, "test-model", observers=[recorder]) as client:
        assert (await Agent(client, observers=[recorder]).run("Hi.")).text == "Hello."
    assert len(first_events(recorder)) == len(recorder.of(PromptProgressed)) == 1


def as_event(chunk: Mapping[str, Any]) -> bytes:
    """Returns a chunk as it is sent."""
    return f"data: {json.dumps(chunk)}\n\n".encode()


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_an_observer_gets_the_load_of_a_model_once(scripted_server: ScriptedServer, is_streamed: bool) -> None:
    llama_cpp(scripted_server, "unloaded")
    recorder = AwaitedRecorder()
    loading = {"model": "test-model", "event": "status_change", "data": {"status": "loaded"}}
    scripted_server.on_path("/models/sse", sse(loading, loading))

    async def answer_after_load(exchange: Exchange) -> None:
        await recorder.wait_for(ModelLoadProgressed, 2)
        llama_cpp(scripted_server, "loaded")
        await answer("Hello.")(exchange)

    scripted_server.script(answer_after_load, answer("Again."))
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        agent = Agent(client, observers=[recorder])
        for _ in range(2):
            await (collect_events(agent) if is_streamed else agent.run("Hi."))
    seen = recorder.of(ModelLoadProgressed)
    assert [(each.model, each.fraction) for each in seen] == [("test-model", None), ("test-model", 1.0)]


async def test_an_observer_of_the_client_alone_does_not_ask_for_progress(
    scripted_server: ScriptedServer, recorder: Recorder
) -> None:
    llama_cpp(scripted_server, "unloaded")
    async with LLMClient(scripted_server.api_base, "test-model", observers=[recorder]) as client:
        await Agent(client).run("Hi.")
    assert "return_progress" not in sent(scripted_server)
    assert "/models/sse" not in [request.path for request in scripted_server.requests]


async def anext_of_kind(events: Any) -> ModelLoading:
    """Returns the first event about a load."""
    async for event in events:
        if isinstance(event, ModelLoading):
            return event
    raise AssertionError("no event about a load")
