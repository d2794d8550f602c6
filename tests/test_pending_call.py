"""A call whose `await` was forgotten says so, and is an ordinary coroutine for everybody who awaits it."""

# The mistakes of these tests are what type checkers report.
# mypy: disable-error-code="index, attr-defined, operator, unused-awaitable, truthy-bool, unused-coroutine, misc"
# pyright: basic, reportIndexIssue=false, reportGeneralTypeIssues=false, reportAttributeAccessIssue=false
# pyright: reportOperatorIssue=false, reportUnusedCoroutine=false

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import warnings
from collections.abc import Awaitable, Callable, Container, Iterable, Iterator, Sized
from typing import Any
from unittest import mock

import anyio
import pytest

from lmbridge import Agent, DynamicAutonomousAgent, LLMClient, LLMClientPool, LLMConnectionError, collect, text_of
from lmbridge._pending_call import PendingCall, explains_missing_await
from lmbridge.testing import MockResponse, MockTransport
from tests.support import MESSAGES

COMPLETION = {"choices": [{"message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}


@pytest.fixture
def client() -> LLMClient:
    return LLMClient(transport=MockTransport(lambda _: COMPLETION))


@pytest.fixture
def unawaited() -> Iterator[None]:
    """Drops calls without awaiting them, which Python warns about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
        yield
        gc.collect()


async def iterate(value: Any) -> None:
    async for _ in value:
        pass


async def enter(value: Any) -> None:
    async with value:
        pass


async def now(function: Callable[[Any], Any], value: Any) -> Any:
    return function(value)


def enter_plainly(value: Any) -> None:
    with value:
        pass


MISTAKES: dict[str, tuple[Callable[[Any], Awaitable[Any]], str]] = {
    "index": (functools.partial(now, lambda call: call["choices"]), "(await chat_completion(...))[...]"),
    "async for": (iterate, "async for ... in await chat_completion(...)"),
    "async with": (enter, "async with await chat_completion(...) as ..."),
    "with": (functools.partial(now, enter_plainly), "async with await chat_completion(...) as ..."),
    "for": (functools.partial(now, list), "await chat_completion(...)"),
    "in": (functools.partial(now, lambda call: "choices" in call), "await chat_completion(...)"),
    "collect": (collect, "async for ... in await chat_completion(...)"),
}


@pytest.mark.usefixtures("unawaited")
@pytest.mark.parametrize(("use", "example"), MISTAKES.values(), ids=MISTAKES)
async def test_a_call_that_is_used_without_await_is_a_sentence(
    client: LLMClient, use: Callable[[Any], Awaitable[Any]], example: str
) -> None:
    with pytest.raises(TypeError) as caught:
        await use(client.chat_completion(MESSAGES))
    assert str(caught.value) == f"`await` is missing: write `{example}`"


@pytest.mark.usefixtures("unawaited")
async def test_the_methods_of_a_dict_are_missing_with_a_sentence(client: LLMClient) -> None:
    call: Any = client.chat_completion(MESSAGES)
    for name in ("get", "keys", "items", "text"):
        with pytest.raises(AttributeError, match=r"^`await` is missing before chat_completion\(\.\.\.\): it"):
            getattr(call, name)
    assert repr(call) == "<a call of chat_completion() that has not been awaited>"
    with pytest.raises(Exception, match="reply must be the dict of a reply, not PendingCall"):
        text_of(call)


CALLS: dict[str, Callable[[LLMClient], Any]] = {
    "chat_completion": lambda client: client.chat_completion(MESSAGES),
    "text_completion": lambda client: client.text_completion("Once"),
    "embeddings": lambda client: client.embeddings("a"),
    "create_response": lambda client: client.create_response("a"),
    "ask": lambda client: client.ask("?"),
    "parse": lambda client: client.parse(MESSAGES, int),
    "list_models": lambda client: client.list_models(),
    "health_check": lambda client: client.health_check(),
    "server_info": lambda client: client.server_info(),
    "models": lambda client: client.lmstudio.models(),
    "load": lambda client: client.lmstudio.load("m"),
    "unload": lambda client: client.lmstudio.unload("m"),
    "raw chat_completion": lambda client: client.with_raw_response.chat_completion(MESSAGES),
    "raw embeddings": lambda client: client.with_raw_response.embeddings("a"),
    "get_client": lambda client: LLMClientPool().get_client("m"),
    "run": lambda client: Agent(client).run("task"),
    "autonomous_with_mcp": lambda client: DynamicAutonomousAgent(client).autonomous_with_mcp("time", "task"),
    "autonomous_discover_and_execute": lambda client: DynamicAutonomousAgent(client).autonomous_discover_and_execute(
        "task"
    ),
    "list_available_mcps": lambda client: DynamicAutonomousAgent(client).list_available_mcps(),
}


@pytest.mark.usefixtures("unawaited")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_every_method_that_returns_something_has_the_sentence(
    client: LLMClient, call: Callable[[LLMClient], Any]
) -> None:
    with pytest.raises(TypeError, match=r"^`await` is missing: write `await \w+\(\.\.\.\)`$"):
        call(client)[0]


async def test_a_call_can_be_tested_before_it_is_awaited(client: LLMClient) -> None:
    pending: Any = client.ask("?")
    assert pending
    assert not isinstance(pending, Iterable | Container | Sized)
    assert await pending == "Hello"
    calls = [client.ask("?"), None, client.ask("?")]
    assert await asyncio.gather(*filter(None, calls)) == ["Hello", "Hello"]


def test_a_forgotten_await_in_a_condition_is_warned_about_by_python(client: LLMClient) -> None:
    with pytest.warns(RuntimeWarning, match=r"coroutine 'LLMClient\.health_check' was never awaited"):  # noqa: PT031 - until it is collected
        if client.health_check():
            pass
        gc.collect()


async def test_a_call_is_a_coroutine_for_asyncio_and_anyio(client: LLMClient) -> None:
    def call() -> Any:
        return client.chat_completion(MESSAGES)

    assert await call() == COMPLETION
    assert await asyncio.create_task(call()) == COMPLETION
    assert list(await asyncio.gather(call(), call())) == [COMPLETION] * 2
    assert await asyncio.wait_for(call(), 5) == COMPLETION
    assert await asyncio.ensure_future(call()) == COMPLETION
    async with asyncio.TaskGroup() as group:
        task = group.create_task(call(), name="t", context=contextvars.copy_context())
    assert task.result() == COMPLETION
    assert await asyncio.to_thread(asyncio.run, LLMClient(transport=MockTransport(lambda _: COMPLETION)).ask("?"))
    async with anyio.create_task_group() as anyio_group:
        anyio_group.start_soon(client.chat_completion, MESSAGES)
    unused = call()
    assert asyncio.iscoroutine(unused)
    assert inspect.isawaitable(unused)
    assert inspect.iscoroutine(unused._coroutine)
    unused.close()
    assert isinstance(repr(asyncio.current_task()), str)


async def test_a_task_of_a_call_is_shown_by_its_method_and_line() -> None:
    started = asyncio.Event()

    async def handler(_: object) -> dict[str, Any]:
        started.set()
        await asyncio.Event().wait()
        return {}

    client = LLMClient(transport=MockTransport(handler))
    task = asyncio.create_task(client.chat_completion(MESSAGES))
    await started.wait()
    assert ".chat_completion() running at " in repr(task)
    assert task.get_stack()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_call_that_fails_raises_its_error_in_a_task() -> None:
    def refuse(_: object) -> dict[str, Any]:
        raise ConnectionRefusedError

    client = LLMClient(transport=MockTransport(refuse), max_retries=0)
    with pytest.raises(LLMConnectionError):
        await asyncio.create_task(client.chat_completion(MESSAGES))


def test_a_call_that_is_dropped_is_warned_about_as_by_python(client: LLMClient) -> None:
    with pytest.warns(RuntimeWarning, match=r"coroutine '\w+\.chat_completion' was never awaited"):  # noqa: PT031 - as above
        client.chat_completion(MESSAGES)
        gc.collect()


def test_the_method_counts_as_async() -> None:
    assert asyncio.iscoroutinefunction(LLMClient.chat_completion)
    assert asyncio.iscoroutinefunction(mock.create_autospec(LLMClient, instance=True).chat_completion)
    assert "temperature" in inspect.signature(LLMClient.chat_completion).parameters
    assert LLMClient.chat_completion.__doc__ is not None


async def test_exceptions_are_thrown_into_the_coroutine() -> None:
    @explains_missing_await
    async def wait() -> str:
        try:
            await asyncio.sleep(0)
        except KeyError as error:
            return str(error)
        return "none"

    call: Any = wait()
    assert isinstance(call, PendingCall)
    call.send(None)
    with pytest.raises(StopIteration) as stopped:
        call.throw(KeyError("a"))
    assert stopped.value.value == "'a'"


async def test_a_tool_may_be_a_method_of_a_client(client: LLMClient) -> None:
    answers = iter(
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "ask_friend", "arguments": "{}"}}],
            },
            {"role": "assistant", "content": "Done."},
        ]
    )

    def handler(request: Any) -> Any:
        if request.method == "GET":
            return MockResponse(404)
        message = next(answers)
        calls = [{**call, "index": 0} for call in message.get("tool_calls") or ()]
        delta = {"content": message["content"] or "", **({"tool_calls": calls} if calls else {})}
        return [{"choices": [{"index": 0, "delta": delta, "finish_reason": "tool_calls" if calls else "stop"}]}]

    def ask_friend() -> Any:
        """Asks a friend."""
        return client.ask("Hello?")

    result = await Agent(LLMClient(transport=MockTransport(handler)), tools=[ask_friend]).run("Ask a friend.")
    assert [record.text for round_ in result.log for record in round_.tool_calls] == ["Hello"]
