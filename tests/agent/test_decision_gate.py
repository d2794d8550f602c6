"""A decision before each call of an agent, and decisions about which tools a task needs."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import (
    Agent,
    Gate,
    LLMClient,
    LLMClientPool,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMValidationError,
    Tool,
    TrueFalse,
    pick_tools,
)
from lmbridge.testing import Exchange, ScriptedServer, answer, reply
from tests.agent.support import add, asks, calls, sent, tool_texts

SYSTEM_ONE = "/v1/systemone"
QUESTION = "Is this call free of harm?"


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("Done."))
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="ignore") as client:
        yield client


def decides(server: ScriptedServer, probability: float) -> None:
    """Makes a server answer every question of a gate with a probability."""
    server.on_path(SYSTEM_ONE, reply(200, {"model": "m", "answers": {"gate": {"type": "noul", "noul": probability}}}))


def questions(server: ScriptedServer) -> list[Any]:
    return [request.json for request in server.requests if request.path == SYSTEM_ONE]


@pytest.mark.parametrize("gate", [QUESTION, TrueFalse(QUESTION), Gate(QUESTION)], ids=["text", "question", "gate"])
async def test_a_call_that_passes_the_gate_is_made(
    scripted_server: ScriptedServer, client: LLMClient, gate: Any
) -> None:
    decides(scripted_server, 0.5)
    result = await Agent(client, tools=[add], gate=gate).run("Go.")
    assert tool_texts(result.messages) == ["3"]
    state = {"task": "Go.", "tool": "add", "description": "Adds two numbers.", "arguments": {"a": 1, "b": 2}}
    assert questions(scripted_server) == [
        {"state": state, "questions": {"gate": {"type": "noul", "instructions": QUESTION}}, "model": "test-model"}
    ]


async def test_a_call_that_does_not_pass_is_refused_and_the_model_reads_why(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    decides(scripted_server, 0.7)
    asked: list[str] = []

    def approve(call: Any) -> bool:
        asked.append(call.name)
        return True

    gate = Gate(QUESTION, threshold=0.8, model="openjev")
    agent = Agent(client, tools=[add], gate=gate, approve=approve)
    result = await agent.run("Go.")
    [text] = tool_texts(sent(scripted_server)["messages"])
    assert text == f"Refused: the answer to {QUESTION!r} is true with probability 0.70, and 0.80 is needed"
    assert (result.text, asked) == ("Done.", []), "nobody is asked about a call that the gate has refused"
    assert questions(scripted_server)[0]["model"] == "openjev"


async def test_approve_is_asked_after_the_gate(scripted_server: ScriptedServer, client: LLMClient) -> None:
    decides(scripted_server, 0.9)

    async def approve(_: Any) -> str:
        return "not today"

    result = await Agent(client, tools=[add], gate=QUESTION, approve=approve).run("Go.")
    assert tool_texts(result.messages) == ["Refused: not today"]


async def test_no_call_is_made_without_a_decision(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.on_path(SYSTEM_ONE, reply(400, {"error": {"message": "bad question"}}))
    with pytest.raises(LLMResponseError, match=r"gate raised this error for a call of 'add': .*bad question") as caught:
        await Agent(client, tools=[add], gate=QUESTION).run("Go.")
    assert caught.value.status == 400
    assert tool_texts(caught.value.partial.messages) == ["Not called: the run ended first."]


async def test_an_error_of_the_decision_model_keeps_its_class(client: LLMClient) -> None:
    async def approve(_: Any) -> bool:
        raise LLMConnectionError("nobody answers", context={"model": "decider"})

    with pytest.raises(LLMConnectionError, match="approve raised this error for a call of 'add'") as caught:
        await Agent(client, tools=[add], approve=approve).run("Go.")
    assert caught.value.context["model"] == "decider"
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("the call was not made")


async def test_an_error_of_approve_behind_a_gate_does_not_blame_the_gate_alone(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    decides(scripted_server, 0.9)

    def approve(_: Any) -> bool:
        raise OSError("nobody is there")

    with pytest.raises(LLMError, match="gate or approve raised OSError for a call of 'add': nobody is there"):
        await Agent(client, tools=[add], gate=QUESTION, approve=approve).run("Go.")


async def test_a_gate_works_with_a_pool(scripted_server: ScriptedServer) -> None:
    decides(scripted_server, 0.9)
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("Done."))
    async with LLMClientPool(api_base=scripted_server.api_base, model="test-model", pool_size=1) as pool:
        result = await Agent(pool, tools=[add], gate=QUESTION).run("Go.")
    assert tool_texts(result.messages) == ["3"]


@pytest.mark.parametrize(
    "options",
    [{"gate": 3}, {"gate": " "}, {"gate": QUESTION, "approve": "yes"}],
    ids=["not a question", "a blank text", "approve is checked as well"],
)
def test_options_are_checked(options: Any) -> None:
    with pytest.raises(LLMValidationError):
        Agent(LLMClient(), **options)
    for threshold in (-0.1, 1.1, "high"):
        with pytest.raises(LLMValidationError, match="threshold"):
            Gate(QUESTION, threshold=threshold)  # type: ignore[arg-type]  # the wrong value is the case


# Choosing tools

TOOLS = [
    Tool(name, f"Does {name}.", {"type": "object", "properties": {}}, lambda: "") for name in ("read", "write", "send")
]


async def test_the_tools_that_a_task_needs_are_picked_and_keep_their_order(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    async def decide(exchange: Exchange) -> None:
        chances = {"read": 0.6, "write": 0.1, "send": 0.9, "add": 0.2}
        answers = {}
        for number, asked in exchange.request.json["questions"].items():
            name = next(each for each in chances if f"'{each}'" in asked["instructions"])
            answers[number] = {"type": "noul", "noul": chances[name]}
        await reply(200, {"model": "m", "answers": answers})(exchange)

    scripted_server.on_path(SYSTEM_ONE, decide)
    picked = await pick_tools(client, "Mail me the file.", [*TOOLS, add], limit=2)
    assert [each.name for each in picked] == ["read", "send"]
    assert len(questions(scripted_server)) == 1
    many = [Tool(f"read{number}", "Like 'read'.", TOOLS[0].parameters, lambda: "") for number in range(40)]
    assert len(await pick_tools(client, "Read.", many, limit=3)) == 3
    assert [len(each["questions"]) for each in questions(scripted_server)[1:]] == [32, 8]


async def test_few_tools_need_no_decision(scripted_server: ScriptedServer, client: LLMClient) -> None:
    assert await pick_tools(client, "Go.", TOOLS, limit=3) == TOOLS
    assert not scripted_server.requests
    with pytest.raises(LLMValidationError):
        await pick_tools(client, "Go.", TOOLS, limit=0)
