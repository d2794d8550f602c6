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


async def test_a_request_that_waits_in_the_queue_is_one_debug_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="lmbridge.transport")
    client = LLMClient(model="m", transport=MockTransport(answer, limits=Limits(max_concurrency=1)))
    await asyncio.gather(*(client.chat_completion(MESSAGES) for _ in range(3)))
    waits = [message for message in caplog.messages if "waits for a permit" in message]
    assert waits == [
        f"chat completion model=m waits for a permit: 1 in flight, {before} waiting before it" for before in (0, 1)
    ]
