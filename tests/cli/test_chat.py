"""`lmbridge chat` with a prompt: what is sent, what is written where, and the exit status."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lmbridge.testing import answer, hang_up, reply, sse
from lmbridge.testing.completions import completion_chunk
from tests.cli.support import Command
from tests.threaded_server import ThreadedServer

PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def bodies(server: ThreadedServer) -> list[dict[str, Any]]:
    """Returns the bodies of the chat completions that the server has received."""
    return [each.json for each in server.scripted.requests if each.path == "/v1/chat/completions"]


def messages(server: ThreadedServer) -> list[Any]:
    (body,) = bodies(server)
    found: list[Any] = body["messages"]
    return found


def test_the_answer_alone_goes_to_stdout(command: Command, server: ThreadedServer) -> None:
    server.answer(answer("The capital is Paris."))
    assert command("chat", "What is the capital of France?") == (0, "The capital is Paris.\n", "")
    (body,) = bodies(server)
    assert body["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert body["model"] == "test-model"
    assert body["stream"] is True


@pytest.mark.parametrize(
    ("arguments", "stdin", "sent"),
    [
        (["Review this"], "diff --git a b\n", "Review this\n\ndiff --git a b"),
        ([], "only the pipe\n", "only the pipe"),
        (["only the prompt"], "\n", "only the prompt"),
        (["trennt"], "Grüße\n", "trennt\n\nGrüße"),
    ],
)
def test_what_is_piped_in_stands_behind_the_prompt(
    command: Command, server: ThreadedServer, arguments: list[str], stdin: str, sent: str
) -> None:
    command("chat", *arguments, stdin=stdin)
    assert messages(server) == [{"role": "user", "content": sent}]


def test_without_a_prompt_and_a_terminal_it_says_what_to_do(command: Command, server: ThreadedServer) -> None:
    status, output, errors = command("chat")
    assert (status, output) == (2, "")
    assert (
        errors
        == 'error: no prompt was given, and a conversation needs a terminal\nhint: lmbridge chat "your question"\n'
    )
    assert bodies(server) == []


def test_a_pipe_that_is_not_text_is_refused(command: Command, server: ThreadedServer) -> None:
    status, _, errors = command("chat", "What is this?", stdin=b"\x89PNG\xff")
    assert status == 2
    assert "what is piped in is not text" in errors
    assert "--image FILE" in errors
    assert bodies(server) == []


def test_options_become_the_request(command: Command, server: ThreadedServer, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(PNG)
    server.scripted.models.append("other")
    command(
        *("chat", "What is this?", "--model", "other", "--system", "Be brief.", "--image", str(picture)),
        *("--max-tokens", "7", "--temperature", "0.5"),
    )
    (body,) = bodies(server)
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("other", 7, 0.5)
    system, user = body["messages"]
    assert system == {"role": "system", "content": "Be brief."}
    text, image = user["content"]
    assert text == {"type": "text", "text": "What is this?"}
    assert image["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_missing_image_is_an_error_before_anything_is_sent(command: Command, server: ThreadedServer) -> None:
    status, _, errors = command("chat", "What is this?", "--image", "missing.png")
    assert status == 2
    assert "missing.png" in errors
    assert bodies(server) == []


def test_control_characters_of_the_model_do_not_reach_the_terminal(command: Command, server: ThreadedServer) -> None:
    server.answer(answer("\x1b]0;owned\x07 one\r\ntwo \x9b2J"))
    assert command("chat", "Hello").output == "␛]0;owned␇ one\ntwo \ufffd2J\n"


def test_control_characters_of_the_server_do_not_reach_the_terminal(command: Command, server: ThreadedServer) -> None:
    server.answer(reply(400, {"error": {"message": "bad \x1b[2J request"}}))
    status, _, errors = command("chat", "Hello")
    assert status == 1
    assert "\x1b" not in errors
    assert "bad ␛[2J request" in errors


# Reasoning


def thinking_answer() -> Any:
    chunks = [
        completion_chunk("chatcmpl-1", "test-model", {"role": "assistant", "reasoning_content": "Hmm, "}),
        completion_chunk("chatcmpl-1", "test-model", {"reasoning_content": "France."}),
        completion_chunk("chatcmpl-1", "test-model", {"content": "Paris"}),
        completion_chunk("chatcmpl-1", "test-model", {}, finish_reason="stop"),
    ]
    return sse(*chunks, done=True)


def test_reasoning_is_hidden_in_a_pipe(command: Command, server: ThreadedServer) -> None:
    server.answer(thinking_answer())
    assert command("chat", "Hello") == (0, "Paris\n", "")


def test_reasoning_that_is_wanted_goes_to_stderr_so_that_the_pipe_gets_the_answer_alone(
    command: Command, server: ThreadedServer
) -> None:
    server.answer(thinking_answer())
    outcome = command("chat", "Hello", "--reasoning", "show")
    assert outcome == (0, "Paris\n", "[thinking]\nHmm, France.\n[/thinking]\n")


# JSON


def test_json_prints_the_whole_reply(command: Command, server: ThreadedServer) -> None:
    server.answer(answer("Paris"))
    outcome = command("chat", "Hello", "--json")
    value = json.loads(outcome.output)
    assert value["choices"][0]["message"]["content"] == "Paris"
    assert value["usage"]["total_tokens"] > 0
    assert outcome.errors == ""


def person_schema(folder: Path) -> str:
    path = folder / "person.json"
    properties = {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}}
    path.write_text(json.dumps({"type": "object", "properties": properties, "required": ["name", "age"]}))
    return str(path)


def test_an_answer_that_follows_the_schema_is_printed_as_json(
    command: Command, server: ThreadedServer, tmp_path: Path
) -> None:
    server.answer(answer('```json\n{"name": "Ada", "age": 36}\n```'))
    outcome = command("chat", "Invent a person", "--schema", person_schema(tmp_path))
    assert (outcome.status, outcome.errors) == (0, "")
    assert json.loads(outcome.output) == {"name": "Ada", "age": 36}
    (body,) = bodies(server)
    assert body["response_format"]["type"] == "json_schema"
    assert body["response_format"]["json_schema"]["name"] == "person"


@pytest.mark.parametrize("text", ['{"name": "Ada"}', '{"name": "Ada", "age": -1}', "[]", "Ada, 36"])
def test_an_answer_that_does_not_follow_the_schema_is_an_error(
    command: Command, server: ThreadedServer, tmp_path: Path, text: str
) -> None:
    server.answer(answer(text))
    outcome = command("chat", "Invent a person", "--schema", person_schema(tmp_path))
    assert (outcome.status, outcome.output) == (1, "")
    assert "error: the answer does not follow the schema" in outcome.errors


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('"text"', "is not the JSON schema of an object"),
        ('{"type": "array"}', "of an object"),
        # How deep is too deep depends on the version of Python.
        ('{"type": "object", "properties": {"x": ' * 1_200 + "{}" + "}}" * 1_200, "nested too deeply"),
        ('{"type": "object", "properties": {"x": ' * 20_000 + "{}" + "}}" * 20_000, "nested too deeply"),
    ],
)
def test_a_file_that_is_no_schema_is_refused(
    command: Command, server: ThreadedServer, tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "schema.json"
    path.write_text(content)
    status, _, errors = command("chat", "Hello", "--schema", str(path))
    assert status == 2
    assert message in errors
    assert bodies(server) == []


# Continuing


def test_the_last_conversation_goes_on(command: Command, server: ThreadedServer) -> None:
    server.scripted.script(answer("Paris"), answer("Yes"))
    command("chat", "What is the capital of France?", "--system", "Be brief.")
    command("chat", "-c", "Is it large?")
    assert bodies(server)[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "Is it large?"},
    ]


def test_a_conversation_goes_on_with_its_model_unless_another_one_is_named(
    command: Command, server: ThreadedServer
) -> None:
    server.scripted.models.append("other")
    command("chat", "Hello", "-m", "other")
    command("chat", "-c", "Again")
    command("chat", "-c", "And again", "-m", "test-model")
    assert [each["model"] for each in bodies(server)] == ["other", "other", "test-model"]


def test_reasoning_is_not_sent_back(command: Command, server: ThreadedServer) -> None:
    server.answer(thinking_answer())
    command("chat", "Hello")
    command("chat", "-c", "Again")
    assert bodies(server)[1]["messages"][1] == {"role": "assistant", "content": "Paris"}


def test_without_a_log_nothing_is_written(command: Command, data_home: Path) -> None:
    assert command("chat", "Hello", "--no-log").status == 0
    assert not data_home.exists()
    status, _, errors = command("chat", "-c", "Again")
    assert status == 1
    assert "the log has no conversation to continue" in errors


def test_continuing_without_a_log_is_a_contradiction(command: Command) -> None:
    status, _, errors = command("chat", "-c", "Again", "--no-log")
    assert status == 2
    assert "--continue needs the log" in errors


def test_a_log_that_cannot_be_written_is_a_warning_because_the_answer_was_given(
    command: Command, data_home: Path
) -> None:
    data_home.write_text("a file in place of the folder")
    status, output, errors = command("chat", "Hello")
    assert status == 0
    assert output
    assert "warning: cannot use the log of conversations" in errors
    assert "--no-log" in errors


# Endings


def test_an_answer_that_was_cut_off_has_a_warning_and_a_status(command: Command, server: ThreadedServer) -> None:
    server.answer(answer("The capital", finish_reason="length"))
    status, output, errors = command("chat", "Hello")
    assert (status, output) == (10, "The capital\n")
    assert errors.startswith("warning: the answer was cut off\nhint: ")


def test_an_answer_that_breaks_off_is_an_error_in_one_line(command: Command, server: ThreadedServer) -> None:
    server.answer(sse(completion_chunk("chatcmpl-1", "test-model", {"content": "The cap"}), end=False))
    status, output, errors = command("chat", "Hello")
    assert (status, output) == (1, "The cap\n")
    assert errors.startswith("error: chat completion with model 'test-model'")
    assert "Traceback" not in errors


def test_a_server_that_is_gone_has_a_status_of_its_own(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", "http://127.0.0.1:1/v1")
    status, output, errors = command("chat", "Hello")
    assert (status, output) == (3, "")
    assert len(errors.splitlines()) == 2
    assert errors.splitlines()[1].startswith("hint: ")


def test_debug_shows_the_traceback_and_the_log(command: Command, server: ThreadedServer) -> None:
    server.answer(reply(400, {"error": "no"}))
    status, _, errors = command("chat", "Hello", "--debug")
    assert status == 1
    assert "Traceback (most recent call last)" in errors
    assert "INFO lmbridge.transport" in errors


@pytest.mark.parametrize(
    "arguments",
    [["--json", "--mcp", "files"], ["--mcp", "files", "--schema", "SCHEMA"], ["--local", "--api-base", "http://x"]],
)
def test_options_that_contradict_each_other_are_refused(
    command: Command, server: ThreadedServer, tmp_path: Path, arguments: list[str]
) -> None:
    given = [person_schema(tmp_path) if each == "SCHEMA" else each for each in arguments]
    assert command("chat", "Hello", *given).status == 2
    assert bodies(server) == []


def test_an_unknown_option_is_a_line_and_a_hint(command: Command) -> None:
    status, _, errors = command("chat", "--nonsense")
    assert status == 2
    first, second = errors.splitlines()
    assert first.startswith("error: no such option: --nonsense")
    assert second == "hint: lmbridge chat --help lists the options"


def test_an_mcp_server_that_does_not_start_is_one_line_and_a_hint(command: Command, tmp_path: Path) -> None:
    code = "import sys; print('first line\\nlast line', file=sys.stderr); sys.exit(3)"
    config = tmp_path / "mcp.json"
    config.write_text(json.dumps({"mcpServers": {"files": {"command": sys.executable, "args": ["-c", code]}}}))
    status, _, errors = command("chat", "Hello", "--mcp", "files", "--mcp-config", str(config))
    first, second = errors.splitlines()
    assert status == 1
    assert first.startswith("error: MCP servers failed: files: ")
    assert first.endswith("first line   last line")
    assert second.startswith("hint: ")


def test_an_error_that_quotes_several_lines_is_one_line(command: Command, server: ThreadedServer) -> None:
    server.answer(reply(400, {"error": {"message": "the template failed:\n  line 3\n  line 4"}}))
    status, _, errors = command("chat", "Hello")
    (line,) = errors.splitlines()
    assert status == 1
    assert line.startswith("error: ")
    assert "the template failed:   line 3   line 4" in line


def test_the_connection_is_lost(command: Command, server: ThreadedServer) -> None:
    server.answer(hang_up())
    status, _, errors = command("chat", "Hello")
    assert status == 3
    assert errors.startswith("error: ")
