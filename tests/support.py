"""Helpers that the tests of several layers share."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterable, Awaitable, Callable, Coroutine, Generator, Mapping
from functools import partial
from typing import Any, AnyStr, TypeVar

from lmbridge import ChatStream, LLMClient
from lmbridge.types import ChatCompletionChunk

_Object = TypeVar("_Object")

MESSAGES = [{"role": "user", "content": "Say hello."}]


def piece(text: str | None = None, *, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    """Returns a chunk with a text, or with an empty delta; `fields` replace fields of the chunk."""
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"object": "chat.completion.chunk", "model": "test-model", "choices": [choice], **fields}


HALF = (piece("Hel"), piece("lo"))
"""The beginning of a stream: chunks without a finish reason."""


def replaced(text: AnyStr, old: AnyStr, new: AnyStr) -> AnyStr:
    """Returns a text with one part replaced, which must be there: otherwise a test would prove nothing."""
    assert old in text, f"{old!r} is not in {text!r}"
    return text.replace(old, new)


async def opened(client: LLMClient) -> ChatStream:
    """Opens a chat stream."""
    return await client.chat_completion(MESSAGES, stream=True)


def in_flight(client: LLMClient) -> int:
    """Returns the number of permits that the transport of a client has handed out."""
    return client._server.transport.in_flight


def text_of(chunk: Mapping[str, Any]) -> str:
    """Returns the text of a chunk."""
    return "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])


async def read_text(stream: AsyncIterable[ChatCompletionChunk]) -> str:
    """Reads a stream to its end and returns its text."""
    return "".join([text_of(chunk) async for chunk in stream])


async def turns(count: int = 3) -> None:
    """Lets the event loop run for a number of turns, so that tasks that are ready can continue."""
    for _ in range(count):
        await asyncio.sleep(0)


def living(kind: type[_Object]) -> list[_Object]:
    """Returns the objects of a class, and not of its subclasses, that are still alive after a garbage collection.

    `isinstance` would read `__class__` of every object, and Django's settings raise then if they are not configured.
    """
    gc.collect()
    return [each for each in gc.get_objects() if type(each) is kind]


def cpu_seconds(run: Callable[[], object], *, repeats: int = 3) -> float:
    """Returns the CPU time that a function takes: the least of several runs, so that a busy machine hardly matters."""

    def measure() -> float:
        started = time.process_time()
        run()
        return time.process_time() - started

    return min(measure() for _ in range(repeats))


_ATTEMPTS = 5
"""How often a growth is measured before it counts as too fast."""


def assert_linear(run: Callable[[int], object], size: int, *, doublings: int = 3, tolerance: float = 3.0) -> None:
    """Checks that the CPU time of a function does not grow faster than its input, at sizes that double.

    For example::

        assert_linear(lambda size: parse_error_body("1" * size), 10_000)

    Choose a size whose run takes some milliseconds. Below two milliseconds, the time of the smallest size counts as two
    milliseconds, because it is mostly noise. The function builds its input itself, and calls `asyncio.run` if what it
    measures is asynchronous.

    It measures time, because most of what it is used for is the work of regular expressions and of other C code, which
    cannot be counted. On a busy machine even CPU time can be several times as long for a while. So a growth that seems
    too fast is measured again, with new times of both sizes, and the check fails only if it is too fast each time:
    quadratic code is, however busy the machine.

    Args:
        run: The function. It is called with the size of the input.
        size: The smallest size.
        doublings: How often the size is doubled. With 3, linear time grows by 8 and quadratic time by 64.
        tolerance: How much more than linear the growth may be. It is generous, so that the test cannot fail by chance.
    """
    for doubling in range(1, doublings + 1):
        # Each size is checked before the next one is tried, so that a test of quadratic code fails soon.
        factor = 2**doubling
        growths: list[float] = []
        while not growths or growths[-1] > tolerance * factor:
            assert len(growths) < _ATTEMPTS, (
                f"{factor} times the input took {min(growths):.1f} times as long, at best in {_ATTEMPTS} attempts"
            )
            growths.append(_growth(run, size, factor))


def _growth(run: Callable[[int], object], size: int, factor: int) -> float:
    smallest = max(cpu_seconds(partial(run, size)), 0.002)
    return cpu_seconds(partial(run, size * factor)) / smallest


class Steps:
    """Awaits a coroutine and calls a function each time the coroutine waits for something.

    Args:
        coroutine: The coroutine to run.
        at_wait: The function; it is called with the number of the wait, starting at 1.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at_wait: Callable[[int], object]) -> None:
        self.count = 0
        self._coroutine = coroutine
        self._at_wait = at_wait

    def __await__(self) -> Generator[Any, Any, Any]:
        step: Callable[[], Any] = partial(self._coroutine.send, None)
        while True:
            try:
                waited_for = step()
            except StopIteration as stop:
                return stop.value
            self.count += 1
            self._at_wait(self.count)
            try:
                value = yield waited_for
            except BaseException as error:  # noqa: BLE001 - the coroutine gets every exception
                step = partial(self._coroutine.throw, error)
            else:
                step = partial(self._coroutine.send, value)


async def cancel_at_each_step(
    run: Callable[[], Coroutine[Any, Any, Any]], after: Callable[[], Awaitable[None]], *, at_least: int
) -> None:
    """Runs a coroutine again and again, cancelled at its 1st, 2nd, ... wait, until one run is not cancelled.

    Args:
        run: Creates the coroutine.
        after: Called after each cancelled run, to check that nothing is left behind.
        at_least: The minimum number of waits, so that the test cannot pass without cancelling anything.
    """
    cancel_at = 0
    while True:
        cancel_at += 1
        task = asyncio.ensure_future(_cancelled_at(run(), cancel_at))
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()
            break
        await after()
    assert cancel_at > at_least, f"only {cancel_at - 1} waits were cancelled"


async def _cancelled_at(coroutine: Coroutine[Any, Any, Any], number: int) -> Any:
    task = asyncio.current_task()
    assert task is not None
    soon = asyncio.get_running_loop().call_soon
    return await Steps(coroutine, lambda count: soon(task.cancel) if count == number else None)
