"""`McpTape`: the part of a `Cassette` that records and replays what MCP servers on stdio send.

The tape sits between the session and the process of the server, so a replay starts no process, and everything above it
is real: the SDK, the checks of what a server sends, time limits and cancellation. A recorded exchange is a request with
all messages up to its answer. The ids of requests are random, so the answers are recorded without them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final

import attrs
import msgspec

from lmbridge._jsonrpc_ids import is_answer, read_id
from lmbridge._text import shorten

_REPEATABLE: Final = ("initialize", "tools/list", "ping")
"""The methods of requests that a replay may repeat, because their number depends on the timing of a program."""
_NO_EXCHANGE: Final = -32000

Redact = Callable[[str], str]
"""Replaces the secrets in a text."""


@attrs.define(eq=False, kw_only=True)
class McpExchange:
    """A request to an MCP server, and what the server sent until it had answered."""

    server: str
    """The name of the server in the configuration."""
    method: str
    """The method of the request."""
    params: Any
    """The parameters of the request, without its metadata."""
    messages: list[tuple[float, dict[str, Any]]] = attrs.field(factory=list)
    """What the server sent, each with the seconds since the request. An answer to the request has no id."""
    ended: tuple[float, str] | None = None
    """If the process ended before it had answered: the seconds since the request, and the reason. Otherwise None."""


class McpTape:
    """The exchanges with MCP servers that a cassette records or replays.

    Args:
        exchanges: The exchanges to replay; None to record new ones.
        redact: Replaces the secrets that the cassette knows.
        time_scale: The factor by which the recorded waits are multiplied.
    """

    def __init__(self, exchanges: Sequence[McpExchange] | None, redact: Redact, time_scale: float) -> None:
        self.is_recording: Final = exchanges is None
        """True if the tape records real servers; False if it replays."""
        self.exchanges: list[McpExchange] = list(exchanges or ())
        """The exchanges in the order of their requests."""
        self.unplayed: list[McpExchange] = list(self.exchanges)
        """The exchanges that have not been replayed."""
        self.problems: list[str] = []
        """Descriptions of the requests that have no exchange on the tape."""
        self._redact = redact
        self._time_scale = time_scale

    def make_link(
        self, server: str, redact: Redact, make_real: Callable[[], Any], on_end: Callable[[str], None]
    ) -> Any:
        """Returns the link to the process of a server; see `LinkMaker`."""

        def redact_all(value: Any) -> Any:
            # Only texts are redacted, because a secret that is a number may also occur as a number in a message.
            return _map_texts(value, lambda text: self._redact(redact(text)))

        if self.is_recording:
            return _RecordingLink(self, server, redact_all, make_real())
        return _ReplayLink(self, server, redact_all, on_end)

    def take(self, server: str, method: str, params: Any) -> McpExchange | None:
        """Returns the exchange that answers a request, and takes it off the tape."""

        def fits(each: McpExchange) -> bool:
            return (each.server, each.method, each.params) == (server, method, params)

        for exchange in self.unplayed:
            if fits(exchange):
                self.unplayed.remove(exchange)
                return exchange
        if method in _REPEATABLE:
            return next((each for each in reversed(self.exchanges) if fits(each) and each.ended is None), None)
        return None

    def scaled(self, seconds: float) -> float:
        """Returns how long the replay waits where the recording has a wait of `seconds`."""
        return seconds * self._time_scale


class _RecordingLink:
    """A link that records what is sent and received over another one."""

    def __init__(self, tape: McpTape, server: str, redact: Callable[[Any], Any], real: Any) -> None:
        self._tape, self._server, self._redact, self._real = tape, server, redact, real
        self._pending: dict[Any, tuple[float, McpExchange]] = {}
        self._last: tuple[float, McpExchange] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def send(self, message: bytes) -> None:
        decoded = msgspec.json.decode(message)
        if "method" in decoded and "id" in decoded:
            params = self._redact(_without_meta(decoded.get("params")))
            exchange = McpExchange(server=self._server, method=decoded["method"], params=params)
            self._pending[read_id(decoded["id"])] = self._last = monotonic(), exchange
            self._tape.exchanges.append(exchange)
        await self._real.send(message)

    async def receive(self) -> dict[str, Any] | None:
        message: dict[str, Any] | None = await self._real.receive()
        if message is None:
            for began, exchange in self._pending.values():
                exchange.ended = monotonic() - began, str(self._redact(self._real.stderr_excerpt) or "it ended")
            self._pending.clear()
        else:
            self._record_message(message)
        return message

    def _record_message(self, message: dict[str, Any]) -> None:
        params = message.get("params")
        token = read_id(params.get("progressToken")) if isinstance(params, Mapping) else None
        answered_id = read_id(message.get("id")) if is_answer(message) else None
        if answered_id in self._pending:
            began, exchange = self._pending.pop(answered_id)
            message = {name: value for name, value in message.items() if name not in ("id", "method")}
        elif isinstance(params, Mapping) and token in self._pending:
            began, exchange = self._pending[token]
            message = {**message, "params": {**params, "progressToken": None}}
        elif (found := next(iter(self._pending.values()), self._last)) is not None:
            # The message belongs to no request. In a replay, it arrives at about the same time.
            began, exchange = found
        else:
            return
        exchange.messages.append((monotonic() - began, self._redact(message)))


class _ReplayLink:
    """A link whose messages come from a tape."""

    pid = None
    stderr_excerpt = ""
    stderr_tail = ""
    last_stderr_at = None

    def __init__(self, tape: McpTape, server: str, redact: Callable[[Any], Any], on_end: Callable[[str], None]) -> None:
        self._tape, self._server, self._redact, self._on_end = tape, server, redact, on_end
        self._messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._timers: list[asyncio.TimerHandle] = []
        self._has_ended = False

    async def start(self) -> None: ...

    async def end(self, *, patience: float | None = None) -> None:  # noqa: ARG002 - there is no process
        for timer in self._timers:
            timer.cancel()
        self._finish()

    async def receive(self) -> dict[str, Any] | None:
        message = await self._messages.get()
        if message is None:
            # Every further call returns None as well.
            self._messages.put_nowait(None)
        return message

    async def send(self, message: bytes) -> None:
        request = msgspec.json.decode(message)
        if "method" not in request or "id" not in request:
            # Notifications, and replies to questions of the server, get no answer.
            return
        method, params = request["method"], self._redact(_without_meta(request.get("params")))
        exchange = self._tape.take(self._server, method, params)
        if exchange is None:
            asked = f"{method} {shorten(repr(params), 200)} of MCP server {self._server!r}"
            self._tape.problems.append(f"no exchange for {asked}")
            error = {"code": _NO_EXCHANGE, "message": f"the cassette has no exchange for {asked}"}
            self._messages.put_nowait({"jsonrpc": "2.0", "id": request["id"], "error": error})
            return
        for seconds, recorded in exchange.messages:
            self._at(seconds, self._messages.put_nowait, _with_id(recorded, request["id"]))
        if exchange.ended is not None:
            seconds, reason = exchange.ended
            self._at(seconds, self._die, reason)

    def _at(self, seconds: float, function: Callable[..., object], *arguments: Any) -> None:
        wait = self._tape.scaled(seconds)
        if wait:
            self._timers.append(asyncio.get_running_loop().call_later(wait, function, *arguments))
        else:
            function(*arguments)

    def _die(self, reason: str) -> None:
        if not self._has_ended:
            self._on_end(reason)
        self._finish()

    def _finish(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._messages.put_nowait(None)


def _map_texts(value: Any, function: Redact) -> Any:
    """Returns a copy of a JSON value in which the function has replaced each text."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, Mapping):
        return {name: _map_texts(each, function) for name, each in value.items()}
    if isinstance(value, list):
        return [_map_texts(each, function) for each in value]
    return value


def _without_meta(params: Any) -> Any:
    """Returns parameters without their metadata, which has the id of the request and the context of a trace."""
    if not isinstance(params, Mapping):
        return params
    return {name: value for name, value in params.items() if name != "_meta"}


def _with_id(recorded: dict[str, Any], request_id: Any) -> dict[str, Any]:
    """Returns a recorded message. An answer, or a report of progress, gets the id of the replayed request."""
    if "method" not in recorded and "id" not in recorded:
        return {**recorded, "id": request_id}
    params = recorded.get("params")
    if isinstance(params, Mapping) and "progressToken" in params and params["progressToken"] is None:
        return {**recorded, "params": {**params, "progressToken": request_id}}
    return recorded
