"""Ctrl-C at any moment: at each instruction with which a blocking call hands its coroutine over and waits for it."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest

from lmbridge import LLMConnectionError
from lmbridge.sync import LLMClient
from lmbridge.sync._portal import Portal, portal
from lmbridge.testing import answer, reset
from tests.threaded_server import ThreadedServer

HELLO = [{"role": "user", "content": "Hello!"}]


async def nothing() -> None:
    pass


class Interrupt:
    """Raises a `KeyboardInterrupt` at one instruction of `Portal.run`, counted from its first."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0

    @contextmanager
    def armed(self) -> Iterator[None]:
        before = sys.gettrace()
        at, self.at = self.at, 0
        sys.settrace(self._enter)
        try:
            # Since Python 3.12, the instructions of a function are reported from its second traced call on.
            portal.run(nothing)
            self.at, self.count = at, 0
            yield
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        if frame.f_code is not Portal.run.__code__:
            return None
        frame.f_trace_opcodes = True
        return self._step

    def _step(self, _frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "opcode":
            self.count += 1
            if self.count == self.at:
                raise KeyboardInterrupt
        return self._step


def interrupted_call(work: Any, at: int) -> bool:
    """Runs a blocking call that is interrupted at an instruction, and returns whether there is such an instruction."""
    interrupt = Interrupt(at)
    try:
        with interrupt.armed():
            work()
    except KeyboardInterrupt:
        return True
    except LLMConnectionError:
        # An interrupt while an error is being raised does not come here.
        assert interrupt.count < at
    return False


def assert_nothing_runs(a_portal: Portal) -> None:
    async def others() -> list[asyncio.Task[Any]]:
        return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

    assert a_portal.run(others) == []


def test_an_interrupt_leaves_nothing_running(server: ThreadedServer, client: LLMClient) -> None:
    server.answer(answer("Hello!"))
    client.chat_completion(HELLO)
    reached = 0
    for at in itertools.count(1):
        if not interrupted_call(lambda: client.chat_completion(HELLO), at):
            break
        reached += 1
        assert client.stats().in_flight == 0, f"at instruction {at}"
        assert_nothing_runs(portal)
    assert reached > 40
    assert client.chat_completion(HELLO)["choices"][0]["message"].get("content") == "Hello!"


def test_an_interrupt_of_a_call_that_fails_leaves_nothing_running(server: ThreadedServer) -> None:
    server.answer(reset())
    with LLMClient(server.api_base, "test-model", max_retries=0) as client:
        for at in itertools.count(1):
            if not interrupted_call(lambda: client.chat_completion(HELLO), at):
                break
            assert client.stats().in_flight == 0, f"at instruction {at}"
            assert_nothing_runs(portal)


def test_an_interrupt_while_the_loop_is_started_does_not_block_the_next_call() -> None:
    async def work() -> int:
        return 7

    started = threading.Thread.start
    for is_late in (False, True):
        own = Portal()

        def start(thread: threading.Thread, *, is_late: bool = is_late) -> None:
            if is_late:
                started(thread)
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            with pytest.raises(KeyboardInterrupt):
                own.run(work)
        assert own.run(work) == 7
        own.shut_down()
