"""`enable_logging`, and the line about requests that wait in the queue."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

import lmbridge
from lmbridge import Limits, LLMClient, LLMValidationError
from lmbridge.testing import MockRequest, MockTransport
from tests.support import MESSAGES


async def answer(request: MockRequest) -> Any:
    await asyncio.sleep(0)
    return {"choices": [{"message": {"content": "Hello"}}]}


async def test_each_request_is_one_line_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    lmbridge.enable_logging("debug")
    lmbridge.enable_logging()
    await LLMClient(transport=MockTransport(answer)).chat_completion(MESSAGES)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "INFO    lmbridge.transport: POST http://llm.test/v1/chat/completions model=None 200 in" in lines[0]


@pytest.mark.parametrize("level", ["loud", None, 10])
def test_an_unknown_level_is_refused(level: Any) -> None:
    with pytest.raises(LLMValidationError, match=r"^level must be 'debug', 'info', 'warning' or 'error'"):
        lmbridge.enable_logging(level)


async def test_prompts_are_written_only_if_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    client, secret = LLMClient(transport=MockTransport(answer)), {"X-Key": "sk-secret"}
    question = [{"role": "user", "content": "Is sk-secret xyzzy?"}]
    lmbridge.enable_logging("debug")
    await client.chat_completion(question)
    assert "xyzzy" not in capsys.readouterr().err
    lmbridge.enable_logging("debug", prompts=True)
    await client.chat_completion(question, extra_headers=secret)
    written = capsys.readouterr().err
    assert "DEBUG   lmbridge.prompts: POST http://llm.test/v1/chat/completions sends {" in written
    assert "xyzzy" in written
    assert "sk-secret" not in written
    lmbridge.enable_logging("debug")
    await client.chat_completion(question)
    assert "xyzzy" not in capsys.readouterr().err
    with pytest.raises(LLMValidationError, match="prompts are not written at level 'info'; pass level='debug'"):
        lmbridge.enable_logging(prompts=True)


async def test_a_program_that_logs_everything_has_not_asked_for_prompts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="lmbridge")
    client = LLMClient(transport=MockTransport(answer))
    await client.chat_completion([{"role": "user", "content": "xyzzy"}])
    assert caplog.records
    assert "xyzzy" not in caplog.text
    caplog.set_level(logging.DEBUG, logger="lmbridge.prompts")
    await client.chat_completion([{"role": "user", "content": "xyzzy"}])
    assert "xyzzy" in caplog.text


async def test_a_request_that_waits_in_the_queue_is_one_debug_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="lmbridge.transport")
    client = LLMClient(model="m", transport=MockTransport(answer, limits=Limits(max_concurrency=1)))
    await asyncio.gather(*(client.chat_completion(MESSAGES) for _ in range(3)))
    waits = [message for message in caplog.messages if "waits for a permit" in message]
    assert waits == [
        f"chat completion model=m waits for a permit: 1 in flight, {before} waiting before it" for before in (0, 1)
    ]
