"""The methods of `LLMClient` for texts, embeddings and responses, and how each call becomes a request.

A client is one object with a method for each endpoint. Its class is written in three files, each of which derives from
the one before: this one, `chat_methods` for everything that sends a chat, and `llm` for the options, the servers and
the closing of a client. The modules behind the endpoints are imported by the methods, because together they would take
a tenth of the time of `import lmbridge`, and many programs call only one of them.

`health_check`, `server_info` and `stats` are in `llm` as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

from lmbridge._checks import check_model_name
from lmbridge._copying import NotCopyable
from lmbridge._pending_call import explains_missing_await
from lmbridge.client.api_requests import ServerApi
from lmbridge.client.call_options import take_options
from lmbridge.client.params import EmbeddingsParams, ResponseParams, TextParams, shows_params, warn_about_mistakes

if TYPE_CHECKING:
    from lmbridge.client.input_checks import Texts
    from lmbridge.client.responses import ResponseInput, ResponseStream
    from lmbridge.client.text_completions import TextStream
    from lmbridge.types import Embeddings, Response, TextCompletion


class EndpointMethods(NotCopyable):
    """The methods of a client that ask a model for texts, embeddings and responses."""

    _server: ServerApi
    """The server, or the servers, that the client asks."""
    _model: str | None
    """The model of calls that name none; None if the server chooses."""

    @overload
    async def text_completion(
        self,
        prompt: Texts,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **params: Unpack[TextParams],
    ) -> TextCompletion: ...

    @overload
    async def text_completion(
        self,
        prompt: Texts,
        *,
        model: str | None = None,
        stream: Literal[True],
        **params: Unpack[TextParams],
    ) -> TextStream: ...

    @overload
    async def text_completion(
        self,
        prompt: Texts,
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **params: Any,
    ) -> TextCompletion: ...

    @overload
    async def text_completion(
        self,
        prompt: Texts,
        *,
        model: str | None = None,
        stream: Literal[True],
        **params: Any,
    ) -> TextStream: ...

    @overload
    async def text_completion(
        self,
        prompt: Texts,
        *,
        model: str | None = None,
        stream: bool,
        **params: Any,
    ) -> TextCompletion | TextStream: ...

    @shows_params(TextParams)
    @explains_missing_await
    async def text_completion(
        self, prompt: Texts, *, model: str | None = None, stream: bool = False, **params: Any
    ) -> TextCompletion | TextStream:
        """Asks for the continuation of a text, without a chat template (`POST /v1/completions`).

        Args:
            prompt: A string or a list of token ids, or a list of such prompts. The reply has `n` choices for each
                prompt, in the order of their `index`.
            model: The model to ask. Default: the client's model.
            stream: Whether to return a `TextStream` at once, instead of the whole reply when it is complete.
            **params: Parameters of the API: `max_tokens`, `temperature`, `stop`, ..., and the options of a call that
                `chat_completion` describes.

        Returns:
            The server's reply as a plain dict, or a stream of its chunks as plain dicts.

        Raises:
            LLMError: The same errors as `chat_completion`.
        """
        from lmbridge.client.text_completions import request_text_completion

        server, body = self._prepare({"prompt": prompt}, params, model, stream=stream)
        return await request_text_completion(server, body, stream=stream)

    @overload
    async def embeddings(
        self,
        input: Texts,
        *,
        model: str | None = None,
        batch_size: int | None = None,
        **params: Unpack[EmbeddingsParams],
    ) -> Embeddings: ...

    @overload
    async def embeddings(
        self, input: Texts, *, model: str | None = None, batch_size: int | None = None, **params: Any
    ) -> Embeddings: ...

    @shows_params(EmbeddingsParams)
    @explains_missing_await
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
            input: A string or a list of token ids, or a list of such texts. No text may be empty.
            model: The model to ask. Default: the client's model.
            batch_size: The most texts that one request may hold. More texts are sent in several requests, one after
                another, and their replies are merged: the indices are consecutive, and the usage is summed up.
                Default: all texts in one request.
            **params: Parameters of the API: `encoding_format`, `dimensions`, ..., and the options of a call that
                `chat_completion` describes.

        Returns:
            The server's reply; its `data` has one embedding for each text, in the order of the texts.

        Raises:
            LLMResponseError: An embedding is missing, or contains anything but finite numbers.
            LLMError: The same errors as `chat_completion`. If one request fails, no embeddings are returned.
        """
        from lmbridge.client.embeddings import request_embeddings

        server, body = self._prepare({"input": input}, params, model)
        return await request_embeddings(server, body, batch_size)

    @overload
    async def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: Literal[False] = False,
        **params: Unpack[ResponseParams],
    ) -> Response: ...

    @overload
    async def create_response(
        self,
        input: ResponseInput,
        *,
        model: str | None = None,
        previous_response_id: str | None = None,
        stream: Literal[True],
        **params: Unpack[ResponseParams],
    ) -> ResponseStream: ...

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

    @shows_params(ResponseParams)
    @explains_missing_await
    async def create_response(
        self,
        input: ResponseInput,  # noqa: A002 - the API's own name
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
            stream: Whether to return a `ResponseStream` of named events at once, instead of the whole response when it
                is complete.
            **params: Parameters of the API: `instructions`, `max_output_tokens`, `tools` (in the flat form of this
                API), `store`, ..., and the options of a call that `chat_completion` describes.

        Returns:
            The response, whose `status` is "completed" or "incomplete"; or a stream of its events.

        Raises:
            LLMError: The same errors as `chat_completion`; they are also raised if the response itself has failed.
        """
        from lmbridge.client.responses import request_response

        given: dict[str, Any] = {"input": input}
        if previous_response_id is not None:
            given["previous_response_id"] = previous_response_id
        server, body = self._prepare(given, params, model, stream=stream)
        return await request_response(server, body, stream=stream)

    def _prepare(
        self, body: dict[str, Any], params: dict[str, Any], model: str | None, *, stream: bool = False
    ) -> tuple[ServerApi, dict[str, Any]]:
        """Returns a `ServerApi` with the options of a call, and the body of the request.

        Args:
            body: The fields that the method itself has as arguments.
            params: The other arguments of the call: parameters of the API, and options of lmbridge.
            model: The model of the call.
            stream: Whether a stream is asked for.
        """
        options = take_options(params)
        if params:
            warn_about_mistakes(params)
        body.update(params)
        asked = check_model_name(model) or self._model
        if asked is not None:
            body["model"] = asked
        if stream:
            body["stream"] = True
        if options is None:
            return self._server, body
        if options.body:
            body.update(options.body)
            check_model_name(body.get("model"), name="extra_body['model']")
        return self._server.for_call(options), body
