"""The methods of `LLMClient` that send a chat: completions, questions, typed answers, decisions, token counts."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, cast, overload

from lmbridge._checks import check_bool
from lmbridge._pending_call import explains_missing_await
from lmbridge.client.chat_stream import ChatStream
from lmbridge.client.completion_shape import complete_chat_reply
from lmbridge.client.endpoints import EndpointMethods
from lmbridge.client.input_checks import check_messages
from lmbridge.client.json_codec import decode_json
from lmbridge.client.params import ChatParams, shows_params

if TYPE_CHECKING:
    from lmbridge.client.call_options import CallOptions
    from lmbridge.client.decisions import Decisions
    from lmbridge.client.questions import Question
    from lmbridge.client.token_count import TokenCount
    from lmbridge.types import ChatCompletion

_T = TypeVar("_T")


class ChatMethods(EndpointMethods):
    """The methods of a client that send a chat to a model."""

    @overload
    async def chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[False] = False,
        **params: Unpack[ChatParams],
    ) -> ChatCompletion: ...

    @overload
    async def chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: Literal[True],
        **params: Unpack[ChatParams],
    ) -> ChatStream: ...

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
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        stream: bool,
        **params: Any,
    ) -> ChatCompletion | ChatStream: ...

    @shows_params(ChatParams)
    @explains_missing_await
    async def chat_completion(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, stream: bool = False, **params: Any
    ) -> ChatCompletion | ChatStream:
        """Asks for the next message of a chat (`POST /v1/chat/completions`).

        Args:
            messages: The chat so far: dicts with `role` and `content`, at least one.
            model: The model to ask. Default: the client's model.
            stream: Whether to return a `ChatStream` at once, instead of the whole reply when it is complete.
            **params: Parameters of the API, as `lmbridge.client.params.ChatParams` describes them: `temperature`,
                `top_p`, `max_tokens`, `stop`, `seed`, `n`, `tools`, `tool_choice`, `response_format`, ... Others are
                sent as well. Those that are not given are not sent, and None is sent as `null`. `timeout`,
                `max_retries`, `priority`, `extra_headers`, `extra_query` and `extra_body` are options of this call.

        Returns:
            The server's reply as a plain dict, or a stream of its chunks as plain dicts.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            LLMConnectionError: The server cannot be reached, or the connection broke.
            LLMTimeoutError: A timeout ran out, or the request was queued for longer than `Limits.max_queue`; `phase`
                says which.
            LLMResponseError: The server reported an error, or sent something that is not a chat completion. Its
                subclasses are more specific.
            ModelNotFoundError: The server does not have the model.
            ModelMismatchError: Another model answered (only with `model_mismatch="raise"`).
            TaskCancelledError: The client was closed in the meantime.
        """
        check_messages(messages)
        server, body = self._prepare({"messages": messages}, params, model, stream=stream)
        request = server.build_post("chat completion", "/chat/completions", body, body.get("model"))
        check_reply = None
        if server.context_overflow is not None:
            from lmbridge.client.context_overflow import check_prompt

            # The prompt is measured as it is sent: every mapping is a dict, and every text can be encoded.
            body = decode_json(request.body or b"{}")
            check = await check_prompt(server, body)
            check_reply = None if check is None else check.check_reply
        if stream:
            choices = body.get("n")
            events = await server.stream(request)
            count = choices if isinstance(choices, int) else 1
            return ChatStream(events, server.mismatch_policy, server.redact, count, check_reply)
        reply = await server.request(request)
        value = await server.read_completion(reply, complete_chat_reply, "a chat completion")
        server.check_served_model(reply, value)
        if check_reply is not None:
            await check_reply(value)
        return cast("ChatCompletion", value)

    @overload
    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **params: Unpack[ChatParams]
    ) -> AbstractAsyncContextManager[ChatStream]: ...

    @overload
    def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **params: Any
    ) -> AbstractAsyncContextManager[ChatStream]: ...

    @shows_params(ChatParams)
    @asynccontextmanager
    async def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], *, model: str | None = None, **params: Any
    ) -> AsyncGenerator[ChatStream, None]:
        """Opens the stream of a chat completion, and closes it at the end of the `async with` block.

        For example::

            async with client.stream_chat(messages, temperature=0) as stream:
                async for text in stream.text():
                    print(text, end="", flush=True)

        The arguments and the errors are those of `chat_completion`, except for the argument `stream`.
        """
        async with await self.chat_completion(messages, model=model, stream=True, **params) as stream:
            yield stream

    @overload
    async def ask(self, question: str, *, model: str | None = None, **params: Unpack[ChatParams]) -> str: ...

    @overload
    async def ask(self, question: str, *, model: str | None = None, **params: Any) -> str: ...

    @shows_params(ChatParams)
    @explains_missing_await
    async def ask(self, question: str, *, model: str | None = None, **params: Any) -> str:
        """Asks a single question, and returns the text of the answer, without the reasoning before it.

        For example::

            print(await client.ask("What is the capital of France?"))

        Args:
            question: The question, which is sent as the message of a user.
            model: The model to ask. Default: the client's model.
            **params: Parameters and options of the call, as for `chat_completion`, except `n` and `stream`.

        Raises:
            LLMValidationError: An argument is not valid, and nothing was sent; or the answer has no text, or was cut
                off although no limit was given: `.partial` is the whole reply.
            LLMError: The same errors as `chat_completion`.
        """
        from lmbridge.client.answer_text import check_answer, check_question

        messages = check_question(question, params)
        reply = await self.chat_completion(messages, model=model, stream=False, **params)
        return check_answer(reply, has_limit=bool(params.get("max_tokens") or params.get("max_completion_tokens")))

    @overload
    async def parse(
        self,
        messages: Sequence[Mapping[str, Any]],
        type_: type[_T],
        *,
        model: str | None = ...,
        **params: Unpack[ChatParams],
    ) -> _T: ...
    @overload
    async def parse(
        self, messages: Sequence[Mapping[str, Any]], type_: type[_T], *, model: str | None = ..., **params: Any
    ) -> _T: ...
    @overload
    async def parse(
        self, messages: Sequence[Mapping[str, Any]], type_: Any, *, model: str | None = ..., **params: Any
    ) -> Any: ...
    @shows_params(ChatParams)
    @explains_missing_await
    async def parse(
        self, messages: Sequence[Mapping[str, Any]], type_: Any, *, model: str | None = None, **params: Any
    ) -> Any:
        """Asks for an answer of a certain type. The request contains its JSON schema, and the answer is validated.

        An answer that is not valid is sent back to the model once, together with a description of the mistake. A model
        that repeated itself until its answer was cut off is asked once more, with a `frequency_penalty`, unless you set
        one. The requests are streamed, so that the server stops generating if the call is cancelled.

        Args:
            messages: The chat so far: dicts with `role` and `content`. Describe the fields of the type in a message,
                because few servers show the schema to the model.
            type_: A dataclass, a pydantic model, an attrs class, a TypedDict, a msgspec.Struct or an enum; or a type
                such as `list[Book]`, `dict[str, int]`, `Cat | Dog` or `Literal["yes", "no"]`. For a type that is not an
                object in JSON, the schema describes an object with one field, `answer`, whose value is returned.
            model: The model to ask. Default: the client's model.
            **params: Parameters of the API, except `n`, `response_format` and `stream`, and the options of a call that
                `chat_completion` describes.

        Returns:
            An instance of the type. Type checkers infer it for classes and for types such as `list[Book]`, and
            infer Any for `Literal` and for a union.

        Raises:
            LLMValidationError: An argument is not valid, and nothing was sent; or the answer is not valid: `.body` is
                its text, `.partial` the whole reply, and `.context["path"]` the place of the fault.
            LLMError: The same errors as `chat_completion`, and those that iterating its stream raises.
        """
        from lmbridge.client import structured

        params = {"model": model, **params}
        return await structured.parse(
            self.chat_completion, messages, type_, params, url=self._server.transport.api_base
        )

    @explains_missing_await
    async def decide(
        self,
        state: Any,
        questions: Mapping[str, Question | Mapping[str, Any]],
        *,
        model: str | None = None,
        fallback: bool = True,
        **options: Unpack[CallOptions],
    ) -> Decisions:
        """Answers typed questions about a text or a JSON value, with the probability of each possible answer.

        Decision models do this in a single pass and without writing anything (`POST /v1/systemone`, else `POST
        /v1/decisions`). An ordinary chat model is asked for the label of an answer instead, and the probabilities are
        those of the labels (`logprobs`). Then `calibrated` is False, and a warning is logged once.

        For example::

            decisions = await client.decide(
                "I was charged twice, and nobody answers.",
                {
                    "team": Choice("Which team should handle this?", ["billing", "shipping", "technical"]),
                    "angry": TrueFalse("Is the customer angry?"),
                },
            )
            print(decisions.answers["team"].winner, decisions.answers["angry"].expected)

        Args:
            state: What the questions are about: a string, or a JSON value, which the model reads as JSON text.
            questions: A dict with names of your choice as keys, and with the questions as values: `Choice`, `Score` and
                `TrueFalse`, or dicts in the form of either endpoint.
            model: The model to ask. Default: the client's model.
            fallback: Whether an ordinary chat model may answer. With False, that is an error.
            **options: `timeout`, `max_retries`, `priority`, `extra_headers`, `extra_query` and `extra_body` of each
                request.

        Raises:
            LLMValidationError: An argument is not valid, and nothing was sent; or a chat model was asked a question
                with more than 20 options.
            ModelMismatchError: The model is not a decision model (only with `fallback=False`).
            LLMResponseError: The server has no endpoint for decisions (only with `fallback=False`), or it does not
                report the log probabilities of a chat model.
            LLMError: The same errors as `chat_completion`.
        """
        from lmbridge.client.decide import decide
        from lmbridge.client.questions import check_questions

        checked, given = check_questions(questions), cast("dict[str, Any]", dict(options))
        check_bool("fallback", fallback)
        server, body = self._prepare({}, given, model)
        if given:
            raise TypeError(f"decide() got an unexpected keyword argument {next(iter(given))!r}")
        ask: Any = partial(self.chat_completion, model=model, stream=True, **options)
        return await decide(server, ask, state, checked, body, fallback=fallback)

    @explains_missing_await
    async def count_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **params: Any,
    ) -> TokenCount:
        """Counts the tokens of a prompt, with the chat template and the tools, without generating anything.

        llama.cpp (`POST /v1/chat/completions/input_tokens`) and vLLM (`POST /tokenize`) count exactly. With other
        servers, such as LM Studio and Ollama, the result is an estimate, with `exact=False`. It is also an estimate for
        a model that llama.cpp's router has not loaded, because a count never loads a model. The request does not queue
        behind generations.

        For example::

            count = await client.count_tokens(messages)
            print(count.tokens, "tokens" if count.exact else "tokens, more or less")

        Args:
            messages: The chat: dicts with `role` and `content`, at least one.
            model: The model whose tokenizer counts. Default: the client's model.
            tools: The tools that the model may call, which are a part of the prompt.
            **params: Other parameters of the API that change the prompt, such as `chat_template_kwargs`; and
                `timeout`, `max_retries`, `extra_headers`, `extra_query` and `extra_body` of this call. An attempt may
                take 10 s at most.

        Raises:
            LLMValidationError: An argument is not valid; nothing was sent.
            LLMError: The same errors as `chat_completion`. If the server cannot count, that is not an error.
        """
        from lmbridge.client.token_count import count_tokens

        check_messages(messages)
        body: dict[str, Any] = {"messages": messages}
        if tools:
            body["tools"] = tools
        server, body = self._prepare(body, params, model)
        return await count_tokens(server, body)
