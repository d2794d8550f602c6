"""Questions that servers ask the user during a call: forms, URLs, and what becomes of them when a call ends."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web
from aiohttp.test_utils import TestServer

from lmbridge import LLMValidationError, ToolError
from lmbridge.mcp import Elicitation, ElicitationAnswer, ElicitationCompleted, McpEvent, UnexpectedMessage
from lmbridge.mcp.sdk import InvalidQuestionError, is_v2
from lmbridge.mcp.servers.elicitation import Elicitor, read_elicitation
from tests.mcp.conftest import MakeHub
from tests.mcp.support import Recorder, function_of, wait_for_notes

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "guests": {"type": "integer", "default": 2}},
    "required": ["guests"],
}
FORM = {"message": "How\x1b[31m many?", "requestedSchema": SCHEMA}
URL = {"mode": "url", "message": "Log in", "url": "https://a.example/login?x=1", "elicitationId": "e1"}


def asking(question: Any = FORM, **options: Any) -> dict[str, Any]:
    return {"tools": ["ask", "visit", "echo", "sleep"], "question": question, **options}


async def result_of(lease: Any, tool: str = "ask") -> Any:
    return json.loads(await function_of(lease, tool)())


async def test_a_form_is_passed_on_and_its_answer_reaches_the_server(make_hub: MakeHub, notes: Path) -> None:
    asked: list[Elicitation] = []

    async def answer(elicitation: Elicitation) -> ElicitationAnswer:
        asked.append(elicitation)
        return elicitation.accept({**elicitation.defaults, "name": "Ada"})

    lease = await make_hub({"a": asking(notes=str(notes))}, on_elicitation=answer).tools()
    assert await result_of(lease) == {"action": "accept", "content": {"guests": 2, "name": "Ada"}}
    assert asked == [Elicitation("a", "How many?", "form", SCHEMA)]
    assert json.loads(notes.read_text().splitlines()[0].removeprefix("capabilities "))["elicitation"] == {
        "form": {},
        "url": {},
    }


async def test_a_plain_function_can_answer(make_hub: MakeHub) -> None:
    lease = await make_hub({"a": asking()}, on_elicitation=lambda each: each.cancel()).tools()
    assert await result_of(lease) == {"action": "cancel"}


async def test_without_a_function_every_question_is_declined_and_the_log_says_so(
    make_hub: MakeHub, notes: Path, recorder: Recorder[McpEvent], caplog: pytest.LogCaptureFixture
) -> None:
    lease = await make_hub({"a": asking(notes=str(notes))}, on_event=recorder).tools()
    assert await result_of(lease) == {"action": "decline"}
    assert "elicitation" not in notes.read_text().splitlines()[0]
    assert "declined because on_elicitation is not set" in caplog.text
    assert any(isinstance(event, UnexpectedMessage) for event in recorder.seen)


async def test_a_url_is_passed_on_and_its_answer_has_no_content(make_hub: MakeHub) -> None:
    asked: list[Elicitation] = []

    def answer(elicitation: Elicitation) -> ElicitationAnswer:
        asked.append(elicitation)
        return elicitation.accept()

    lease = await make_hub({"a": asking(URL)}, on_elicitation=answer).tools()
    assert await result_of(lease) == {"action": "accept"}
    assert asked[0].url == URL["url"]
    assert asked[0].host == "a.example"
    assert asked[0].elicitation_id == "e1"


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"message": "?"}, "requestedSchema"),
        ({"message": "?", "requestedSchema": {"type": "string"}}, "requestedSchema"),
        ({"message": "?", "mode": "voice"}, "mode"),
        ({**URL, "url": "javascript:alert(1)"}, "http or https URL"),
        ({**URL, "url": "file:///etc/passwd"}, "http or https URL"),
        ({**URL, "url": "https://a.example:port/"}, "http or https URL"),
        ({**URL, "url": "https://a.example/\u202egnp.exe"}, "http or https URL"),
        ({**URL, "url": None}, "http or https URL"),
    ],
)
async def test_an_invalid_question_is_refused_and_nobody_is_asked(
    make_hub: MakeHub, question: dict[str, Any], words: str
) -> None:
    def answer(elicitation: Elicitation) -> ElicitationAnswer:
        pytest.fail(f"asked {elicitation}")

    lease = await make_hub({"a": asking(question)}, on_elicitation=answer).tools()
    refusal = await result_of(lease)
    assert refusal["code"] == -32602
    assert words in refusal["message"]


BAD_SCHEMAS: list[dict[str, Any]] = [
    {**SCHEMA, "$id": 4},
    {**SCHEMA, "$ref": 5},
    {**SCHEMA, "$schema": "http://[bad"},
    {**SCHEMA, "properties": {"guests": {"type": "integer", "required": True}}},
    {**SCHEMA, "allOf": [{"$ref": "#"}]},
    {"type": "object", "required": 5, "properties": 5},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS)
async def test_a_form_whose_schema_is_not_valid_is_asked_and_answered(
    make_hub: MakeHub, schema: dict[str, Any]
) -> None:
    question = {"message": "?", "requestedSchema": schema}
    lease = await make_hub({"a": asking(question)}, on_elicitation=lambda each: each.accept({"guests": 2})).tools()
    assert await result_of(lease) == {"action": "accept", "content": {"guests": 2}}


async def test_a_form_whose_schema_cannot_be_used_is_refused() -> None:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(2_000):
        schema = {"type": "object", "properties": {"x": schema}}
    with pytest.raises(InvalidQuestionError, match="nested too deeply"):
        await Elicitor("a", lambda each: each.accept()).ask({"message": "?", "requestedSchema": schema})


@pytest.mark.parametrize("content", [{}, {"guests": "many"}, {"guests": 2, "name": 5}])
def test_an_answer_that_does_not_fit_the_form_is_an_error_of_accept(content: dict[str, Any]) -> None:
    with pytest.raises(LLMValidationError, match=r"\$"):
        read_elicitation("a", FORM).accept(content)


def test_a_url_takes_no_content() -> None:
    with pytest.raises(LLMValidationError, match="only an accepted form"):
        read_elicitation("a", URL).accept({"a": 1})


@pytest.mark.parametrize(
    "answer",
    [ElicitationAnswer("accept", {"guests": "secret words"}), ElicitationAnswer("decline", {"guests": 2}), None, True],
)
async def test_an_answer_that_does_not_fit_is_never_sent(answer: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert await Elicitor("a", lambda _: answer).ask(FORM) == {"action": "cancel"}
    assert "does not fit the question" in caplog.text
    assert "secret words" not in caplog.text


async def test_an_exception_of_the_function_is_logged_and_cancels_the_question(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(_: Elicitation) -> ElicitationAnswer:
        raise RuntimeError("no terminal")

    lease = await make_hub({"a": asking()}, on_elicitation=fail).tools()
    assert await result_of(lease) == {"action": "cancel"}
    assert "no terminal" in caplog.text
    assert [record.levelno for record in caplog.records if record.exc_info] == [logging.ERROR]


async def test_a_question_that_fails_unexpectedly_is_logged_and_answered(
    make_hub: MakeHub, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ask(_: Elicitor, __: Any) -> dict[str, Any]:
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(Elicitor, "ask", ask)
    lease = await make_hub({"a": asking()}, on_elicitation=lambda each: each.accept()).tools()
    assert (await result_of(lease))["code"] == -32603
    assert "unforeseen" in caplog.text


def test_the_error_for_an_invalid_question_is_one_of_the_adapter() -> None:
    with pytest.raises(InvalidQuestionError):
        read_elicitation("a", {"mode": "form"})


class Person:
    """Somebody who is asked and does not answer until the test lets them."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.answers = asyncio.Event()
        self.left = asyncio.Event()

    async def __call__(self, elicitation: Elicitation) -> ElicitationAnswer:
        self.asked.set()
        try:
            await self.answers.wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        return elicitation.accept({"guests": 4} if elicitation.mode == "form" else None)


async def test_a_cancelled_call_ends_its_question(make_hub: MakeHub, notes: Path) -> None:
    person = Person()
    lease = await make_hub({"a": asking(notes=str(notes), leaves=False)}, on_elicitation=person).tools()
    call = asyncio.ensure_future(function_of(lease, "ask")())
    await person.asked.wait()
    call.cancel()
    await asyncio.wait({call})
    await person.left.wait()
    assert call.cancelled()
    lines = await wait_for_notes(notes, 3)
    assert 'reply {"action": "cancel"}' in lines
    # The session can still be used.
    assert await function_of(lease, "echo")(text="on") == "on"


async def test_a_call_that_is_answered_ends_its_question(make_hub: MakeHub) -> None:
    person = Person()
    lease = await make_hub({"a": asking(leaves=True)}, on_elicitation=person).tools()
    assert await function_of(lease, "ask")() == "left"
    if person.asked.is_set():
        await person.left.wait()
    assert await function_of(lease, "echo")(text="on") == "on"


async def test_a_question_lasts_as_long_as_any_call_that_it_may_belong_to(make_hub: MakeHub, notes: Path) -> None:
    person = Person()
    lease = await make_hub({"a": asking(notes=str(notes))}, on_elicitation=person).tools()
    asks = asyncio.ensure_future(function_of(lease, "ask")())
    await person.asked.wait()
    sleeps = asyncio.ensure_future(function_of(lease, "sleep")())
    assert await function_of(lease, "echo")(text="on") == "on"
    sleeps.cancel()
    await asyncio.wait({sleeps})
    assert not person.left.is_set()
    person.answers.set()
    assert json.loads(await asks) == {"action": "accept", "content": {"guests": 4}}


async def test_a_question_that_the_server_withdraws_is_given_up(make_hub: MakeHub) -> None:
    person = Person()
    lease = await make_hub({"a": asking(withdraws=True)}, on_elicitation=person).tools()
    call = asyncio.ensure_future(function_of(lease, "ask")())
    # Both messages may be read before the person is asked at all.
    assert await function_of(lease, "echo")(text="on") == "on"
    assert not person.asked.is_set() or person.left.is_set()
    call.cancel()
    await asyncio.wait({call})


async def test_closing_the_hub_ends_open_questions(make_hub: MakeHub) -> None:
    person = Person()
    hub = make_hub({"a": asking()}, on_elicitation=person)
    lease = await hub.tools()
    call = asyncio.ensure_future(function_of(lease, "ask")())
    await person.asked.wait()
    await hub.close()
    await person.left.wait()
    with pytest.raises(ToolError):
        await call


async def test_the_time_of_the_user_does_not_count_against_the_limit_of_the_call(make_hub: MakeHub) -> None:
    person = Person()
    entry = asking(lmbridge={"callTimeout": 1, "maxCallTimeout": 60})
    lease = await make_hub({"a": entry}, on_elicitation=person).tools()
    call = asyncio.ensure_future(function_of(lease, "ask")())
    await person.asked.wait()
    # Far longer than the limit.
    await asyncio.wait({call}, timeout=2.5)
    assert not call.done()
    person.answers.set()
    assert json.loads(await call)["action"] == "accept"


async def test_the_most_that_a_call_may_take_limits_the_user_as_well(make_hub: MakeHub) -> None:
    person = Person()
    entry = asking(lmbridge={"callTimeout": 0.1, "maxCallTimeout": 0.3})
    lease = await make_hub({"a": entry}, on_elicitation=person).tools()
    with pytest.raises(ToolError, match="was still waiting for the user to answer"):
        await function_of(lease, "ask")()
    await person.left.wait()


async def test_a_question_outside_of_a_call_is_declined(make_hub: MakeHub, notes: Path) -> None:
    def answer(elicitation: Elicitation) -> ElicitationAnswer:
        pytest.fail(f"asked {elicitation}")

    first = [{"jsonrpc": "2.0", "id": "q", "method": "elicitation/create", "params": FORM}]
    server = asking(first=first, notes=str(notes), leaves=True)
    lease = await make_hub({"a": server}, on_elicitation=answer).tools()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert 'reply {"action": "decline"}' in await wait_for_notes(notes, 2)


URLS = [{**URL, "elicitationId": "e1"}, {**URL, "elicitationId": "e2"}]


async def test_a_call_that_needs_a_visit_is_made_again_after(make_hub: MakeHub, recorder: Recorder[McpEvent]) -> None:
    asked: list[str | None] = []

    def answer(elicitation: Elicitation) -> ElicitationAnswer:
        asked.append(elicitation.elicitation_id)
        return elicitation.accept()

    hub = make_hub({"a": asking(urls=URLS, visited=True)}, on_elicitation=answer, on_event=recorder)
    lease = await hub.tools()
    assert await function_of(lease, "visit")() == "visit"
    assert asked == ["e1", "e2"]
    assert ElicitationCompleted("a", "e2") in recorder.seen


async def test_a_visit_that_is_not_reported_is_waited_for_only_for_a_while(
    make_hub: MakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.sdk.elicitation_messages._VISIT_SECONDS", 0.05)
    lease = await make_hub({"a": asking(urls=URLS)}, on_elicitation=lambda each: each.accept()).tools()
    assert await function_of(lease, "visit")() == "visit"


@pytest.mark.parametrize("options", [{}, {"on_elicitation": lambda each: each.decline()}])
async def test_a_call_that_needs_a_visit_fails_if_the_user_does_not_agree(
    make_hub: MakeHub, options: dict[str, Any]
) -> None:
    lease = await make_hub({"a": asking(urls=URLS)}, **options).tools()
    with pytest.raises(ToolError, match="-32042: visit it first"):
        await function_of(lease, "visit")()


# Servers that are made with the SDK

ASKING_SERVER = str(Path(__file__).parent.parent / "asking_server.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "results"),
    [
        (
            {"on_elicitation": lambda each: each.accept({"guests": 4} if each.mode == "form" else None)},
            ["accept 4", "accept"],
        ),
        ({"on_elicitation": lambda each: each.decline()}, ["decline", "decline"]),
        ({}, ["decline", "decline"]),
    ],
)
async def test_a_server_of_the_sdk_gets_the_answers(
    make_hub: MakeHub, options: dict[str, Any], results: list[str]
) -> None:
    lease = await make_hub({"a": {"command": sys.executable, "args": [ASKING_SERVER]}}, **options).tools()
    assert [await function_of(lease, name)() for name in ("book", "log_in")] == results


# The revision 2026-07-28, in which a question is in the result of the call

NEEDS_INPUT = {
    "resultType": "input_required",
    "requestState": "opaque",
    "inputRequests": {"guests": {"method": "elicitation/create", "params": {"mode": "form", **FORM}}},
}


def modern_result(message: Any) -> dict[str, Any]:
    """Returns the result of a request to a server that asks in each call, and answers with what it was told."""
    params = message.get("params") or {}
    if message["method"] == "tools/call" and "inputResponses" in params:
        told = [params["requestState"], params["inputResponses"]["guests"], params["_meta"]]
        return {"resultType": "complete", "content": [{"type": "text", "text": json.dumps(told)}]}
    results: dict[str, dict[str, Any]] = {
        "server/discover": {
            "resultType": "complete",
            "supportedVersions": ["2026-07-28"],
            "capabilities": {"tools": {}},
            "ttlMs": 0,
            "cacheScope": "private",
        },
        "tools/list": {
            "resultType": "complete",
            "tools": [{"name": "book", "inputSchema": {"type": "object"}}],
            "ttlMs": 0,
            "cacheScope": "private",
        },
        "tools/call": NEEDS_INPUT,
    }
    return results[message["method"]]


@pytest_asyncio.fixture
async def modern_url() -> AsyncIterator[str]:
    """The URL of a server that answers with `modern_result`."""

    async def respond(request: web.Request) -> web.Response:
        message = await request.json()
        return web.json_response({"jsonrpc": "2.0", "id": message.get("id"), "result": modern_result(message)})

    app = web.Application()
    app.router.add_post("/mcp", respond)
    server = TestServer(app)
    await server.start_server()
    yield str(server.make_url("/mcp"))
    await server.close()


CAPABILITIES = "io.modelcontextprotocol/clientCapabilities"
needs_modern = pytest.mark.skipif(not is_v2(), reason="SDK 1.x does not speak this revision")


@needs_modern
async def test_a_question_in_a_result_is_asked_and_the_call_is_made_again(make_hub: MakeHub, modern_url: str) -> None:
    hub = make_hub({"a": {"url": modern_url}}, on_elicitation=lambda each: each.accept({"guests": 3}))
    state, response, meta = json.loads(await function_of(await hub.tools(), "book")())
    assert state == "opaque"
    assert response == {"action": "accept", "content": {"guests": 3}}
    assert meta[CAPABILITIES]["elicitation"] == {"form": {}, "url": {}}


@needs_modern
async def test_a_question_in_a_result_is_declined_by_default(make_hub: MakeHub, modern_url: str) -> None:
    hub = make_hub({"a": {"url": modern_url}})
    _, response, meta = json.loads(await function_of(await hub.tools(), "book")())
    assert response == {"action": "decline"}
    assert "elicitation" not in meta[CAPABILITIES]


@needs_modern
async def test_a_cancelled_call_ends_its_question_in_a_result(make_hub: MakeHub, modern_url: str) -> None:
    person = Person()
    lease = await make_hub({"a": {"url": modern_url}}, on_elicitation=person).tools()
    call = asyncio.ensure_future(function_of(lease, "book")())
    await person.asked.wait()
    call.cancel()
    await asyncio.wait({call})
    assert call.cancelled()
    assert person.left.is_set()


@needs_modern
async def test_the_most_that_a_call_may_take_limits_a_question_in_a_result(make_hub: MakeHub, modern_url: str) -> None:
    person = Person()
    entry = {"url": modern_url, "lmbridge": {"callTimeout": 0.1, "maxCallTimeout": 0.3}}
    lease = await make_hub({"a": entry}, on_elicitation=person).tools()
    with pytest.raises(ToolError, match="was still waiting for the user to answer"):
        await function_of(lease, "book")()
    assert person.left.is_set()
