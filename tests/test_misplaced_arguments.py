"""Arguments in the wrong place: the error names the right one."""

from __future__ import annotations

import inspect
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

import lmbridge.sync
from lmbridge import (
    Agent,
    Limits,
    LLMClient,
    LLMClientPool,
    LLMValidationError,
    ModelValidator,
    Timeouts,
    Tool,
    collect,
)
from lmbridge.mcp import DynamicAutonomousAgent
from lmbridge.testing import MockTransport
from lmbridge.transport import Transport
from tests.support import MESSAGES

URL: Final = "http://127.0.0.1:1234/v1"


def look_up(city: str) -> str:
    return city


def client() -> Any:
    return LLMClient(transport=MockTransport(lambda _request: {}), model="test-model")


def tool() -> Any:
    return Tool("look_up", "Looks up.", {"type": "object"}, look_up)


# The values are of the wrong type on purpose.
CALLS: Final[dict[str, tuple[Callable[[], Any], str]]] = {
    "validator of a client": (lambda: ModelValidator(client()), "pass it as client=: ModelValidator(client=client)"),
    # Each `type: ignore` of this table is for the wrong argument that the case is about.
    "validator of a pool": (lambda: ModelValidator(LLMClientPool()), "pass a client of the pool as client="),  # type: ignore[arg-type]
    "validator of a transport": (lambda: ModelValidator(Transport()), "client=LLMClient(transport=transport)"),  # type: ignore[arg-type]
    "validator with a URL as client": (lambda: ModelValidator(client=URL), "as api_base: ModelValidator('http"),  # type: ignore[arg-type]
    "validator with a pool as client": (lambda: ModelValidator(client=LLMClientPool()), "pass a client of the pool"),  # type: ignore[arg-type]
    "validator of a blocking client": (
        lambda: ModelValidator(client=lmbridge.sync.LLMClient()),  # type: ignore[arg-type]
        "those of lmbridge.sync fit only",
    ),
    "client of a client": (lambda: LLMClient(client()), "client.with_options()"),
    "client of a transport": (lambda: LLMClient(Transport()), "pass it as transport=: LLMClient(transport="),  # type: ignore[arg-type]
    "client of a pool": (lambda: LLMClient(LLMClientPool()), "async with pool.client() as client"),  # type: ignore[arg-type]
    "client of no server": (lambda: LLMClient([]), "for example ['http://127.0.0.1:1234/v1'"),
    "client of a set of URLs": (lambda: LLMClient({URL}), "pass a list of URLs"),  # type: ignore[arg-type]
    "client of transports": (lambda: LLMClient([Transport()]), "LLMClient(transport="),  # type: ignore[list-item]
    "transport of several URLs": (lambda: Transport([URL]), "NodePool([Transport(url), ...])"),  # type: ignore[arg-type]
    "client of the same server twice": (lambda: LLMClient([URL, URL]), "list each server once"),
    "client of a name": (lambda: LLMClient("qwen3-4b"), "write it like 'http://127.0.0.1:1234/v1'"),
    "timeouts as model": (lambda: LLMClient(URL, Timeouts()), "pass it as timeout="),  # type: ignore[arg-type]
    "seconds as model": (lambda: LLMClient(URL, 30), "pass a number of seconds as timeout="),  # type: ignore[arg-type]
    "limits as model": (lambda: LLMClient(URL, Limits()), "pass it as limits="),  # type: ignore[arg-type]
    "a number as limits": (lambda: LLMClient(limits=4), "pass Limits(max_concurrency=...)"),  # type: ignore[arg-type]
    "timeouts as limits": (lambda: LLMClient(limits=Timeouts()), "pass it as timeout="),  # type: ignore[arg-type]
    "a URL as transport": (lambda: LLMClient(transport=URL), "pass the URL of a server as api_base"),  # type: ignore[arg-type]
    "a client as transport": (lambda: LLMClient(transport=client()), "client.with_options()"),
    "False as ssl": (lambda: LLMClient(ssl=False), "ssl.create_default_context(cafile='ca.pem')"),  # type: ignore[arg-type]
    "a path as ssl": (lambda: LLMClient(ssl="ca.pem"), "ssl.create_default_context(cafile='ca.pem')"),  # type: ignore[arg-type]
    "transport of a client": (lambda: Transport(client()), "client.with_options()"),
    "pool of a client": (lambda: LLMClientPool(client()), "LLMClientPool(4, api_base=client.api_base)"),
    "pool of a URL": (lambda: LLMClientPool(URL), "pass the URL of a server as api_base="),  # type: ignore[arg-type]
    "pool of a transport": (lambda: LLMClientPool(Transport()), "LLMClientPool(4, transport=transport)"),  # type: ignore[arg-type]
    "agent of a URL": (lambda: Agent(URL), "make a client of a URL: Agent(LLMClient('http"),  # type: ignore[arg-type]
    "agent of a transport": (lambda: Agent(Transport()), "Agent(LLMClient(transport=transport))"),  # type: ignore[arg-type]
    "agent of an agent": (lambda: Agent(Agent(client())), "pass the client of that agent"),  # type: ignore[arg-type]
    "agent of a class": (lambda: Agent(LLMClient), "create an object of the class first: LLMClient(...)"),  # type: ignore[arg-type]
    "agent of nothing": (lambda: Agent(None), "pass LLMClient()"),  # type: ignore[arg-type]
    "agent of a blocking client": (
        lambda: Agent(lmbridge.sync.LLMClient()),  # type: ignore[arg-type]
        "those of lmbridge.sync fit only",
    ),
    "a function as tools": (lambda: Agent(client(), tools=look_up), "put it into a list"),  # type: ignore[arg-type]
    "a tool as tools": (lambda: Agent(client(), tools=tool()), "put it into a list"),
    "a dict as tools": (lambda: Agent(client(), tools={"look_up": look_up}), "pass a list of functions"),  # type: ignore[arg-type]
    "a path as MCP client": (lambda: DynamicAutonomousAgent("config.json"), "config_path='mcp.json'"),  # type: ignore[arg-type]
    "a Path as MCP client": (lambda: DynamicAutonomousAgent(Path("config.json")), "config_path='mcp.json'"),  # type: ignore[arg-type]
    "a dict as MCP client": (lambda: DynamicAutonomousAgent({}), "write a dict to a file first"),  # type: ignore[arg-type]
    "a URL as MCP client": (lambda: DynamicAutonomousAgent(URL), "make a client of a URL"),  # type: ignore[arg-type]
    "a dict as config_path": (
        lambda: DynamicAutonomousAgent(config_path={"mcpServers": {}}),  # type: ignore[arg-type]
        "write a dict to a file first",
    ),
    "several names of a server": (
        lambda: DynamicAutonomousAgent(client()).autonomous_with_mcp(["a", "b"], "Go."),  # type: ignore[call-overload]
        "call autonomous_with_multiple_mcps()",
    ),
    "one name of several servers": (
        lambda: DynamicAutonomousAgent(client()).autonomous_with_multiple_mcps("a", "Go."),
        "put the name of a single server into a list",
    ),
    "a string as messages": (lambda: client().chat_completion("Hi"), "for example [{'role': 'user'"),
    "a message as messages": (lambda: client().chat_completion(MESSAGES[0]), "for example [{'role': 'user'"),
    "a body as messages": (lambda: client().chat_completion({"messages": MESSAGES}), "chat_completion(**body)"),
    "strings as messages": (lambda: client().chat_completion(["Hi"]), "for example [{'role': 'user'"),
    "a list to collect": (lambda: collect([{"choices": []}]), "what a call with stream=True returns"),  # type: ignore[call-overload]
    "a reply to collect": (lambda: collect({"choices": []}), "it is a whole reply already"),  # type: ignore[call-overload]
}


@pytest.mark.parametrize(("call", "hint"), CALLS.values(), ids=CALLS)
async def test_the_error_names_the_right_place(call: Callable[[], Any], hint: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        await _result_of(call)
    assert hint in (caught.value.hint or "")


async def _result_of(call: Callable[[], Any]) -> Any:
    result = call()
    return await result if inspect.isawaitable(result) else result


def test_a_context_is_accepted_as_ssl() -> None:
    LLMClient(URL, ssl=ssl.create_default_context())
