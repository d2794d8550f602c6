"""Runs of a `DynamicAutonomousAgent` that go on from a journal."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmbridge import Agent, Journal, JournalError, LLMClient, TaskCancelledError
from lmbridge.testing import ScriptedServer, answer, stall
from tests.agent.support import asks, calls, tool_texts
from tests.mcp.conftest import MakeAgent
from tests.mcp.dynamic_support import ONLY_ECHO, sent_tool_names


async def test_a_run_goes_on_with_its_servers(
    scripted_server: ScriptedServer, make_agent: MakeAgent, tmp_path: Path
) -> None:
    agent, journal = make_agent({"a": ONLY_ECHO, "b": ONLY_ECHO}), tmp_path / "runs.db"
    scripted_server.script(calls(asks("echo", text="Hello.")), stall())
    stream = await agent.autonomous_with_mcp("b", "Go.", journal=journal, stream=True)
    await scripted_server.wait_until(lambda: scripted_server.in_flight and not scripted_server._script)
    stream.handle.cancel()
    with pytest.raises(TaskCancelledError):
        await stream.handle.result()
    await agent.close()
    scripted_server.script(answer("Done."))
    result = await agent.resume(journal, full=True)
    assert (result.text, tool_texts(result.messages)) == ("Done.", ["Hello."])
    assert list(agent._hub.status()) == ["b"]
    assert sent_tool_names(scripted_server) == ["echo"]
    assert await agent.resume(journal) == "Done."
    assert [run.state for run in await Journal(journal).runs()] == ["finished"]


async def test_a_run_without_servers_is_not_taken_for_one_with_them(
    scripted_server: ScriptedServer, make_agent: MakeAgent, client: LLMClient, tmp_path: Path
) -> None:
    journal = tmp_path / "runs.db"
    await Agent(client).run("Go.", journal=journal)
    with pytest.raises(JournalError, match="not begun by a DynamicAutonomousAgent") as caught:
        await make_agent({"a": ONLY_ECHO}).resume(journal)
    assert caught.value.problem == "mismatch"
