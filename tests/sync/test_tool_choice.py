"""`lmbridge.sync.pick_tools`, which blocks until the model has decided about all tools."""

from __future__ import annotations

import inspect
import json

import lmbridge
from lmbridge import sync
from lmbridge.testing import Exchange, reply
from tests.threaded_server import ThreadedServer


def multiply(a: int, b: int) -> int:
    """Multiplies two numbers."""
    return a * b


def greet(name: str) -> str:
    """Greets somebody."""
    return f"Hello, {name}!"


async def decide(exchange: Exchange) -> None:
    """Answers that the first tool is needed and the second is not."""
    questions = json.loads(exchange.request.body)["questions"]
    answers = {name: {"type": "noul", "noul": 0.9 if name == "0" else 0.1} for name in questions}
    await reply(200, {"model": "openjev", "answers": answers})(exchange)


def test_the_tools_that_a_task_needs_are_picked_without_async(server: ThreadedServer, client: sync.LLMClient) -> None:
    server.scripted.on_path("/v1/systemone", decide)
    (picked,) = sync.pick_tools(client, "What is 6 times 7?", [multiply, greet], limit=1)
    assert picked.name == "multiply"


def test_it_has_the_parameters_of_the_asynchronous_function() -> None:
    assert inspect.signature(sync.pick_tools) == inspect.signature(lmbridge.pick_tools)
