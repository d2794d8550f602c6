"""`ServerApi`: how the endpoints of one client talk to its server.

Each endpoint (chat, embeddings, LM Studio's own API, ...) is a function that builds a request, sends it, and reads the
reply. This module contains the parts that they share: building and sending requests with the client's options, and
turning a reply into a JSON object or an error. It does not know any endpoint, and the transport below it does not know
JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Literal, Self

import attrs

from lmbridge._tasks import SIZE_PER_STEP, pause_after
from lmbridge._text import excerpt, redacted_beginning
from lmbridge.client import failures
from lmbridge.client.call_options import CallSettings
from lmbridge.client.completion_shape import aborted_error, error_in_choice
from lmbridge.client.error_body import is_error_object, reports_error
from lmbridge.client.json_codec import decode_json, decode_whole_characters, encode_body
from lmbridge.client.model_lists import add_available_models
from lmbridge.client.served_model import MismatchPolicy
from lmbridge.client.server_progress import reports_progress
from lmbridge.client.several_servers import find_models
from lmbridge.client.usage import usage_in_body
from lmbridge.config import UNSET, Timeouts, Unset
from lmbridge.errors import LLMError, LLMResponseError, LLMValidationError, ModelNotFoundError
from lmbridge.observe.observer import Observers
from lmbridge.transport import BaseTransport, EventStream, Interpreter, Reply, Request, Transport
from lmbridge.transport.headers import merge_headers

PROBE_SECONDS: Final = 10.0
"""The most seconds that a request about the server itself may take, unless `Timeouts.first_byte` is shorter."""
PROBE_BYTES: Final = 16 * 1024 * 1024
"""The most bytes that the reply to such a request may have."""
_GENERATION_INTERPRETER: Final = Interpreter(
    classify=failures.classify,
    reports_error=reports_error,
    reports_progress=reports_progress,
    read_usage=usage_in_body,
    concerns_server=failures.concerns_server,
    report_loss=failures.report_loss,
    find_models=find_models,
)
_PROBE_INTERPRETER: Final = Interpreter(classify=failures.classify)


class ServerApi:
    """A server as one client sees it: through a transport, with the client's options.

    Args:
        transport: The connections to the server.
        make_transport: A function that returns a transport to another `api_base`, or None if the transport is shared
            and must not be replaced.
        timeouts: The timeouts of every request.
        max_retries: How often a failed request may be sent again.
        mismatch_policy: What happens if the model that answers is not the one that was asked for.
        headers: Headers of every request, in addition to those of the transport or in their place.
        query: Query parameters of every request.
        priority: How urgent the requests are; a higher number goes first.
        context_overflow: What happens if a prompt does not fit into the context: "raise", "warn", or None for nothing.
        observers: The observers of every request, or None.
        parent: The object that owns the transport, if this one was derived from it.
    """

    def __init__(
        self,
        transport: BaseTransport,
        *,
        make_transport: Callable[[str | Sequence[str]], BaseTransport] | None,
        timeouts: Timeouts,
        max_retries: int,
        mismatch_policy: MismatchPolicy,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
        priority: int = 0,
        context_overflow: Literal["raise", "warn"] | None = None,
        observers: Observers | None = None,
        parent: ServerApi | None = None,
    ) -> None:
        self._transport = transport
        self._parent = parent
        self._headers: Mapping[str, str] = headers or {}
        self._query: Mapping[str, Any] = query or {}
        self._priority = priority
        self._observers = observers
        # Whether requests about the server are limited to `PROBE_SECONDS`. They are, unless the call has a `timeout`.
        self._caps_probes = True
        self.mismatch_policy: Final = mismatch_policy
        self.context_overflow: Final = context_overflow
        self.on_response: Callable[[int, Mapping[str, str]], None] | None = None
        """A function that is called with the status and the headers of each whole reply of a model, or None."""
        self._make_transport = make_transport
        self._timeouts = timeouts
        self._max_retries = max_retries
        self._former_transports: list[BaseTransport] = []
        self._node: Transport | None = None
        self._refusal: tuple[str, str] | None = None

    def shared(
        self,
        *,
        timeouts: Timeouts | None = None,
        max_retries: int | None = None,
        mismatch_policy: MismatchPolicy | None = None,
        headers: Mapping[str, str] | None = None,
        query: Mapping[str, Any] | None = None,
        priority: int | None = None,
        context_overflow: Literal["raise", "warn"] | Unset | None = UNSET,
    ) -> Self:
        """Returns a `ServerApi` with the same transport, which owns nothing and closes nothing.

        It follows this one to another server when `api_base` is set, and refuses requests when this one does.

        Args:
            timeouts: The timeouts, in place of those of this object.
            max_retries: The number of retries, in place of that of this object.
            mismatch_policy: The policy, in place of that of this object.
            headers: Headers in addition to those of this object, or in their place.
            query: Query parameters in addition to those of this object, or in their place.
            priority: The priority, in place of that of this object.
            context_overflow: What happens if a prompt is too long, in place of the setting of this object.
        """
        return type(self)(
            self._transport,
            make_transport=None,
            timeouts=self._timeouts if timeouts is None else timeouts,
            max_retries=self._max_retries if max_retries is None else max_retries,
            mismatch_policy=self.mismatch_policy if mismatch_policy is None else mismatch_policy,
            headers=merge_headers(self._headers, headers) if headers else self._headers,
            query={**self._query, **query} if query else self._query,
            priority=self._priority if priority is None else priority,
            context_overflow=self.context_overflow if isinstance(context_overflow, Unset) else context_overflow,
            observers=self._observers,
            parent=self,
        )

    def at(self, node: Transport) -> Self:
        """Returns a `ServerApi` for one of several servers, with the options of this one."""
        server = self.shared()
        server._node = node  # noqa: SLF001 - its own copy
        server._caps_probes = self._caps_probes  # noqa: SLF001 - its own copy
        server.on_response = self.on_response
        return server

    def each(self) -> list[Self]:
        """Returns a `ServerApi` for each server, or only this one if there are no others."""
        nodes = self.transport.nodes
        return [self] if len(nodes) == 1 else [self.at(node) for node in nodes]

    def for_call(self, options: CallSettings) -> Self:
        """Returns a `ServerApi` for a single call with its own options."""
        server = self.shared(
            timeouts=options.timeouts,
            max_retries=options.max_retries,
            headers=options.headers,
            query=options.query,
            priority=options.priority,
        )
        server._caps_probes = options.timeouts is None  # noqa: SLF001 - its own copy
        server.on_response = self.on_response
        return server

    @property
    def timeouts(self) -> Timeouts:
        """The timeouts of every request."""
        return self._timeouts

    @property
    def transport(self) -> BaseTransport:
        """The connections to the server, or to several."""
        if self._node is not None:
            return self._node
        return self._transport if self._parent is None else self._parent.transport

    def set_api_base(self, api_base: str | Sequence[str]) -> None:
        """Sends later requests to another server. Requests and streams in progress finish on the old one.

        Raises:
            LLMValidationError: The URL is not valid, or the transport is shared with other clients.
        """
        if self._make_transport is None:
            raise LLMValidationError(
                "api_base cannot be set: this client's transport is shared with others",
                hint="create another client for another server",
            )
        transport = self._make_transport(api_base)
        self._former_transports.append(self._transport)
        self._transport = transport

    def refuse_requests(self, message: str, hint: str) -> None:
        """Makes every later request raise an `LLMError` with this message. Streams in progress are not affected."""
        self._refusal = (message, hint)

    @property
    def refuses_requests(self) -> bool:
        """Whether `refuse_requests` was called, on this object or on one that it is derived from."""
        return self._current_refusal() is not None

    def _current_refusal(self) -> tuple[str, str] | None:
        if self._refusal is not None or self._parent is None:
            return self._refusal
        return self._parent._current_refusal()  # noqa: SLF001 - same class

    async def close(self) -> None:
        """Closes the transports that this object has made; can be called more than once."""
        try:
            for transport in list(self._former_transports):
                await transport.close()
                if transport in self._former_transports:
                    self._former_transports.remove(transport)
        finally:
            if self._make_transport is not None:
                await self._transport.close()

    # Requests

    def build_post(
        self, operation: str, path: str, body: Mapping[str, Any], model: str | None, **fields: Any
    ) -> Request:
        """Returns a request with a JSON body.

        Args:
            operation: A name for the request in errors and logs: "chat completion".
            path: The path below `/v1`.
            body: The body, which is encoded here.
            model: The model that the request is for, by which it is scheduled.
            **fields: Further fields of the `Request`.

        Raises:
            LLMValidationError: The body contains something that JSON cannot express.
        """
        return Request(
            operation,
            "POST",
            path,
            _GENERATION_INTERPRETER,
            self._timeouts,
            self._max_retries,
            encode_body(body),
            model,
            priority=self._priority,
            complete_error=self.complete_error,
            headers=self._headers,
            query=self._query,
            observers=self._observers,
            **fields,
        )

    def probe_timeouts(self, max_seconds: float | None = None) -> Timeouts:
        """Returns the timeouts of a request that asks about the server; `build_get` describes `max_seconds`."""
        if not self._caps_probes:
            return self._timeouts
        seconds = PROBE_SECONDS if max_seconds is None else max_seconds
        limit = self._timeouts.first_byte
        return attrs.evolve(self._timeouts, first_byte=seconds if limit is None else min(seconds, limit))

    def build_get(self, operation: str, path: str, *, max_seconds: float | None = None, **fields: Any) -> Request:
        """Returns a request that asks about the server: it does not queue behind generations.

        Args:
            operation: A name for the request in errors and logs: "model list".
            path: The path below `/v1`, or below the server's root with `below_root=True`.
            max_seconds: The most seconds that the reply may take, unless the call has a `timeout`. Default:
                `PROBE_SECONDS`.
            **fields: Fields of the `Request` that differ from the defaults.
        """
        request = Request(
            operation=operation,
            method="GET",
            path=path,
            timeouts=self.probe_timeouts(max_seconds),
            max_retries=self._max_retries,
            interpreter=_PROBE_INTERPRETER,
            queued=False,
            max_bytes=PROBE_BYTES,
            headers=self._headers,
            query=self._query,
            observers=self._observers,
        )
        return attrs.evolve(request, **fields)

    async def request(self, request: Request) -> Reply:
        """Sends a request and returns the whole reply, whatever its status.

        Raises:
            LLMError: The client was given back to its pool, or the transport got no reply.
        """
        self.check_not_refused(request.operation, request.model)
        if self._former_transports:
            await self._close_idle_transports()
        reply = await self.transport.request(request)
        if self.on_response is not None and request.queued:
            self.on_response(reply.status, reply.headers)
        await pause_after(len(reply.body))
        return reply

    async def stream(self, request: Request) -> EventStream:
        """Sends a request and returns the events of the reply.

        Raises:
            LLMError: The client was given back to its pool, the transport got no reply, or the reply is not an event
                stream.
        """
        self.check_not_refused(request.operation, request.model)
        if self._former_transports:
            await self._close_idle_transports()
        answer = await self.transport.stream(request)
        if not isinstance(answer, Reply):
            return answer
        await self.read_object(answer)
        raise self.unexpected_reply(answer, "an event stream")

    def check_not_refused(self, operation: str, model: str | None = None) -> None:
        """Checks that `refuse_requests` was not called.

        Args:
            operation: A name for the request, which the error mentions.
            model: The model that the request is for.

        Raises:
            LLMError: The client was given back to its pool.
        """
        refusal = self._refusal if self._parent is None else self._current_refusal()
        if refusal is not None:
            message, hint = refusal
            context = {"operation": operation, "url": self.transport.api_base, "model": model}
            raise LLMError(message, hint=hint, context=context)

    async def _close_idle_transports(self) -> None:
        """Closes the transports to former servers whose last request has ended."""
        # Each round searches the list again, because another task may have closed a transport during the wait.
        while (idle := next((each for each in self._former_transports if not each.busy), None)) is not None:
            self._former_transports.remove(idle)
            await idle.close()

    # Replies

    async def read_object(
        self, reply: Reply, has_answer: Callable[[dict[str, Any]], bool] | None = None
    ) -> dict[str, Any]:
        """Returns what `json_object` returns, with "?" in place of each lone half of a surrogate pair.

        If the server does not have the model, the error lists the models that it has.

        Args:
            reply: The reply.
            has_answer: See `json_object`.

        Raises:
            LLMError: The reply reports an error, or is not a JSON object.
        """
        try:
            return self.json_object(reply, decode_whole_characters, has_answer)
        except LLMError as error:
            await self.complete_error(error)
            raise

    async def read_completion(
        self, reply: Reply, complete: Callable[[dict[str, Any]], bool], expected: str
    ) -> dict[str, Any]:
        """Returns the completion that a reply consists of, and checks that the server has finished every answer in it.

        Otherwise it does what `read_object` does. A large reply is read in a thread, so that other tasks can run
        meanwhile.

        Args:
            reply: The reply.
            complete: Fills in the missing fields of a completion, and returns whether it is one.
            expected: The kind of reply that is expected, with an article: "a chat completion".

        Raises:
            LLMError: The reply or a choice reports an error, or the reply is not a completion, or a finish reason says
                that the server has broken an answer off.
        """
        read = partial(_read_completion, reply, complete)
        value, is_complete, fault = read() if len(reply.body) <= SIZE_PER_STEP else await asyncio.to_thread(read)
        if value is None or is_error_object(value):
            raise await self._completed_error(reply, value if is_complete else None)
        if not is_complete:
            raise self.unexpected_reply(reply, expected)
        if fault is not None:
            raise self._error_in_choice(reply, value, fault)
        return value

    async def _completed_error(self, reply: Reply, partial: dict[str, Any] | None) -> LLMError:
        error = self._error_from(reply, partial)
        await self.complete_error(error)
        return error

    def _error_in_choice(self, reply: Reply, value: dict[str, Any], fault: str | LLMError) -> LLMError:
        error = self._error_from(attrs.evolve(reply, body=fault.encode())) if isinstance(fault, str) else fault
        # The error was made from the part of the body about the choice. Here, the whole body takes its place.
        error.body = None
        body = self.body_text(reply)
        return error.completed(context=reply.call.context(), status=reply.status, body=body, partial=value)

    async def complete_error(self, error: LLMError) -> None:
        """If an error is a `ModelNotFoundError`, adds the names of the server's models to it.

        That takes another request. Other errors stay unchanged.
        """
        if isinstance(error, ModelNotFoundError):
            await add_available_models(self, error)

    def can_look_up(self, error: LLMError) -> bool:
        """Returns whether another request may be sent to the server that reported an error.

        No request may be sent if `api_base` was set in the meantime, or if the client was closed, because the request
        would open it again.
        """
        closing = self.transport.closing
        is_open = closing is not None and not closing.done() and not self.refuses_requests
        return is_open and self.transport.owns_url(str(error.context.get("url")))

    def json_object(
        self,
        reply: Reply,
        decode: Callable[[bytes], Any] = decode_json,
        has_answer: Callable[[dict[str, Any]], bool] | None = None,
    ) -> dict[str, Any]:
        """Returns the JSON object that a reply consists of.

        Args:
            reply: The reply.
            decode: Decodes JSON, and raises a ValueError for anything else.
            has_answer: Returns whether an object that reports an error also contains an answer. Such an object becomes
                the `.partial` of the error.

        Raises:
            LLMError: The reply reports an error, or is not a JSON object.
        """
        value = _json_object_in(reply, decode)
        if value is None or is_error_object(value):
            # The error is not kept in a variable. Its traceback refers to this frame, so that only a garbage collection
            # would free the two, with everything that the callers refer to.
            is_partial = value is not None and has_answer is not None and has_answer(value)
            raise self._error_from(reply, value if is_partial else None)
        return value

    def unexpected_reply(
        self, reply: Reply, expected: str, *, message: str | None = None, hint: str | None = None
    ) -> LLMResponseError:
        """Returns the error for a reply that is a JSON object, but not the one that was expected.

        Args:
            reply: The reply.
            expected: The kind of reply that was expected, with an article: "a chat completion".
            message: The text of the error. Default: a text that names what was expected.
            hint: The advice to the user. Default: to check `api_base`.
        """
        body = self.body_text(reply)
        return LLMResponseError(
            message or f"the server answered {reply.status} with something that is not {expected}: {excerpt(body)!r}",
            hint=hint or "check that api_base is an OpenAI-compatible server",
            status=reply.status,
            body=body,
            context=reply.call.context(),
        )

    def check_served_model(self, reply: Reply, value: Mapping[str, Any]) -> None:
        """Compares the model that a reply names with the one that was asked for.

        Raises:
            ModelMismatchError: They differ, and the client's `model_mismatch` is "raise".
        """
        try:
            if not self.mismatch_policy.check(reply.call.request.model, value.get("model")):
                reply.call.mark_unloaded()
        except LLMError as error:
            reply.call.mark_unloaded()
            error.completed(
                context=reply.call.context(), status=reply.status, body=self.body_text(reply), partial=value
            )
            raise

    def body_text(self, reply: Reply) -> str:
        """Returns the body of a reply as text, or its beginning, without the API key and the caller's headers."""
        return redacted_beginning(reply.body, self.redact)

    def redact(self, text: str) -> str:
        """Returns the text without the API key, and without the values of the headers that the caller has set."""
        return self.transport.redact(text, self._headers)

    def _error_from(self, reply: Reply, partial: dict[str, Any] | None = None) -> LLMError:
        error = failures.error_from_reply(reply, self.redact)
        error.partial = partial
        failures.report_lost_model(reply.call, error)
        return error


def _read_completion(
    reply: Reply, complete: Callable[[dict[str, Any]], bool]
) -> tuple[dict[str, Any] | None, bool, str | LLMError | None]:
    """Reads a completion, without touching anything that belongs to the event loop.

    Returns:
        The JSON object; whether it is a completion; and what is wrong with the first choice that the server has not
        finished: the body of an error, or an error.
    """
    value = _json_object_in(reply, decode_whole_characters)
    if value is None or not complete(value):
        return value, False, None
    faults = (error_in_choice(choice) or aborted_error(choice) for choice in value["choices"])
    return value, True, next((fault for fault in faults if fault is not None), None)


def is_damaged(reply: Reply) -> bool:
    """Returns whether a reply claims to be successful and to be JSON, but is not JSON.

    A server that does not have a path says so: with another status, with an error, or with the page of a web interface.
    So a caller that asks whether a server has something must not take a damaged reply for a no.
    """
    content_type = reply.headers.get("Content-Type", "").lower()
    if not 200 <= reply.status < 300 or not content_type.startswith("application/json"):
        return False
    try:
        decode_json(reply.body)
    except ValueError:
        return True
    return False


def is_unknown_path(error: LLMError, reply: Reply) -> bool:
    """Returns whether an error says that the server does not have the path of the request.

    LM Studio answers 200 to such a request, with a message (lmstudio-bug-tracker#618).
    """
    if type(error) is not LLMResponseError:
        return False
    if reply.status == 200:
        return failures.UNKNOWN_PATH_OF_LM_STUDIO in (error.body or "")[:1000].lower()
    return reply.status in (404, 405, 501)


def _json_object_in(reply: Reply, decode: Callable[[bytes], Any]) -> dict[str, Any] | None:
    """Returns the JSON object of a reply, or None if it has an error status or is not a JSON object."""
    if not 200 <= reply.status < 300:
        return None
    try:
        value = decode(reply.body)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
