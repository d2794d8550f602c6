"""Cassettes of MCP servers on stdio: what a server has sent once is replayed without its process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Agent, ToolCall, ToolError
from lmbridge.mcp import McpHub
from lmbridge.testing import Cassette, CassetteError, FakeChatClient
from tests.mcp.conftest import MakeHub
from tests.mcp.support import function_of, wait_for_notes


async def call(hub: McpHub, tool: str, **arguments: Any) -> Any:
    try:
        return await function_of(await hub.tools(), tool)(**arguments)
    finally:
        await hub.close()


async def test_a_replay_starts_no_process(make_hub: MakeHub, tmp_path: Path, notes: Path) -> None:
    path = tmp_path / "tape.json"
    servers = {"s": {"notes": str(notes), "starts": True}}
    with Cassette(path) as cassette:
        assert cassette.is_recording
        recorded = await call(make_hub(servers), "echo", text="hello")
    assert len(await wait_for_notes(notes)) == 1
    with Cassette(path) as cassette:
        replayed = await call(make_hub(servers), "echo", text="hello")
        assert cassette.all_played
        assert cassette.play_count == 3
    assert replayed == recorded
    # The server notes each start.
    assert len(await wait_for_notes(notes)) == 1


async def test_an_agent_with_tools_of_a_server_is_replayed(make_hub: MakeHub, tmp_path: Path) -> None:
    for _ in range(2):
        with Cassette(tmp_path / "tape.json"):
            hub = make_hub({"s": {}})
            tools = (await hub.tools()).tools
            calls = [ToolCall("1", "echo", {"text": "a"}), ToolCall("2", "echo", {"text": "b"})]
            result = await Agent(FakeChatClient([calls, "Done."]), tools=tools).run("?")
            assert [record.text for record in result.log[0].tool_calls] == ["a", "b"]
            await hub.close()


async def test_progress_and_errors_are_replayed(make_hub: MakeHub, tmp_path: Path) -> None:
    for _ in range(2):
        with Cassette(tmp_path / "tape.json"):
            hub = make_hub({"s": {}})
            tools = await hub.tools()
            assert await function_of(tools, "progress")() is not None
            with pytest.raises(ToolError, match="no such file"):
                await function_of(tools, "fails")()
            with pytest.raises(ToolError, match="bad arguments"):
                await function_of(tools, "refuses")()
            await hub.close()


async def test_a_server_that_died_dies_again(make_hub: MakeHub, tmp_path: Path) -> None:
    for _ in range(2):
        with Cassette(tmp_path / "tape.json"):
            hub = make_hub({"s": {"die_at": ["parts"]}})
            tools = await hub.tools()
            with pytest.raises(ToolError):
                await function_of(tools, "parts")()
            await hub.close()


async def test_a_list_that_changes_is_replayed(make_hub: MakeHub, tmp_path: Path) -> None:
    for _ in range(2):
        with Cassette(tmp_path / "tape.json"):
            hub = make_hub({"s": {}})
            tools = await hub.tools()
            await function_of(tools, "change")()
            while "new" not in [tool.name for tool in (await hub.tools()).tools]:
                await asyncio.sleep(0.01)
            await hub.close()


async def test_a_call_that_is_not_on_the_tape_fails_and_ends_the_block_with_an_error(
    make_hub: MakeHub, tmp_path: Path
) -> None:
    path = tmp_path / "tape.json"
    with Cassette(path):
        await call(make_hub({"s": {}}), "echo", text="hello")

    async def handle_the_failure() -> None:
        with Cassette(path), pytest.raises(ToolError, match="the cassette has no exchange for tools/call"):
            await call(make_hub({"s": {}}), "echo", text="other")

    with pytest.raises(CassetteError, match=r"no exchange for tools/call .*'other'.*; delete the file"):
        await handle_the_failure()


async def test_secrets_are_not_in_the_file(make_hub: MakeHub, tmp_path: Path) -> None:
    path = tmp_path / "tape.json"
    servers = {"s": {"env": {"TOKEN": "sk-secret-1"}}}
    for _ in range(2):
        with Cassette(path, redact=["Miller Industries"]):
            assert await call(make_hub(servers), "echo", text="sk-secret-1 of Miller Industries")
    written = path.read_text()
    assert "sk-secret-1" not in written
    assert "Miller" not in written
    assert [each["method"] for each in json.loads(written)["mcp"]] == ["initialize", "tools/list", "tools/call"]


async def test_a_scaled_replay_takes_its_time(make_hub: MakeHub, tmp_path: Path) -> None:
    path = tmp_path / "tape.json"
    with Cassette(path):
        await call(make_hub({"s": {}}), "echo", text="hello")
    content = json.loads(path.read_text())
    content["mcp"][-1]["messages"][0]["seconds"] = 600
    path.write_text(json.dumps(content))
    with Cassette(path, time_scale=1):
        hub = make_hub({"s": {}})
        tools = await hub.tools()
        task = asyncio.create_task(function_of(tools, "echo")(text="hello"))
        done, _ = await asyncio.wait({task}, timeout=0.1)
        assert not done
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await hub.close()


async def test_after_the_block_servers_are_started_again(make_hub: MakeHub, tmp_path: Path, notes: Path) -> None:
    path = tmp_path / "tape.json"
    servers = {"s": {"notes": str(notes), "starts": True}}
    with Cassette(path):
        await call(make_hub(servers), "echo", text="hello")
    await call(make_hub(servers), "echo", text="hello")
    assert len(await wait_for_notes(notes, 2)) == 2


def answers_to_echo(*before: dict[str, Any], **answer: Any) -> dict[str, Any]:
    result = {"content": [{"type": "text", "text": "on"}]}
    return {"answers": {"echo": [*before, {"jsonrpc": "2.0", "id": "$id", "result": result, **answer}]}}


@pytest.mark.parametrize(
    "server",
    [
        answers_to_echo(id="$text_id"),
        answers_to_echo(method="tools/call"),
        # Messages that belong to no request, some of them with values that can be no id.
        answers_to_echo({"jsonrpc": "2.0", "id": {}, "result": {}}),
        answers_to_echo({"jsonrpc": "2.0", "id": 5, "result": {"content": [{"type": "text", "text": "other"}]}}),
        answers_to_echo({"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": []}}),
        answers_to_echo(
            {"jsonrpc": "2.0", "method": "notifications/progress", "params": {"progressToken": "$text_id"}}
        ),
    ],
)
async def test_the_answers_of_an_irregular_server_are_replayed_to_their_requests(
    make_hub: MakeHub, tmp_path: Path, server: dict[str, Any]
) -> None:
    path = tmp_path / "tape.json"
    for _ in range(2):
        with Cassette(path) as cassette:
            assert await call(make_hub({"s": server}), "echo", text="?") == "on"
            assert cassette.all_played


async def test_an_answer_with_its_id_as_a_text_is_kept_with_its_own_request(make_hub: MakeHub, tmp_path: Path) -> None:
    # The first call never gets an answer, so that an answer that is not recognized would be kept with it.
    server = {"answers": {"parts": [], **answers_to_echo(id="$text_id")["answers"]}}
    for _ in range(2):
        with Cassette(tmp_path / "tape.json"):
            hub = make_hub({"s": server})
            tools = await hub.tools()
            waits = asyncio.ensure_future(function_of(tools, "parts")())
            assert await function_of(tools, "echo")(text="?") == "on"
            assert not waits.done()
            waits.cancel()
            await asyncio.wait({waits})
            await hub.close()
