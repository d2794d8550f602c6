"""A sample of `make cancel-sweep`: operations of each layer, cancelled at some of their steps in each way and loop."""

from __future__ import annotations

import asyncio
import inspect

import pytest

import lmbridge
from lmbridge import fleet, gateway, mcp
from lmbridge.client.client_models import Models
from lmbridge.client.lmstudio import LMStudio
from tests.reliability.cancel_sweep import LOOPS, OPERATIONS, SLOW, run
from tests.reliability.cancelling import WAYS, Way, WrongOutcome, cancel_at
from tests.reliability.public_coroutines import asynchronous_members, is_asynchronous

QUICK = ("chat_completion, streamed", "LLMClientPool", "Agent.run")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", QUICK)
def test_a_cancel_leaves_nothing_behind(name: str, loop: str) -> None:
    swept = run(name, loop, step=3)
    assert swept.findings == []
    assert set(swept.cancelled) == set(WAYS)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in SLOW])
def test_a_cancel_of_each_operation_leaves_nothing_behind(name: str) -> None:
    for loop in LOOPS:
        assert run(name, loop, ("cancel", "cancel twice"), step=5).findings == []


# What the sweep notices


async def test_a_swallowed_cancellation_is_noticed() -> None:
    async def swallow() -> None:
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            await asyncio.sleep(0)

    with pytest.raises(WrongOutcome, match="swallowed"):
        await cancel_at(swallow, "cancel", 1)


@pytest.mark.parametrize("way", WAYS)
async def test_another_exception_is_noticed(way: Way) -> None:
    async def fail() -> None:
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        finally:
            raise KeyError

    with pytest.raises((WrongOutcome, KeyError)):
        await cancel_at(fail, way, 1)


@pytest.mark.parametrize("way", WAYS)
async def test_the_steps_of_tasks_that_an_operation_starts_count_as_well(way: Way) -> None:
    async def work() -> None:
        for _ in range(10):
            await asyncio.sleep(0)

    async def start() -> None:
        await asyncio.gather(work(), work())

    reached = [await cancel_at(start, way, at) for at in range(1, 30)]
    assert 15 < reached.count(True) < 29


# Nothing public is forgotten

SWEPT = {
    "Agent": {"run": "Agent.run", "switch_model": "Agent.switch_model", "resume": "journal"},
    "ChatClient": {"chat_completion": "chat_completion"},
    "ChatClientPool": {"client": "LLMClientPool"},
    "ChatStream": {
        "__aenter__": "chat_completion, streamed",
        "__anext__": "chat_completion, streamed",
        "aclose": "chat_completion, streamed",
        "collect": "chat_completion, streamed",
    },
    "ChunkStream": {"aclose": "chat_completion, streamed"},
    "DynamicAutonomousAgent": {
        "__aenter__": "DynamicAutonomousAgent",
        "list_available_mcps": "DynamicAutonomousAgent",
        "autonomous_with_mcp": "DynamicAutonomousAgent",
        "close": "DynamicAutonomousAgent",
        "autonomous_with_multiple_mcps": "DynamicAutonomousAgent, several",
        "autonomous_discover_and_execute": "DynamicAutonomousAgent, several",
        "switch_model": "Agent.switch_model",
        "resume": "journal",
    },
    "Gateway": dict.fromkeys(("__aenter__", "open", "drain", "close"), "Gateway"),
    "Journal": {"runs": "journal", "export": "journal"},
    "LLMClient": {
        "__aenter__": "a client, opened and closed",
        "close": "a client, opened and closed",
        "chat_completion": "chat_completion",
        "stream_chat": "chat_completion, streamed",
        "text_completion": "text_completion",
        "create_response": "create_response",
        "embeddings": "embeddings",
        "ask": "ask",
        "parse": "parse",
        "decide": "decide",
        **dict.fromkeys(
            ("list_models", "health_check", "server_info", "server_infos", "count_tokens"),
            "list_models, health_check, server_info, server_infos, count_tokens",
        ),
    },
    "LLMClientPool": dict.fromkeys(("__aenter__", "client", "get_client", "close"), "LLMClientPool"),
    "LMStudio": dict.fromkeys(("models", "load", "unload", "download"), "models of LM Studio"),
    "LocalServer": dict.fromkeys(("__aenter__", "close"), "LocalServer"),
    "McpHub": dict.fromkeys(("names", "reload", "tools", "close"), "McpHub"),
    "McpTools": {"new_tools": "McpHub"},
    "ModelValidator": dict.fromkeys(
        ("__aenter__", "validate_model", "get_available_models", "get_loaded_models", "close"), "ModelValidator"
    ),
    "Models": dict.fromkeys(("list", "capabilities", "load", "unload", "download", "loading"), "models of a router"),
    "NodePool": dict.fromkeys(("__aenter__", "request", "stream", "forward", "close"), "NodePool"),
    "ResponseStream": dict.fromkeys(("__aenter__", "__anext__", "aclose", "collect"), "create_response"),
    "RunHandle": dict.fromkeys(("wait_begun", "result", "aclose"), "Agent.start"),
    "RunStream": dict.fromkeys(("__aenter__", "__anext__", "aclose"), "Agent.stream"),
    "StreamedText": dict.fromkeys(("__anext__", "aclose"), "chat_completion, the text"),
    # A stream of another kind, whose code is that of a chat stream.
    "TextStream": dict.fromkeys(("__aenter__", "__anext__", "aclose", "collect"), "chat_completion, streamed"),
    "Transport": dict.fromkeys(("__aenter__", "request", "stream", "forward", "learn_limits", "close"), "NodePool"),
    "": {
        "collect": "create_response",
        "discover": "discover",
        "map_runs": "map_runs",
        "pick_tools": "decide",
    },
}
"""The operation that sweeps each public coroutine, by its class."""
EXCUSED = {
    "asend": "it is __anext__ in the protocol of generators",
    "athrow": "it is aclose in the protocol of generators",
    "LocalServer.wait": "it only waits for a process that LocalServer owns",
    "McpTools.list_tools": "it returns a list that is known",
}


def public_coroutines() -> set[str]:
    owners = {getattr(module, name) for module in (lmbridge, fleet, gateway, mcp) for name in module.__all__}
    found = set[str]()
    for owner in (*owners, LMStudio, Models):
        if inspect.isclass(owner):
            found |= {f"{owner.__name__}.{name}" for name in asynchronous_members(owner)}
        elif callable(owner) and is_asynchronous(owner):
            found.add(f".{owner.__name__}")
    return found


def test_every_public_coroutine_is_swept_or_excused() -> None:
    swept = {f"{owner}.{name}" for owner, methods in SWEPT.items() for name in methods}
    excused = {each for each in public_coroutines() if each in EXCUSED or each.rpartition(".")[2] in EXCUSED}
    assert public_coroutines() - excused == swept
    assert {name for methods in SWEPT.values() for name in methods.values()} <= OPERATIONS.keys()
