"""Responses: plain ones, streams of named events, and retries that never create a stored response twice."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from aiohttp_sse_client.client import MessageEvent

from lmbridge import (
    ContextLengthExceededError,
    Limits,
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    ModelChangedDuringExecutionError,
    ModelLoadError,
    ModelMismatchError,
    ResponseEvent,
    ResponseStream,
    TaskCancelledError,
    Timeouts,
    collect,
)
from lmbridge.testing import ScriptedServer, hang_up, reply, reset, sse, stall
from lmbridge.types import Response
from tests.support import MESSAGES, cancel_at_each_step, in_flight

FLAT = {"type": "function", "name": "add", "parameters": {"type": "object"}}
NESTED = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def named(kind: str, **fields: Any) -> bytes:
    """Returns an event with its name, which its data repeats."""
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode({"type": kind, **fields}))


def message(text: str, status: str = "completed", **fields: Any) -> dict[str, Any]:
    """Returns an item of the output."""
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"id": "msg_1", "type": "message", "role": "assistant", "status": status, "content": [part], **fields}


def response(*output: Any, **fields: Any) -> dict[str, Any]:
    """Returns a complete response."""
    usage = {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}
    whole = {"id": "resp_1", "object": "response", "model": "test-model", "status": "completed", "error": None}
    return {**whole, "output": list(output), "usage": usage, **fields}


STARTED = {"id": "resp_1", "object": "response", "model": "test-model", "status": "in_progress"}
WHOLE = response(message("Hello"))
HALF = (
    named("response.created", response=STARTED),
    named("response.in_progress", response=STARTED),
    named("response.output_item.added", item=message("", "in_progress", content=[])),
    named("response.content_part.added", item_id="msg_1", part={"type": "output_text", "text": ""}),
    named("response.output_text.delta", item_id="msg_1", delta="Hel"),
    named("response.output_text.delta", item_id="msg_1", delta="lo"),
)
ALL = (
    *HALF,
    named("response.output_text.done", item_id="msg_1", text="Hello"),
    named("response.content_part.done", item_id="msg_1", part={"type": "output_text", "text": "Hello"}),
    named("response.output_item.done", item=message("Hello")),
    named("response.completed", response=WHOLE),
)


async def opened(client: LLMClient) -> ResponseStream:
    return await client.create_response("Say hello.", stream=True)


async def ask(client: LLMClient, stream: bool, **params: Any) -> Response:
    """Returns the response of a plain call, or the collected one of a stream."""
    answer = await client.create_response("Hi", stream=stream, **params)
    return await collect(answer) if isinstance(answer, ResponseStream) else answer


async def take_one(client: LLMClient) -> None:
    async for _ in await opened(client):
        break


async def read(stream: AsyncIterator[ResponseEvent]) -> str:
    return "".join([data["delta"] async for _, data in stream if data["type"] == "response.output_text.delta"])


def text_of(partial: Any) -> str:
    text = partial["output"][0]["content"][0]["text"]
    assert isinstance(text, str)
    return text


# Plain responses


async def test_the_reply_is_the_dict_that_the_server_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    sent = response(message("Hello"), odd={"a": None})
    scripted_server.script(reply(200, sent))
    assert await client.create_response("Say hello.") == sent


async def test_nothing_is_added_to_a_request_except_whether_it_streams(scripted_server: ScriptedServer) -> None:
    scripted_server.default = reply(200, WHOLE)
    items = [{"role": "user", "content": "Hi"}, {"type": "function_call_output", "call_id": "c", "output": "3"}]
    async with LLMClient(scripted_server.api_base) as client:
        first = await client.create_response("Hi")
        await client.create_response(items, model="m", previous_response_id=first["id"], tools=[FLAT], store=True)
        scripted_server.script(sse(*ALL))
        await collect(await client.create_response("", stream=True))
    assert [request.json for request in scripted_server.requests] == [
        {"input": "Hi", "stream": False},
        {
            "input": items,
            "model": "m",
            "previous_response_id": "resp_1",
            "tools": [FLAT],
            "store": True,
            "stream": False,
        },
        {"input": "", "stream": True},
    ]
    assert {request.path for request in scripted_server.requests} == {"/v1/responses"}


BAD: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input must be a string or a list of items, not None; for example"),
    ({"input": 5}, "input must be a string or a list of items, not int"),
    ({"input": b"x"}, "input must be a string or a list of items, not bytes"),
    ({"input": {"role": "user"}}, "input must be a string or a list of items, not dict"),
    ({"input": []}, "input is empty; give at least one item"),
    ({"input": ["a"]}, r"input\[0\] must be a dict, not str"),
    ({"input": [{"content": "a"}]}, r"input\[0\] has neither role nor type"),
    ({"previous_response_id": ""}, "previous_response_id must be .*, not ''; give the 'id'"),
    ({"previous_response_id": 5}, "previous_response_id must be .*, not 5"),
    ({"tools": [FLAT, "add"]}, r"tools\[1\] must be a dict, not str"),
    (
        {"tools": (NESTED,)},
        r"tools\[0\] is nested.*; tools of a response are flat: {.*'name': 'add', ",
    ),
    ({"model": ""}, "model must be .*, not ''"),
]


@pytest.mark.parametrize(("arguments", "expected_text"), BAD)
@pytest.mark.parametrize("stream", [True, False])
async def test_bad_input_is_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient, arguments: dict[str, Any], expected_text: str, stream: bool
) -> None:
    with pytest.raises(LLMValidationError, match=expected_text):
        await client.create_response(**{"input": "Hi", **arguments}, stream=stream)
    assert scripted_server.connections == 0


async def test_an_incomplete_response_is_returned_unchanged(scripted_server: ScriptedServer, client: LLMClient) -> None:
    sent = response(message("Hel"), status="incomplete", incomplete_details={"reason": "max_output_tokens"})
    scripted_server.script(reply(200, sent), sse(*HALF, named("response.incomplete", response=sent)))
    assert await client.create_response("Hi") == sent
    assert await collect(await opened(client)) == sent


@pytest.mark.parametrize(
    ("fields", "error", "expected_text"),
    [
        ({"status": "failed", "error": {"message": "model crashed"}}, ModelLoadError, "model crashed"),
        ({"error": {"code": "rate_limit_exceeded", "message": "slow"}}, LLMRateLimitError, "slow"),
        ({"status": "failed"}, LLMResponseError, "the response failed, with no reason given"),
        ({"output": None}, LLMResponseError, "something that is not a response"),
    ],
)
async def test_a_failed_response_raises(
    scripted_server: ScriptedServer, client: LLMClient, fields: Any, error: type[LLMError], expected_text: str
) -> None:
    scripted_server.script(reply(200, response(**fields)))
    with pytest.raises(error, match=expected_text) as caught:
        await client.create_response("Hi")
    assert caught.value.status == 200
    assert '"resp_1"' in (caught.value.body or "")
    assert str(caught.value).startswith("response with model 'test-model' at http")


@pytest.mark.parametrize("error", [None, {"code": "server_error", "message": "Oh no."}, "model crashed"])
async def test_the_error_of_a_failed_response_has_its_output(
    scripted_server: ScriptedServer, client: LLMClient, error: Any
) -> None:
    failed = response(message("Hel", "incomplete"), status="failed", error=error)
    scripted_server.script(reply(200, failed), sse(*HALF, named("response.failed", response=failed)))
    with pytest.raises(LLMError) as caught:
        await client.create_response("Hi")
    assert caught.value.partial == failed
    with pytest.raises(LLMError) as streamed:
        await collect(await opened(client))
    assert streamed.value.partial == failed


async def test_an_error_without_a_response_has_no_partial(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(reply(200, {"error": {"message": "Oh no."}}))
    with pytest.raises(LLMResponseError, match="Oh no") as caught:
        await client.create_response("Hi")
    assert caught.value.partial is None


@pytest.mark.parametrize("stream", [True, False])
async def test_server_errors_raise_the_same_classes_as_for_a_chat(
    scripted_server: ScriptedServer, client: LLMClient, stream: bool
) -> None:
    scripted_server.script(reply(400, {"error": {"message": "too long", "type": "exceed_context_size_error"}}))
    with pytest.raises(ContextLengthExceededError, match="response with model 'test-model' at http"):
        await client.create_response("Hi", stream=stream)


@pytest.mark.parametrize(
    "fields",
    [
        {"status": "cancelled"},
        {"status": "aborted"},
        {"status": "error"},
        {"status": "incomplete", "incomplete_details": {"reason": "abort"}},
        {"status": "incomplete", "incomplete_details": {"reason": "error"}},
    ],
)
async def test_an_aborted_response_raises(
    scripted_server: ScriptedServer, client: LLMClient, fields: dict[str, Any]
) -> None:
    aborted = response(message("Hel", "incomplete"), **fields)
    scripted_server.script(reply(200, aborted), sse(*HALF, named("response.incomplete", response=aborted)))
    with pytest.raises(LLMResponseError, match="the server aborted the response") as caught:
        await client.create_response("Hi")
    assert caught.value.partial["output"] == aborted["output"]
    with pytest.raises(LLMStreamError, match="the server aborted the response") as streamed:
        await collect(await opened(client))
    assert streamed.value.partial["output"] == aborted["output"]


async def test_a_cancelled_response_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(*HALF, named("response.cancelled", response=response(message("Hel")))))
    with pytest.raises(LLMStreamError, match="the response failed"):
        await collect(await opened(client))


async def test_a_response_with_a_reason_of_the_future_is_returned(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    for details in ({"reason": "content_filter"}, {"reason": "a reason of the future"}, {}):
        incomplete = response(message("Hel"), status="incomplete", incomplete_details=details)
        scripted_server.script(reply(200, incomplete))
        assert await client.create_response("Hi") == incomplete


async def test_an_output_with_anything_but_objects_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    for item in (None, "text", [message("Hello")]):
        scripted_server.script(reply(200, response(item)))
        with pytest.raises(LLMResponseError, match="something that is not a response"):
            await client.create_response("Hi")


async def test_json_in_place_of_a_stream_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(reply(200, WHOLE))
    with pytest.raises(LLMResponseError, match="not an event stream"):
        await opened(client)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_of_another_model_is_noticed(
    scripted_server: ScriptedServer, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.default = sse(*ALL) if stream else reply(200, WHOLE)
    async with LLMClient(scripted_server.api_base, "other", model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError):
            await ask(client, stream)
    async with LLMClient(scripted_server.api_base, "other") as client:
        with caplog.at_level(logging.WARNING, "lmbridge"):
            await ask(client, stream)
    assert caplog.messages[0].startswith("asked for model 'other', but 'test-model' answered")


# Streamed responses


async def test_events_are_message_events_with_their_parsed_data(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse(*ALL))
    events = [event async for event in await opened(client)]
    assert len(events) == len(ALL)
    event, data = events[4]
    assert data == {"type": "response.output_text.delta", "item_id": "msg_1", "delta": "Hel"}
    message_event: Any = MessageEvent
    assert event == message_event(
        type="response.output_text.delta",
        message="response.output_text.delta",
        data='{"type":"response.output_text.delta","item_id":"msg_1","delta":"Hel"}',
        origin=scripted_server.origin,
        last_event_id="",
    )


async def test_events_are_handed_out_while_the_server_is_still_writing(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    async with await opened(client) as stream:
        seen = [(await anext(stream)).data["type"] for _ in HALF]
    assert seen[-1] == "response.output_text.delta"


async def test_collect_returns_the_plain_reply(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(*ALL))
    stream = await opened(client)
    await anext(stream)
    assert await collect(stream) == WHOLE
    assert await collect(stream) == WHOLE


async def test_the_model_may_change_before_the_answer_or_if_model_mismatch_is_ignore(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    announcement = named("response.queued", response={**STARTED, "model": "proxy"})
    scripted_server.script(sse(announcement, *ALL))
    assert await collect(await opened(client)) == WHOLE
    other = {**WHOLE, "model": "other"}
    scripted_server.script(sse(*HALF, named("response.completed", response=other)))
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="ignore") as indifferent:
        assert await collect(await opened(indifferent)) == other


@pytest.mark.parametrize("last", [(), ("data: [DONE]\n\n",), ("event: done\ndata: [DONE]\n\n",), ("garbage\n",)])
async def test_events_after_the_last_one_are_ignored(
    scripted_server: ScriptedServer, client: LLMClient, last: tuple[str, ...]
) -> None:
    scripted_server.script(sse(b"".join(ALL) + "".join(last).encode()), sse(*ALL, *last))
    for _ in range(2):
        stream = await opened(client)
        assert await read(stream) == "Hello"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_stream_ends_with_its_last_event_even_if_the_body_goes_on(
    scripted_server: ScriptedServer, client: LLMClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.transport.events.DRAIN_SECONDS", 0.01)
    scripted_server.script(stall(after=ALL))
    assert await read(await opened(client)) == "Hello"
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_events_without_names_are_recognized_by_their_type(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    bare = [event.partition(b"\n")[2] for event in ALL]
    scripted_server.script(sse(*bare))
    stream = await opened(client)
    event, _ = await anext(stream)
    assert (event.type, event.message) == ("response.created", "response.created")
    assert await collect(stream) == WHOLE


async def test_events_without_types_are_recognized_by_their_names(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    data = msgspec.json.encode({"response": WHOLE})
    scripted_server.script(sse(b"event: response.completed\ndata: " + data + b"\n\n"))
    stream = await opened(client)
    event, parsed = await anext(stream)
    assert parsed == {"type": "response.completed", "response": WHOLE}
    assert json.loads(event.data) == {"response": WHOLE}
    assert await collect(stream) == WHOLE


@pytest.mark.parametrize("names", ["name and type", "type", "name", "message and type"])
async def test_the_text_is_found_by_the_name_or_by_the_type(
    scripted_server: ScriptedServer, client: LLMClient, names: str
) -> None:
    parts = [event.removeprefix(b"event: ").split(b"\n", 1) for event in ALL]
    forms = {
        "name and type": ALL,
        "type": [data for _, data in parts],
        "name": [b"event: %b\n%b" % (name, data.replace(b'"type":"%b",' % name, b"")) for name, data in parts],
        "message and type": [b"event: message\n" + data for _, data in parts],
    }
    scripted_server.default = sse(*forms[names])
    assert [text async for text in (await opened(client)).text()] == ["Hel", "lo"]
    events = [(event.type, data["type"]) async for event, data in await opened(client)]
    assert events == [(name.decode(), name.decode()) for name, _ in parts]


async def test_comments_empty_events_and_unknown_events_are_accepted(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    others = (": ping\n\n", "event: ping\ndata:\n\n", named("response.mystery.event", x=1), {"keep": "alive"})
    scripted_server.script(sse(":\n\n", *HALF, *others, *ALL[len(HALF) :]))
    events = [data.get("type") async for _, data in await opened(client)]
    assert "response.mystery.event" in events
    assert len(events) == len(ALL) + 2


CALL = {"id": "fc_1", "type": "function_call", "call_id": "call_1", "name": "add", "arguments": ""}


@pytest.mark.parametrize(
    ("events", "output"),
    [
        ((), []),
        (HALF[2:], [message("Hello", "in_progress", content=[{"type": "output_text", "text": "Hello"}])]),
        (HALF[4:], [{"id": "msg_1", "content": [{"type": "output_text", "text": "Hello"}]}]),
        (ALL[2:-2], [message("Hello", "in_progress", content=[{"type": "output_text", "text": "Hello"}])]),
        (ALL[2:-1], [message("Hello")]),
        (
            (
                named("response.output_item.added", item=CALL),
                named("response.function_call_arguments.delta", item_id="fc_1", delta='{"a"'),
                named("response.function_call_arguments.delta", item_id="fc_1", delta=": 1"),
            ),
            [{**CALL, "arguments": '{"a": 1'}],
        ),
        (
            (
                named("response.output_item.added", item={"id": "rs_1", "type": "reasoning", "summary": []}),
                named("response.reasoning_text.delta", item_id="rs_1", delta="Hm"),
                named("response.reasoning_text.delta", delta="m."),
                named("response.reasoning_summary_part.added", part={"type": "summary_text", "text": ""}),
                named("response.reasoning_summary_text.delta", delta="Sum"),
                *HALF[2:],
                named("response.reasoning_text.delta", item_id="rs_1", delta="."),
            ),
            [
                {
                    "id": "rs_1",
                    "type": "reasoning",
                    "content": [{"type": "reasoning_text", "text": "Hmm.."}],
                    "summary": [{"type": "summary_text", "text": "Sum"}],
                },
                message("Hello", "in_progress", content=[{"type": "output_text", "text": "Hello"}]),
            ],
        ),
        (
            (
                named("response.output_item.added", item=message("", content=[])),
                named("response.content_part.added", content_index=0, part={"type": "output_text", "text": ""}),
                named("response.content_part.added", content_index=1, part={"type": "refusal", "refusal": ""}),
                named("response.refusal.delta", content_index=1, delta="No"),
                named("response.output_text.delta", content_index=0, delta="Yes"),
                named("response.content_part.done", content_index=1, part={"type": "refusal", "refusal": "No."}),
            ),
            [message("", content=[{"type": "output_text", "text": "Yes"}, {"type": "refusal", "refusal": "No."}])],
        ),
    ],
    ids=["nothing", "text", "deltas alone", "part done", "item done", "call", "reasoning", "indices"],
)
async def test_an_incomplete_stream_raises_with_the_partial_response(
    scripted_server: ScriptedServer, client: LLMClient, events: tuple[bytes, ...], output: Any
) -> None:
    scripted_server.script(sse(HALF[0], *events), sse(HALF[0], *events, done=True), sse(HALF[0], *events, end=False))
    for expected_text in (
        "without response.completed",
        "without response.completed",
        "the connection broke mid-stream",
    ):
        with pytest.raises(LLMStreamError, match=expected_text) as caught:
            await read(await opened(client))
        partial = caught.value.partial
        for item in partial["output"]:
            if item.get("id") == "msg_1" and "type" in item and "type" not in output[-1]:
                # They are assumed if the item is known only from its deltas.
                del item["type"], item["role"]
        assert partial == {**STARTED, "output": output}
    assert in_flight(client) == 0


async def test_an_empty_stream_is_incomplete(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(":\n\n"), sse(done=True))
    for _ in range(2):
        with pytest.raises(LLMStreamError, match="cut off") as caught:
            await read(await opened(client))
        assert caught.value.partial is None


async def test_a_stream_that_is_cut_at_any_byte_raises(scripted_server: ScriptedServer, client: LLMClient) -> None:
    body = b"".join(ALL)
    for cut in range(0, len(body) - 2, 7):
        scripted_server.script(sse(body[:cut]))
        with pytest.raises(LLMStreamError):
            await read(await opened(client))
    assert in_flight(client) == 0


FAILED = response(message("Hel", "incomplete"), status="failed", error={"code": "server_error", "message": "Oh no."})


@pytest.mark.parametrize(
    ("last", "error", "expected_text"),
    [
        (named("response.failed", response=FAILED), LLMStreamError, r"the server ended the stream: Oh no\."),
        (named("response.failed", response={**FAILED, "error": None}), LLMStreamError, "with no reason given"),
        (named("response.failed"), LLMStreamError, "an event of an unknown shape"),
        (named("response.completed", response=FAILED), LLMStreamError, r"Oh no\."),
        (
            named("response.failed", response={**FAILED, "error": {"message": "model crashed"}}),
            ModelLoadError,
            "model crashed",
        ),
        (named("error", message="model crashed", code=None), ModelLoadError, "model crashed"),
        (b'data: {"type": "error", "error": {"message": "gone"}}\n\n', LLMStreamError, "gone"),
        (b'data: {"error": {"message": "Compute error."}}\n\n', LLMStreamError, r"Compute error\."),
        (b"event: error\ndata: gone\n\n", LLMStreamError, "gone"),
        (b"event: error\ndata:\n\n", LLMStreamError, "an error that has no text"),
        (b"data: gone\n\n", LLMStreamError, "gone"),
        (b"data: 7\n\n", LLMStreamError, "7"),
        (b"proxy error: gone\n\n", LLMStreamError, "proxy error: gone"),
        (b'data: {"detail": "gone"}\n\n', LLMStreamError, "gone"),
        (named("response.completed"), LLMStreamError, "an event of an unknown shape"),
        (named("response.output_text.delta", delta=5), LLMStreamError, "an event of an unknown shape"),
        (named("response.output_item.added", item="x"), LLMStreamError, "an event of an unknown shape"),
        (
            named("response.completed", response={**WHOLE, "model": "other"}),
            ModelChangedDuringExecutionError,
            "went on with 'other'",
        ),
    ],
)
async def test_an_error_in_a_stream_has_its_class_and_the_partial_response(
    scripted_server: ScriptedServer, client: LLMClient, last: bytes, error: type[LLMError], expected_text: str
) -> None:
    scripted_server.script(sse(*HALF, last))
    stream = await opened(client)
    with pytest.raises(error, match=expected_text) as caught:
        await read(stream)
    assert type(caught.value) is error
    assert text_of(caught.value.partial) in ("Hello", "Hel")
    assert caught.value.status == 200
    with pytest.raises(error) as again:
        await anext(stream)
    assert again.value is caught.value
    assert in_flight(client) == 0


async def test_the_error_of_a_failed_response_has_the_event_and_the_output(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    last = named("response.failed", response=FAILED)
    scripted_server.script(sse(*HALF, last))
    with pytest.raises(LLMStreamError) as caught:
        await read(await opened(client))
    assert caught.value.body == last.partition(b"data: ")[2].decode().strip()
    assert caught.value.partial == FAILED


async def test_the_key_appears_in_no_error(scripted_server: ScriptedServer) -> None:
    failed = {**FAILED, "error": {"message": "bad key sk-secret"}}
    scripted_server.script(sse(*HALF, named("response.failed", response=failed)))
    async with LLMClient(scripted_server.api_base, api_key="sk-secret") as client:
        with pytest.raises(LLMStreamError, match=r"bad key \[api_key\]") as caught:
            await read(await opened(client))
    assert "sk-secret" not in f"{caught.value} {caught.value.body}"


async def test_a_long_gap_between_events_is_an_idle_timeout(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=HALF))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(idle=0.05)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await read(await opened(client))
    assert caught.value.phase == "idle"
    assert text_of(caught.value.partial) == "Hello"


async def test_the_reader_of_a_stream_that_another_task_closes_gets_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    stream = await opened(client)
    for _ in HALF:
        await anext(stream)
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(0)
    await stream.aclose()
    with pytest.raises(TaskCancelledError) as caught:
        await reader
    assert text_of(caught.value.partial) == "Hello"
    await scripted_server.wait_until(lambda: scripted_server.aborts)


async def test_dropping_an_open_stream_warns_and_closes_its_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(after=HALF))
    with pytest.warns(ResourceWarning, match="unclosed stream of response with model 'test-model'"):
        await take_one(client)
    assert in_flight(client) == 0
    await scripted_server.wait_until(lambda: scripted_server.aborts)


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_at_any_step_leaves_nothing_behind(
    scripted_server: ScriptedServer, no_waits: list[float], stream: bool
) -> None:
    good = sse(*ALL) if stream else reply(200, WHOLE)
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:

        async def run() -> None:
            scripted_server._script.clear()
            scripted_server.script(reply(503, {"error": "busy"}), good)
            await ask(client, stream)

        async def after() -> None:
            assert in_flight(client) == 0
            scripted_server._script.clear()
            scripted_server.script(reply(200, WHOLE))
            assert await client.create_response("Hi") == WHOLE

        await cancel_at_each_step(run, after, at_least=3)
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


# A response that the server stores is not created twice


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("first", [reply(503, {"error": "busy"}), reply(429, {"error": "slow down"})])
async def test_a_request_is_retried_if_the_server_has_not_begun(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], stream: bool, first: Any
) -> None:
    scripted_server.script(first, sse(*ALL) if stream else reply(200, WHOLE))
    assert await ask(client, stream) == WHOLE
    assert len(scripted_server.requests) == 2


async def test_a_request_waits_for_a_server_that_is_loading(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float]
) -> None:
    loading = reply(503, {"error": {"message": "Loading model", "code": 503}})
    scripted_server.script(*[loading] * 5, reply(200, WHOLE))
    assert await ask(client, stream=False) == WHOLE


async def test_a_refused_connection_is_retried(no_waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        port = bound.getsockname()[1]
    async with LLMClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(LLMConnectionError, match=r"could not connect.*after 3 attempts"):
            await ask(client, stream=False)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [408, 500, 502, 504])
async def test_an_error_is_not_retried_if_the_server_may_have_begun(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], stream: bool, status: int
) -> None:
    scripted_server.script(reply(status, {"error": "odd"}), reply(200, WHOLE))
    with pytest.raises(LLMResponseError, match=f"answered {status}"):
        await ask(client, stream)
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("breaks", [reset(), hang_up()])
async def test_the_error_of_a_broken_connection_says_why_it_was_not_retried(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], stream: bool, breaks: Any
) -> None:
    scripted_server.script(breaks, reply(200, WHOLE))
    with pytest.raises(LLMConnectionError, match="1 attempt") as caught:
        await ask(client, stream)
    assert "not sent again, because the server may have started" in (caught.value.hint or "")
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize("kind", [["x"], {"a": 1}, 5, True, None])
async def test_a_type_that_is_not_a_text_is_replaced_by_the_name_of_the_event(
    scripted_server: ScriptedServer, client: LLMClient, kind: object
) -> None:
    item = {"type": "message", "id": "m", "content": [{"type": "output_text", "text": "Hi"}]}
    ended = {"type": "response.completed", "response": {"status": "completed", "output": [item]}}
    first = {"type": kind, "item_id": "m", "output_index": 0, "delta": "Hi"}
    event = f"event: response.output_text.delta\ndata: {json.dumps(first)}\n\n"
    scripted_server.script(sse(f"data: {json.dumps(first)}\n\n", event, f"data: {json.dumps(ended)}\n\n", done=False))
    assert text_of(await collect(await client.create_response("Say", stream=True))) == "Hi"


async def test_a_request_uses_a_new_connection_because_a_kept_one_may_be_dead(
    scripted_server: ScriptedServer,
) -> None:
    async with LLMClient(scripted_server.api_base, "test-model", max_retries=0) as client:
        await client.chat_completion(MESSAGES)
        scripted_server.hang_up_reused = 1
        scripted_server.script(reply(200, WHOLE), reply(200, WHOLE), sse(*ALL))
        assert await ask(client, stream=False) == WHOLE
        assert await ask(client, stream=False) == WHOLE
        assert await ask(client, stream=True) == WHOLE
        assert [request.connection for request in scripted_server.requests] == [1, 2, 3, 4]
        await scripted_server.wait_until(lambda: scripted_server.open_connections == 1)
        # The kept connection is dead, and is replaced silently.
        await client.chat_completion(MESSAGES)
    assert sum(request.refused for request in scripted_server.requests) == 1


@pytest.mark.parametrize("first", [reset(), reply(502, {"error": "odd"}), reply(500, {"error": "odd"})])
async def test_a_request_that_is_not_stored_is_retried_like_a_chat(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], first: Any
) -> None:
    scripted_server.script(reply(200, WHOLE), first, reply(200, WHOLE))
    assert await ask(client, stream=False, store=False) == WHOLE
    assert await ask(client, stream=False, store=False) == WHOLE
    assert scripted_server.requests[1].connection == 1
    assert len(scripted_server.requests) == 3


@pytest.mark.parametrize("store", [True, None, 0, "false"])
async def test_only_store_false_makes_a_request_retryable(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], store: Any
) -> None:
    scripted_server.script(reply(502, {"error": "odd"}), reply(200, WHOLE))
    with pytest.raises(LLMResponseError):
        await ask(client, stream=False, store=store)
