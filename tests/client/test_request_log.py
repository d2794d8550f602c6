"""The line that each request writes to the log of `lmbridge.transport`, at level INFO."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from lmbridge import Limits, LLMClient, LLMError, TaskCancelledError, Timeouts, collect
from lmbridge.testing import MockRequest, MockResponse, MockTransport, ScriptedServer, answer, hang_up, stall
from tests.support import HALF, MESSAGES, opened, piece, read_text, turns

USAGE = {"prompt_tokens": 12, "completion_tokens": 34, "total_tokens": 46}
COMPLETION = {"choices": [{"message": {"role": "assistant", "content": "Hello"}}], "usage": USAGE}


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "lmbridge"):
        yield caplog


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines so far, without their seconds."""
    assert {record.name for record in caplog.records} <= {"lmbridge.transport"}
    return [re.sub(r"\d+\.\d\d s", "N s", message) for message in caplog.messages]


def client_of(handler: Any, **options: Any) -> LLMClient:
    return LLMClient(model="m", transport=MockTransport(handler, api_key="sk-secret-key"), **options)


def line_of(outcome: str, tokens: str = "", attempts: str = "1 attempt") -> str:
    return f"POST http://llm.test/v1/chat/completions model=m {outcome} in N s{tokens}, {attempts}"


async def test_a_plain_reply(log: pytest.LogCaptureFixture) -> None:
    await client_of(lambda _: COMPLETION).chat_completion(MESSAGES)
    assert lines(log) == [line_of("200", ", 12 + 34 tokens")]


async def test_a_reply_that_reports_no_tokens(log: pytest.LogCaptureFixture) -> None:
    await client_of(lambda _: {**COMPLETION, "usage": None}).chat_completion(MESSAGES)
    assert lines(log) == [line_of("200")]


async def test_a_model_list(log: pytest.LogCaptureFixture) -> None:
    await client_of(lambda _: {"data": []}).list_models()
    assert lines(log) == ["GET http://llm.test/v1/models model=None 200 in N s, 1 attempt"]


@pytest.mark.parametrize("done", [True, False])
async def test_a_stream_writes_its_line_when_it_ends(log: pytest.LogCaptureFixture, done: bool) -> None:
    events = [piece("a"), piece(finish_reason="stop", usage=USAGE)]
    stream = await opened(client_of(lambda _: MockResponse(events=events, done=done), model_mismatch="ignore"))
    await anext(stream)
    assert lines(log) == []
    await read_text(stream)
    assert lines(log) == [line_of("200", ", 12 + 34 tokens")]


async def test_an_error_reply(log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LLMError):
        await client_of(lambda _: MockResponse(400, json={"error": "no"})).chat_completion(MESSAGES)
    assert lines(log) == [line_of("400")]


async def test_a_request_that_was_repeated_writes_one_line(
    log: pytest.LogCaptureFixture, no_waits: list[float]
) -> None:
    replies: Iterator[Any] = iter([MockResponse(503), MockResponse(503), COMPLETION])
    await client_of(lambda _: next(replies)).chat_completion(MESSAGES)
    assert lines(log) == [line_of("200", ", 12 + 34 tokens", "3 attempts")]


async def test_a_request_that_failed_names_the_class_of_its_error(
    log: pytest.LogCaptureFixture, no_waits: list[float]
) -> None:
    def handler(_: MockRequest) -> dict[str, Any]:
        raise ConnectionRefusedError(111, "refused")

    with pytest.raises(LLMError):
        await client_of(handler).chat_completion(MESSAGES)
    assert lines(log) == [line_of("LLMConnectionError", attempts="3 attempts")]


async def never(_: MockRequest) -> Any:
    return await asyncio.get_running_loop().create_future()


async def test_a_request_that_took_too_long(log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LLMError):
        await client_of(never, timeout=Timeouts(first_byte=0.02)).chat_completion(MESSAGES)
    assert lines(log) == [line_of("LLMTimeoutError")]


async def test_a_request_that_was_cancelled(log: pytest.LogCaptureFixture) -> None:
    asked = asyncio.create_task(client_of(never).chat_completion(MESSAGES))
    await turns(10)
    asked.cancel()
    await asyncio.wait([asked])
    assert lines(log) == [line_of("CancelledError")]


async def test_a_request_that_was_cancelled_in_the_queue(log: pytest.LogCaptureFixture) -> None:
    transport = MockTransport(never, limits=Limits(max_concurrency=1))
    client = LLMClient(model="m", transport=transport)
    asked = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(2)]
    await turns(10)
    asked[1].cancel()
    await asyncio.wait([asked[1]])
    assert lines(log) == [line_of("CancelledError", attempts="0 attempts")]
    asked[0].cancel()
    await asyncio.wait([asked[0]])


async def half(_: MockRequest) -> AsyncIterator[dict[str, Any]]:
    for chunk in HALF:
        yield {**chunk, "model": "m"}
    await asyncio.get_running_loop().create_future()


async def test_a_stream_that_is_closed_early(log: pytest.LogCaptureFixture) -> None:
    async with await opened(client_of(half)) as stream:
        await anext(stream)
    assert lines(log) == [line_of("TaskCancelledError")]
    await stream.aclose()
    assert len(lines(log)) == 1


async def test_a_stream_whose_reader_is_cancelled(log: pytest.LogCaptureFixture) -> None:
    reading = asyncio.create_task(collect(await opened(client_of(half))))
    await turns(20)
    reading.cancel()
    await asyncio.wait([reading])
    assert lines(log) == [line_of("CancelledError")]


async def test_a_stream_that_fails(log: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LLMError):
        await read_text(await opened(client_of(half, timeout=Timeouts(idle=0.02))))
    assert lines(log) == [line_of("LLMTimeoutError")]
    log.clear()
    with pytest.raises(LLMError):
        await read_text(await opened(client_of(lambda _: [piece("a", model="m"), {"error": "model crashed"}])))
    assert lines(log) == [line_of("ModelLoadError")]


async def test_a_stream_that_is_dropped(log: pytest.LogCaptureFixture) -> None:
    stream = await opened(client_of(half))
    await anext(stream)
    with pytest.warns(ResourceWarning, match="unclosed stream"):  # noqa: PT031 - the last reference goes in there
        del stream
        gc.collect()
    assert lines(log) == [line_of("dropped unclosed")]


async def test_a_client_that_is_closed(scripted_server: ScriptedServer, log: pytest.LogCaptureFixture) -> None:
    scripted_server.script(stall(after=[*HALF]), stall())
    client = LLMClient(scripted_server.api_base, "m", model_mismatch="ignore", limits=Limits())
    stream = await opened(client)
    asked = asyncio.create_task(client.chat_completion(MESSAGES))
    await scripted_server.wait_until(lambda: scripted_server.in_flight == 2)
    await client.close()
    with pytest.raises(TaskCancelledError):
        await asked
    outcomes = [line.split(" model=m ")[1] for line in lines(log)]
    assert outcomes == ["TaskCancelledError in N s, 1 attempt"] * 2
    with pytest.raises(LLMError):
        await read_text(stream)
    assert len(lines(log)) == 2


async def test_a_silent_repetition_on_a_dead_kept_connection_is_not_an_attempt(
    scripted_server: ScriptedServer, log: pytest.LogCaptureFixture
) -> None:
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        await client.chat_completion(MESSAGES)
        scripted_server.hang_up_reused = 1
        await client.chat_completion(MESSAGES)
    assert len(lines(log)) == 2
    assert all(line.endswith(", 1 attempt") for line in lines(log))


async def test_no_line_shows_a_key_or_a_body(log: pytest.LogCaptureFixture, no_waits: list[float]) -> None:
    replies: Iterator[Any] = iter([MockResponse(503, json={"error": "sk-secret-key"}), COMPLETION])
    with log.at_level(logging.DEBUG, "lmbridge"):
        await client_of(lambda _: next(replies)).chat_completion(MESSAGES)
    assert "secret" not in log.text
    assert MESSAGES[0]["content"] not in log.text
    assert "chat completion: status 503; retry in" in log.text


async def test_nothing_is_counted_if_nobody_listens(
    scripted_server: ScriptedServer, log: pytest.LogCaptureFixture, no_waits: list[float]
) -> None:
    scripted_server.script(hang_up(), answer("Hi"))
    with log.at_level(logging.WARNING, "lmbridge"):
        async with LLMClient(scripted_server.api_base, "test-model") as client:
            await client.chat_completion(MESSAGES)
    assert lines(log) == []


async def test_a_line_has_its_numbers_as_fields(caplog: pytest.LogCaptureFixture) -> None:
    await client_of(lambda _: COMPLETION).chat_completion(MESSAGES)
    fields = {name: value for name, value in vars(caplog.records[0]).items() if name.startswith("lmbridge_")}
    assert fields.pop("lmbridge_seconds") >= 0
    assert fields == {
        "lmbridge_operation": "chat completion",
        "lmbridge_model": "m",
        "lmbridge_outcome": 200,
        "lmbridge_attempts": 1,
        "lmbridge_prompt_tokens": 12,
        "lmbridge_completion_tokens": 34,
    }
