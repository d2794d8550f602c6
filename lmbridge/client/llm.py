"""`LLMClient`: the server's API as dicts and streams of dicts."""

from __future__ import annotations

import ssl as ssl_module
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Final, Literal, Self, cast, overload

from lmbridge.client.names import Mismatch, ModelNames
from lmbridge.client.server import Server
from lmbridge.client.stream import ChatStream
from lmbridge.client.wire import check_messages, checked_model
from lmbridge.config import Limits, Timeouts, checked, default_model
from lmbridge.errors import LLMConnectionError, LLMTimeoutError, LLMValidationError
from lmbridge.transport import Transport, Verdict
from lmbridge.types import ChatCompletion

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
        timeouts = Timeouts() if timeout is None else timeout
        if not isinstance(timeouts, Timeouts):
            raise LLMValidationError(f"timeout is {timeout!r}", hint="give a Timeouts, like Timeouts(first_byte=60)")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise LLMValidationError(f"max_retries is {max_retries!r}", hint="give a whole number of 0 or more")
        names = ModelNames(model_mismatch)
        own: dict[str, Any] = {"api_key": api_key, "limits": limits, "ssl": ssl, "trust_env": trust_env}
        if transport is not None:
            checked("transport", transport, Transport)
            given = [name for name, value in {"api_base": api_base, **own}.items() if value not in (None, False)]
            if given:
                raise LLMValidationError(
                    f"{' and '.join(given)} given beside transport=", hint="give them to the Transport instead"
                )
        again = None
        if transport is None:
            transport = Transport(api_base, **own)
            # With the key as it is now: the environment may change meanwhile.
            again = partial(Transport, **{**own, "api_key": transport.api_key})
        self._server = Server(transport, again=again, timeouts=timeouts, max_retries=max_retries, names=names)

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
        return self._server.transport.api_base

    @api_base.setter
    def api_base(self, api_base: str) -> None:
        self._server.move(api_base)

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
        server = self._server
        request = server.post("chat completion", "/chat/completions", body, asked)
        if stream:
            answers = params.get("n")
            events = await server.stream(request)
            return ChatStream(events, server.names, server.transport.redact, answers if isinstance(answers, int) else 1)
        reply = await server.request(request)
        value = server.value(reply)
        try:
            whole = isinstance(value["choices"][0]["message"], dict)
        except (KeyError, TypeError, IndexError):
            whole = False
        if not whole:
            raise server.is_not(reply, "a chat completion")
        server.check_name(reply, value)
        return cast("ChatCompletion", value)

    async def list_models(self) -> list[str]:
        """The ids of the server's models (`GET /v1/models`); it does not queue behind generations.

        Raises:
            LLMError: as for `chat_completion`.
        """
        server = self._server
        reply = await server.request(server.get("model list", "/models"))
        value = server.value(reply)
        entries = value.get("data")
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries or ()]
        if not isinstance(entries, list) or not all(isinstance(each, str) for each in ids):
            raise server.is_not(reply, "a list of models")
        return cast("list[str]", ids)

    async def health_check(self) -> bool:
        """Whether the server is there and serves requests. It neither queues nor retries, and takes 5 s at most.

        Returns:
            False if nobody answers, or the server is still loading or failing (5xx).

        Raises:
            LLMAuthenticationError: it is there, but refuses the key.
            LLMResponseError: something else answers there.
        """
        server = self._server
        request = server.get("health check", "/models", seconds=HEALTH, max_retries=0, classify=_never_again)
        try:
            reply = await server.request(request)
        except (LLMConnectionError, LLMTimeoutError):
            return False
        if reply.status >= 500:
            return False
        server.value(reply)
        return True

    async def close(self) -> None:
        """Ends what is in flight with `TaskCancelledError` and closes all connections; idempotent.

        A later request opens the client again.
        """
        await self._server.close()


def _never_again(_status: int, _headers: Mapping[str, str], _body: bytes) -> Verdict:
    return Verdict.FAIL
