"""Objects that hold connections cannot be copied or pickled, and say so at once."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

import lmbridge.sync
from lmbridge import Agent, ChatStream, LLMClient, LLMClientPool, ModelValidator, NodePool, collect, text_of
from lmbridge.gateway import Gateway
from lmbridge.local import LocalServer
from lmbridge.mcp import DynamicAutonomousAgent, McpHub
from lmbridge.mcp.servers.leased_tools import McpTools
from lmbridge.testing import MockTransport
from lmbridge.transport import Transport
from tests.support import MESSAGES, piece

COPIES: Final[dict[str, Callable[[Any], Any]]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "pickle 2": lambda value: pickle.dumps(value, 2),
    "deepcopy of a list": lambda value: copy.deepcopy([value]),
    "pickle of a dict": lambda value: pickle.dumps({"value": value}),
}
CHUNKS: Final = [piece("Hi"), piece(finish_reason="stop")]


def client() -> LLMClient:
    return LLMClient(transport=MockTransport(lambda _request: CHUNKS), model="test-model")


@contextmanager
def refused(name: str) -> Iterator[None]:
    with pytest.raises(TypeError, match=f"^this {name} cannot be copied or pickled, because .* process; .+"):
        yield


OBJECTS: Final[dict[str, Callable[[], Any]]] = {
    "LLMClient": client,
    "LLMClientPool": LLMClientPool,
    "Transport": Transport,
    "MockTransport": lambda: MockTransport(lambda _request: CHUNKS),
    "ModelValidator": ModelValidator,
    "Agent": lambda: Agent(client()),
    "DynamicAutonomousAgent": lambda: DynamicAutonomousAgent(client()),
    "LocalServer": LocalServer,
    "LMStudio": lambda: client().lmstudio,
    "RawResponses": lambda: client().with_raw_response,
    "Models": lambda: client().models,
    "NodePool": lambda: NodePool([Transport("http://127.0.0.1:1"), Transport("http://127.0.0.1:2")]),
    "Gateway": Gateway,
    "McpHub": McpHub,
    "McpTools": lambda: McpTools([], {}),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
async def test_a_call_that_was_not_awaited_is_not_copied(make_copy: Callable[[Any], Any]) -> None:
    pending = client().chat_completion(MESSAGES, stream=True)
    with refused("PendingCall"):
        make_copy(pending)
    assert text_of(await collect(await pending)) == "Hi"


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(("name", "make"), OBJECTS.items(), ids=OBJECTS)
async def test_an_object_that_holds_connections_is_not_copied(
    name: str, make: Callable[[], Any], make_copy: Callable[[Any], Any]
) -> None:
    value = make()
    with refused(name):
        make_copy(value)


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
async def test_an_object_in_use_is_not_copied(make_copy: Callable[[Any], Any]) -> None:
    async with client() as used, LLMClientPool(transport=MockTransport(lambda _request: CHUNKS)) as pool:
        async with await used.chat_completion(MESSAGES, stream=True) as stream:
            assert isinstance(stream, ChatStream)
            with refused("ChatStream"):
                make_copy(stream)
            with refused("LLMClient"):
                make_copy(used)
        async with pool.client() as lease:
            with refused("PooledClient"):
                make_copy(lease)
        agent = Agent(used)
        handle = agent.start("Hi")
        with refused("RunHandle"):
            make_copy(handle)
        async with agent.stream("Hi") as events:
            with refused("RunStream"):
                make_copy(events)
        assert copy.deepcopy(await handle.result()).text == "Hi"


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_blocking_object_is_not_copied(make_copy: Callable[[Any], Any]) -> None:
    with lmbridge.sync.LLMClient(transport=MockTransport(lambda _request: CHUNKS)) as blocking:
        with refused("LLMClient"):
            make_copy(blocking)
        with blocking.chat_completion(MESSAGES, stream=True) as stream, refused("ChatStream"):
            make_copy(stream)
        with refused("Agent"):
            make_copy(lmbridge.sync.Agent(blocking))
