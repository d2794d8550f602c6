"""`LLMClient`: the server's API as dicts and streams of dicts."""

from __future__ import annotations

import ssl as ssl_module
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Literal, Self, cast, overload

import attrs

from lmbridge.client import failures
from lmbridge.client.names import Mismatch, ModelNames
from lmbridge.client.stream import ChatStream
from lmbridge.client.wire import check_messages, checked_model, decode_json, encode_body
from lmbridge.config import Limits, Timeouts, checked, default_model, normalize_api_base
from lmbridge.errors import (
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
)
from lmbridge.transport import Reply, Request, Transport, Verdict
from lmbridge.types import ChatCompletion

DISCOVERY: Final = 10.0
"""Seconds that a list of models may take, if `Timeouts.first_byte` is no less."""
HEALTH: Final = 5.0
"""Seconds that a health check may take."""


class LLMClient:
    """A client of one server with an OpenAI-compatible `/v1`.

    It opens with its first request. `close`, or leaving its `async with`, returns it to unopened. Use one for as
    many tasks as you like, in one event loop.

    Args:
        api_base: The server, with or without `/v1`. Default: `LMBRIDGE_API_BASE`, else `LMSTUDIO_HOST` and
            `LMSTUDIO_PORT`, else `http://127.0.0.1:1234/v1` (LM Studio).
        model: Asked for where a call names none. Default: `DEFAULT_MODEL`, else the server's choice.
        api_key: Sent as a bearer token. Default: `LM_API_TOKEN`.
        timeout: How long to wait for what.
        max_retries: Further attempts after refused connections and passing errors; at most 5 are made.
        limits: How much may be going on at a time.
        model_mismatch: What to do if another model answers than the one asked for: "warn" logs a line for each
            pair of names, "raise" raises `ModelMismatchError`, "ignore" does nothing.
        ssl: A context for https in place of the default verification.
        trust_env: Whether to use the environment's proxies and netrc. Loopback is never proxied.
        transport: Connections and limits to share with other clients, in place of the options about them. It stays
            its owner's to close.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    def __init__(
        self,
        api_base: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        *,
        timeout: Timeouts | None = None,
        max_retries: int = 2,
        limits: Limits | None = None,
        model_mismatch: Mismatch = "warn",
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        transport: Transport | None = None,
    ) -> None:
        self._model = checked_model(default_model() if model is None else model)
        self._timeouts = Timeouts() if timeout is None else timeout
        if not isinstance(self._timeouts, Timeouts):
            raise LLMValidationError(f"timeout is {timeout!r}", hint="give a Timeouts, like Timeouts(first_byte=60)")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise LLMValidationError(f"max_retries is {max_retries!r}", hint="give a whole number of 0 or more")
        self._max_retries = max_retries
        self._names = ModelNames(model_mismatch)
        own: dict[str, Any] = {
            "api_base": api_base,
            "api_key": api_key,
            "limits": limits,
            "ssl": ssl,
            "trust_env": trust_env,
        }
        if transport is not None:
            checked("transport", transport, Transport)
            given = [name for name, value in own.items() if value not in (None, False)]
            if given:
                raise LLMValidationError(
                    f"{' and '.join(given)} given beside transport=", hint="give them to the Transport instead"
                )
        self._owns_transport = transport is None
        self._transport = Transport(**own) if transport is None else transport
        self._options = own
        self._retired: list[Transport] = []

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.api_base} model={self._model!r}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def model(self) -> str | None:
        """The model asked for where a call names none."""
        return self._model

    @property
    def api_base(self) -> str:
        """The server's base URL, with `/v1`. It may be set: later requests go there, streams under way end here."""
        return self._transport.api_base

    @api_base.setter
    def api_base(self, api_base: str) -> None:
        if not self._owns_transport:
            raise LLMValidationError(
                "api_base cannot be set: the transport was given, and others may use it",
                hint="make another client for another server",
            )
        api_base = normalize_api_base(api_base)
        self._retired.append(self._transport)
        self._transport = Transport(**{**self._options, "api_base": api_base, "api_key": self._transport.api_key})

    @overload
    async def chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **params: Any,
    ) -> ChatCompletion: ...

    @overload
    async def chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[True],
        **params: Any,
    ) -> ChatStream: ...

    @overload
    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, stream: bool, **params: Any
    ) -> ChatCompletion | ChatStream: ...

    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, stream: bool = False, **params: Any
    ) -> ChatCompletion | ChatStream:
        """Asks for the next message of a chat (`POST /v1/chat/completions`).

        Args:
            messages: Dicts with `role` and `content`, at least one.
            model: The model; default: the client's.
            stream: Whether to return a `ChatStream` instead of the whole reply.
            **params: Sent as they are: `temperature`, `max_tokens`, `tools`, `response_format`, ...

        Returns:
            The server's reply, or a stream of its chunks, as plain dicts.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent.
            LLMConnectionError: nobody there, or the connection broke.
            LLMTimeoutError: a limit ran out; see `phase`.
            LLMResponseError: the server said no, or what it said is no reply; see also its subclasses.
            ModelNotFoundError: the server does not have the model.
            ModelMismatchError: another model answered (`model_mismatch="raise"`).
            TaskCancelledError: the client was closed meanwhile.
        """
        check_messages(messages)
        body: dict[str, Any] = {"messages": messages, **params}
        asked = checked_model(model) or self._model
        if asked is not None:
            body["model"] = asked
        if stream:
            body["stream"] = True
        request = self._post("chat completion", "/chat/completions", body, asked)
        if self._retired:
            await self._close_retired()
        if stream:
            answers = params.get("n")
            return await self._stream(request, answers if isinstance(answers, int) else 1)
        return cast("ChatCompletion", await self._plain(request))

    async def list_models(self) -> list[str]:
        """The ids of the server's models (`GET /v1/models`); it does not queue behind generations.

        Raises:
            LLMError: as for `chat_completion`.
        """
        request = self._get("model list", "/models", DISCOVERY, self._max_retries)
        if self._retired:
            await self._close_retired()
        reply = await self._transport.request(request)
        value = self._value(reply)
        entries = value.get("data")
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries or ()]
        if not isinstance(entries, list) or not all(isinstance(each, str) for each in ids):
            raise self._not(reply, "a list of models")
        return cast("list[str]", ids)

    async def health_check(self) -> bool:
        """Whether the server is there and serves requests. It neither queues nor retries, and takes 5 s at most.

        Returns:
            False if nobody answers, or the server is still loading or failing (5xx).

        Raises:
            LLMAuthenticationError: it is there, but refuses the key.
            LLMResponseError: something else answers there.
        """
        request = self._get("health check", "/models", HEALTH, 0)
        request = attrs.evolve(request, classify=_never_again)
        if self._retired:
            await self._close_retired()
        try:
            reply = await self._transport.request(request)
        except (LLMConnectionError, LLMTimeoutError):
            return False
        if reply.status >= 500:
            return False
        self._value(reply)
        return True

    async def close(self) -> None:
        """Ends what is in flight with `TaskCancelledError` and closes all connections; idempotent.

        A later request opens the client again.
        """
        try:
            for transport in list(self._retired):
                await transport.close()
                if transport in self._retired:
                    self._retired.remove(transport)
        finally:
            if self._owns_transport:
                await self._transport.close()

    # Requests

    def _post(self, operation: str, path: str, body: Mapping[str, Any], model: str | None) -> Request:
        return Request(
            operation=operation,
            method="POST",
            path=path,
            body=encode_body(body),
            model=model,
            timeouts=self._timeouts,
            max_retries=self._max_retries,
            classify=failures.classify,
        )

    def _get(self, operation: str, path: str, seconds: float, max_retries: int) -> Request:
        limit = self._timeouts.first_byte
        return Request(
            operation=operation,
            method="GET",
            path=path,
            timeouts=attrs.evolve(self._timeouts, first_byte=seconds if limit is None else min(seconds, limit)),
            max_retries=max_retries,
            classify=failures.classify,
            queued=False,
        )

    async def _plain(self, request: Request) -> dict[str, Any]:
        reply = await self._transport.request(request)
        value = self._value(reply)
        try:
            whole = isinstance(value["choices"][0]["message"], dict)
        except (KeyError, TypeError, IndexError):
            whole = False
        if not whole:
            raise self._not(reply, "a chat completion")
        self._check_name(request, reply, value)
        return value

    async def _stream(self, request: Request, answers: int) -> ChatStream:
        transport = self._transport
        answer = await transport.stream(request)
        if isinstance(answer, Reply):
            raise self._no_stream(answer)
        return ChatStream(answer, self._names, transport.redact, answers)

    # Replies

    def _value(self, reply: Reply) -> dict[str, Any]:
        """The reply's JSON object; an error is raised."""
        value = _object_in(reply)
        if value is None:
            raise failures.error_of_reply(reply, self._transport.redact)
        return value

    def _no_stream(self, reply: Reply) -> LLMError:
        """The error for a whole answer to a request for a stream."""
        if _object_in(reply) is None:
            return failures.error_of_reply(reply, self._transport.redact)
        return self._not(reply, "an event stream")

    def _not(self, reply: Reply, what: str) -> LLMResponseError:
        text = self._transport.redact(reply.body.decode("utf-8", "replace"))
        return LLMResponseError(
            f"the server answered {reply.status} with something that is not {what}: {failures.shortened(text)!r}",
            hint="check that api_base is an OpenAI-compatible server",
            status=reply.status,
            body=text,
            context=reply.call.context(),
        )

    def _check_name(self, request: Request, reply: Reply, value: Mapping[str, Any]) -> None:
        try:
            self._names.check(request.model, value.get("model"))
        except LLMError as error:
            error.context, error.status = reply.call.context(), reply.status
            error.body = self._transport.redact(reply.body.decode("utf-8", "replace"))
            error.partial = value
            raise

    async def _close_retired(self) -> None:
        """Closes the servers before the present one whose last request has ended."""
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


def _never_again(_status: int, _headers: Mapping[str, str], _body: bytes) -> Verdict:
    return Verdict.FAIL
