"""`MessageExchange`: decides what happens to each message of a server, before the SDK sees any of it.

The SDK is given only what it needs to match an answer to a request: a handshake that is valid, a list of tools reduced
to their names, and empty results. The data bypasses the SDK. Otherwise the SDK would reject a whole list of tools
because of one bad definition, and the result of a call that has already run because of one bad field; and its two major
versions differ in what they reject. Notifications and requests of the server are handled here as well, because the SDK
starts a task for each of them, and logs a traceback for each that is not valid. A server that floods its client with
them would slow everything down.

Requests are sent under ids that cannot be guessed. So an answer to a request that has not been sent yet is recognized
as forged, even while the session is being opened.

Lines that are not messages never get here; `mcp.jsonrpc` skips them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Mapping
from typing import Any, Final

import attrs

from lmbridge._jsonrpc_ids import is_answer, read_id
from lmbridge._tasks import ITEMS_PER_STEP, end_task
from lmbridge._text import shorten
from lmbridge.mcp.jsonrpc import METHOD_NOT_FOUND
from lmbridge.mcp.sdk.elicitation_messages import AskUser, Questions, refusal_error
from lmbridge.mcp.sdk.normalize import normalize_handshake, read_answer
from lmbridge.mcp.sdk.package import known_handshake_versions
from lmbridge.mcp.sdk.sent_requests import SentRequest, current_request

_ID_BITS: Final = 31
"""The size of request ids in bits. Servers in typed languages read them as signed 32-bit integers."""
REMEMBERED_REQUESTS: Final = 256
"""How many finished requests are remembered, so that a late answer to one of them is not reported as unexpected."""
_MOST_PENDING_REPLIES: Final = 64
"""How many replies may be waiting for the server to read them. Further requests of the server are dropped."""
_CLOSE_SECONDS: Final = 1.0
"""How long a cancelled reply may take to end, in seconds."""
_CAPABILITIES_KEY: Final = "io.modelcontextprotocol/clientCapabilities"
"""The key under which the metadata of a request holds our capabilities, in the revision 2026-07-28."""
_ELICITATION_CAPABILITY: Final[Mapping[str, Any]] = {"form": {}, "url": {}}
_INPUT_REQUIRED: Final = "input_required"
"""The type of a result with which a server asks for input, in the revision 2026-07-28. The SDK then sends the request
again, with the answers of the user."""
_PLACEHOLDER_ERROR: Final = {"code": 0, "message": "see the failure of the request"}
_LONGEST_DETAIL: Final = 200
"""The length to which the description of an unexpected message is shortened, in characters."""
_MODERN_NOTIFICATIONS: Final = ("notifications/subscriptions/acknowledged", "notifications/cancelled")
"""The notifications that the SDK needs for a subscription to changes."""
_KNOWN_NOTIFICATIONS: Final = (
    *_MODERN_NOTIFICATIONS,
    "notifications/initialized",
    "notifications/prompts/list_changed",
    "notifications/resources/list_changed",
    "notifications/resources/updated",
    "notifications/roots/list_changed",
    "notifications/tasks/status",
)
"""The notifications of the protocol that lmbridge ignores without reporting them as unexpected."""
_HEADER_KEYS: Final = ("type", "x-mcp-header")
"""The keys of a property's schema that decide whether an argument is also sent as an HTTP header."""
_HEADER_DEPTH: Final = 16
"""How many levels of nested properties are searched for these keys."""


def _ignore(_: str) -> None: ...


@attrs.frozen
class NotificationHandlers:
    """Functions that are called with what a server sends on its own initiative."""

    on_tools_changed: Callable[[], None]
    """Called when the server's list of tools has changed."""
    on_log: Callable[[str, Any], None]
    """Called with the level and the data of a log message."""
    on_lost: Callable[[str], None]
    """Called with the reason when a stream that the session needs has ended, so that the session cannot be used."""
    on_unexpected: Callable[[str, str], None]
    """Called with the kind and the description of something that the protocol does not allow, or that is ignored. It is
    called once for each kind of such messages in a session."""
    ask: AskUser | None = None
    """Asks the user a question of the server. With None, every question is declined."""
    on_visited: Callable[[str], None] = _ignore
    """Called with the id of a question when the server reports that the user has finished at its URL."""


class MessageExchange:
    """Tracks the requests of a session, and filters and normalizes the messages that arrive.

    Args:
        handlers: The functions that are called with what the server sends on its own initiative.
    """

    def __init__(self, handlers: NotificationHandlers) -> None:
        self.is_modern: bool = False
        """True if the session uses a protocol revision without a handshake, 2026-07-28 or later."""
        self.protocol: str = ""
        """The protocol revision that the server named in the handshake, or an empty string."""
        self.failure: Exception | None = None
        """Why the last request failed, or None if it succeeded. It explains why a session could not be opened."""
        self.send_reply: Callable[[dict[str, Any]], Awaitable[None]] | None = None
        """Sends a reply to a request of the server. Without it, such requests are ignored."""
        self._handlers = handlers
        self._pending: dict[Any, tuple[SentRequest, Any]] = {}
        self._finished: deque[Any] = deque(maxlen=REMEMBERED_REQUESTS)
        self._replies: set[asyncio.Future[None]] = set()
        self.questions: Questions = Questions(handlers.ask, handlers.on_visited, self.report, self._send_reply)
        """The questions of the server to the user."""
        self._reported: set[str] = set()

    def report(self, kind: str, detail: Any = "") -> None:
        """Reports something unexpected, if it is the first of its kind in this session."""
        if kind not in self._reported:
            self._reported.add(kind)
            self._handlers.on_unexpected(kind, shorten(str(detail), _LONGEST_DETAIL))

    # Messages to the server.

    def outgoing(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Returns a message of the SDK in the form in which it is sent. The ids of requests in it are replaced.

        For the cancellation of a request that is already over, the method returns None.
        """
        method, params = message.get("method"), message.get("params") or {}
        if method is None:
            return message
        if "id" in message:
            return self._outgoing_request(message, method, params)
        if method == "notifications/cancelled":
            wire_id = self._finish_sdk_id(params.get("requestId"))
            return None if wire_id is None else {**message, "params": {**params, "requestId": wire_id}}
        return message

    def _outgoing_request(self, message: dict[str, Any], method: str, params: dict[str, Any]) -> dict[str, Any]:
        request = current_request(method)
        request.sdk_id = message["id"]
        # An id that is a string names a subscription. It is not replaced, because notifications repeat it.
        wire_id = message["id"] if isinstance(message["id"], str) else new_request_id()
        self._pending[wire_id] = (request, message["id"])
        if method == "initialize":
            params = {**params, "capabilities": self._with_elicitation(params.get("capabilities") or {})}
        meta = params.get("_meta") or {}
        if _CAPABILITIES_KEY in meta:
            meta = {**meta, _CAPABILITIES_KEY: self._with_elicitation(meta[_CAPABILITIES_KEY] or {})}
            params = {**params, "_meta": meta}
        if request.meta:
            # SDK 2.x may have created a span below ours and added its trace context, which is then kept.
            meta = {**request.meta, **meta}
            params = {**params, "_meta": meta}
        if "progressToken" in meta:
            params = {**params, "_meta": {**meta, "progressToken": wire_id}}
        if request.on_sent is not None:
            request.on_sent(wire_id)
        return {**message, "id": wire_id} | ({"params": params} if params else {})

    def _with_elicitation(self, capabilities: Mapping[str, Any]) -> dict[str, Any]:
        """Returns our capabilities, with elicitation (questions to the user) only if the user can be asked."""
        others = {key: value for key, value in capabilities.items() if key != "elicitation"}
        return others if not self.questions.can_ask else {**others, "elicitation": _ELICITATION_CAPABILITY}

    def _finish_sdk_id(self, sdk_id: Any) -> Any:
        """Ends a request that the SDK has given up. Returns the id with which it was sent, or None if it is over."""
        for wire_id, (request, pending_sdk_id) in self._pending.items():
            if pending_sdk_id == sdk_id:
                del self._pending[wire_id]
                self._finished.append(wire_id)
                self.questions.on_request_over(request)
                return wire_id
        return None

    def forget(self, request: SentRequest) -> None:
        """Ends a request whose caller no longer waits for it."""
        self._finish_sdk_id(request.sdk_id)

    # Messages from the server.

    def incoming_in_slices(self, message: dict[str, Any]) -> Generator[None, None, dict[str, Any] | None]:
        """Handles a message that has arrived, and returns the part of it that the SDK gets, or None.

        It is a generator that yields whenever other tasks should run. The next message must wait until it has ended.
        """
        if is_answer(message):
            return (yield from self._incoming_answer(message))
        method = message["method"]
        if not isinstance(method, str):
            self.report("a message whose method is not a string", method)
        elif message.get("id") is not None:
            self._incoming_request(message, method)
        elif not isinstance(message.get("params", {}), dict | None):
            self.report("a malformed notification", method)
        else:
            return self._incoming_notification(message, method, message.get("params") or {})
        return None

    def fail(self, wire_id: Any, failure: Exception) -> dict[str, Any] | None:
        """Ends a request without an answer of the server, and returns the answer that the SDK gets, or None."""
        if (pending := self._pending.pop(wire_id, None)) is None:
            return None
        request, sdk_id = pending
        self._finished.append(wire_id)
        self.questions.on_request_over(request)
        request.failure = self.failure = failure
        return {"jsonrpc": "2.0", "id": sdk_id, "error": _PLACEHOLDER_ERROR}

    def _incoming_answer(self, message: dict[str, Any]) -> Generator[None, None, dict[str, Any] | None]:
        wire_id = self._match_id(message.get("id"))
        if wire_id is None:
            if read_id(message.get("id")) not in self._finished:
                self.report("an answer to a request that was not sent", message.get("id"))
            return None
        request, sdk_id = self._pending[wire_id]
        self.questions.on_request_over(request)
        answer = yield from read_answer(message, request.method)
        for note in sorted(answer.notes):
            self.report(note, request.method)
        sdk_result = {} if answer.result is None else (yield from self._result_for_sdk(request.method, answer.result))
        if self._pending.pop(wire_id, None) is None:
            # The caller has given the request up while the answer was read.
            return None
        self._finished.append(wire_id)
        if answer.result is None:
            request.failure = self.failure = refusal_error(answer.refusal, answer.error)
            # The SDK acts on the content of an error only in a handshake.
            is_call = request.method in ("tools/call", "tools/list")
            return {"jsonrpc": "2.0", "id": sdk_id, "error": _PLACEHOLDER_ERROR if is_call else answer.error}
        self.failure = None
        if answer.result.get("resultType") != _INPUT_REQUIRED:
            request.result = answer.result
        return {"jsonrpc": "2.0", "id": sdk_id, "result": sdk_result}

    def _match_id(self, answered_id: Any) -> Any:
        """Returns the id of the pending request that an answer names, or None. Some servers return it as a string."""
        answered_id = read_id(answered_id)
        return answered_id if answered_id in self._pending else None

    def _result_for_sdk(self, method: str, result: dict[str, Any]) -> Generator[None, None, dict[str, Any]]:
        notes: set[str] = set()
        sdk_result: dict[str, Any]
        if method == "initialize":
            sdk_result, self.protocol = normalize_handshake(result, known_handshake_versions(), notes)
        elif method == "tools/list":
            definitions = []
            for number, definition in enumerate(result["tools"], 1):
                if has_name(definition):
                    definitions.append(_minimal_definition(definition))
                if number % ITEMS_PER_STEP == 0:
                    yield
            sdk_result = {**_cache_hints(result), "tools": definitions}
        elif method == "tools/call" and result.get("resultType", "complete") == "complete":
            sdk_result = {"content": []}
        else:
            sdk_result = result
        if self.is_modern:
            # The specification says that a result without this field counts as complete. The SDK rejects it.
            sdk_result.setdefault("resultType", "complete")
        for note in sorted(notes):
            self.report(note, method)
        return sdk_result

    def _incoming_request(self, message: Mapping[str, Any], method: str) -> None:
        request_id = message["id"]
        if isinstance(request_id, bool) or not isinstance(request_id, str | int):
            self.report("a request without a usable id", method)
        elif len(self._replies) >= _MOST_PENDING_REPLIES:
            self.report("more requests than the server reads replies to", method)
        elif method == "elicitation/create":
            self.questions.open(request_id, message.get("params"), (request for request, _ in self._pending.values()))
        elif method == "ping":
            self._reply(request_id, {"result": {}})
        else:
            self.report("a request for something that lmbridge does not offer", method)
            problem = f"lmbridge does not support {shorten(method, _LONGEST_DETAIL)}"
            self._reply(request_id, {"error": {"code": METHOD_NOT_FOUND, "message": problem}})

    def _reply(self, request_id: Any, outcome: Mapping[str, Any]) -> None:
        """Sends the reply to a request of the server, in a task."""
        task = asyncio.ensure_future(self._send_reply(request_id, outcome))
        self._replies.add(task)
        task.add_done_callback(self._replies.discard)

    async def _send_reply(self, request_id: Any, outcome: Mapping[str, Any]) -> None:
        if self.send_reply is not None:
            await self.send_reply({"jsonrpc": "2.0", "id": request_id, **outcome})

    async def close(self) -> None:
        """Cancels the questions to the user, and the replies that the server has not read."""
        await self.questions.close()
        if self._replies:
            # Cancelling the future that gathers them cancels all of them at once.
            await end_task(asyncio.gather(*self._replies, return_exceptions=True), grace=_CLOSE_SECONDS)

    def _incoming_notification(
        self, message: dict[str, Any], method: str, params: dict[str, Any]
    ) -> dict[str, Any] | None:
        if method == "notifications/progress":
            self._on_progress(params)
        elif method == "notifications/message":
            self._handlers.on_log(str(params.get("level") or "info"), params.get("data", params.get("message")))
        elif method == "notifications/tools/list_changed":
            self._handlers.on_tools_changed()
        elif method == "notifications/elicitation/complete":
            self.questions.on_visited(params.get("elicitationId"))
        elif method == "notifications/cancelled" and not self.is_modern:
            self.questions.cancel(params.get("requestId"))
        elif self.is_modern and method in _MODERN_NOTIFICATIONS:
            return {**message, "jsonrpc": "2.0"}
        elif method not in _KNOWN_NOTIFICATIONS:
            self.report("a notification that the protocol does not define", method)
        return None

    def _on_progress(self, params: dict[str, Any]) -> None:
        wire_id = self._match_id(params.get("progressToken"))
        progress = _as_number(params.get("progress"))
        if wire_id is None:
            if read_id(params.get("progressToken")) not in self._finished:
                self.report("progress of a request that was not sent", params.get("progressToken"))
        elif progress is None:
            self.report("progress that is not a number", params.get("progress"))
        elif (listener := self._pending[wire_id][0].listener) is not None:
            message = params.get("message")
            listener.on_progress(
                progress, _as_number(params.get("total")), message if isinstance(message, str) else None
            )


def _as_number(value: Any) -> float | None:
    try:
        return None if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def new_request_id() -> int:
    """Returns an id for a request to a server, which nobody can guess."""
    # The highest bit is always set, because some servers answer all requests under a constant id such as 0 or 1.
    return secrets.randbits(_ID_BITS) | 1 << (_ID_BITS - 1)


def has_name(definition: Any) -> bool:
    """Returns whether something in a list of tools is an object with a name."""
    return isinstance(definition, dict) and isinstance(definition.get("name"), str)


def _cache_hints(page: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields besides `tools` that a page in a modern session needs. They keep the SDK from caching it."""
    cursor = page.get("nextCursor")
    return {"ttlMs": 0, "cacheScope": "private"} | ({"nextCursor": cursor} if isinstance(cursor, str) else {})


def _minimal_definition(definition: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a definition that is valid and not too deep for the SDK, with only what it needs to send a call."""
    schema = {"type": "object", "properties": _header_properties(definition.get("inputSchema"), _HEADER_DEPTH)}
    return {"name": definition["name"], "inputSchema": schema}


def _header_properties(schema: Any, depth: int) -> dict[str, Any]:
    """Returns a schema's properties, reduced to the keys that say which arguments are also sent as HTTP headers."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not depth:
        return {}
    return {
        name: {key: each[key] for key in _HEADER_KEYS if key in each}
        | {"properties": _header_properties(each, depth - 1)}
        for name, each in properties.items()
        if isinstance(each, dict)
    }
