"""Runs over recorded replies of real servers, and over the forms in which servers are known to stream tool calls."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMError
from lmbridge.testing import ScriptedServer, answer, raw, sse
from tests.agent.support import check_valid, collect_events, sent, tool_texts
from tests.client.test_captures import BREAKS, CALLS, STREAMS, Capture, each_of, expectation_for, finish_reason_of
from tests.support import in_flight, piece


def tools(made: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Returns the tools of the recorded requests, which note how they are called."""

    async def get_weather(city: str, unit: str | None = None) -> str:
        """Returns the weather."""
        made.append(("get_weather", {"city": city} if unit is None else {"city": city, "unit": unit}))
        return "get_weather did it"

    async def add(a: int, b: int) -> str:
        """Adds."""
        made.append(("add", {"a": a, "b": b}))
        return "add did it"

    return [get_weather, add]


@each_of(STREAMS)
async def test_a_recorded_reply_becomes_a_round_of_a_run(scripted_server: ScriptedServer, capture: Capture) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    served = next(chunk["model"] for chunk in capture.chunks)
    scripted_server.script(raw(*capture.as_recorded()))
    scripted_server.default = answer("All done.", model=served)
    async with LLMClient(scripted_server.api_base, capture.model, model_mismatch="ignore") as client:
        events = await collect_events(Agent(client, tools=tools(made)))
        assert in_flight(client) == 0
    result = events[-1].result
    check_valid(result.messages)
    calls = [(name, json.loads(arguments)) for name, arguments in expectation_for(capture, CALLS, [])]
    assert [(call.name, call.arguments) for call in result.tool_calls][: len(calls)] == calls
    records = [record for each in result.log for record in each.tool_calls]
    assert [(each.call.name, each.call.arguments) for each in records if not each.is_error] == made
    if records:
        assert [text for text in tool_texts(result.messages) if "did it" in text] == [
            f"{name} did it" for name, _ in made
        ]
        assert result.text == "All done."
        check_valid(sent(scripted_server)["messages"])
    elif result.log[0].text != "All done.":  # of an empty reply, which was asked for once more
        assert result.stop_reason == finish_reason_of(capture)
        spoken = "".join(event.text for event in events if type(event).__name__ == "TextDelta")
        assert result.text == spoken
    assert result.model == served or result.model == capture.model


@each_of(BREAKS)
async def test_a_recorded_failure_becomes_an_error_with_the_run_so_far(
    scripted_server: ScriptedServer, capture: Capture
) -> None:
    scripted_server.script(raw(*capture.as_recorded()))
    async with LLMClient(scripted_server.api_base, capture.model, max_retries=0, model_mismatch="ignore") as client:
        with pytest.raises(LLMError) as caught:
            await Agent(client, tools=tools([])).run("Go.")
        assert in_flight(client) == 0
    assert caught.value.partial.stop_reason == "error"
    check_valid(caught.value.partial.messages)


# Two calls of one reply, in the forms in which servers are known to stream them

PARIS, ROME = '{"city": "Paris"}', '{"city": "Rome"}'


def delta(*pieces: dict[str, Any]) -> dict[str, Any]:
    chunk = piece(None)
    chunk["choices"][0]["delta"] = {"tool_calls": list(pieces)}
    return chunk


def part(arguments: Any, name: str | None = "get_weather", **fields: Any) -> dict[str, Any]:
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    return {"function": function, **fields}


SHAPES: dict[str, list[dict[str, Any]]] = {
    "as OpenAI does": [
        delta(part("", index=0, id="a", type="function")),
        delta(part('{"city": ', None, index=0)),
        delta(part('"Paris"}', None, index=0)),
        delta(part("", index=1, id="b", type="function")),
        delta(part(ROME, None, index=1)),
    ],
    "LM Studio: interleaved, each with its index": [
        delta(part("", index=0, id="a")),
        delta(part("", index=1, id="b")),
        delta(part('{"city": ', None, index=0), part('{"city": ', None, index=1)),
        delta(part('"Paris"}', None, index=0), part('"Rome"}', None, index=1)),
    ],
    "Ollama: whole calls, no ids": [delta(part(PARIS, index=0)), delta(part(ROME, index=1))],
    "Ollama: whole calls, index 0 for all": [delta(part(PARIS, index=0, id="a")), delta(part(ROME, index=0, id="b"))],
    "no ids, index 0 for all": [delta(part(PARIS, index=0)), delta(part(ROME, index=0))],
    "no ids, no index": [delta(part(PARIS)), delta(part(ROME))],
    "both in one delta": [delta(part(PARIS, index=0, id="a"), part(ROME, index=1, id="b"))],
    "arguments as an object": [
        delta(part({"city": "Paris"}, index=0, id="a")),
        delta(part({"city": "Rome"}, index=1, id="b")),
    ],
    "vLLM: the id only at first, the name in a delta of its own": [
        delta({"index": 0, "id": "a", "type": "function", "function": {}}),
        delta(part("", index=0)),
        delta(part(PARIS, None, index=0)),
        delta({"index": 1, "id": "b", "type": "function", "function": {"name": "get_weather"}}),
        delta(part(ROME, None, index=1)),
    ],
    "llama-cpp-python: id and name in every delta": [
        delta(part('{"city": ', index=0, id="a", type="function")),
        delta(part('"Paris"}', index=0, id="a", type="function")),
        delta(part(ROME, index=1, id="b", type="function")),
    ],
}


def shapes(names: Iterable[str] = SHAPES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", names)


@shapes()
@pytest.mark.parametrize("reason", ["tool_calls", "stop"])
async def test_calls_in_any_form_are_made_once_each(
    scripted_server: ScriptedServer, client: LLMClient, shape: str, reason: str
) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    scripted_server.script(sse(*SHAPES[shape], piece(finish_reason=reason), done=True), answer("Fine."))
    result = await Agent(client, tools=tools(made)).run("Weather?")
    assert made == [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Rome"})]
    assert len({call.id for call in result.tool_calls}) == 2
    check_valid(sent(scripted_server)["messages"])
    check_valid(result.messages)


@pytest.mark.parametrize("cut", range(1, len(PARIS)))
async def test_a_cut_call_with_the_finish_reason_of_a_whole_one_is_reported_to_the_model(
    scripted_server: ScriptedServer, client: LLMClient, cut: int
) -> None:
    made: list[tuple[str, dict[str, Any]]] = []
    whole = piece(finish_reason="tool_calls")
    scripted_server.script(sse(delta(part(PARIS[:cut], index=0, id="a")), whole, done=True), answer("Sorry."))
    result = await Agent(client, tools=tools(made)).run("Weather?")
    assert (made, result.text) == ([], "Sorry.")
    assert "not valid JSON" in tool_texts(result.messages)[0]
    check_valid(sent(scripted_server)["messages"])
