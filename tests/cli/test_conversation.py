"""A conversation: turns, interruptions, errors, commands, and what the log keeps."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from lmbridge.cli.answer_view import AnswerView
from lmbridge.cli.chat_commands import COMMANDS
from lmbridge.cli.chat_options import ChatOptions
from lmbridge.cli.command_runner import Signals
from lmbridge.cli.connection import connect_to_server
from lmbridge.cli.conversation import Conversation
from lmbridge.cli.conversation_log import ConversationLog
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.options import ServerOptions
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_access import ToolAccess
from lmbridge.cli.tool_options import ToolOptions
from lmbridge.cli.turns import ChatTurn
from lmbridge.testing import ScriptedServer, answer, reply, stall
from lmbridge.testing.completions import completion_chunk
from tests.cli.test_chat import PNG
from tests.cli.test_run import FakeHub, calling

LEAVE = "\x04"


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        yield keyboard


def chat_options(server: ScriptedServer, **changes: Any) -> ChatOptions:
    defaults: dict[str, Any] = {
        "server": ServerOptions(api_base=server.api_base),
        "tools": ToolOptions(),
        "system": None,
        "images": (),
        "schema": None,
        "as_json": False,
        "continues": False,
        "logs": True,
        "reasoning": "show",
        "params": {},
    }
    return ChatOptions(**{**defaults, **changes})


@asynccontextmanager
async def started(options: ChatOptions) -> AsyncIterator[tuple[asyncio.Task[ExitStatus], Signals]]:
    """Yields the task of a conversation, and its signals."""
    ready: asyncio.Future[Signals] = asyncio.get_running_loop().create_future()

    async def lead() -> ExitStatus:
        task = asyncio.current_task()
        assert task is not None
        signals = Signals(task)
        ready.set_result(signals)
        terminal = Terminal()
        async with connect_to_server(options.server, terminal) as connection:
            return await Conversation.hold(options, connection, terminal, signals)

    task = asyncio.create_task(lead())
    try:
        yield task, await ready
    finally:
        task.cancel()
        await asyncio.wait({task})


async def converse(server: ScriptedServer, keyboard: PipeInput, *lines: str, **changes: Any) -> ExitStatus:
    """Types lines and leaves."""
    keyboard.send_text("".join(f"{line}\r" for line in lines) + LEAVE)
    async with started(chat_options(server, **changes)) as (task, _):
        return await task


def sent_messages(server: ScriptedServer) -> list[list[Any]]:
    return [each.json["messages"] for each in server.requests if each.path == "/v1/chat/completions"]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


async def test_each_question_is_sent_with_what_was_said_before(
    scripted_server: ScriptedServer, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted_server.script(answer("Paris"), answer("Yes, very."))
    assert await converse(scripted_server, keyboard, "The capital of France?", "", "Is it large?") is ExitStatus.OK
    assert sent_messages(scripted_server)[1] == [
        user("The capital of France?"),
        assistant("Paris"),
        user("Is it large?"),
    ]
    output, notices = capsys.readouterr()
    assert output == "Paris\nYes, very.\n"
    assert notices.splitlines()[0] == f"test-model on a server at {scripted_server.api_base}"
    last = await ConversationLog().last()
    assert last is not None
    assert last.messages[-1] == assistant("Yes, very.")


async def test_ctrl_c_stops_the_generation_on_the_server_and_keeps_the_conversation(
    scripted_server: ScriptedServer, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk = completion_chunk("chatcmpl-1", "test-model", {"content": "Once upon"})
    scripted_server.script(stall(after=(chunk,)), answer("The end."))
    keyboard.send_text("Tell a story\r")
    async with started(chat_options(scripted_server)) as (task, signals):
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        while "Once upon" not in (shown := capsys.readouterr().out):
            await asyncio.sleep(0)
        assert shown == "Once upon"
        signals._cancel(signal.SIGINT)
        await scripted_server.wait_until(lambda: scripted_server.aborts)
        keyboard.send_text(f"Go on\r{LEAVE}")
        assert await task is ExitStatus.OK
    assert sent_messages(scripted_server)[1] == [user("Tell a story"), assistant("Once upon"), user("Go on")]
    output, notices = capsys.readouterr()
    assert output == "\nThe end.\n"
    assert "[stopped]\n" in notices


async def test_a_second_ctrl_c_leaves(scripted_server: ScriptedServer, keyboard: PipeInput) -> None:
    scripted_server.script(stall())
    keyboard.send_text("Tell a story\r")
    async with started(chat_options(scripted_server)) as (task, signals):
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        signals._cancel(signal.SIGINT)
        await scripted_server.wait_until(lambda: scripted_server.aborts)
        keyboard.send_text("\x03")
        assert await task is ExitStatus.INTERRUPTED


async def test_sigterm_ends_the_conversation_while_the_model_writes(
    scripted_server: ScriptedServer, keyboard: PipeInput
) -> None:
    scripted_server.script(stall())
    keyboard.send_text("Tell a story\r")
    async with started(chat_options(scripted_server)) as (task, signals):
        await scripted_server.wait_until(lambda: scripted_server.in_flight)
        signals._cancel(signal.SIGTERM)
        await scripted_server.wait_until(lambda: scripted_server.aborts)
        await asyncio.wait({task})
        assert task.cancelled()
        assert signals.status is ExitStatus.TERMINATED


async def test_a_question_without_an_answer_can_be_asked_again(
    scripted_server: ScriptedServer, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted_server.script(reply(400, {"error": "no"}), answer("Paris"))
    assert await converse(scripted_server, keyboard, "The capital?", "Once more") is ExitStatus.OK
    assert sent_messages(scripted_server)[1] == [user("Once more")]
    assert "error: chat completion" in capsys.readouterr().err


async def test_the_advice_of_an_error_is_a_hint(
    scripted_server: ScriptedServer, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted_server.script(reply(401, {"error": "no"}))
    await converse(scripted_server, keyboard, "Hello")
    assert capsys.readouterr().err.splitlines()[-1].startswith("hint: ")


async def test_a_conversation_goes_on_after_the_program_was_left(
    scripted_server: ScriptedServer, keyboard: PipeInput
) -> None:
    await converse(scripted_server, keyboard, "First", system="Be brief.")
    await converse(scripted_server, keyboard, "Second", continues=True)
    roles = [each["role"] for each in sent_messages(scripted_server)[1]]
    assert roles == ["system", "user", "assistant", "user"]


# Commands


async def test_every_command_is_in_the_help(
    scripted_server: ScriptedServer, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    await converse(scripted_server, keyboard, "/help")
    shown = capsys.readouterr().out
    assert all(f"/{name}" in shown for name in COMMANDS)
    assert sent_messages(scripted_server) == []


async def test_an_unknown_command_is_not_sent_to_the_model(
    scripted_server: ScriptedServer, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    await converse(scripted_server, keyboard, "/hlep")
    assert "error: unknown command /hlep\nhint: /help lists the commands\n" in capsys.readouterr().err
    assert sent_messages(scripted_server) == []


@pytest.mark.parametrize("leave", ["/exit", "/quit", "/bye"])
async def test_a_command_leaves(scripted_server: ScriptedServer, keyboard: PipeInput, leave: str) -> None:
    assert await converse(scripted_server, keyboard, leave, "not sent") is ExitStatus.OK
    assert sent_messages(scripted_server) == []


async def test_the_model_can_be_changed(
    scripted_server: ScriptedServer, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted_server.models.append("other")
    await converse(scripted_server, keyboard, "/model", "/model missing", "/model other", "Hello")
    output, notices = capsys.readouterr()
    assert ["*", "test-model"] in [line.split() for line in output.splitlines()]
    assert "error: the server has no model 'missing'" in notices
    assert scripted_server.requests[-1].json["model"] == "other"


async def test_the_system_message_can_be_set_and_removed(scripted_server: ScriptedServer, keyboard: PipeInput) -> None:
    await converse(scripted_server, keyboard, "One", "/system Be brief.", "Two", "/system -", "Three")
    roles = [[each["role"] for each in messages] for messages in sent_messages(scripted_server)]
    assert roles == [["user"], ["system", "user", "assistant", "user"], ["user", "assistant"] * 2 + ["user"]]


async def test_a_new_conversation_keeps_the_system_message_and_the_log_keeps_both(
    scripted_server: ScriptedServer, keyboard: PipeInput
) -> None:
    await converse(scripted_server, keyboard, "One", "/new", "Two", system="Be brief.")
    assert [each["content"] for each in sent_messages(scripted_server)[1]] == ["Be brief.", "Two"]
    assert await ConversationLog().prompts() == ["One", "Two"]


async def test_a_conversation_can_be_saved(
    scripted_server: ScriptedServer, keyboard: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    markdown, plain = tmp_path / "notes.md", tmp_path / "notes.json"
    scripted_server.script(answer("Hi."))
    lines = ["Hello", f"/save {markdown}", f"/save {plain}", f"/save {markdown}", "/save"]
    await converse(scripted_server, keyboard, *lines)
    assert markdown.read_text() == "**user**\n\nHello\n\n**assistant**\n\nHi.\n"
    assert json.loads(plain.read_text()) == [user("Hello"), assistant("Hi.")]
    notices = capsys.readouterr().err
    assert f"error: {markdown} exists already" in notices
    assert "error: /save needs the name of a file" in notices


async def test_an_image_is_shown_with_the_next_question_only(
    scripted_server: ScriptedServer, keyboard: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(PNG)
    await converse(scripted_server, keyboard, "/image missing.png", f"/image {picture}", "What is this?", "And now?")
    first, second = sent_messages(scripted_server)
    assert [part["type"] for part in first[-1]["content"]] == ["text", "image_url"]
    assert second[-1] == user("And now?")
    assert "missing.png" in capsys.readouterr().err


async def test_reasoning_can_be_hidden_and_shown(
    scripted_server: ScriptedServer, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    await converse(scripted_server, keyboard, "/reasoning", "/reasoning", "/reasoning hide", "/reasoning loud")
    lines = capsys.readouterr().err.splitlines()[-4:]
    assert lines == [
        "reasoning is hidden",
        "reasoning is shown",
        "reasoning is hidden",
        "error: /reasoning takes show or hide",
    ]


async def test_the_tools_of_the_configuration_are_listed(
    scripted_server: ScriptedServer, keyboard: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"files": {"command": "true"}, "time": {"command": "true"}}}))
    tools = ToolOptions(config=config)
    await converse(scripted_server, keyboard, "/tools", "/tools time", "/tools nothing", "/tools off", tools=tools)
    output, notices = capsys.readouterr()
    rows = [line.split() for line in output.splitlines()]
    assert rows.count(["*", "time"]) == 1
    assert rows.count(["files"]) == 3
    assert "error: the configuration has no MCP server 'nothing'" in notices


async def test_all_stands_for_every_server_of_the_configuration_in_a_chat(
    scripted_server: ScriptedServer, keyboard: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"files": {"command": "true"}, "time": {"command": "true"}}}))
    tools = ToolOptions(names=["all"], config=config)
    await converse(scripted_server, keyboard, "/tools", "/tools off", "/tools all", tools=tools)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows.count(["*", "files"]) == rows.count(["*", "time"]) == 2
    assert rows.count(["files"]) == 1


async def test_the_status_line_of_a_turn_with_tools_has_its_speed_and_the_context(
    scripted_server: ScriptedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.hub.McpHub", FakeHub)
    # Time passes whenever it is asked for.
    monkeypatch.setattr("lmbridge.cli.run_view.monotonic", count().__next__)
    scripted_server.script(calling("list_files"), answer("There is one."))
    options = chat_options(scripted_server, tools=ToolOptions(names=["files"]))
    turn = ChatTurn([user("Which files are there?")])
    terminal = Terminal()
    async with (
        connect_to_server(options.server, terminal) as connection,
        ToolAccess(options.tools, None) as tools,
    ):
        with AnswerView(terminal) as view:
            await turn.take(connection, view, {}, tools)
    assert capsys.readouterr().out == "There is one.\n"
    line = turn.status_line(200)
    assert re.fullmatch(r"\d+ tokens in 2 rounds · \d+\.\d tokens/s · context \d+ of 200 \(\d+%\)", line), line
