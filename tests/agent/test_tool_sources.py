"""Tools that are opened for each run with `open_tools`, and closed when it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from types import TracebackType
from typing import Any

import pytest

from lmbridge import (
    Agent,
    LLMClient,
    LLMError,
    LLMValidationError,
    RunInfo,
    RunTools,
    TaskCancelledError,
    Tool,
    ToolContext,
    ToolError,
)
from lmbridge.testing import ScriptedServer, answer, reply
from tests.agent.support import add, asks, calls, generations, sent, tool_texts


@asynccontextmanager
async def open_incompletely(_run: RunInfo) -> AsyncIterator[RunTools]:
    """Opens no tools, because the only source of tools is missing."""
    yield RunTools(note="Something is missing.", errors={"source": OSError("it is not there")})


def opens(*tools: Any) -> Callable[[RunInfo], AbstractAsyncContextManager[RunTools]]:
    """Returns an `open_tools` that gives the same tools to every run."""

    @asynccontextmanager
    async def open_tools(_run: RunInfo) -> AsyncIterator[RunTools]:
        yield RunTools(tools=tools)

    return open_tools


def offered(server: ScriptedServer) -> list[str]:
    """The names of the tools that the last request offered."""
    return [tool["function"]["name"] for tool in sent(server).get("tools", ())]


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers."""
    return a * b


async def test_tools_that_were_opened_are_offered_beside_the_fixed_ones_and_can_be_called(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("multiply", a=6, b=7)), answer("42"))
    result = await Agent(client, tools=[add], open_tools=opens(multiply)).run("Go.")
    assert offered(scripted_server) == ["add", "multiply"]
    assert tool_texts(result.messages) == ["42"]


async def test_a_run_replaces_the_agents_tools_and_its_opened_tools_separately(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    agent = Agent(client, tools=[add], open_tools=opens(multiply))
    await agent.run("Go.", tools=[])
    assert offered(scripted_server) == ["multiply"]
    await agent.run("Go.", open_tools=opens())
    assert offered(scripted_server) == ["add"]


async def test_a_provider_may_be_among_the_tools_that_were_opened(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    class Provider:
        async def list_tools(self) -> list[Tool]:
            return [Tool.from_function(multiply)]

    await Agent(client).run("Go.", open_tools=opens(Provider()))
    assert offered(scripted_server) == ["multiply"]


async def test_open_tools_gets_the_id_the_model_and_the_context_length_of_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    runs: list[RunInfo] = []
    ids: list[str] = []

    def note_id(context: ToolContext) -> None:
        """Notes the id of the run."""
        ids.append(context.run_id)

    @asynccontextmanager
    async def open_tools(run: RunInfo) -> AsyncIterator[RunTools]:
        runs.append(run)
        yield RunTools(tools=[note_id])

    scripted_server.script(calls(asks("note_id")), answer("done"))
    agent = Agent(client, open_tools=open_tools)
    await agent.run("Go.", model="other")
    context_length = await agent._source.context_length("other")
    assert runs == [RunInfo(run_id=ids[0], model="other", context_length=context_length)]


async def test_missing_tools_are_in_the_result_and_in_the_system_message(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    handle = Agent(client).start("Go.", open_tools=open_incompletely)
    await handle.wait_begun()
    assert not handle.done
    result = await handle.result()
    await handle.wait_begun()
    assert str(result.errors["source"]) == "it is not there"
    assert sent(scripted_server)["messages"][0] == {"role": "system", "content": "Something is missing."}


async def test_the_error_of_a_run_names_the_tools_that_were_missing(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = reply(400, {"error": "no such thing"})
    with pytest.raises(LLMError) as caught:
        await Agent(client, open_tools=open_incompletely).run("Go.")
    assert list(caught.value.partial.errors) == ["source"]


async def test_tools_stay_open_until_the_run_ends_and_are_closed_however_it_ends(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    log: list[str] = []

    @asynccontextmanager
    async def open_tools(_run: RunInfo) -> AsyncIterator[RunTools]:
        log.append("opened")
        try:
            yield RunTools()
        finally:
            await asyncio.sleep(0)
            log.append(f"closed after {len(generations(scripted_server))}")

    scripted_server.script(answer("one"), answer("two", gate=asyncio.Event()), reply(400, {"error": "no"}))
    agent = Agent(client, open_tools=open_tools)
    await agent.run("Go.")
    handle = agent.start("Go.")
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    handle.cancel()
    with pytest.raises(TaskCancelledError):
        await handle.result()
    with pytest.raises(LLMError):
        await agent.run("Go.")
    assert log == ["opened", "closed after 1", "opened", "closed after 2", "opened", "closed after 3"]


async def test_a_run_that_is_not_admitted_opens_no_tools(scripted_server: ScriptedServer, client: LLMClient) -> None:
    opened: list[str | None] = []

    @asynccontextmanager
    async def open_tools(run: RunInfo) -> AsyncIterator[RunTools]:
        opened.append(run.model)
        yield RunTools()

    scripted_server.script(answer("one", gate=asyncio.Event()))
    agent = Agent(client, open_tools=open_tools, switch_policy="drain")
    first = agent.start("Go.", model="a")
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    second = agent.start("Go.", model="b")
    await asyncio.sleep(0)
    await second.aclose()
    await first.aclose()
    assert opened == ["a"]


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [(OSError("no route"), ToolError, "open_tools raised OSError: no route"), (ToolError("mine"), ToolError, "mine")],
)
async def test_an_error_of_open_tools_ends_the_run(
    scripted_server: ScriptedServer, client: LLMClient, error: Exception, kind: type[LLMError], text: str
) -> None:
    @asynccontextmanager
    async def open_tools(_run: RunInfo) -> AsyncIterator[RunTools]:
        raise error
        yield

    with pytest.raises(kind, match=text) as caught:
        await Agent(client).run("Go.", open_tools=open_tools)
    assert caught.value.partial.stop_reason == "error"
    assert generations(scripted_server) == []


async def test_something_other_than_run_tools_is_refused(client: LLMClient) -> None:
    @asynccontextmanager
    async def open_tools(_run: RunInfo) -> AsyncIterator[Any]:
        yield [add]

    with pytest.raises(LLMValidationError, match="the value of open_tools must be an instance of RunTools"):
        await Agent(client).run("Go.", open_tools=open_tools)


def test_open_tools_must_be_a_function(client: LLMClient) -> None:
    with pytest.raises(LLMValidationError, match="open_tools must be a function or None"):
        Agent(client, open_tools=[add])  # type: ignore[arg-type]  # that is what is tested


class Suppressing:
    """A context manager that suppresses every exception, cancellations included."""

    async def __aenter__(self) -> RunTools:
        return RunTools()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        return True


async def test_a_context_manager_that_suppresses_the_error_of_a_run_does_not_make_it_succeed(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(reply(400, {"error": "no"}), answer("two", gate=asyncio.Event()))
    agent = Agent(client, open_tools=lambda _run: Suppressing())
    with pytest.raises(LLMError, match="suppressed the error that ended the run"):
        await agent.run("Go.")
    handle = agent.start("Go.")
    await scripted_server.wait_until(lambda: scripted_server.in_flight)
    handle.cancel()
    with pytest.raises(TaskCancelledError):
        await handle.result()
