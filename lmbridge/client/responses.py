"""Responses (`/v1/responses`): conversations that the server may keep, streamed as named events.

This is the only module that imports `aiohttp_sse_client`, and it does so when the first stream is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast
from urllib.parse import urlsplit

import attrs

from lmbridge._checks import check_text, wrong_type
from lmbridge.client import failures
from lmbridge.client.answer_text import StreamedText
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.completion_shape import is_broken_reason
from lmbridge.client.error_body import Redact, is_error_object, parse_error_body
from lmbridge.client.reply_stream import ReplyStream
from lmbridge.client.response_accumulator import ResponseAccumulator
from lmbridge.client.served_model import MismatchPolicy
from lmbridge.client.surrogates import join_halves, may_hold_surrogates
from lmbridge.errors import LLMError, LLMResponseError, LLMValidationError
from lmbridge.transport import EventStream
from lmbridge.types import Response, ResponseEventData

if TYPE_CHECKING:
    from aiohttp_sse_client.client import MessageEvent

_FAILED_WITHOUT_REASON: Final = "the response failed, with no reason given"
_UNNAMED: Final = "message"
"""The name that an event without a name has, by the specification of event streams; some servers send it."""
_FAILURE_EVENTS: Final = frozenset({"response.failed", "response.cancelled"})
_EXAMPLE_ITEM: Final = "[{'role': 'user', 'content': 'Hello'}]"


ResponseInput = str | Sequence[Mapping[str, Any]]
"""The input of a response: a text, or a list of items, such as messages and results of function calls."""


class ResponseEvent(NamedTuple):
    """An event of a streamed response.

    Attributes:
        event: The event as the server sent it. Its `type` is the name of the event, or the type in its data if the
            server sends no names. Its `data` is the text.
        data: The text of the event, parsed as JSON. It always has a `type`, which is the name of the event if the
            server has not put it into the data.
    """

    event: MessageEvent
    data: ResponseEventData


class ResponseStream(ReplyStream[ResponseEvent, Response]):
    """The events of one response, each with its parsed data.

    For example::

        async for event, data in await client.create_response("Hello", stream=True):
            if event.type == "response.output_text.delta":
                print(data["delta"], end="")

    It is used like a `ChatStream`, and raises the same errors. It ends only after `response.completed` or
    `response.incomplete`. `.partial` and the result of `collect` have the shape of a plain response.
    """

    __slots__ = ("_event_class", "_origin")

    _EXPECTED_END = "response.completed or response.incomplete"

    def __init__(
        self,
        events: EventStream,
        mismatch_policy: MismatchPolicy,
        redact: Redact,
        event_class: Callable[..., MessageEvent],
    ) -> None:
        super().__init__(events, mismatch_policy, redact, ResponseAccumulator())
        url = urlsplit(events.call.url)
        self._origin = f"{url.scheme}://{url.netloc}"
        self._event_class = event_class

    def text(self) -> StreamedText:
        """Returns an iterator over the pieces of the text of the answer."""
        return StreamedText(self, _event_text)

    def _read_object(self, value: dict[str, Any], name: str, data: bytes) -> ResponseEvent:
        """Adds an event to the response and returns it.

        Raises:
            LLMError: The event reports an error, or that the response failed.
        """
        text = data.decode("utf-8", "replace")
        if _is_error_event(value):
            raise self._server_error(text)
        # Some servers send the type only as the name of the event, and others only in its data.
        kind = value.get("type")
        if isinstance(kind, str) and kind:
            name = kind if name in ("", _UNNAMED) else name
        elif name or "type" in value:
            value = {**value, "type": name}
        self._add_to_response(value, text)
        if self._halves or may_hold_surrogates(data):
            value = dict(join_halves(value, self._halves))
        event = self._event_class(type=name or None, message=name, data=text, origin=self._origin, last_event_id="")
        return ResponseEvent(event, cast("ResponseEventData", value))

    def _make_last_item(self, rest: dict[str, Any]) -> ResponseEvent:
        name, text = rest.get("type", ""), json.dumps(rest)
        event = self._event_class(type=name or None, message=name, data=text, origin=self._origin, last_event_id="")
        return ResponseEvent(event, cast("ResponseEventData", rest))

    def _add_to_response(self, value: dict[str, Any], text: str) -> None:
        response = value.get("response")
        response = response if isinstance(response, dict) else {}
        try:
            self._add_from_model(value, response.get("model"), response.get("id"))
        except LLMError as error:
            self._fail(error)
            raise
        reason = response.get("error") or _reason_of_failure(response)
        if reason or value.get("type") in _FAILURE_EVENTS:
            raise self._fail(self._error_of_failed_event(reason, text))
        if self._accumulator.is_finished:
            self._mark_complete()
            self._pending = iter(())

    def _error_of_failed_event(self, error: object, text: str) -> LLMError:
        error_body = parse_error_body(json.dumps({"error": error or _FAILED_WITHOUT_REASON}), self._redact)
        return failures.error_from_event(attrs.evolve(error_body, text=self._redact(text)), self._events.call.context())

    def _on_done(self) -> None:
        # A response ends with a named event, so `[DONE]` without that event is treated like the end of the body.
        self._end_of_body()


def _is_error_event(value: Mapping[str, Any]) -> bool:
    if value.get("error") or value.get("type") == "error":
        return True
    return not value.get("type") and is_error_object(value)


def _event_text(event: ResponseEvent) -> str:
    delta = event.data.get("delta") if event.data.get("type") == "response.output_text.delta" else None
    return delta if isinstance(delta, str) else ""


def _message_event_class() -> type[MessageEvent]:
    from aiohttp_sse_client.client import MessageEvent  # noqa: PLC0415 - most programs never stream a response

    return cast("type[MessageEvent]", MessageEvent)


async def request_response(server: ServerApi, body: dict[str, Any], *, stream: bool) -> Response | ResponseStream:
    """Sends the request of `LLMClient.create_response`, and returns its reply or stream."""
    _check_arguments(body["input"], body.get("previous_response_id"), body.get("tools"))
    # `transformers serve` streams a response by default.
    body.setdefault("stream", False)
    # A response that the server keeps must not be created twice by a retry.
    request = server.build_post(
        "response", "/responses", body, body.get("model"), repeatable=body.get("store") is False
    )
    if stream:
        event_class = _message_event_class()
        return ResponseStream(await server.stream(request), server.mismatch_policy, server.redact, event_class)
    reply = await server.request(request)
    value = await server.read_object(reply, _has_output)
    if not _has_output(value):
        raise server.unexpected_reply(reply, "a response")
    server.check_served_model(reply, value)
    if (reason := _reason_of_failure(value)) is not None:
        raise LLMResponseError(
            reason, status=reply.status, body=server.body_text(reply), context=reply.call.context(), partial=value
        )
    return cast("Response", value)


def _has_output(response: Mapping[str, Any]) -> bool:
    output = response.get("output")
    return isinstance(output, list) and all(isinstance(item, dict) for item in output)


def _reason_of_failure(response: Mapping[str, Any]) -> str | None:
    """Returns why a response without an error object has failed, or None if it has not.

    A response that was cut off at its limit has not failed.
    """
    status, details = response.get("status"), response.get("incomplete_details")
    if status == "failed":
        return _FAILED_WITHOUT_REASON
    if is_broken_reason(status):
        return f"the server aborted the response, with the status {status!r}"
    if isinstance(details, Mapping) and is_broken_reason(reason := details.get("reason")):
        return f"the server aborted the response, with the reason {reason!r}"
    return None


def _check_arguments(input_items: object, previous_response_id: object, tools: object) -> None:
    """Refuses arguments that no server can accept.

    Raises:
        LLMValidationError: An argument is not valid.
    """
    if not isinstance(input_items, str):
        _check_input_items(input_items)
    check_text(
        "previous_response_id",
        previous_response_id,
        optional=True,
        hint="give the 'id' of the response to continue, or None",
    )
    if isinstance(tools, Sequence) and not isinstance(tools, str | bytes):
        for number, tool in enumerate(tools):
            _check_tool(number, tool)


def _check_input_items(items: object) -> None:
    if not isinstance(items, Sequence) or isinstance(items, bytes | bytearray):
        raise wrong_type("input", "a string or a list of items", items, f"for example {_EXAMPLE_ITEM}")
    if not items:
        raise LLMValidationError("input is empty", hint=f"give at least one item, like {_EXAMPLE_ITEM}")
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise wrong_type(f"input[{number}]", "a dict", item, f"for example {_EXAMPLE_ITEM}")
        if not item.get("role") and not item.get("type"):
            raise LLMValidationError(
                f"input[{number}] has neither role nor type",
                hint="add 'role': 'user', or the type of the item, like 'function_call_output'",
            )


def _check_tool(number: int, tool: object) -> None:
    if not isinstance(tool, Mapping):
        raise wrong_type(f"tools[{number}]", "a dict", tool, "give a dict for each tool")
    if isinstance(function := tool.get("function"), Mapping):
        name = function.get("name")
        raise LLMValidationError(
            f"tools[{number}] is nested, like a tool of a chat completion",
            hint=f"tools of a response are flat: {{'type': 'function', 'name': {name!r}, 'parameters': {{...}}}}",
        )
