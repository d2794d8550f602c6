"""Runs that are held while a person decides."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from lmbridge import Agent, LLMClient, RoundFinished, TaskCancelledError
from lmbridge.agent import ask_user
from lmbridge.agent.pause import PauseGate
from lmbridge.errors import LLMValidationError
from lmbridge.observe import ObservedEvent, RunEnded
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import add, asks, calls, generations, tool_texts


async def test_a_paused_run_makes_no_further_request_until_it_is_resumed(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = asyncio.Event()
    scripted_server.script(calls(asks("add", a=1, b=2), gate=gate), answer("It is 3."))
    handle = Agent(client, tools=[add]).start("1 + 2?")
    events = handle.events()
    await anext(events)
    assert handle.pause()
    assert handle.is_paused
    gate.set()
    # The generation in progress ends, and its call is held.
    while not handle.partial.tool_calls:
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert (len(generations(scripted_server)), handle.partial.log) == (1, ())
    assert handle.resume()
    assert not handle.is_paused
    assert (await handle.result()).text == "It is 3."
    await events.aclose()


async def test_a_run_that_is_paused_in_a_tool_is_held_before_the_next_generation(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def pause() -> str:
        """Pauses the run."""
        handle.pause()
        return "paused"

    scripted_server.script(calls(asks("pause")), answer("Done."))
    handle = Agent(client, tools=[pause]).start("Pause.")
    async for event in handle.events():
        if isinstance(event, RoundFinished):
            break
    for _ in range(20):
        await asyncio.sleep(0)
    assert (handle.is_paused, len(generations(scripted_server))) == (True, 1)
    handle.resume()
    assert (await handle.result()).text == "Done."


async def test_the_time_of_a_pause_does_not_count(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("Hello."))
    loop = asyncio.get_running_loop()
    handle = Agent(client, max_seconds=0.2).start("Hi.")
    handle.pause()
    held_until = loop.time() + 0.4
    while loop.time() < held_until:
        await asyncio.sleep(0.05)
    assert not handle.done
    # With what is left of 0.2 s, the run might still be too slow on a busy machine, so only the pause is judged.
    handle.resume()
    assert (await handle.result()).stop_reason in ("stop", "budget")


async def test_the_time_limit_counts_again_after_a_pause(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("never", gate=asyncio.Event()))
    handle = Agent(client, max_seconds=0.1).start("Hi.")
    # The limit exists once the task of the run has begun.
    await asyncio.sleep(0)
    handle.pause()
    handle.resume()
    assert (await handle.result()).stop_reason == "budget"


async def test_a_paused_run_can_be_cancelled(scripted_server: ScriptedServer, client: LLMClient) -> None:
    handle = Agent(client).start("Hi.")
    handle.pause()
    await asyncio.sleep(0)
    await handle.aclose()
    with pytest.raises(TaskCancelledError):
        await handle.result()
    assert generations(scripted_server) == []


async def test_a_run_that_has_ended_cannot_be_paused(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("Hello."))
    handle = Agent(client).start("Hi.")
    assert handle.resume()
    await handle.result()
    assert (handle.pause(), handle.resume(), handle.is_paused) == (False, False, False)


async def test_a_run_that_ends_in_a_pause_is_no_longer_paused(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("Hello.", gate=gate))
    handle = Agent(client).start("Hi.")
    events = handle.events()
    await anext(events)
    while not generations(scripted_server):
        await asyncio.sleep(0.001)
    handle.pause()
    gate.set()
    assert (await handle.result()).text == "Hello."
    assert not handle.is_paused
    await events.aclose()


@pytest.mark.parametrize("has_journal", [False, True])
@pytest.mark.parametrize("paused_before", [False, True])
async def test_a_run_whose_last_generation_has_ended_ends_although_it_is_paused_or_resumed(
    scripted_server: ScriptedServer, client: LLMClient, tmp_path: Path, paused_before: bool, has_journal: bool
) -> None:
    done: list[bool] = []

    class Pauser:
        def on_event(self, event: ObservedEvent) -> None:
            """Pauses the run when its time limit no longer applies, and its task has not ended yet."""
            if isinstance(event, RunEnded):
                done.append(handle.done)
                if paused_before:
                    handle.resume()
                done.append(handle.pause())
                done.append(handle.is_paused)

    gate = asyncio.Event()
    scripted_server.script(answer("Hello.", gate=gate))
    agent = Agent(client, max_seconds=60, observers=[Pauser()])
    handle = agent.start("Hi.", journal=tmp_path / "runs.db" if has_journal else None)
    events = handle.events()
    await anext(events)
    while not generations(scripted_server):
        await asyncio.sleep(0.001)
    if paused_before:
        handle.pause()
    gate.set()
    result = await handle.result()
    assert (result.text, result.stop_reason, done) == ("Hello.", "stop", [False, True, True])
    assert (handle.is_paused, handle.pause(), handle.resume()) == (False, False, False)
    await events.aclose()


async def test_the_gate_holds_all_that_wait_at_it() -> None:
    gate = PauseGate()
    gate.close()
    gate.close()
    waiting = [asyncio.create_task(gate.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.wait(waiting[:1])
    assert [task.done() for task in waiting] == [True, False, False]
    gate.open()
    await asyncio.gather(*waiting[1:])
    await gate.wait()


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_model_can_ask_the_user(scripted_server: ScriptedServer, client: LLMClient, is_async: bool) -> None:
    asked: list[str] = []

    async def ask(question: str) -> str:
        asked.append(question)
        return "Paris"

    def ask_at_once(question: str) -> str:
        asked.append(question)
        return "Paris"

    scripted_server.script(calls(asks("ask_user", question="Which city?")), answer("Paris it is."))
    result = await Agent(client, tools=[ask_user(ask if is_async else ask_at_once)]).run("Book a room.")
    assert (asked, tool_texts(result.messages)) == (["Which city?"], ["Paris"])


def test_a_callback_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(LLMValidationError, match="callback"):
        # Type checkers refuse a text as well.
        ask_user("Which city?")  # type: ignore[arg-type]
