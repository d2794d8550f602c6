"""Whole programs, as a user would write and start them: on the scripted server, and on a real one.

tests/programs/scripts has the programs, and tests/programs/user_project a project with tests of its own.
"""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lmbridge import LocalServer
from lmbridge.testing import Exchange, ScriptedServer, answer, reply, sse
from tests.support import piece

HERE = Path(__file__).parent
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII=")
TOO_LONG = {"error": {"message": "request (20001 tokens) exceeds the available context size", "code": 400}}


class Outcome(NamedTuple):
    status: int | None
    output: str
    errors: str


async def run(script: str, api_base: str, *args: str, text: str = "", model: str = "test-model") -> Outcome:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error::ResourceWarning", str(HERE / "scripts" / script), *args),
        env=os.environ | {"LMBRIDGE_API_BASE": api_base, "LMBRIDGE_MODEL": model},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate(text.encode())
    return Outcome(process.returncode, output.decode(), errors.decode())


def sent(server: ScriptedServer) -> list[dict[str, Any]]:
    """Returns the bodies that the server received."""
    return [request.json for request in server.requests if request.body]


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    path.write_bytes(PIXEL)
    return path


# On the scripted server


async def test_a_chat_keeps_the_conversation_and_goes_on_after_an_error(scripted_server: ScriptedServer) -> None:
    scripted_server.script(answer("Hello there."), reply(400, {"error": "no such thing"}), answer("Good bye."))
    outcome = await run("chat.py", scripted_server.api_base, text="Hello!\nBoo!\nBye!\n")
    assert outcome == (0, "Hello there.\n! the server answered 400: no such thing\nGood bye.\n(5 messages)\n", "")
    contents = [[message["content"] for message in body["messages"][1:]] for body in sent(scripted_server)]
    assert contents == [["Hello!"], ["Hello!", "Hello there.", "Boo!"], ["Hello!", "Hello there.", "Bye!"]]


async def behave_like_openai(exchange: Exchange) -> None:
    body = exchange.request.json
    function = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    if len(body["messages"][0]["content"]) > 1000:
        await reply(400, TOO_LONG)(exchange)
    elif "tools" in body:
        await answer("", tool_calls=[{"id": "call_1", "type": "function", "function": function}])(exchange)
    elif "response_format" in body:
        await answer('{"name": "Oslo", "people": 720000}')(exchange)
    else:
        await answer("Hello to you.")(exchange)


async def test_the_port_of_an_openai_script_sends_the_same_requests_and_prints_the_same(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.default = behave_like_openai
    original = await run("openai_original.py", scripted_server.api_base)
    expected = sent(scripted_server)
    headers = [
        {name: request.headers.get(name) for name in ("X-Team", "X-Request-Source")}
        for request in scripted_server.requests
    ]
    scripted_server.requests.clear()
    port = await run("openai_port.py", scripted_server.api_base)
    assert (port.status, port.errors) == (0, "")
    assert (original.status, port.output) == (0, original.output)
    assert port.output == (
        "['test-model']\nHello to you.\n4\nHello to you.\nget_weather {'city': 'Oslo'}\nCity\n200 application/json\n"
        "too long: 400\n"
    )
    assert headers == [
        {name: request.headers.get(name) for name in ("X-Team", "X-Request-Source")}
        for request in scripted_server.requests
    ]
    # `parse` streams, so that a call that is cancelled stops the server, and its schema may have another form.
    assert [_comparable(body) for body in sent(scripted_server)] == [_comparable(body) for body in expected]


def _comparable(body: dict[str, Any]) -> dict[str, Any]:
    if "response_format" not in body:
        return body
    schema = body["response_format"]["json_schema"]["schema"]
    return {"messages": body["messages"], "max_tokens": body["max_tokens"], "fields": sorted(schema["properties"])}


async def test_a_program_logs_its_requests_with_the_standard_module(
    scripted_server: ScriptedServer, tmp_path: Path
) -> None:
    scripted_server.script(reply(503, {"error": "busy"}), answer("Hello."), answer("Hi."), reply(400, TOO_LONG))
    path = tmp_path / "requests.jsonl"
    outcome = await run("log_requests.py", scripted_server.api_base, str(path))
    assert outcome == (0, "Hello.\nContextLengthExceededError\n", "")
    log = path.read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    url = f"POST {scripted_server.api_base}/chat/completions model=test-model"
    requests = [line["text"] for line in lines if line["level"] == "INFO" and line["logger"] == "lmbridge.transport"]
    assert [text.startswith(f"{url} {status} in ") for text, status in zip(requests, (200, 200, 400), strict=True)]
    assert "2 attempts" in requests[0]
    assert "1 + 1 tokens" in requests[1]
    assert any("status 503" in line["text"] for line in lines if line["level"] == "DEBUG")
    assert "secret" not in log


async def behave_like_a_model(exchange: Exchange) -> None:
    body = exchange.request.json
    question = str(body["messages"][0]["content"])
    if "picture" in question:
        assert body["messages"][0]["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")
        await answer("A black dot.")(exchange)
    elif "17" in question:
        await answer("51", reasoning="17 + 17 + 17")(exchange)
    elif body.get("logprobs"):
        tokens = [{"token": token, "logprob": logprob} for token, logprob in (("yes", -0.1), ("no", -3.0))]
        content = [{**tokens[0], "top_logprobs": tokens}]
        message = {"role": "assistant", "content": "yes"}
        choice = {"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": content}}
        await reply(200, {"choices": [choice]})(exchange)
    elif body.get("stream"):
        ships = [piece(f"Ship {index}") for index in range(3)] + [piece(finish_reason="stop") for _ in range(3)]
        for index, ship in enumerate(ships):
            ship["choices"][0]["index"] = index % 3
        await sse(*ships, done=True)(exchange)
    elif body.get("n"):
        choices = [{"index": index, "message": {"role": "assistant", "content": "Ship"}} for index in range(3)]
        await reply(200, {"choices": choices})(exchange)
    elif isinstance(body["tool_choice"], dict):
        await reply(400, {"error": "Invalid tool_choice type: 'object'."})(exchange)
    else:
        call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
        await answer("5", tool_calls=[call] if body["tool_choice"] == "required" else [])(exchange)


async def test_a_program_uses_images_reasoning_logprobs_several_answers_and_tool_choice(
    scripted_server: ScriptedServer, picture: Path
) -> None:
    scripted_server.default = behave_like_a_model
    outcome = await run("model_features.py", scripted_server.api_base, str(picture))
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.splitlines() == [
        "picture: A black dot.",
        "thought 12 characters, said '51'",
        "streamed {'reasoning': 12, 'text': 2}",
        "chances: [0.9, 0.05]",
        "answers: 3",
        "streamed answers: 3",
        "call: add with ['a', 'b']",
        "refused: 400",
    ]


# It starts pytest in a process of its own, which takes a while on a busy machine.
@pytest.mark.timeout(240)
async def test_a_user_tests_a_program_without_a_server(tmp_path: Path) -> None:
    shutil.copytree(HERE / "user_project", tmp_path / "project")
    (tmp_path / "project" / "pytest.ini").write_text(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "check_summaries.py"),
        cwd=tmp_path / "project",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    assert b"4 passed" in output


# On a real server


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_the_programs_run_on_the_embedded_server(picture: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    async with LocalServer(n_ctx=4096, n_parallel=4) as server:
        programs = {
            "chat.py": await run("chat.py", server.api_base, text="Hello!\nAnd you?\n", model=server.model),
            "openai_original.py": await run("openai_original.py", server.api_base, model=server.model),
            "openai_port.py": await run("openai_port.py", server.api_base, model=server.model),
            "log_requests.py": await run("log_requests.py", server.api_base, str(tmp_path / "log"), model=server.model),
            "model_features.py": await run("model_features.py", server.api_base, str(picture), model=server.model),
        }
    assert {name: (each.status, each.errors) for name, each in programs.items()} == dict.fromkeys(programs, (0, ""))
    assert programs["chat.py"].output.endswith("(5 messages)\n")
    assert programs["openai_port.py"].output.endswith("City\n200 application/json; charset=utf-8\ntoo long: 400\n")
    assert programs["log_requests.py"].output.endswith("\nContextLengthExceededError\n")
    features = programs["model_features.py"].output
    assert "image input is not supported" in features
    assert "streamed answers: 3" in features
    assert "call: add with ['a', 'b']" in features
