"""Attacks of docs/security.md that belong to no single module: injected lines, huge numbers, and keys that leak."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMError, LLMValidationError
from lmbridge.observe import TimelineObserver
from lmbridge.testing import ScriptedServer, answer, raw, reply, sse
from tests.agent.support import add, asks, calls
from tests.support import MESSAGES

KEY = "sk-very-secret-123456"
HOSTILE = "gone\r\n2026-01-01 ERROR root: forged\x1b]0;owned\x07\u202e"


# Injected header fields


@pytest.mark.parametrize("text", ["a\r\nEvil: 1", "a\nEvil: 1", "a\rb", "a\0b"])
@pytest.mark.parametrize(
    "options",
    [
        lambda text: {"headers": {"X-Name": text}},
        lambda text: {"headers": {text: "x"}},
        lambda text: {"api_key": text},
        lambda text: {"auth": ("user", "password"), "headers": {"X-Name": text}},
    ],
    ids=["value", "name", "key", "beside auth"],
)
def test_a_client_takes_no_header_with_a_line_break(text: str, options: Any) -> None:
    with pytest.raises(LLMValidationError):
        LLMClient("http://127.0.0.1:1", **options(text))


async def test_a_call_takes_no_header_with_a_line_break(scripted_server: ScriptedServer, client: LLMClient) -> None:
    for headers in ({"X-Name": "a\r\nEvil: 1"}, {"X\r\nEvil": "1"}):
        with pytest.raises(LLMValidationError):
            await client.chat_completion(MESSAGES, extra_headers=headers)
    assert scripted_server.requests == []


async def test_a_query_and_a_model_cannot_inject_anything(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("Hi")
    async with LLMClient(scripted_server.api_base, "a\r\nEvil: 1", model_mismatch="ignore") as client:
        await client.chat_completion(MESSAGES, extra_query={"a\r\nEvil": "b\r\nEvil: 1"})
    (request,) = scripted_server.requests
    assert "evil" not in {name.lower() for name in request.headers}
    assert request.json["model"] == "a\r\nEvil: 1"


# Injected lines of the log


async def test_no_line_of_the_log_is_forged(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture, no_waits: list[float]
) -> None:
    caplog.set_level(logging.DEBUG, "lmbridge")
    scripted_server.script(
        *[reply(503, {"error": {"message": HOSTILE}})] * 4,
        reply(400, HOSTILE.encode(), content_type="text/plain"),
        reply(200, {"model": HOSTILE, "choices": [{"message": {"content": HOSTILE}, "finish_reason": "stop"}]}),
        sse({"error": {"message": HOSTILE}}),
        calls(asks("add", a=1, b=2), asks(HOSTILE, b=HOSTILE)),
        answer(HOSTILE),
    )
    for stream in (False, False, False, True):
        with contextlib.suppress(LLMError):
            got: Any = await client.chat_completion(MESSAGES, stream=stream)
            if stream:
                await got.collect()
    await Agent(client, tools=[add]).run("Go.")
    assert caplog.records
    for record in caplog.records:
        assert "\x1b" not in record.getMessage()
        assert not any(line.startswith("2026-01-01 ERROR") for line in record.getMessage().splitlines())


# Numbers


@pytest.mark.parametrize("number", ["1e999", "-1e999", "9" * 5000, "1" + "0" * 400 + ".5", "-0", "1e-999"])
@pytest.mark.parametrize("field", ["prompt_tokens", "created", "index"])
async def test_a_huge_number_is_a_value_or_a_named_error(
    scripted_server: ScriptedServer, client: LLMClient, number: str, field: str
) -> None:
    message = '"message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"'
    body = (
        f'{{"choices": [{{"index": {number if field == "index" else 0}, {message}}}], '
        f'"created": {number if field == "created" else 0}, "model": "test-model", '
        f'"usage": {{"prompt_tokens": {number if field == "prompt_tokens" else 0}, "completion_tokens": 1}}}}'
    )
    chunk = body.replace('"message"', '"delta"')
    scripted_server.script(reply(200, body.encode()), sse(f"data: {chunk}\n\n", done=True))
    for stream in (False, True):
        with contextlib.suppress(LLMError):
            got: Any = await client.chat_completion(MESSAGES, stream=stream)
            whole = await got.collect() if stream else got
            assert whole["choices"][0]["message"]["content"] == "Hi"


@pytest.mark.parametrize("length", ["9" * 30, "-1", "0x10", "1e3", "10, 20"])
async def test_a_length_that_is_no_number_is_a_named_error(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], length: str
) -> None:
    scripted_server.default = raw(f"HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{{}}".encode())
    with pytest.raises(LLMError):
        await client.chat_completion(MESSAGES)


# Keys


async def test_a_key_is_in_no_pickle_copy_or_timeline(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    timeline = TimelineObserver()
    echo = {"error": {"message": f"Incorrect API key: {KEY}", "headers": {"Authorization": f"Bearer {KEY}"}}}
    scripted_server.default = reply(400, echo)
    async with LLMClient(scripted_server.api_base, api_key=KEY, observers=[timeline]) as client:
        with pytest.raises(LLMError) as caught:
            await client.chat_completion(MESSAGES)
        with pytest.raises(LLMError) as of_run:
            await Agent(client).run("Go.")
        for error in (caught.value, of_run.value):
            assert KEY.encode() not in pickle.dumps(error)
            for copied in (copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
                assert KEY not in f"{copied} {copied!r} {vars(copied)}"
        assert KEY not in f"{client!r} {vars(timeline)}"
    path = tmp_path / "timeline.html"
    timeline.write(path)
    assert KEY not in path.read_text()
