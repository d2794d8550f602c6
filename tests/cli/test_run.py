"""`lmbridge run`: what is shown, what needs an approval, the events as JSON, and the exit status."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmbridge import Tool, ToolCall
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_access import ToolAccess, may_change_something
from lmbridge.cli.tool_options import ApprovalMode, ToolOptions
from lmbridge.sync import Agent, LLMClient
from lmbridge.testing import answer, reply
from tests.cli.support import Command
from tests.threaded_server import ThreadedServer

NO_ARGUMENTS = {"type": "object", "properties": {}}


def list_files() -> list[str]:
    return ["notes.txt"]


def delete_files() -> str:
    return "deleted"


READING = Tool("list_files", "Lists files.", NO_ARGUMENTS, list_files, annotations={"readOnlyHint": True})
DELETING = Tool("delete_files", "Deletes all files.", NO_ARGUMENTS, delete_files, annotations={})


class FakeLease:
    """The tools of MCP servers, without servers."""

    async def list_tools(self) -> Sequence[Tool]:
        return [READING, DELETING]

    def release(self) -> None:
        pass


class FakeHub:
    """An `McpHub` with two servers."""

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        self.leased: list[Sequence[str]] = []
        hubs.append(self)

    async def names(self) -> list[str]:
        return ["files", "time"]

    async def tools(self, names: Sequence[str], **_options: Any) -> FakeLease:
        self.leased.append(names)
        return FakeLease()

    async def close(self) -> None:
        pass


hubs: list[FakeHub] = []


@pytest.fixture(autouse=True)
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> list[FakeHub]:
    hubs.clear()
    monkeypatch.setattr("lmbridge.mcp.servers.hub.McpHub", FakeHub)
    return hubs


def calling(name: str) -> Any:
    return answer("", tool_calls=[{"id": "call_1", "type": "function", "function": {"name": name, "arguments": "{}"}}])


def results(server: ThreadedServer) -> list[str]:
    """Returns the results of calls that were sent to the model in its last request."""
    request = server.scripted.requests[-1].json
    return [each["content"] for each in request["messages"] if each["role"] == "tool"]


def test_a_pipe_gets_the_answer_alone(command: Command, server: ThreadedServer) -> None:
    server.scripted.script(calling("list_files"), answer("There is one: notes.txt"))
    assert command("run", "Which files are there?", "--mcp", "files") == (0, "There is one: notes.txt\n", "")
    assert results(server) == ['["notes.txt"]']
    assert hubs[0].leased == [["files"]]


def test_all_stands_for_every_server_of_the_configuration(command: Command, server: ThreadedServer) -> None:
    server.scripted.script(answer("Done."))
    command("run", "Tidy up", "--mcp", "all")
    assert hubs[0].leased == [["files", "time"]]


def test_options_reach_the_agent(command: Command, server: ThreadedServer) -> None:
    arguments = ["--system", "Be brief.", "--max-tokens", "7", "--temperature", "0"]
    command("run", "Say hello", *arguments, stdin="to Ada\n")
    sent = server.scripted.requests[-1].json
    assert (sent["max_tokens"], sent["temperature"]) == (7, 0)
    assert [each["content"] for each in sent["messages"]] == ["Be brief.", "Say hello\n\nto Ada"]


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ([], "the user would have to approve this call, but cannot be asked"),
        (["--approve", "none"], "the user does not allow calls that may change something"),
        (["--approve", "all"], "deleted"),
    ],
)
def test_a_call_that_may_destroy_something_needs_an_approval(
    command: Command, server: ThreadedServer, arguments: list[str], result: str
) -> None:
    server.scripted.script(calling("delete_files"), answer("Done."))
    assert command("run", "Delete everything", "--mcp", "files", *arguments).status == 0
    assert result in results(server)[0]


@pytest.mark.parametrize(
    ("typed", "outcomes"),
    [
        ("y", [True, "the user has refused this call"]),
        ("no", ["the user has refused this call"] * 2),
        ("a", [True] * 2),
    ],
)
async def test_the_person_is_asked_before_each_call_unless_always_was_the_answer(
    typed: str, outcomes: list[bool | str]
) -> None:
    questions: list[str] = []
    answers = iter([typed, "n"])

    async def ask(question: str) -> str:
        questions.append(question)
        return next(answers)

    call = ToolCall("call_1", "delete_files", {"path": "/\x1b[2J"}, DELETING)
    async with ToolAccess(ToolOptions(names=["files"]), ask) as access:
        assert [await access.approve(call), await access.approve(call)] == outcomes
        assert await access.approve(ToolCall("call_2", "list_files", {}, READING)) is True
    assert questions[0] == 'Run delete_files {"path": "/\\u001b[2J"}? [y]es, [n]o, [a]lways: '
    assert len(questions) == (1 if typed == "a" else 2)


async def test_always_does_not_apply_to_a_tool_of_another_server_with_the_same_name() -> None:
    answers = iter(["a", "n"])

    async def ask(_question: str) -> str:
        return next(answers)

    def call(server: str) -> ToolCall:
        tool = Tool("delete", "Deletes.", NO_ARGUMENTS, delete_files, server=server)
        return ToolCall("call_1", "delete", {}, tool)

    async with ToolAccess(ToolOptions(), ask) as access:
        assert [await access.approve(call(server)) for server in ("notes", "notes", "files")] == [
            True,
            True,
            "the user has refused this call",
        ]


@pytest.mark.parametrize(
    ("hints", "expected"),
    [
        ({}, True),
        ({"destructiveHint": True}, True),
        ({"destructiveHint": False}, True),
        ({"readOnlyHint": True, "destructiveHint": True}, False),
    ],
)
def test_a_tool_may_change_something_unless_its_server_says_that_it_only_reads(
    hints: dict[str, bool], expected: bool
) -> None:
    tool = Tool("tool", "", NO_ARGUMENTS, list_files, annotations=hints)
    assert may_change_something(tool) is expected


def test_json_has_one_event_a_line(command: Command, server: ThreadedServer) -> None:
    server.scripted.script(calling("list_files"), answer("One \x9b2J file"))
    status, output, errors = command("run", "Which files are there?", "--mcp", "files", "--json")
    assert (status, errors) == (0, "")
    events = [json.loads(line) for line in output.splitlines()]
    types = [each["type"] for each in events]
    assert types[0] == "round_started"
    assert {"tool_call_started", "tool_call_finished", "text_delta", "round_finished"} <= set(types)
    assert types[-1] == "run_finished"
    assert events[types.index("tool_call_started")]["call"]["tool"] == "list_files"
    assert events[-1]["result"]["text"] == "One \x9b2J file"
    assert events[-1]["result"]["stop_reason"] == "stop"
    assert "\x9b" not in output


@pytest.mark.parametrize("as_json", [[], ["--json"]])
def test_the_exit_status_says_how_the_run_ended(command: Command, server: ThreadedServer, as_json: list[str]) -> None:
    server.scripted.script(answer("The file", finish_reason="length"))
    assert command("run", "Read it", *as_json).status == 10
    server.scripted.script(calling("list_files"))
    outcome = command("run", "List them", "--mcp", "files", "--max-rounds", "1", *as_json)
    assert outcome.status == 14
    if as_json:
        assert json.loads(outcome.output.splitlines()[-1])["type"] == "error"
    else:
        assert outcome.errors.startswith("warning: the run ended without an answer: it used up its rounds\nhint: ")


def test_without_a_task_it_says_what_to_do(command: Command, server: ThreadedServer) -> None:
    status, _, errors = command("run")
    assert (status, errors) == (2, 'error: no task was given\nhint: lmbridge run "what to do"\n')


@pytest.mark.parametrize("mode", ["ask", "all", "none"])
async def test_calls_that_change_nothing_are_always_made(mode: ApprovalMode) -> None:
    async with ToolAccess(ToolOptions(names=["files"], approval=mode), None) as access:
        assert await access.approve(ToolCall("call_1", "list_files", {}, READING)) is True


def test_nobody_is_asked_in_a_pipe() -> None:
    assert Terminal().ask is None


# Journals


def test_a_run_with_a_journal_goes_on_with_its_servers_and_makes_no_call_again(
    command: Command, server: ThreadedServer, tmp_path: Path
) -> None:
    journal = str(tmp_path / "run.db")
    server.scripted.script(calling("delete_files"), reply(400, {"error": "broken"}))
    arguments = ["--mcp", "files", "--approve", "all", "--journal", journal, "--system", "Be brief."]
    assert command("run", "Delete everything", *arguments).status == 1
    server.scripted.script(answer("All files are gone."))
    assert command("resume", journal) == (0, "All files are gone.\n", "")
    assert results(server) == ["deleted"]
    assert hubs[-1].leased == [["files"]]
    assert command("resume", journal).output == "All files are gone.\n"


@pytest.mark.parametrize("model", [None, "models/tiny.gguf"])
def test_a_run_with_the_embedded_server_is_resumed_with_the_same_file(
    command: Command,
    server: ThreadedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str | None,
) -> None:
    started: list[str | None] = []

    @asynccontextmanager
    async def start_local(model: str | None, _terminal: Terminal) -> AsyncIterator[Any]:
        started.append(model)
        yield SimpleNamespace(api_base=server.api_base, model="test-model")

    monkeypatch.setattr("lmbridge.cli.local_start.start_local", start_local)
    journal, path = str(tmp_path / "run.db"), None if model is None else str(Path(model).absolute())
    server.scripted.script(reply(400, {"error": "broken"}))
    arguments = [] if model is None else ["--model", model]
    assert "broken" in command("run", "Tidy up", "--local", "--journal", journal, *arguments).errors
    server.scripted.script(answer("Done."))
    monkeypatch.chdir(tmp_path)
    assert command("resume", journal, "--local") == (0, "Done.\n", "")
    assert started == [model, path]


def test_a_run_that_answered_at_its_limit_is_not_said_to_have_no_answer(
    command: Command, server: ThreadedServer, tmp_path: Path
) -> None:
    journal = str(tmp_path / "run.db")
    server.scripted.script(calling("list_files"), answer("Probably one."))
    with LLMClient(server.api_base, "test-model") as client:
        agent = Agent(client, tools=[READING], max_rounds=1, on_limit="answer")
        assert agent.run("Which files are there?", journal=journal).has_answer
    status, output, errors = command("resume", journal)
    assert (status, output) == (14, "Probably one.\n")
    assert errors.startswith("warning: the run ended with the best answer so far: it used up its rounds\nhint: ")


def test_the_result_of_a_resumed_run_as_json(command: Command, server: ThreadedServer, tmp_path: Path) -> None:
    journal = str(tmp_path / "run.db")
    server.scripted.script(answer("Done."))
    command("run", "Tidy up", "--journal", journal)
    finished = json.loads(command("resume", journal, "--json").output)
    assert (finished["type"], finished["result"]["text"]) == ("run_finished", "Done.")


def test_a_resumed_run_has_one_event_a_line_as_json(command: Command, server: ThreadedServer, tmp_path: Path) -> None:
    journal = str(tmp_path / "run.db")
    server.scripted.script(calling("list_files"), reply(400, {"error": "broken"}))
    command("run", "Which files are there?", "--mcp", "files", "--journal", journal)
    server.scripted.script(answer("One."))
    status, output, errors = command("resume", journal, "--json")
    assert (status, errors) == (0, "")
    events = [json.loads(line) for line in output.splitlines()]
    types = [each["type"] for each in events]
    assert {"round_started", "text_delta"} <= set(types)
    assert "tool_call_started" not in types
    assert types[-1] == "run_finished"
    assert all("queue_seconds" in each for each in events if each["type"] == "round_finished")


def test_a_resumed_run_that_fails_says_so(command: Command, server: ThreadedServer, tmp_path: Path) -> None:
    journal = str(tmp_path / "run.db")
    server.scripted.script(reply(400, {"error": "broken"}), reply(400, {"error": "still broken"}))
    command("run", "Tidy up", "--journal", journal)
    status, output, errors = command("resume", journal)
    assert (status, output) == (1, "")
    assert "still broken" in errors


def test_the_runs_of_a_journal_are_listed(command: Command, server: ThreadedServer, tmp_path: Path) -> None:
    journal = str(tmp_path / "run.db")
    server.scripted.script(answer("Done."), reply(400, {"error": "broken"}))
    command("run", "First", "--journal", journal)
    command("run", "Second", "--journal", journal)
    rows = [line.split() for line in command("resume", journal, "--list").output.splitlines()]
    assert sorted((row[1], row[-1]) for row in rows[1:]) == [("failed", "Second"), ("finished", "First")]
    assert {each["state"] for each in json.loads(command("resume", journal, "--list", "--json").output)} == {
        "failed",
        "finished",
    }


def test_a_journal_that_does_not_exist_is_an_error_in_one_line(command: Command, tmp_path: Path) -> None:
    status, _, errors = command("resume", str(tmp_path / "missing.db"))
    assert status == 1
    assert errors.startswith("error: ")
    assert "missing.db" in errors
