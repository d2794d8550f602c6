"""`Attempts`: sends a request, and sends it again as long as a further attempt may succeed.

An attempt ends in one of five ways: with a response that is passed on, with a reply that reports an error, with a reply
that is too large, with a connection that failed, or with a timeout. What follows depends on the request as well: one
that must not be repeated is sent again only if the server cannot have started to work on it.

`Transport` holds the permit of the request during all attempts.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeVar

from lmbridge._text import redacted_beginning, shorten
from lmbridge.errors import LLMError, LLMTimeoutError
from lmbridge.transport.calls import Call, Reply
from lmbridge.transport.credentials import Credentials
from lmbridge.transport.events import EventStream
from lmbridge.transport.forwarding import ForwardedResponse
from lmbridge.transport.headers import add_query, merge_headers
from lmbridge.transport.http_interface import ConnectionFailed, HttpRequest, HttpResponse, StaleConnection
from lmbridge.transport.open_state import OpenState, closed_error
from lmbridge.transport.receive import receive_reply
from lmbridge.transport.retry import REFUSED_BEFORE_WORK, Verdict

logger: logging.Logger = logging.getLogger("lmbridge.transport")
# Prompts are confidential, and a program that sets the level of a parent logger to DEBUG has not asked for them. So
# they are written only if this logger itself has a level. Setting a higher level here would not keep them out of the
# log, because `logging.config` resets it.
prompt_logger: logging.Logger = logging.getLogger("lmbridge.prompts")

_LONGEST_PROMPT: Final = 100_000
"""The most characters of a request that are written to the log. An image can have millions."""
_NOT_RESENT_HINT: Final = (
    "the request was not sent again, because the server may have started to work on it;"
    " check its effect before you repeat it"
)

_T = TypeVar("_T", bound="Reply | EventStream | ForwardedResponse")
Receive = Callable[[Call, HttpResponse], Awaitable[_T]]
"""A function that reads as much of a response as its caller needs."""


class Attempts:
    """Sends the requests of one transport.

    Args:
        credentials: The headers of every request.
        retries: The number of retries so far, by model. Each retry is added to it.
        api_base: The URL of the server, as it is in `Transport.api_base`.
        socket_path: The path of the server's Unix socket; None if it has none.
    """

    def __init__(
        self, credentials: Credentials, retries: Counter[str | None], *, api_base: str, socket_path: str | None
    ) -> None:
        self._credentials = credentials
        self._retries = retries
        self._api_base = api_base
        self._socket_path = socket_path

    async def run_until_final(self, state: OpenState, call: Call, receive: Receive[_T]) -> _T | Reply:
        """Sends the request until an attempt succeeds, or until no further attempt is worthwhile.

        An attempt fails either with a reply that reports an error, or because no complete reply arrives.

        Args:
            state: The open state of the transport.
            call: The request, which has its permit.
            receive: Reads the response as the caller wants it.

        Raises:
            LLMConnectionError: The server could not be reached, or the connection broke.
            LLMTimeoutError: A time limit has run out.
            LLMResponseError: The reply is too large, or is compressed in a way that is not supported.
            TaskCancelledError: The transport was closed.
            MovedToAnotherServer: Another server gets the request.
        """
        if prompt_logger.level and call.request.body is not None and prompt_logger.isEnabledFor(logging.DEBUG):
            self._log_prompt(call, call.request.body)
        while True:
            if state.closing.done():
                raise closed_error(call)
            error: LLMError | None = None
            try:
                answer = await self._attempt(state, call, receive)
            except ConnectionFailed as failure:
                if state.closing.done():
                    error, wait = self._with_arrived(closed_error(call), call), None
                else:
                    self._note_failure(state, call, failure)
                    error, wait = self._complete_error(call, failure), self._wait_after_failure(call, failure)
            else:
                if not isinstance(answer, Reply) or answer.status < 400:
                    return answer
                if call.request.failover is not None:
                    call.request.failover.on_error_reply(call, answer)
                wait = self._wait_after_reply(call, answer)
                if wait is None:
                    return answer
            if error is not None and wait is None:
                # Raised outside the `except` clause, so that the failure does not become its `__context__`.
                raise error
            # This is a sleep that ends early if the transport is closed.
            await asyncio.wait((state.closing,), timeout=wait)

    async def _attempt(self, state: OpenState, call: Call, receive: Receive[_T]) -> _T | Reply:
        """Sends the request once, and reads as much of the response as `receive` does.

        Raises:
            ConnectionFailed: No response arrived, or only a part of it.
            LLMTimeoutError: With phase "first_byte" or "total".
            LLMResponseError: The reply is too large.
        """
        request = self._http_request(call)
        response: HttpResponse | None = None
        try:
            with call.begin_attempt():
                try:
                    response = await state.session.send(request)
                except StaleConnection:
                    if state.closing.done():
                        raise
                if response is None:
                    # A kept connection was dead before any byte of a response had arrived. That is normal: llama.cpp,
                    # for example, closes the connection after every stream although it announces keep-alive. So the
                    # request is sent once more at once, and this does not count as a retry.
                    state.forget_server(was_stale=True)
                    response = await state.session.send(request)
                try:
                    if response.status >= 400:
                        return await receive_reply(call, response)
                    return await receive(call, response)
                except BaseException:
                    # Part of the response may not have been read, so the connection cannot be used again.
                    response.close()
                    raise
        except TimeoutError as exc:
            status = None if response is None else response.status
            raise self._with_arrived(call.attempt_timed_out(exc).completed(status=status), call) from exc
        except LLMError as error:
            raise self._with_arrived(error, call)  # noqa: B904 - it is the same error

    def _log_prompt(self, call: Call, body: bytes) -> None:
        text = self._credentials.redact(body.decode("utf-8", "replace"), call.request.headers)
        prompt_logger.debug("%s %s sends %s", call.request.method, call.url, shorten(text, _LONGEST_PROMPT))

    def _http_request(self, call: Call) -> HttpRequest:
        """Returns the request of a call in the form in which a session sends it."""
        request = call.request
        headers = self._credentials.headers if request.body is None else self._credentials.json_headers
        if call.watch is not None and (context := call.watch.trace_context()):
            headers = merge_headers(headers, context)
        # HTTP over a Unix socket needs some host, and servers expect this one.
        url = call.url if self._socket_path is None else f"http://localhost{call.url[len(self._api_base) :]}"
        return HttpRequest(
            request.method,
            add_query(url, request.query) if request.query else url,
            merge_headers(headers, request.headers) if request.headers else headers,
            request.body,
            connect_timeout=request.timeouts.connect,
            fresh_connection=not request.repeatable,
            keeps_compression=request.keeps_compression,
        )

    def _wait_after_reply(self, call: Call, reply: Reply) -> float | None:
        """Returns the seconds to wait before the next attempt, or None if this reply is final."""
        verdict = call.request.interpreter.classify(reply.status, reply.headers, reply.plain_body)
        if verdict is Verdict.RETRY and not call.request.repeatable and reply.status not in REFUSED_BEFORE_WORK:
            return None
        try:
            wait = call.wait_before_next(verdict, reply.retry_after)
        except LLMTimeoutError as error:
            raise error.completed(status=reply.status, body=self._body_text(reply))  # noqa: B904 - it is the same error
        self._record_wait(call, verdict, wait, f"status {reply.status}")
        return wait

    def _note_failure(self, state: OpenState, call: Call, failure: ConnectionFailed) -> None:
        if failure.verdict is Verdict.RETRY:
            state.forget_server()
        if (failover := call.request.failover) is not None:
            failover.on_failure(call, failure, self._credentials.redact(failure.error.message, call.request.headers))

    def _wait_after_failure(self, call: Call, failure: ConnectionFailed) -> float | None:
        """Returns the seconds to wait before the next attempt, or None if this failure is final."""
        if failure.verdict is not Verdict.RETRY:
            return None
        if not call.request.repeatable and not failure.unsent:
            failure.error.hint = _NOT_RESENT_HINT
            return None
        wait = call.wait_before_next(failure.verdict, None)
        self._record_wait(call, failure.verdict, wait, failure.error.message)
        return wait

    def _record_wait(self, call: Call, verdict: Verdict, wait: float | None, reason: str) -> None:
        if wait is not None:
            self._retries[call.request.model] += verdict is Verdict.RETRY
            logger.debug("%s: %s; %s in %.2f s", call.request.operation, reason, verdict.value, wait)
            if call.watch is not None:
                call.watch.retry(reason=reason, wait=wait, is_poll=verdict is Verdict.POLL)

    def _complete_error(self, call: Call, failure: ConnectionFailed) -> LLMError:
        """Returns the error of a failure, with its context and without the key."""
        error = failure.error
        # The errors of the HTTP parser quote the response, and the response may quote the key.
        headers = call.request.headers
        if error.__cause__ is not None and self._credentials.redact(repr(error.__cause__), headers) != repr(
            error.__cause__
        ):
            error.__cause__ = None
        error.completed(self._credentials.redact(error.message, headers), context=call.context())
        return self._with_arrived(error, call)

    def _with_arrived(self, error: LLMError, call: Call) -> LLMError:
        """Adds to an error the part of a plain reply that had arrived before it broke off, and returns the error."""
        if (arrived := call.arrived) is None:
            return error
        return error.completed(status=arrived.status, body=self._body_text(arrived) or None)

    def _body_text(self, reply: Reply) -> str:
        headers = reply.call.request.headers
        return redacted_beginning(reply.plain_body, partial(self._credentials.redact, headers=headers))
