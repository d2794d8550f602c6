"""Answers requests for generations: schedules each by the model that its body names, and passes it on byte for byte."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

import attrs

from lmbridge._scheduled_run import current_run
from lmbridge._tasks import run_in_slices
from lmbridge.client import failures
from lmbridge.client.error_body import Redact, parse_error_body
from lmbridge.client.several_servers import find_models
from lmbridge.client.usage import usage_in_body
from lmbridge.config import Priority, Timeouts, check_priority
from lmbridge.errors import LLMError, LLMValidationError
from lmbridge.gateway.access import Access
from lmbridge.gateway.activity import Activity, Entry
from lmbridge.gateway.fair_order import FairOrder
from lmbridge.gateway.gateway_errors import Problem, problem_of
from lmbridge.gateway.http_server import IncomingRequest
from lmbridge.gateway.passing_body import (
    PassingBody,
    begins_with_error,
    end_to_end,
    headers_for_client,
    is_event_stream,
)
from lmbridge.gateway.redaction import redacted_body
from lmbridge.gateway.request_fields import read_fields
from lmbridge.gateway.waiting_comments import WaitingComments
from lmbridge.transport import Call, ForwardedResponse, Interpreter, Request
from lmbridge.transport.base_transport import BaseTransport
from lmbridge.transport.decompression import decompressed_beginning

logger: logging.Logger = logging.getLogger("lmbridge.gateway")

ENDPOINTS: Final = frozenset(
    f"/v1/{name}"
    for name in (
        "chat/completions",
        "completions",
        "embeddings",
        "responses",
        "messages",
        "decisions",
        "systemone",
    )
)
"""The paths whose requests are scheduled by model."""
COUNTS: Final = frozenset(
    {
        "/v1/chat/completions/input_tokens",
        "/v1/messages/count_tokens",
        "/v1/responses/input_tokens",
        "/apply-template",
        "/detokenize",
        "/tokenize",
    }
)
"""The paths of requests about the tokens of a prompt: of llama.cpp, of Anthropic's and OpenAI's API, and of vLLM. Such
a request takes the server only milliseconds and no slot, so it needs no permit. But it has to go to the server that has
the model."""
_STORING: Final = "/v1/responses"
"""The path whose answers a server stores unless the request forbids it. Sending such a request twice would store two
answers."""
_NEVER_STREAMED: Final = frozenset({"/v1/embeddings", *COUNTS})
"""The paths that are never answered with a stream, even if a request asks for one. So a client that waits for such an
answer must not get comments, which would corrupt the answer."""
PRIORITY_HEADER: Final = "X-Lmbridge-Priority"
"""The header in which a client sends the priority of its request."""
_NOT_PASSED_ON: Final = frozenset({"host", "content-length", "expect", "accept-encoding", "x-lmbridge-priority"})
"""Headers of a request that are for the gateway, or that the connection to the server determines."""
_CREDENTIALS: Final = frozenset({"authorization", "x-api-key"})
_INTERPRETER: Final = Interpreter(
    classify=failures.classify,
    reports_error=begins_with_error,
    read_usage=usage_in_body,
    concerns_server=failures.concerns_server,
    report_loss=failures.report_loss,
    find_models=find_models,
)
_READABLE_ENCODINGS: Final = ("gzip", "deflate")


@attrs.frozen(kw_only=True)
class ForwardingOptions:
    """How requests are passed on."""

    timeouts: Timeouts
    """The time limits of each request."""
    max_retries: int
    """How often a failed request may be sent again."""
    max_body_bytes: int
    """The maximum size of the body of a request, in bytes."""
    passes_credentials: bool
    """Whether the keys that clients send are passed on to the server."""
    comment_seconds: float
    """The seconds after which a client that waits for a stream gets the first comment, and then the next one."""


class Generations:
    """Answers the requests that make a model work.

    Args:
        upstream: The server, or the pool of servers, that requests are passed on to.
        activity: The record of all requests.
        access: Makes the names of the clients.
        options: How requests are passed on.
    """

    def __init__(self, upstream: BaseTransport, activity: Activity, access: Access, options: ForwardingOptions) -> None:
        self._upstream = upstream
        self._activity = activity
        self._access = access
        self._options = options
        self._order = FairOrder()

    async def answer(self, incoming: IncomingRequest) -> None:
        """Answers a request.

        On cancellation of the caller, which means that the client has left, the connection to the server is closed, or
        the request leaves the queue.

        Raises:
            Problem: The request is not passed on, or was not answered by the server.
            ConnectionError: The client has left.
        """
        body = await incoming.read_body(self._options.max_body_bytes)
        encoding = incoming.headers.get("Content-Encoding")
        fields = await run_in_slices(read_fields(body, encoding, self._options.max_body_bytes))
        streams = fields.streams and incoming.path not in _NEVER_STREAMED
        headers = self._headers_for_server(incoming, streams=streams)
        name, priority = _priority_in(incoming.headers.get(PRIORITY_HEADER))
        client = self._access.client_name(incoming.address, incoming.headers)
        entry = Entry(
            id=self._activity.next_id(),
            model=fields.model,
            endpoint=incoming.path,
            priority=priority,
            priority_name=name,
            client=client,
            streaming=streams,
            position=self._order.enter(client, priority, fields.model if self._waits_by_model else None),
            arrived_at=time.monotonic(),
        )
        # A retry must not make the server store a second response. `LLMClient.create_response` has the same rule.
        repeatable = incoming.path != _STORING or fields.forbids_storing
        request = self._request(incoming, body, headers, entry, repeatable=repeatable)
        if incoming.path in COUNTS:
            self._admit_at_once(entry, request)
        # The transport drops the body when the response has begun. Without `del`, this reference would keep the long
        # prompts of many open streams in memory.
        del body
        with self._recorded(entry):
            await self._forward(incoming, entry, request)

    @property
    def _waits_by_model(self) -> bool:
        """Whether requests for different models wait separately, because a server limits the models in use."""
        return any(server.limits.max_loaded_models is not None for server in self._upstream.nodes)

    @contextmanager
    def _recorded(self, entry: Entry) -> Iterator[None]:
        """Records a request, and keeps its position in the order, until it has been answered."""
        token = current_run.set(entry.position)
        self._activity.enter(entry)
        try:
            yield
        except asyncio.CancelledError:
            entry.status = "client left"
            raise
        except ConnectionError:
            entry.status = "client left"
            raise
        except Problem as problem:
            entry.status = problem.status
            raise
        except BaseException as exc:
            # The status page shows how the request has ended, whatever ended it.
            entry.status = type(exc).__name__
            raise
        finally:
            current_run.reset(token)
            entry.position.end()
            self._order.leave(entry.position)
            self._activity.leave(entry)

    def _request(
        self, incoming: IncomingRequest, body: bytes, headers: dict[str, str], entry: Entry, *, repeatable: bool
    ) -> Request:
        def on_admitted(call: Call) -> None:
            entry.server = server_of(call)
            if entry.admitted_at is None:
                entry.admitted_at = time.monotonic()
                self._order.admitted(entry.position)

        return Request(
            operation=f"gateway request {entry.id}",
            method="POST",
            path=incoming.path.removeprefix("/v1"),
            body=body,
            model=entry.model,
            priority=entry.priority,
            timeouts=self._options.timeouts,
            max_retries=self._options.max_retries,
            interpreter=_INTERPRETER,
            headers=headers,
            query=incoming.query,
            on_admitted=on_admitted,
            repeatable=repeatable,
        )

    def _admit_at_once(self, entry: Entry, request: Request) -> None:
        """Lets a request pass without a permit."""
        entry.admitted_at = entry.arrived_at
        entry.needs_model = False
        self._order.leave(entry.position)
        request.queued = False
        request.below_root = not entry.endpoint.startswith("/v1/")
        # Loading a model could unload the model of a running generation, so llama.cpp's router must not load one for a
        # request that has no permit.
        request.query = {**request.query, "autoload": "false"}

    def _headers_for_server(self, incoming: IncomingRequest, *, streams: bool) -> dict[str, str]:
        headers: dict[str, str] = {}
        for name, value in end_to_end(incoming.headers):
            lower = name.lower()
            if lower in _NOT_PASSED_ON or (lower in _CREDENTIALS and not self._options.passes_credentials):
                continue
            try:
                value.encode()
            except UnicodeEncodeError as exc:
                raise Problem(400, f"the header {name} is not UTF-8", code="invalid_header") from exc
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        # A stream is never compressed, because a compressor holds events back. Other answers may be compressed only in
        # ways that the gateway can read, because it has to know what an error says.
        accepted = incoming.headers.get("Accept-Encoding", "")
        readable = [] if streams else [name for name in _READABLE_ENCODINGS if _accepts_encoding(accepted, name)]
        return headers | {"Accept-Encoding": ", ".join(readable) or "identity"}

    async def _forward(self, incoming: IncomingRequest, entry: Entry, request: Request) -> None:
        comments = WaitingComments(incoming, self._options.comment_seconds) if entry.streaming else None
        try:
            response = await self._upstream.forward(request)
        except LLMError as error:
            if comments is not None:
                await comments.stop()
            await _report_problem(incoming, entry, problem_of(error))
            return
        except BaseException:
            # The comments have to stop, even after a cancellation.
            if comments is not None:
                await comments.give_up()
            raise
        async with response:
            if comments is not None:
                await comments.stop()
            entry.server = server_of(response.call)
            await self._pass_on(incoming, entry, response)

    async def _pass_on(self, incoming: IncomingRequest, entry: Entry, response: ForwardedResponse) -> None:
        entry.status = response.status
        whole = response.whole_body
        body = PassingBody(response, self._upstream.redact, decompresses=incoming.has_begun)
        is_error = response.status >= 400
        if whole is not None:
            plain = decompressed_beginning(whole, response.headers.get("Content-Encoding"))
            if is_error:
                failures.report_loss(response.call, response.status, plain)
            if not is_event_stream(response):
                entry.tokens = body.tokens(plain)
                # Some servers report errors with status 200.
                is_error = is_error or (b'"error"' in plain and begins_with_error(plain))
        if incoming.has_begun and (response.status != 200 or not is_event_stream(response) or not body.is_readable):
            await _report_problem(incoming, entry, _late_problem(response, whole, self._upstream.redact))
        elif whole is not None and not incoming.has_begun:
            headers = [each for each in headers_for_client(response.headers) if each[0].lower() != "content-length"]
            if is_error:
                headers, whole = await redacted_body(response.status, headers, whole, self._upstream.redact)
            self._activity.note_part(entry, len(whole), 0)
            await incoming.respond(response.status, headers, whole)
        else:
            if not incoming.has_begun:
                await incoming.begin(response.status, body.headers())
            await self._pass_parts(incoming, entry, body)

    async def _pass_parts(self, incoming: IncomingRequest, entry: Entry, body: PassingBody) -> None:
        try:
            while part := await body.next_part():
                self._activity.note_part(entry, len(part), body.count_events(part))
                await incoming.write(part)
        except LLMError as error:
            entry.status = type(error).__name__
            logger.warning("the response to request %d broke off: %s", entry.id, error)
            if not body.can_end_with_event:
                incoming.abort()
                return
            await incoming.write(body.separator + problem_of(error).event(incoming.path))
        finally:
            entry.tokens = body.tokens(None)
        await incoming.finish()


def _accepts_encoding(header: str, encoding: str) -> bool:
    """Returns whether an `Accept-Encoding` names an encoding, and does not refuse it with the weight 0."""
    for entry in header.lower().split(","):
        name, _, weight = entry.partition(";")
        if name.strip() == encoding:
            return re.fullmatch(r"\s*q\s*=\s*0(\.0*)?\s*", weight) is None
    return False


def server_of(call: Call) -> str:
    """Returns the URL of the server that a call is sent to, without the path of the request."""
    return call.url.removesuffix(call.request.path)


async def _report_problem(incoming: IncomingRequest, entry: Entry, problem: Problem) -> None:
    """Reports a problem to the client: with a response, or in an event if the response has begun.

    Raises:
        Problem: The response has not begun. The caller turns every problem into a response.
    """
    if not incoming.has_begun:
        raise problem
    entry.status = problem.status
    await incoming.write(problem.event(incoming.path))
    await incoming.finish()


def _late_problem(response: ForwardedResponse, whole: bytes | None, redact: Redact) -> Problem:
    """Returns the problem for a client whose stream has begun with comments, if the server's answer cannot follow them.

    The answer is an error, or is not an event stream that the client can read.
    """
    plain = decompressed_beginning(whole or b"", response.headers.get("Content-Encoding"))
    error = parse_error_body(plain, redact)
    is_other = response.status < 400 and not is_event_stream(response)
    answered = f"answered {response.status}{', but not with an event stream' if is_other else ''}"
    return Problem(
        response.status if response.status >= 400 else 502,
        f"the server {answered}: {error.message or 'its body cannot be read'}",
        code=redact(str(error.fields.get("code") or "upstream_error"))[:100],
    )


def _priority_in(header: str | None) -> tuple[str, int]:
    """Returns a priority by the name that the client has used, and as a number.

    Raises:
        Problem: The header is not a priority.
    """
    if header is None:
        return "normal", 0
    value: Priority | str = header.strip()
    with suppress(ValueError):
        value = int(value)
    try:
        return str(value), check_priority(value)  # type: ignore[arg-type]  # it is checked
    except LLMValidationError as exc:
        message = f"{PRIORITY_HEADER} must be interactive, normal, batch or an integer"
        raise Problem(400, message, code="invalid_priority", param=PRIORITY_HEADER) from exc
