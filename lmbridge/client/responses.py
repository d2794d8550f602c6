"""Responses (`/v1/responses`): conversations that the server may keep, streamed as events with names.

This is the only importer of `aiohttp_sse_client`, and imports it when the first stream is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, cast
from urllib.parse import urlsplit

import attrs

from lmbridge.client import failures
from lmbridge.client.names import MismatchPolicy
from lmbridge.client.response_fold import ResponseFold
from lmbridge.client.server_api import ServerApi
from lmbridge.client.stream import ReplyStream
from lmbridge.client.wire import decode_json
from lmbridge.errors import LLMError, LLMResponseError, LLMStreamError, LLMValidationError
from lmbridge.transport import Event, EventStream, NamedEvent, Reply
from lmbridge.types import Response, ResponseEventData

if TYPE_CHECKING:
    from aiohttp_sse_client.client import MessageEvent

_DONE: Final = b"[DONE]"
_NO_REASON: Final = "the response failed, with no reason given"
_ITEM: Final = "[{'role': 'user', 'content': 'Hello'}]"


ResponseInput = str | Sequence[Mapping[str, Any]]
"""A text, or items: messages, results of function calls."""


class ResponseEvent(NamedTuple):
    """An event of a streamed response.

    Attributes:
        event: As the server sent it: its name is in `type`, its text in `data`.
        data: The text, parsed.
    """

    event: MessageEvent
    data: ResponseEventData


class ResponseStream(ReplyStream[ResponseEvent, Response]):
    """The events of one response, each with its parsed data.

    It promises what a `ChatStream` does, and raises what that raises, but it ends after `response.completed` or
    `response.incomplete`, and nothing else. `.partial` and `collect` have the shape of a plain response.
    """

    __slots__ = ("_message_event", "_origin")

    def __init__(
        self, events: EventStream, names: MismatchPolicy, redact: failures.Redact, message_event: type[MessageEvent]
    ) -> None:
        super().__init__(events, names, redact, ResponseFold())
        url = urlsplit(events.call.url)
        self._origin = f"{url.scheme}://{url.netloc}"
        self._message_event = message_event

    async def __anext__(self) -> ResponseEvent:
        while True:
            for event in self._left:
                if (read := self._read_unusual(event)) is not None:
                    return read
            await self._read_more()

    def _read_unusual(self, event: Event) -> ResponseEvent | None:
        """The event with its data; None for one that has none.

        Raises:
            LLMError: it reports an error, or is one.
        """
        name, raw = (event.name, event.data) if isinstance(event, NamedEvent) else ("", event)
        raw = raw.strip()
        if raw == _DONE:  # the event that ends a response would have come before
            self._end_of_body()
        if not raw and name != "error":
            return None
        text = raw.decode("utf-8", "replace")
        data = self._parsed(raw, text, name)
        if data is None:
            return None
        self._add_to_reply(data if data.get("type") else {**data, "type": name}, text)
        message = self._message_event(type=name or None, message=name, data=text, origin=self._origin, last_event_id="")
        return ResponseEvent(message, cast("ResponseEventData", data))

    def _parsed(self, raw: bytes, text: str, name: str) -> dict[str, Any] | None:
        try:
            data = decode_json(raw)
        except ValueError:
            if self._events.ended and name != "error" and text.startswith(("{", "[")):
                return None  # the end of the body cut it off: that is told when the body's end is
            raise self._report(text) from None
        if not isinstance(data, dict) or name == "error" or _is_error(data):
            raise self._report(text)
        return data

    def _add_to_reply(self, data: dict[str, Any], text: str) -> None:
        response = data.get("response")
        response = response if isinstance(response, dict) else {}
        try:
            self._note_model(response.get("model"))
            self._add(data)
        except LLMError as error:
            self._fail(error)
            raise
        if data["type"] == "response.failed" or response.get("status") == "failed" or response.get("error"):
            raise self._fail(self._failed(response.get("error"), text))
        if self._fold.finished:
            self._finish()
            self._left = iter(())

    def _failed(self, error: object, text: str) -> LLMError:
        said = failures.parse_error_body(self._redact(json.dumps({"error": error or _NO_REASON})))
        return failures.error_from_event(attrs.evolve(said, text=self._redact(text)), self._events.call.context())

    def _end_of_body(self) -> NoReturn:
        if stray := self._events.stray:
            raise self._report(stray)
        raise self._fail(
            LLMStreamError(
                "the stream was cut off: it ended without response.completed or response.incomplete",
                hint="the server stopped, crashed or was cut off; what had arrived is in .partial",
            )
        )


def _is_error(data: Mapping[str, Any]) -> bool:
    if data.get("error") or data.get("type") == "error":
        return True
    return not data.get("type") and failures.is_error_object(data)


def _message_event() -> type[MessageEvent]:
    from aiohttp_sse_client.client import MessageEvent  # noqa: PLC0415 - only who streams responses needs it

    return cast("type[MessageEvent]", MessageEvent)


async def respond(server: ServerApi, body: dict[str, Any], *, stream: bool) -> Response | ResponseStream:
    """Asks for a response; see `LLMClient.create_response`."""
    _check(body["input"], body.get("previous_response_id"), body.get("tools"))
    # One that the server keeps is not made twice.
    request = server.build_post(
        "response", "/responses", body, body.get("model"), repeatable=body.get("store") is False
    )
    if stream:
        message_event = _message_event()
        return ResponseStream(
            await server.stream(request), server.mismatch_policy, server.transport.redact, message_event
        )
    reply = await server.request(request)
    value = server.json_object(reply)
    if not isinstance(value.get("output"), list):
        raise server.unexpected_reply(reply, "a response")
    server.check_served_model(reply, value)
    if value.get("status") == "failed":
        raise _failed(reply, server)
    return cast("Response", value)


def _failed(reply: Reply, server: ServerApi) -> LLMResponseError:
    return LLMResponseError(
        _NO_REASON,
        status=reply.status,
        body=server.body_text(reply),
        context=reply.call.context(),
    )


def _check(given: object, previous: object, tools: object) -> None:
    """Checks what can be known to be wrong before it is sent.

    Raises:
        LLMValidationError: it is.
    """
    if not isinstance(given, str):
        _check_items(given)
    if previous is not None and (not isinstance(previous, str) or not previous.strip()):
        raise LLMValidationError(
            f"previous_response_id is {previous!r}", hint="give the 'id' of the response to go on from, or None"
        )
    if isinstance(tools, Sequence) and not isinstance(tools, str | bytes):
        for number, tool in enumerate(tools):
            _check_tool(number, tool)


def _check_items(items: object) -> None:
    if not isinstance(items, Sequence) or isinstance(items, bytes | bytearray):
        raise LLMValidationError(f"input is {_kind(items)}", hint=f"give a string, or a list of items, like {_ITEM}")
    if not items:
        raise LLMValidationError("input is empty", hint=f"give at least one item, like {_ITEM}")
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            raise LLMValidationError(
                f"input[{number}] is {_kind(item)}", hint=f"give a dict for each item, like {_ITEM}"
            )
        if not item.get("role") and not item.get("type"):
            raise LLMValidationError(
                f"input[{number}] has neither role nor type",
                hint="add 'role': 'user', or the type of the item, like 'function_call_output'",
            )


def _check_tool(number: int, tool: object) -> None:
    if not isinstance(tool, Mapping):
        raise LLMValidationError(f"tools[{number}] is {_kind(tool)}", hint="give a dict for each tool")
    if isinstance(function := tool.get("function"), Mapping):
        name = function.get("name")
        raise LLMValidationError(
            f"tools[{number}] is nested, as tools of a chat are",
            hint=f"here they are flat: {{'type': 'function', 'name': {name!r}, 'parameters': {{...}}}}",
        )


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
