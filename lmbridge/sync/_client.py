"""Blocking classes, written by scripts/generate_sync.py: change that, or the asynchronous classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import lmbridge.client.llm as _llm
import lmbridge.client.pool as _pool
from lmbridge.client.responses import ResponseEvent
from lmbridge.sync._wrap import Owner, Stream, Wrapper, entered, unwrap
from lmbridge.types import ChatCompletionChunk, TextCompletionChunk

if TYPE_CHECKING:
    import ssl as ssl_module
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Literal

    from lmbridge.client.inputs import Texts
    from lmbridge.client.llm import _T
    from lmbridge.client.names import Mismatch
    from lmbridge.client.pool import PoolStats
    from lmbridge.client.responses import ResponseEvent, ResponseInput
    from lmbridge.client.server_info import ServerInfo
    from lmbridge.config import Limits, Timeouts
    from lmbridge.transport import Transport
    from lmbridge.transport.stats import ClientStats
    from lmbridge.types import (
        ChatCompletion,
        ChatCompletionChunk,
        DownloadStatus,
        Embeddings,
        LMStudioLoad,
        LMStudioModel,
        LMStudioUnload,
        Response,
        TextCompletion,
        TextCompletionChunk,
    )


class ChatStream(Stream[ChatCompletionChunk]):
    """The chunks of one chat completion, as the server sent them.

    Iterate it, once and by one task at a time; it is an async context manager too. It ends after `[DONE]` or a
    finish reason; anything else raises, with `.partial`. Leaving it early, in any way, closes the connection, so
    that the server stops generating, and gives its permit back.

    Raises (while it is iterated):
        LLMStreamError: it was cut off, or the server reported an error that is none of those below.
        ContextLengthExceededError, ModelLoadError, LLMRateLimitError, ...: the server reported one.
        LLMTimeoutError: phase "first_byte", "idle" or "total".
        ModelMismatchError: another model answers (`model_mismatch="raise"`).
        ModelChangedDuringExecutionError: the model's name changed between two chunks.
        TaskCancelledError: it was closed, by another task or before its end.
    """

    wraps = "lmbridge.client.stream:ChatStream"

    @property
    def partial(self) -> ChatCompletion | None:
        """What `collect` would make of the stream so far, as a new dict; None before the first chunk."""
        result: ChatCompletion | None = self._call(lambda: self.wrapped.partial)
        return result


class TextStream(Stream[TextCompletionChunk]):
    """The chunks of one text completion, as the server sent them.

    It promises what a `ChatStream` does, and raises what that raises; `.partial` and `collect` have the shape of a
    plain text completion.
    """

    wraps = "lmbridge.client.completions:TextStream"

    @property
    def partial(self) -> TextCompletion | None:
        """What `collect` would make of the stream so far, as a new dict; None before the first chunk."""
        result: TextCompletion | None = self._call(lambda: self.wrapped.partial)
        return result


class ResponseStream(Stream[ResponseEvent]):
    """The events of one response, each with its parsed data.

    It promises what a `ChatStream` does, and raises what that raises, but it ends after `response.completed` or
    `response.incomplete`, and nothing else. `.partial` and `collect` have the shape of a plain response.
    """

    wraps = "lmbridge.client.responses:ResponseStream"

    @property
    def partial(self) -> Response | None:
        """What `collect` would make of the stream so far, as a new dict; None before the first chunk."""
        result: Response | None = self._call(lambda: self.wrapped.partial)
        return result


class LMStudio(Wrapper):
    """LM Studio's own API, as `client.lmstudio`.

    Every method raises as `chat_completion` does, and an `LLMResponseError` that says so if the server is not LM
    Studio, or is too old. None of them queues behind generations.
    """

    wraps = "lmbridge.client.lmstudio:LMStudio"

    def models(self) -> list[LMStudioModel]:
        """The downloaded models, with their loaded instances (`GET /api/v1/models`).

        Returns:
            Dicts as the server sent them. What an LM Studio before 0.4.0 tells (`GET /api/v0/models`) is put into the
            same fields, with those left out that it does not tell: `parallel`, sizes, names for people.

        Raises:
            LLMResponseError: it is not LM Studio.
        """
        result: list[LMStudioModel] = self._await(self.wrapped.models)
        return result

    def load(self, model: str, **config: Any) -> LMStudioLoad:
        """Loads a model, which may take minutes (`POST /api/v1/models/load`): `Timeouts.load` is its limit.

        A model that is loaded already is loaded a second time. It is sent again only if the server refused it before
        any work.

        Args:
            model: The `key` of a downloaded model.
            **config: Sent as it is: `context_length`, `flash_attention`, `eval_batch_size`, `num_experts`,
                `offload_kv_cache_to_gpu`, `echo_load_config` (to be told the whole configuration), ...

        Returns:
            The server's dict: `instance_id`, by which to ask for it and to unload it, and `load_time_seconds`.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent.
            ModelNotFoundError: it is not downloaded.
            ModelLoadError: it does not fit into memory, or crashed.
            LLMTimeoutError: phase "load"; LM Studio may go on loading it.
        """
        result: LMStudioLoad = self._await(lambda: self.wrapped.load(model, **config))
        return result

    def unload(self, instance_id: str) -> LMStudioUnload:
        """Unloads an instance of a model, whatever it is generating (`POST /api/v1/models/unload`).

        Args:
            instance_id: The `id` of one of the `loaded_instances`, or what `load` returned.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent.
            LLMResponseError: there is no such instance.
        """
        result: LMStudioUnload = self._await(lambda: self.wrapped.unload(instance_id))
        return result

    def download(self, model: str, **options: Any) -> Iterator[DownloadStatus]:
        """Downloads a model and tells how far it is (`POST /api/v1/models/download`).

        LM Studio does it by itself: to leave the iteration, or to cancel it, does not stop the download. Asked for
        the same model again, LM Studio says where it is.

        Args:
            model: A name of LM Studio's catalogue, or the link of a repository on Hugging Face.
            **options: Sent as they are: `quantization` (only with a link).

        Yields:
            The server's dicts, about one a second: `status`, `downloaded_bytes`, `total_size_bytes`,
            `bytes_per_second`, ... The status of the last one is "completed" or "already_downloaded"; before that it
            is "downloading", or "paused" for as long as somebody paused it in LM Studio.

        Raises:
            LLMValidationError: an argument cannot be right; nothing was sent. Raised by the call.
            LLMResponseError: it failed; `partial` is the last status. This and all else is raised by the iteration.
        """
        result: Iterator[DownloadStatus] = self._call(lambda: self.wrapped.download(model, **options))
        return result


class LLMClient(Owner):
    """A client of one server with an OpenAI-compatible `/v1`.

    It opens with its first request. `close`, or leaving its `with`, returns it to unopened. Use one for as
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

    wraps = "lmbridge.client.llm:LLMClient"

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
        self._open(
            lambda: _llm.LLMClient(
                api_base,
                model,
                api_key,
                timeout=timeout,
                max_retries=max_retries,
                limits=limits,
                model_mismatch=model_mismatch,
                ssl=ssl,
                trust_env=trust_env,
                transport=transport,
            )
        )

    @property
    def model(self) -> str | None:
        """The model asked for where a call names none."""
        result: str | None = self._call(lambda: self.wrapped.model)
        return result

    @property
    def api_base(self) -> str:
        """The server's base URL, with `/v1`. It may be set: later requests go there, streams under way end here."""
        result: str = self._call(lambda: self.wrapped.api_base)
        return result

    @api_base.setter
    def api_base(self, api_base: str) -> None:
        self._call(lambda: setattr(self.wrapped, "api_base", api_base))

    @property
    def lmstudio(self) -> LMStudio:
        """LM Studio's own API: what is loaded and how; load, unload, download. Other servers refuse it."""
        result: LMStudio = self._call(lambda: self.wrapped.lmstudio)
        return result

    @overload
    def chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **params: Any,
    ) -> ChatCompletion: ...

    @overload
    def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> ChatStream: ...

    @overload
    def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, stream: bool, **params: Any
    ) -> ChatCompletion | ChatStream: ...

    def chat_completion(
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
        result: ChatCompletion | ChatStream = self._await(
            lambda: self.wrapped.chat_completion(messages, model=model, stream=stream, **params)
        )
        return result

    @overload
    def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: Literal[False] = False, **params: Any
    ) -> TextCompletion: ...

    @overload
    def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: Literal[True], **params: Any
    ) -> TextStream: ...

    @overload
    def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: bool, **params: Any
    ) -> TextCompletion | TextStream: ...

    def text_completion(
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
        result: TextCompletion | TextStream = self._await(
            lambda: self.wrapped.text_completion(prompt, model=model, stream=stream, **params)
        )
        return result

    def embeddings(
        self, input: Texts, *, model: str | None = None, batch_size: int | None = None, **params: Any
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
        result: Embeddings = self._await(
            lambda: self.wrapped.embeddings(input, model=model, batch_size=batch_size, **params)
        )
        return result

    @overload
    def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: Literal[False] = False,
        **params: Any,
    ) -> Response: ...

    @overload
    def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: Literal[True],
        **params: Any,
    ) -> ResponseStream: ...

    @overload
    def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: bool,
        **params: Any,
    ) -> Response | ResponseStream: ...

    def create_response(
        self,
        input: ResponseInput,
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
        result: Response | ResponseStream = self._await(
            lambda: self.wrapped.create_response(
                input, model=model, previous_response_id=previous_response_id, stream=stream, **params
            )
        )
        return result

    def parse(
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
        result: _T = self._await(lambda: self.wrapped.parse(messages, type_, model=model, **params))
        return result

    def list_models(self) -> list[str]:
        """The ids of the server's models (`GET /v1/models`); it does not queue behind generations.

        Raises:
            LLMError: as for `chat_completion`.
        """
        result: list[str] = self._await(self.wrapped.list_models)
        return result

    def server_info(self) -> ServerInfo:
        """Which server it is, its version, what it has loaded, with how much context and how many slots.

        It asks afresh each time: `GET /v1/models`, then what the server that this looks like has of its own. LM Studio:
        `/api/v1/models` (before 0.4.0 `/api/v0/models` as well); llama.cpp: `/props` (a router: once more for each
        loaded model); Ollama: `/api/version`, `/api/ps`; vLLM: `/version`. Each may take 10 s, and none queues behind
        generations. What the server does not tell, or refuses to tell, is None.

        Raises:
            LLMAuthenticationError: it refuses the key.
            LLMError: as for `chat_completion`.
        """
        result: ServerInfo = self._await(self.wrapped.server_info)
        return result

    def stats(self) -> ClientStats:
        """What is in flight and waits, and how often models were swapped and requests repeated, also by model.

        It counts all that goes through the client's transport; setting `api_base` begins anew.
        """
        result: ClientStats = self._call(self.wrapped.stats)
        return result

    def health_check(self) -> bool:
        """Whether the server is there and serves requests. It neither queues nor retries, and takes 5 s at most.

        Returns:
            False if nobody answers, or the server is still loading or failing (5xx).

        Raises:
            LLMAuthenticationError: it is there, but refuses the key.
            LLMResponseError: something else answers there.
        """
        result: bool = self._await(self.wrapped.health_check)
        return result


class LLMClientPool(Owner):
    """At most `pool_size` clients at a time, first come, first served, each for one model.

    They share one transport: its connections, and its limit on generations in flight, which is never more than
    `pool_size`. A pool belongs to the event loop that first gets a client from it. Unlike a client, it does not open
    again once it is closed.

    Args:
        pool_size: Clients that may be out at a time.
        api_base: As for `LLMClient`.
        model: For clients that are got without one. Default: `DEFAULT_MODEL`, else the server's choice.
        api_key: As for `LLMClient`.
        timeout: As for `LLMClient`.
        max_retries: As for `LLMClient`.
        limits: As for `LLMClient`; `max_concurrency` is `pool_size` by default, and at most that.
        model_mismatch: As for `LLMClient`; "warn" logs a line for each pair of names in the whole pool.
        ssl: As for `LLMClient`.
        trust_env: As for `LLMClient`.
        transport: Connections and limits to share beyond this pool, in place of the options about them. It stays its
            owner's to close, and its own limits count.

    Raises:
        LLMValidationError: an argument cannot be right.
    """

    wraps = "lmbridge.client.pool:LLMClientPool"

    def __init__(
        self,
        pool_size: int = 10,
        *,
        api_base: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        timeout: Timeouts | None = None,
        max_retries: int = 2,
        limits: Limits | Literal["auto"] | None = None,
        model_mismatch: Mismatch = "warn",
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        transport: Transport | None = None,
    ) -> None:
        self._open(
            lambda: _pool.LLMClientPool(
                pool_size,
                api_base=api_base,
                model=model,
                api_key=api_key,
                timeout=timeout,
                max_retries=max_retries,
                limits=limits,
                model_mismatch=model_mismatch,
                ssl=ssl,
                trust_env=trust_env,
                transport=transport,
            )
        )

    @property
    def model(self) -> str | None:
        """The model of clients that are got without one."""
        result: str | None = self._call(lambda: self.wrapped.model)
        return result

    def get_client(self, model: str | None = None) -> LLMClient:
        """Waits for a client; give it back with `release_client`, or by closing it.

        Args:
            model: What the client asks for where a call names none; default: the pool's.

        Raises:
            LLMValidationError: the model's name cannot be right.
            LLMError: the pool is closed, or belongs to another event loop.
            TaskCancelledError: the pool was closed meanwhile.
        """
        result: LLMClient = self._await(lambda: self.wrapped.get_client(model))
        return result

    def release_client(self, client: LLMClient) -> None:
        """Gives a client back, to whoever waits longest.

        Its streams that are still open go on to their end; it sends nothing new.

        Raises:
            LLMValidationError: it is not of this pool, or was given back before.
        """
        self._call(lambda: self.wrapped.release_client(unwrap(client)))

    def client(self, model: str | None = None) -> AbstractContextManager[LLMClient]:
        """Waits for a client, and gives it back whichever way the block is left.

        Args:
            model: As for `get_client`.

        Raises:
            LLMError: as for `get_client`.
        """
        return entered(lambda: self.wrapped.client(model))

    def stats(self) -> PoolStats:
        """How many clients there may be, are out, and are waited for."""
        result: PoolStats = self._call(self.wrapped.stats)
        return result
