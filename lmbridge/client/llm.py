"""`LLMClient`: the server's API as dicts and streams of dicts."""

from __future__ import annotations

import ssl as ssl_module
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TypeVar, cast, overload

from lmbridge._checks import check_instance, check_integer, check_model_name
from lmbridge.client.auto import checked_limits
from lmbridge.client.names import Mismatch, ModelNames
from lmbridge.client.server import Server
from lmbridge.client.stream import ChatStream
from lmbridge.client.wire import check_messages
from lmbridge.config import Limits, Timeouts, default_model
from lmbridge.errors import LLMConnectionError, LLMTimeoutError, LLMValidationError
from lmbridge.transport import Transport, Verdict

if TYPE_CHECKING:
    from lmbridge.client.completions import TextStream
    from lmbridge.client.inputs import Texts
    from lmbridge.client.lmstudio import LMStudio
    from lmbridge.client.responses import ResponseInput, ResponseStream
    from lmbridge.client.server_info import ServerInfo
    from lmbridge.transport.stats import ClientStats
    from lmbridge.types import ChatCompletion, Embeddings, Response, TextCompletion

# What serves one method that many programs never call is imported there: together it is a tenth of the import's time.

_T = TypeVar("_T")

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
        limits: How much may be going on at a time; "auto" asks the server (docs/model-scheduling.md says what).
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
        limits: Limits | Literal["auto"] | None = None,
        model_mismatch: Mismatch = "warn",
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        transport: Transport | None = None,
    ) -> None:
        self._model = check_model_name(default_model() if model is None else model)
        timeouts = Timeouts() if timeout is None else timeout
        check_instance("timeout", timeouts, Timeouts, hint="for example Timeouts(first_byte=60)")
        check_integer("max_retries", max_retries, minimum=0)
        names = ModelNames(model_mismatch)
        own: dict[str, Any] = {"api_key": api_key, "limits": checked_limits(limits), "ssl": ssl, "trust_env": trust_env}
        if transport is not None:
            check_instance("transport", transport, Transport)
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
        self._lmstudio: LMStudio | None = None

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

    @property
    def lmstudio(self) -> LMStudio:
        """LM Studio's own API: what is loaded and how; load, unload, download. Other servers refuse it."""
        if self._lmstudio is None:
            from lmbridge.client.lmstudio import LMStudio

            self._lmstudio = LMStudio(self._server)
        return self._lmstudio

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
        server = self._server
        asked = check_model_name(model) or self._model
        request = server.post("chat completion", "/chat/completions", _body(messages, asked, stream, params), asked)
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

    @overload
    async def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> TextCompletion: ...

    @overload
    async def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> TextStream: ...

    @overload
    async def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: bool, **params: Any
    ) -> TextCompletion | TextStream: ...

    async def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: bool = False, **params: Any
    ) -> TextCompletion | TextStream:
        """Asks how a text goes on, with no chat template around it (`POST /v1/completions`).

        Args:
            prompt: A string or token ids, or a list of these: `n` answers for each, in the order of their `index`.
            model: The model; default: the client's.
            stream: Whether to return a `TextStream` instead of the whole reply.
            **params: Sent as they are: `max_tokens`, `temperature`, `stop`, ...

        Raises:
            LLMError: as for `chat_completion`.
        """
        from lmbridge.client.completions import complete

        return await complete(self._server, self._body({"prompt": prompt, **params}, model, stream), stream=stream)

    async def embeddings(
        self,
        input: Texts,  # noqa: A002 - the API's own name
        *,
        model: str | None = None,
        batch_size: int | None = None,
        **params: Any,
    ) -> Embeddings:
        """Asks for the embeddings of texts (`POST /v1/embeddings`).

        Args:
            input: A string or token ids, or a list of these; none empty.
            model: The model; default: the client's.
            batch_size: How many texts a request may hold. More are sent in several requests, one after another, and
                their replies made one: indices count through, usage is added up. Default: all in one.
            **params: Sent as they are: `encoding_format`, `dimensions`, ...

        Returns:
            The server's reply; its `data` has one embedding for each text, in the order of the texts.

        Raises:
            LLMResponseError: an embedding is missing, or holds something else than finite numbers.
            LLMError: as for `chat_completion`. There is never a part of the embeddings.
        """
        from lmbridge.client.embeddings import embed

        return await embed(self._server, self._body({"input": input, **params}, model), batch_size)

    @overload
    async def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: Literal[False] = False,
        **params: Any,
    ) -> Response: ...

    @overload
    async def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: Literal[True],
        **params: Any,
    ) -> ResponseStream: ...

    @overload
    async def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: bool,
        **params: Any,
    ) -> Response | ResponseStream: ...

    async def create_response(
        self,
        input: ResponseInput,  # noqa: A002 - the API's own name
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: bool = False,
        **params: Any,
    ) -> Response | ResponseStream:
        """Asks for a response, which the server may keep and go on from (`POST /v1/responses`).

        A response that the server keeps is not made twice: unless `store=False` is given, a request is sent again
        only after a refused connection, a 429 or a 503.

        Args:
            input: A string, or a list of items: messages, results of function calls.
            model: The model; default: the client's.
            previous_response_id: The `id` of the response to go on from.
            stream: Whether to return a `ResponseStream` of named events instead of the whole response.
            **params: Sent as they are: `instructions`, `max_output_tokens`, `tools` (flat ones), `store`, ...

        Returns:
            The response, or a stream of its events. Whether it is "completed" or "incomplete", its `status` says.

        Raises:
            LLMError: as for `chat_completion`, also for a response that failed.
        """
        from lmbridge.client.responses import respond

        body = self._body({"input": input, **params}, model, stream)
        if previous_response_id is not None:
            body["previous_response_id"] = previous_response_id
        return await respond(self._server, body, stream=stream)

    def _body(self, body: dict[str, Any], model: str | None, stream: bool = False) -> dict[str, Any]:
        asked = check_model_name(model) or self._model
        if asked is not None:
            body["model"] = asked
        if stream:
            body["stream"] = True
        return body

    async def parse(
        self, messages: Sequence[Mapping[str, Any]], type_: type[_T], *, model: str | None = None, **params: Any
    ) -> _T:
        """Asks for an answer of a type: its schema goes along, and what comes back is validated.

        An answer that is none is sent back once, with what is wrong about it. The request is streamed, so that the
        server stops when this is cancelled.

        Args:
            messages: As for `chat_completion`. Say in them what the fields mean: few servers show the model the schema.
            type_: A dataclass, an attrs class, a TypedDict or a msgspec.Struct.
            model: The model; default: the client's.
            **params: Sent as they are; not `n`, `response_format` and `stream`.

        Raises:
            LLMValidationError: an argument cannot be right, and nothing was sent; or the answer is not what was asked
                for: `.body` is its text, `.partial` the whole reply, `.context["path"]` the place of the fault.
            LLMError: as for `chat_completion`, and what iterating its stream raises.
        """
        from lmbridge.client import structured

        params = {"model": model, **params}
        return await structured.parse(self.chat_completion, messages, type_, params, url=self.api_base)

    async def list_models(self) -> list[str]:
        """The ids of the server's models (`GET /v1/models`); it does not queue behind generations.

        Raises:
            LLMError: as for `chat_completion`.
        """
        server = self._server
        reply = await server.request(server.get("model list", "/models"))
        value = server.value(reply)
        entries = value.get("data")
        if entries is None and "data" in value:
            return []  # an Ollama without models
        listed = entries if isinstance(entries, list) else [entries]
        ids = [entry.get("id") if isinstance(entry, dict) else None for entry in listed]
        if not isinstance(entries, list) or not all(isinstance(each, str) for each in ids):
            raise server.is_not(reply, "a list of models")
        return cast("list[str]", ids)

    async def server_info(self) -> ServerInfo:
        """Which server it is, its version, what it has loaded, with how much context and how many slots.

        It asks afresh each time: `GET /v1/models`, then what the server that this looks like has of its own. LM Studio:
        `/api/v1/models` (before 0.4.0 `/api/v0/models` as well); llama.cpp: `/props` (a router: once more for each
        loaded model); Ollama: `/api/version`, `/api/ps`; vLLM: `/version`. Each may take 10 s, and none queues behind
        generations. What the server does not tell, or refuses to tell, is None.

        Raises:
            LLMAuthenticationError: it refuses the key.
            LLMError: as for `chat_completion`.
        """
        from lmbridge.client.server_info import describe

        return await describe(self._server, self._model)

    def stats(self) -> ClientStats:
        """What is in flight and waits, and how often models were swapped and requests repeated, also by model.

        It counts all that goes through the client's transport; setting `api_base` begins anew.
        """
        return self._server.transport.stats()

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


def _body(messages: Any, model: str | None, stream: bool, params: Mapping[str, Any]) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": messages, **params}
    if model is not None:
        body["model"] = model
    if stream:
        body["stream"] = True
    return body


def _never_again(_status: int, _headers: Mapping[str, str], _body: bytes) -> Verdict:
    return Verdict.FAIL
