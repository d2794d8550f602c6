"""The server as a client with certain options sees it: requests made, answers read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import attrs

from lmbridge._text import excerpt
from lmbridge.client import failures
from lmbridge.client.names import ModelNames
from lmbridge.client.wire import decode_json, encode_body
from lmbridge.config import Timeouts, normalize_api_base
from lmbridge.errors import LLMError, LLMResponseError, LLMValidationError
from lmbridge.transport import EventStream, Reply, Request, Transport

DISCOVERY: Final = 10.0
"""Seconds that a question about the server may take, if `Timeouts.first_byte` is no less."""


class Server:
    """What the endpoints of a client share: its transport, its options, and how answers are read.

    Args:
        transport: The connections.
        again: Makes the transport of another `api_base`; None if the transport is somebody else's.
        timeouts: How long to wait for what.
        max_retries: Further attempts of a request.
        names: What to do if another model answers.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        again: Callable[[str], Transport] | None,
        timeouts: Timeouts,
        max_retries: int,
        names: ModelNames,
    ) -> None:
        self.transport = transport
        self.names: Final = names
        self._again = again
        self._timeouts = timeouts
        self._max_retries = max_retries
        self._retired: list[Transport] = []

    def move(self, api_base: str) -> None:
        """Sends later requests elsewhere; those under way end where they are.

        Raises:
            LLMValidationError: the URL is none, or the transport is somebody else's.
        """
        if self._again is None:
            raise LLMValidationError(
                "api_base cannot be set: the transport was given, and others may use it",
                hint="make another client for another server",
            )
        api_base = normalize_api_base(api_base)
        self._retired.append(self.transport)
        self.transport = self._again(api_base)

    async def close(self) -> None:
        """Closes every connection that is the client's own; idempotent."""
        try:
            for transport in list(self._retired):
                await transport.close()
                if transport in self._retired:
                    self._retired.remove(transport)
        finally:
            if self._again is not None:
                await self.transport.close()

    # Requests

    def post(self, operation: str, path: str, body: Mapping[str, Any], model: str | None, **how: Any) -> Request:
        """A request with a JSON body; `how` are further fields of `Request`.

        Raises:
            LLMValidationError: the body holds something that JSON does not have.
        """
        return Request(
            operation=operation,
            method="POST",
            path=path,
            body=encode_body(body),
            model=model,
            timeouts=self._timeouts,
            max_retries=self._max_retries,
            classify=failures.classify,
            reports_error=failures.reports_error,
            **how,
        )

    def get(self, operation: str, path: str, *, seconds: float | None = None, **how: Any) -> Request:
        """A question about the server: it does not queue behind generations, and has `DISCOVERY` seconds at most."""
        seconds = DISCOVERY if seconds is None else seconds
        limit = self._timeouts.first_byte
        request = Request(
            operation=operation,
            method="GET",
            path=path,
            timeouts=attrs.evolve(self._timeouts, first_byte=seconds if limit is None else min(seconds, limit)),
            max_retries=self._max_retries,
            classify=failures.classify,
            queued=False,
        )
        return attrs.evolve(request, **how)

    async def request(self, request: Request) -> Reply:
        """Sends it and reads the whole answer, whatever it is."""
        if self._retired:
            await self._close_retired()
        return await self.transport.request(request)

    async def stream(self, request: Request) -> EventStream:
        """Sends it and returns the events of the answer; any other answer is raised."""
        if self._retired:
            await self._close_retired()
        answer = await self.transport.stream(request)
        if isinstance(answer, Reply):
            raise self._no_stream(answer)
        return answer

    # Replies

    def value(self, reply: Reply) -> dict[str, Any]:
        """The reply's JSON object.

        Raises:
            LLMError: it is an error, or no JSON object.
        """
        value = _object_in(reply)
        if value is None:
            raise self._error_of(reply)
        return value

    def is_not(self, reply: Reply, what: str) -> LLMResponseError:
        """The error for a reply that is not `what` was asked for."""
        text = self._text(reply)
        return LLMResponseError(
            f"the server answered {reply.status} with something that is not {what}: {excerpt(text)!r}",
            hint="check that api_base is an OpenAI-compatible server",
            status=reply.status,
            body=text,
            context=reply.call.context(),
        )

    def check_name(self, reply: Reply, value: Mapping[str, Any]) -> None:
        """Compares the model that answered with the one that was asked for.

        Raises:
            ModelMismatchError: they differ, and that is to be an error.
        """
        try:
            if not self.names.check(reply.call.request.model, value.get("model")):
                reply.call.mark_unloaded()
        except LLMError as error:
            reply.call.mark_unloaded()
            error.context, error.status, error.body = reply.call.context(), reply.status, self._text(reply)
            error.partial = value
            raise

    def _no_stream(self, answer: Reply) -> LLMError:
        if _object_in(answer) is None:
            return self._error_of(answer)
        return self.is_not(answer, "an event stream")

    def _error_of(self, reply: Reply) -> LLMError:
        error = failures.error_of_reply(reply, self.transport.redact)
        if failures.is_about_loading(error):
            reply.call.mark_unloaded()
        return error

    def _text(self, reply: Reply) -> str:
        return self.transport.redact(reply.body.decode("utf-8", "replace"))

    async def _close_retired(self) -> None:
        """Closes the transports before the present one whose last request has ended."""
        # Looked for afresh after each wait: another task may have closed some meanwhile.
        while (idle := next((each for each in self._retired if not each.busy), None)) is not None:
            self._retired.remove(idle)
            await idle.close()


def _object_in(reply: Reply) -> dict[str, Any] | None:
    """The JSON object of a reply, or None for what is an error or no JSON object."""
    if not 200 <= reply.status < 300:
        return None
    try:
        value = decode_json(reply.body)
    except ValueError:
        return None
    return value if isinstance(value, dict) and not failures.is_error(value) else None
