"""A model that only thinks is asked once more without thinking, in the fields that its server takes."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import Agent, LLMClient
from lmbridge.agent.thinking import without_thinking
from lmbridge.testing import ScriptedServer, answer, reply
from tests.agent.support import add, asks, calls, sent


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        yield client


def served_by(server: ScriptedServer, owner: str) -> None:
    server.on_path("/v1/models", reply(200, {"data": [{"id": "test-model", "owned_by": owner}]}))
    server.on_path("/props", reply(200, {"total_slots": 1}))
    if owner == "library":
        server.on_path("/api/version", reply(200, {"version": "0.35"}))
        server.on_path("/api/show", reply(200, {}))


ONLY_REASONING = answer("", reasoning="Hm, hm.")
CUT_REASONING = answer("", reasoning="Hm, hm, hm", finish_reason="length")
OFF = {"enable_thinking": False}


@pytest.mark.parametrize("flawed", [ONLY_REASONING, CUT_REASONING], ids=["only reasoning", "endless reasoning"])
@pytest.mark.parametrize(
    ("owner", "fields"),
    [
        ("llamacpp", {"reasoning_effort": "none", "chat_template_kwargs": OFF}),
        ("vllm", {"reasoning_effort": None, "chat_template_kwargs": OFF}),
        ("library", {"reasoning_effort": "none", "chat_template_kwargs": None}),
        ("somebody", {"reasoning_effort": None, "chat_template_kwargs": None}),
    ],
    ids=["llama.cpp", "vLLM", "Ollama", "unknown"],
)
async def test_the_follow_up_switches_thinking_off(
    scripted_server: ScriptedServer,
    client: LLMClient,
    flawed: Any,
    owner: str,
    fields: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    served_by(scripted_server, owner)
    scripted_server.script(flawed, calls(asks("add", a=1, b=2)), answer("It is 3."))
    with caplog.at_level(logging.INFO, "lmbridge.agent"):
        result = await Agent(client, tools=[add]).run("Go.")
    assert result.text == "It is 3."
    first, follow_up, last = (sent(scripted_server, number) for number in range(3))
    for body in (first, last):
        assert "chat_template_kwargs" not in body
        assert "reasoning_effort" not in body
    assert {name: follow_up.get(name) for name in fields} == fields
    [nudge] = result.log[0].nudges
    assert nudge.without_thinking is (owner != "somebody")
    assert ("asked again without thinking" in caplog.text) is nudge.without_thinking


async def test_a_model_that_goes_on_thinking_is_asked_only_once_more(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    served_by(scripted_server, "llamacpp")
    scripted_server.script(CUT_REASONING, CUT_REASONING)
    result = await Agent(client).run("Go.")
    assert result.stop_reason == "length"
    assert len([each for each in scripted_server.requests if each.path == "/v1/chat/completions"]) == 2


async def test_other_flaws_leave_the_thinking_alone(scripted_server: ScriptedServer, client: LLMClient) -> None:
    served_by(scripted_server, "llamacpp")
    scripted_server.script(answer(""), answer("Hello."))
    await Agent(client).run("Go.")
    assert "chat_template_kwargs" not in sent(scripted_server)


def test_the_users_own_fields_are_kept() -> None:
    given: dict[str, Any] = {
        "extra_body": {"top_k": 20, "chat_template_kwargs": {"enable_thinking": True, "lang": "de"}},
        "seed": 1,
    }
    assert without_thinking(given, "vllm") == {
        "extra_body": {"top_k": 20, "chat_template_kwargs": {"enable_thinking": False, "lang": "de"}},
        "seed": 1,
    }
    assert given["extra_body"]["chat_template_kwargs"]["enable_thinking"] is True
