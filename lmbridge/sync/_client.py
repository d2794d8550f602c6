"""Blocking classes, written by scripts/generate_sync.py: change that, or the asynchronous classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import lmbridge.client.llm as _llm
import lmbridge.client.pool as _pool
from lmbridge.client.responses import ResponseEvent
from lmbridge.config import UNSET
from lmbridge.sync._wrap import Owner, Stream, Wrapper, entered, unwrap
from lmbridge.types import ChatCompletionChunk, TextCompletionChunk

if TYPE_CHECKING:
    import ssl as ssl_module
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Literal, Unpack

    from lmbridge.client.call_options import RequestOptions
    from lmbridge.client.inputs import Texts
    from lmbridge.client.llm import _T, ClientOptions
    from lmbridge.client.names import MismatchMode
    from lmbridge.client.params import ChatParams, ResponseParams, TextParams
    from lmbridge.client.pool import PoolStats
    from lmbridge.client.raw import RawResponse
    from lmbridge.client.responses import ResponseInput
    from lmbridge.client.server_info import ServerInfo
    from lmbridge.config import Limits, Timeouts, Unset
    from lmbridge.transport import Transport
    from lmbridge.transport.stats import ClientStats
    from lmbridge.types import (
        ChatCompletion,
        DownloadStatus,
        Embeddings,
        LMStudioLoad,
        LMStudioModel,
        LMStudioUnload,
        Response,
        TextCompletion,
    )


class ChatStream(Stream[ChatCompletionChunk]):
    """The chunks of one chat completion, exactly as the server sent them.

    For example::

        with client.chat_completion(messages, stream=True) as stream:
            for chunk in stream:
                for choice in chunk["choices"]:
                    print(choice["delta"].get("content") or "", end="")

    Iterate it once, from one task at a time. It ends after `[DONE]`, or after a finish reason; any other end raises
    an error whose `.partial` is the reply so far. Leaving it early, in any way, closes the connection, so that the
    server stops generating, and frees its slot.

    Raises (while it is iterated):
        LLMStreamError: The stream was cut off, or the server reported an error other than those below.
        ContextLengthExceededError, ModelLoadError, LLMRateLimitError, ...: The server reported this error.
        LLMTimeoutError: A limit was exceeded; `phase` is "first_byte", "idle" or "total".
        ModelMismatchError: The model that answers was not asked for (only with `model_mismatch="raise"`).
        ModelChangedDuringExecutionError: Another model continued the answer (except with `model_mismatch="ignore"`).
        TaskCancelledError: The stream was closed, by another task or before its end.
    """

    wraps = "lmbridge.client.chat_stream:ChatStream"

    @property
    def partial(self) -> ChatCompletion | None:
        """What `collect` would return for the stream so far, as a new dict, or None before the first chunk."""
        result: ChatCompletion | None = self._call(lambda: self.wrapped.partial)
        return result

    @property
    def status(self) -> int:
        """The HTTP status code of the response."""
        result: int = self._call(lambda: self.wrapped.status)
        return result

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the response. Names are looked up in any case."""
        result: Mapping[str, str] = self._call(lambda: self.wrapped.headers)
        return result


class TextStream(Stream[TextCompletionChunk]):
    """The chunks of one text completion, exactly as the server sent them.

    It is used like a `ChatStream`, and raises the same errors. `.partial` and the result of `collect` have the shape of
    a plain text completion.
    """

    wraps = "lmbridge.client.completions:TextStream"

    @property
    def partial(self) -> TextCompletion | None:
        """What `collect` would return for the stream so far, as a new dict, or None before the first chunk."""
        result: TextCompletion | None = self._call(lambda: self.wrapped.partial)
        return result

    @property
    def status(self) -> int:
        """The HTTP status code of the response."""
        result: int = self._call(lambda: self.wrapped.status)
        return result

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the response. Names are looked up in any case."""
        result: Mapping[str, str] = self._call(lambda: self.wrapped.headers)
        return result


class ResponseStream(Stream[ResponseEvent]):
    """The events of one response, each with its parsed data.

    For example::

        for event, data in client.create_response("Hello", stream=True):
            if event.type == "response.output_text.delta":
                print(data["delta"], end="")

    It is used like a `ChatStream`, and raises the same errors, except that it ends only after `response.completed` or
    `response.incomplete`. `.partial` and the result of `collect` have the shape of a plain response.
    """

    wraps = "lmbridge.client.responses:ResponseStream"

    @property
    def partial(self) -> Response | None:
        """What `collect` would return for the stream so far, as a new dict, or None before the first chunk."""
        result: Response | None = self._call(lambda: self.wrapped.partial)
        return result

    @property
    def status(self) -> int:
        """The HTTP status code of the response."""
        result: int = self._call(lambda: self.wrapped.status)
        return result

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers of the response. Names are looked up in any case."""
        result: Mapping[str, str] = self._call(lambda: self.wrapped.headers)
        return result


class LMStudio(Wrapper):
    """LM Studio's own API, as `client.lmstudio`.

    The requests do not queue behind generations. Besides their own errors, all methods raise those of
    `LLMClient.chat_completion`. If the server is not LM Studio, or an LM Studio that is too old, they raise an
    `LLMResponseError` whose text says which of the two it is.
    """

    wraps = "lmbridge.client.lmstudio:LMStudio"

    def models(self) -> list[LMStudioModel]:
        """Returns the downloaded models with their loaded instances (`GET /api/v1/models`).

        Returns:
            Dicts as the server sent them. The older list of an LM Studio before 0.4.0 (`GET /api/v0/models`) is put
            into the same fields; the fields that it does not have are left out: `parallel`, sizes, display names.

        Raises:
            LLMResponseError: The server is not LM Studio.
        """
        result: list[LMStudioModel] = self._await(self.wrapped.models)
        return result

    def load(self, model: str, **config: Any) -> LMStudioLoad:
        """Loads a model (`POST /api/v1/models/load`), which may take minutes; the limit is `Timeouts.load`.

        A model that is already loaded is loaded a second time. The request is sent again only if the server refused it
        before it did any work.

        Args:
            model: The `key` of a downloaded model.
            **config: Options of LM Studio, sent unchanged: `context_length`, `flash_attention`, `eval_batch_size`,
                `num_experts`, `offload_kv_cache_to_gpu`, `echo_load_config` (returns the whole configuration), ...

        Returns:
            The server's dict. Its `instance_id` is the name to ask for and to unload; `load_time_seconds` is the time
            that loading took.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            ModelNotFoundError: The model is not downloaded.
            ModelLoadError: The model does not fit into memory, or crashed.
            LLMTimeoutError: Phase "load". LM Studio may go on loading the model.
        """
        result: LMStudioLoad = self._await(lambda: self.wrapped.load(model, **config))
        return result

    def unload(self, instance_id: str) -> LMStudioUnload:
        """Unloads an instance of a model at once, even if it is generating (`POST /api/v1/models/unload`).

        Args:
            instance_id: The `id` of one of the `loaded_instances`, or the `instance_id` that `load` returned.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            LLMResponseError: No such instance exists.
        """
        result: LMStudioUnload = self._await(lambda: self.wrapped.unload(instance_id))
        return result

    def download(self, model: str, **options: Any) -> Iterator[DownloadStatus]:
        """Downloads a model and yields its progress (`POST /api/v1/models/download`).

        LM Studio downloads on its own: leaving the iteration, or cancelling it, does not stop the download. Calling
        `download` again for the same model yields the progress of the download that is running.

        Args:
            model: A name in LM Studio's catalogue, or a link to a repository on Hugging Face.
            **options: Options of LM Studio, sent unchanged: `quantization` (only with a link).

        Yields:
            The server's dicts, about one a second: `status`, `downloaded_bytes`, `total_size_bytes`,
            `bytes_per_second`, ... The status is "downloading", or "paused" while the download is paused in LM Studio;
            that of the last dict is "completed" or "already_downloaded".

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent. The call raises this; the iteration raises
                all other errors.
            LLMResponseError: The download failed; `partial` is the last status.
            TaskCancelledError: The client was closed, given back to its pool, or sent to another server, while LM
                Studio goes on with the download.
        """
        result: Iterator[DownloadStatus] = self._call(lambda: self.wrapped.download(model, **options))
        return result


class RawResponses(Wrapper):
    """The methods of a client, as `client.with_raw_response`: each returns a `RawResponse`.

    The parameters and the errors are those of the client's methods. Streams have `status` and `headers` themselves.
    """

    wraps = "lmbridge.client.raw:RawResponses"

    def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **params: Any
    ) -> RawResponse[ChatCompletion]:
        """Asks for the next message of a chat, as `LLMClient.chat_completion` does."""
        result: RawResponse[ChatCompletion] = self._await(
            lambda: self.wrapped.chat_completion(messages, model=model, **params)
        )
        return result

    def text_completion(self, prompt: Texts, *, model: str | None = None, **params: Any) -> RawResponse[TextCompletion]:
        """Asks for the continuation of a text, as `LLMClient.text_completion` does."""
        result: RawResponse[TextCompletion] = self._await(
            lambda: self.wrapped.text_completion(prompt, model=model, **params)
        )
        return result

    def embeddings(self, input: Texts, *, model: str | None = None, **params: Any) -> RawResponse[Embeddings]:
        """Asks for embeddings, as `LLMClient.embeddings` does; of several requests, the last one is reported."""
        result: RawResponse[Embeddings] = self._await(lambda: self.wrapped.embeddings(input, model=model, **params))
        return result

    def create_response(
        self, input: ResponseInput, *, model: str | None = None, **params: Any
    ) -> RawResponse[Response]:
        """Asks for a response, as `LLMClient.create_response` does."""
        result: RawResponse[Response] = self._await(lambda: self.wrapped.create_response(input, model=model, **params))
        return result


class LLMClient(Owner):
    """A client of one server with an OpenAI-compatible `/v1`.

    It opens with its first request. `close`, or leaving its `with` block, closes its connections; a later request
    opens it again. One client serves any number of concurrent tasks of one event loop::

        with LLMClient("http://127.0.0.1:1234/v1") as client:
            reply = client.chat_completion([{"role": "user", "content": "Hello!"}])
            print(reply["choices"][0]["message"]["content"])

    Args:
        api_base: The URL of the server, with or without `/v1`. Default: the environment variable `LMBRIDGE_API_BASE`,
            else `LMSTUDIO_HOST` and `LMSTUDIO_PORT`, else `http://127.0.0.1:1234/v1`, where LM Studio listens.
        model: The model of calls that name none. Default: the environment variable `DEFAULT_MODEL`, else the server
            chooses.
        api_key: The key that is sent as a bearer token. Default: the environment variable `LM_API_TOKEN`, else none.
        timeout: The timeouts of each request. A number of seconds limits each wait, like
            `Timeouts(connect=min(5, t), first_byte=t, idle=t)`; None switches all limits off. Default: those of
            `Timeouts()`.
        max_retries: How often a request is sent again after a refused connection or a temporary error. At most 5 are
            made. Default: 2.
        limits: How many requests and models may be active at the same time. "auto" asks the server for its limits, as
            docs/model-scheduling.md describes. Default: those of `Limits()`.
        model_mismatch: What happens if another model answers than the one that was asked for. "warn", the default, logs
            a warning for each pair of names, "raise" raises `ModelMismatchError`, and "ignore" does nothing, not even
            if another model continues an answer in the middle of a stream.
        ssl: The context for https, for example with a certificate authority of your own. Default: the usual
            verification.
        trust_env: Whether the proxies and the netrc file of the environment are used. A server on the loopback
            interface is never reached through a proxy. Default: False.
        transport: A transport whose connections and limits are shared with other clients. It replaces the options
            `api_base`, `api_key`, `limits`, `ssl` and `trust_env`, and remains open when the client is closed.
            Default: the client makes a transport for itself.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    wraps = "lmbridge.client.llm:LLMClient"

    def __init__(
        self,
        api_base: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        *,
        timeout: Timeouts | float | Unset | None = UNSET,
        max_retries: int = 2,
        limits: Limits | Literal["auto"] | None = None,
        model_mismatch: MismatchMode = "warn",
        ssl: ssl_module.SSLContext | None = None,
        trust_env: bool = False,
        transport: Transport | None = None,
    ) -> None:
        self._set_wrapped(
            _llm.LLMClient(
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
        """The model of calls that name none, or None if the server chooses."""
        result: str | None = self._call(lambda: self.wrapped.model)
        return result

    @property
    def api_base(self) -> str:
        """The server's URL, with `/v1`.

        It can be set: later requests go to the new server, and streams in progress finish on the old one. Setting it
        raises `LLMValidationError` if the URL is not valid, or if the client was created with `transport=`.
        """
        result: str = self._call(lambda: self.wrapped.api_base)
        return result

    @api_base.setter
    def api_base(self, api_base: str) -> None:
        self._call(lambda: setattr(self.wrapped, "api_base", api_base))

    @property
    def lmstudio(self) -> LMStudio:
        """LM Studio's own API: lists, loads, unloads and downloads models. With another server its methods raise."""
        result: LMStudio = self._call(lambda: self.wrapped.lmstudio)
        return result

    @property
    def with_raw_response(self) -> RawResponses:
        """The methods of this client, with the status and headers of each HTTP response beside its reply."""
        result: RawResponses = self._call(lambda: self.wrapped.with_raw_response)
        return result

    def with_options(
        self,
        *,
        model: str | Unset | None = UNSET,
        timeout: Timeouts | float | Unset | None = UNSET,
        max_retries: int | Unset = UNSET,
        model_mismatch: MismatchMode | Unset = UNSET,
        extra_headers: Mapping[str, str] | Unset | None = UNSET,
    ) -> LLMClient:
        """Returns a client with other options on the same transport: it shares connections, limits and statistics.

        For example::

            patient = client.with_options(timeout=600, max_retries=5)

        It follows this client when `api_base` is set, and is at its end when this one is given back to its pool.
        Closing it closes nothing: close this client.

        Args:
            model: The model of calls that name none; None leaves the choice to the server. Default: this client's.
            timeout: The timeouts, a number of seconds for each wait, or None for no limits. Default: this client's.
            max_retries: How often a request is sent again. Default: this client's.
            model_mismatch: What happens if another model answers: "warn", "raise" or "ignore". Default: this client's.
            extra_headers: Headers of every request, in addition to this client's or in their place.

        Raises:
            LLMValidationError: An option is not valid.
        """
        result: LLMClient = self._call(
            lambda: self.wrapped.with_options(
                model=model,
                timeout=timeout,
                max_retries=max_retries,
                model_mismatch=model_mismatch,
                extra_headers=extra_headers,
            )
        )
        return result

    @overload
    def chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **params: Unpack[ChatParams],
    ) -> ChatCompletion: ...

    @overload
    def chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[True],
        **params: Unpack[ChatParams],
    ) -> ChatStream: ...

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
            messages: The chat so far: dicts with `role` and `content`, at least one.
            model: The model to ask. Default: the client's model.
            stream: Whether to return a `ChatStream` at once instead of the whole reply at its end.
            **params: Parameters of the API, as `lmbridge.client.params.ChatParams` describes them: `temperature`,
                `top_p`, `max_tokens`, `stop`, `seed`, `n`, `tools`, `tool_choice`, `response_format`, ... Others are
                sent as well. Those that are not given are not sent, and None is sent as `null`. `timeout`,
                `max_retries`, `extra_headers`, `extra_query` and `extra_body` are options of this call.

        Returns:
            The server's reply as a plain dict, or a stream of its chunks as plain dicts.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            LLMConnectionError: The server cannot be reached, or the connection broke.
            LLMTimeoutError: A timeout or the queue limit ran out; `phase` says which one.
            LLMResponseError: The server reported an error, or sent something that is not a chat completion. Its
                subclasses are more specific.
            ModelNotFoundError: The server does not have the model.
            ModelMismatchError: Another model answered (only with `model_mismatch="raise"`).
            TaskCancelledError: The client was closed in the meantime.
        """
        result: ChatCompletion | ChatStream = self._await(
            lambda: self.wrapped.chat_completion(messages, model=model, stream=stream, **params)
        )
        return result

    @overload
    def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: Literal[False] = False, **params: Unpack[TextParams]
    ) -> TextCompletion: ...

    @overload
    def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: Literal[True], **params: Unpack[TextParams]
    ) -> TextStream: ...

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
        """Asks for the continuation of a text, without a chat template (`POST /v1/completions`).

        Args:
            prompt: A string or a list of token ids, or a list of several of them. The reply has `n` choices for each
                prompt, in the order of their `index`.
            model: The model to ask. Default: the client's model.
            stream: Whether to return a `TextStream` at once instead of the whole reply at its end.
            **params: Parameters of the API: `max_tokens`, `temperature`, `stop`, ..., and the options of a call that
                `chat_completion` describes.

        Returns:
            The server's reply as a plain dict, or a stream of its chunks as plain dicts.

        Raises:
            LLMError: The same errors as `chat_completion`.
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
            input: A string or a list of token ids, or a list of several of them; none may be empty.
            model: The model to ask. Default: the client's model.
            batch_size: The most texts that one request may hold. More texts are sent in several requests, one after
                another, and their replies are merged: the indices are consecutive, and the usage is summed up.
                Default: all texts in one request.
            **params: Parameters of the API: `encoding_format`, `dimensions`, ..., and the options of a call that
                `chat_completion` describes.

        Returns:
            The server's reply; its `data` has one embedding for each text, in the order of the texts.

        Raises:
            LLMResponseError: An embedding is missing, or contains something else than finite numbers.
            LLMError: The same errors as `chat_completion`. A part of the embeddings is never returned.
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
        **params: Unpack[ResponseParams],
    ) -> Response: ...

    @overload
    def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: Literal[True],
        **params: Unpack[ResponseParams],
    ) -> ResponseStream: ...

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
        """Asks for a response, which the server may store and continue later (`POST /v1/responses`).

        A response that the server stores must not be created twice. Therefore, unless `store=False` is given, a request
        is sent again only after a refused connection, a 429 or a 503.

        Args:
            input: A string, or a list of items: messages, and results of function calls.
            model: The model to ask. Default: the client's model.
            previous_response_id: The `id` of the stored response to continue.
            stream: Whether to return a `ResponseStream` of named events at once instead of the whole response at its
                end.
            **params: Parameters of the API: `instructions`, `max_output_tokens`, `tools` (in the flat form of this
                API), `store`, ..., and the options of a call that `chat_completion` describes.

        Returns:
            The response, or a stream of its events. Its `status` is "completed" or "incomplete".

        Raises:
            LLMError: The same errors as `chat_completion`, also for a response that failed.
        """
        result: Response | ResponseStream = self._await(
            lambda: self.wrapped.create_response(
                input, model=model, previous_response_id=previous_response_id, stream=stream, **params
            )
        )
        return result

    @overload
    def parse(
        self,
        messages: Sequence[Mapping[str, Any]],
        type_: type[_T],
        *,
        model: str | None = ...,
        **params: Unpack[ChatParams],
    ) -> _T: ...

    @overload
    def parse(
        self, messages: Sequence[Mapping[str, Any]], type_: type[_T], *, model: str | None = ..., **params: Any
    ) -> _T: ...

    @overload
    def parse(
        self, messages: Sequence[Mapping[str, Any]], type_: Any, *, model: str | None = ..., **params: Any
    ) -> Any: ...

    def parse(
        self, messages: Sequence[Mapping[str, Any]], type_: Any, *, model: str | None = None, **params: Any
    ) -> Any:
        """Asks for an answer of a certain type: its JSON schema is sent along, and the answer is validated.

        An answer that is not valid is sent back to the model once, with what is wrong about it. The request is
        streamed, so that the server stops generating if the call is cancelled.

        Args:
            messages: The chat so far: dicts with `role` and `content`. Describe the fields in it, because few servers
                show the schema to the model.
            type_: A dataclass, a pydantic model, an attrs class, a TypedDict, a msgspec.Struct, or a form of these such
                as `list[Book]`, `dict[str, int]`, `Cat | Dog`, `Literal["yes", "no"]` or an enum. A type that is not an
                object in JSON is sent as the field `answer` of one, and its value is returned.
            model: The model to ask. Default: the client's model.
            **params: Parameters of the API, except `n`, `response_format` and `stream`, and the options of a call that
                `chat_completion` describes.

        Returns:
            An instance of the type. Type checkers infer it for classes and for forms such as `list[Book]`; some of them
            infer Any for `Literal` and for unions.

        Raises:
            LLMValidationError: An argument is not valid, and nothing was sent; or the answer is not valid: `.body` is
                its text, `.partial` the whole reply, and `.context["path"]` the place of the fault.
            LLMError: The same errors as `chat_completion`, and those that iterating its stream raises.
        """
        result: Any = self._await(lambda: self.wrapped.parse(messages, type_, model=model, **params))
        return result

    def list_models(self, **options: Unpack[RequestOptions]) -> list[str]:
        """Returns the ids of the server's models (`GET /v1/models`). The request does not queue behind generations.

        Args:
            **options: `timeout`, `max_retries`, `extra_headers` and `extra_query` of this call. Without a `timeout`, an
                attempt may take 10 s.

        Raises:
            LLMError: The same errors as `chat_completion`.
        """
        result: list[str] = self._await(lambda: self.wrapped.list_models(**options))
        return result

    def server_info(self, **options: Unpack[RequestOptions]) -> ServerInfo:
        """Asks which server it is, which models it has loaded, with how much context, and with how many slots.

        Nothing is cached. The requests are `GET /v1/models`, and then those of the server that this looks like:
        LM Studio `/api/v1/models` (before 0.4.0 also `/api/v0/models`), llama.cpp `/props` (a router once more for each
        loaded model), Ollama `/api/version` and `/api/ps`, vLLM `/version`. Each may take 10 s, and none queues behind
        generations.

        Args:
            **options: `timeout`, `max_retries`, `extra_headers` and `extra_query` of each of the requests.

        Returns:
            The server and its models. What the server does not report is None.

        Raises:
            LLMAuthenticationError: The server refused the key.
            LLMError: The same errors as `chat_completion`.
        """
        result: ServerInfo = self._await(lambda: self.wrapped.server_info(**options))
        return result

    def stats(self) -> ClientStats:
        """Returns what is in flight and queued, and how many swaps and retries there were, in total and by model.

        The numbers are those of the client's transport, so they include other clients that share it. Setting `api_base`
        starts them anew.
        """
        result: ClientStats = self._call(self.wrapped.stats)
        return result

    def health_check(self, **options: Unpack[RequestOptions]) -> bool:
        """Asks whether the server is running and ready. The request neither queues nor retries, and takes 5 s at most.

        Args:
            **options: `timeout` (in place of the 5 s), `extra_headers` and `extra_query` of this call.

        Returns:
            True if the server is ready; False if nothing answers, or the server is still loading or failing (5xx).

        Raises:
            LLMAuthenticationError: The server is running, but refuses the key.
            LLMResponseError: Something that is not a model server answers at this address.
            LLMError: The client was given back to its pool.
        """
        result: bool = self._await(lambda: self.wrapped.health_check(**options))
        return result


class LLMClientPool(Owner):
    """Hands out at most `pool_size` clients at the same time, each with its own default model.

    Callers that wait for a client are served in the order of their arrival.

    The clients share one transport: its connections, and its limit on generations in flight, which is never more than
    `pool_size`. A pool belongs to the event loop that first gets a client from it. Unlike a client, it does not open
    again once it is closed::

        with LLMClientPool(pool_size=4) as pool, pool.client("qwen3-4b") as client:
            reply = client.chat_completion([{"role": "user", "content": "Hello!"}])

    Args:
        pool_size: The most clients that can be in use at the same time. Default: 10.
        **options: The options of the clients, as `LLMClient` documents them, all by keyword. Some apply to the whole
            pool: `model` is the model of clients that are requested without one. The `max_concurrency` of `limits` is
            `pool_size` by default, and never more than that. With `model_mismatch="warn"`, each pair of names is logged
            once for the whole pool. A `transport` is shared beyond the pool: its own limits apply, and it stays open
            when the pool is closed.

    Raises:
        LLMValidationError: An argument is not valid.
    """

    wraps = "lmbridge.client.pool:LLMClientPool"

    def __init__(self, pool_size: int = 10, **options: Unpack[ClientOptions]) -> None:
        self._set_wrapped(_pool.LLMClientPool(pool_size, **options))

    @property
    def model(self) -> str | None:
        """The model of clients that are requested without one."""
        result: str | None = self._call(lambda: self.wrapped.model)
        return result

    def get_client(self, model: str | None = None) -> LLMClient:
        """Waits for a client. Give it back with `release_client`, or by closing it.

        Args:
            model: The model of the client's calls that name none. Default: the pool's model.

        Raises:
            LLMValidationError: The model's name is not valid.
            LLMError: The pool is closed, or is in use in another event loop.
            TaskCancelledError: The pool was closed during the wait.
        """
        result: LLMClient = self._await(lambda: self.wrapped.get_client(model))
        return result

    def release_client(self, client: LLMClient) -> None:
        """Gives a client back. The caller that has waited longest gets the slot.

        Streams that the client has opened go on to their end. A further request raises an `LLMError`.

        Raises:
            LLMValidationError: The client does not belong to this pool, or was already given back.
        """
        self._call(lambda: self.wrapped.release_client(unwrap(client)))

    def client(self, model: str | None = None) -> AbstractContextManager[LLMClient]:
        """Waits for a client, and gives it back at the end of the `with` block.

        Args:
            model: The model of the client's calls that name none. Default: the pool's model.

        Raises:
            LLMError: The same errors as `get_client`.
        """
        return entered(lambda: self.wrapped.client(model))

    def stats(self) -> PoolStats:
        """Returns how many clients the pool can hand out, how many are in use, and how many callers are waiting."""
        result: PoolStats = self._call(self.wrapped.stats)
        return result
