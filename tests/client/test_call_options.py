"""Options of a single call, and clients that `with_options` derives."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import logging
from typing import Any

import pytest

from lmbridge import (
    LLMAuthenticationError,
    LLMClient,
    LLMClientPool,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
    ModelMismatchError,
    Timeouts,
    collect,
)
from lmbridge.client import call_options, params
from lmbridge.client.params import _warn_about
from lmbridge.config import as_timeouts
from lmbridge.testing import MockRequest, MockResponse, MockTransport, ScriptedServer, answer, stall
from tests.support import MESSAGES, piece

CHAT = {"choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}]}
REPLIES: dict[str, Any] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"choices": [{"index": 0, "text": "Hello", "finish_reason": "stop"}]},
    "/v1/embeddings": {"data": [{"index": 0, "embedding": [1.0]}]},
    "/v1/responses": {"output": []},
    "/v1/models": {"data": [{"id": "m"}]},
}
SECRET = "s3cret-value/1"


def handler(request: MockRequest) -> Any:
    return REPLIES[request.path]


CALLS: dict[str, Any] = {
    "chat_completion": lambda client, **options: client.chat_completion(MESSAGES, **options),
    "text_completion": lambda client, **options: client.text_completion("Hello", **options),
    "embeddings": lambda client, **options: client.embeddings("Hello", **options),
    "create_response": lambda client, **options: client.create_response("Hello", **options),
    "list_models": lambda client, **options: client.list_models(**options),
    "health_check": lambda client, **options: client.health_check(**options),
}
GENERATIONS = ("chat_completion", "text_completion", "embeddings", "create_response")


@dataclasses.dataclass
class Person:
    name: str
    age: int


# Headers, query and body


@pytest.mark.parametrize("method", CALLS)
async def test_every_call_takes_headers_and_query_parameters(method: str) -> None:
    transport = MockTransport(handler)
    client = LLMClient(transport=transport)
    await CALLS[method](client, extra_headers={"X-Api-Key": SECRET}, extra_query={"v": 1, "all": True, "no": None})
    (request,) = transport.requests
    assert request.headers["x-api-key"] == SECRET
    assert request.url.partition("?")[2] == "v=1&all=true"
    assert SECRET.encode() not in request.body


@pytest.mark.parametrize("method", GENERATIONS)
async def test_extra_body_is_merged_into_the_json_last(method: str) -> None:
    transport = MockTransport(handler)
    client = LLMClient(transport=transport, model="m")
    await CALLS[method](client, temperature=1, extra_body={"temperature": 0, "model": "other", "grammar": "root"})
    (request,) = transport.requests
    assert request.json["temperature"] == 0
    assert (request.json["model"], request.json["grammar"]) == ("other", "root")
    assert "extra_body" not in request.json
    assert "other" in client.stats().by_model


async def test_extra_headers_replace_headers_of_lmbridge_in_any_case() -> None:
    transport = MockTransport(handler, api_key="key-of-the-client")
    client = LLMClient(transport=transport)
    await client.chat_completion(MESSAGES, extra_headers={"authorization": "Bearer other", "USER-AGENT": "mine"})
    assert transport.requests[0].headers["Authorization"] == "Bearer other"
    names = [name.lower() for name in transport.requests[0].headers]
    assert names.count("authorization") == names.count("user-agent") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_secrets_in_extra_headers_are_in_no_error_log_or_repr(
    stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    transport = MockTransport(
        lambda request: MockResponse(status=401, json={"error": {"message": f"no such key: {SECRET}"}})
    )
    client = LLMClient(transport=transport)
    with pytest.raises(LLMAuthenticationError) as caught:
        await client.chat_completion(
            MESSAGES, stream=stream, extra_headers={"Authorization": f"Bearer {SECRET}"}, extra_query={"k": SECRET}
        )
    error = caught.value
    shown = f"{error} {error!r} {error.body} {error.context} {error.__cause__!r} {caplog.text} {transport.requests!r}"
    assert SECRET not in shown.replace(f"?k={SECRET.replace('/', '%2F')}", "")
    assert "[header]" in str(error)


async def test_secrets_in_the_headers_of_a_derived_client_are_in_no_error_of_a_stream() -> None:
    def break_off(request: MockRequest) -> Any:
        return [piece("Hel"), {"error": {"message": f"key {SECRET} was revoked"}}]

    client = LLMClient(transport=MockTransport(break_off)).with_options(extra_headers={"X-Key": SECRET})
    with pytest.raises(LLMError) as caught:
        await collect(await client.chat_completion(MESSAGES, stream=True))
    assert SECRET not in f"{caught.value} {caught.value!r} {caught.value.body}"
    assert SECRET not in repr(client)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"extra_headers": "X: 1"}, "extra_headers must be a dict of headers, not str"),
        ({"extra_headers": {"X Y": "1"}}, "extra_headers has a name that is not valid in HTTP"),
        ({"extra_headers": {"X": 1}}, "extra_headers['X'] must be a string, not int"),
        ({"extra_headers": {"X": "secret\r\nEvil: 1"}}, "extra_headers['X'] must be printable ASCII"),
        ({"extra_headers": {"Content-Length": "1"}}, "extra_headers['Content-Length'] is set by HTTP itself"),
        ({"extra_query": "a=1"}, "extra_query must be a dict of query parameters, not str"),
        ({"extra_query": {"a": {}}}, "extra_query['a'] must be a string, a number, a boolean or a list of these"),
        ({"extra_body": [1]}, "extra_body must be a dict of JSON fields, not list"),
        ({"extra_body": {"stream": True}}, "extra_body must not contain stream; pass stream= to the call"),
        ({"max_retries": -1}, "max_retries must be an integer of at least 0, not -1"),
        ({"timeout": 0}, "timeout must be a positive number of seconds, an instance of Timeouts, or None, not 0"),
        ({"timeout": "5"}, "timeout must be a positive number of seconds, an instance of Timeouts, or None, not '5'"),
    ],
)
async def test_an_invalid_option_is_refused_before_anything_is_sent(options: dict[str, Any], message: str) -> None:
    transport = MockTransport(handler)
    with pytest.raises(LLMValidationError) as caught:
        await LLMClient(transport=transport).chat_completion(MESSAGES, **options)
    assert str(caught.value).startswith(message)
    assert "secret" not in str(caught.value)
    assert transport.requests == []


# Options of other libraries


@pytest.mark.parametrize("method", GENERATIONS)
@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("api_key", "LLMClient(api_key="),
        ("api_base", "LLMClient(api_base="),
        ("base_url", "LLMClient(api_base="),
        ("default_headers", "extra_headers="),
        ("headers", "extra_headers="),
        ("http_client", "LLMClient(transport="),
        ("organization", "extra_headers="),
        ("request_timeout", "timeout="),
        ("num_retries", "max_retries="),
    ],
)
async def test_an_option_of_another_library_is_refused_with_the_right_name(method: str, name: str, ours: str) -> None:
    transport = MockTransport(handler)
    with pytest.raises(LLMValidationError) as caught:
        await CALLS[method](LLMClient(transport=transport), **{name: SECRET})
    assert str(caught.value).startswith(f"{name} is not a parameter of a request; ")
    assert ours in str(caught.value)
    assert SECRET not in repr(caught.value)
    assert transport.requests == []


async def test_other_unknown_keywords_are_sent_unchanged() -> None:
    transport = MockTransport(handler)
    await LLMClient(transport=transport).chat_completion(MESSAGES, top_k=40, min_p=0.1, cache_prompt=True, stop=None)
    sent = {"messages": MESSAGES, "top_k": 40, "min_p": 0.1, "cache_prompt": True, "stop": None}
    assert transport.requests[0].json == sent


async def test_a_list_of_models_takes_no_parameters() -> None:
    client = LLMClient(transport=MockTransport(handler))
    with pytest.raises(TypeError, match=r"list_models\(\) got an unexpected keyword argument 'temperature'"):
        await client.list_models(temperature=1)  # type: ignore[call-arg]  # not an option
    with pytest.raises(TypeError, match="max_retries"):
        await client.health_check(max_retries=1)


# Timeouts and retries


def test_a_number_of_seconds_stands_for_the_limit_of_each_wait() -> None:
    assert as_timeouts(30) == Timeouts(connect=5, first_byte=30, idle=30)
    assert as_timeouts(0.5) == Timeouts(connect=0.5, first_byte=0.5, idle=0.5)
    assert as_timeouts(None) == Timeouts(connect=None, load=None, first_byte=None, idle=None, total=None)
    assert as_timeouts(Timeouts(idle=1)) == Timeouts(idle=1)


@pytest.mark.parametrize("method", ["chat_completion", "list_models"])
async def test_the_timeout_of_a_call_replaces_that_of_the_client(method: str) -> None:
    async def never(request: MockRequest) -> Any:
        await asyncio.Event().wait()

    async with LLMClient(transport=MockTransport(never), timeout=Timeouts(first_byte=500)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await CALLS[method](client, timeout=0.05, max_retries=0)
    assert caught.value.phase == "first_byte"
    assert "0.05" in str(caught.value)


async def test_a_client_takes_a_number_of_seconds(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall([]))
    async with LLMClient(scripted_server.api_base, timeout=0.05) as client:
        with pytest.raises(LLMTimeoutError):
            await client.chat_completion(MESSAGES)


@pytest.mark.usefixtures("no_waits")
async def test_the_retries_of_a_call_replace_those_of_the_client() -> None:
    transport = MockTransport(lambda request: MockResponse(status=503, body="busy"))
    client = LLMClient(transport=transport, max_retries=5)
    for retries in (0, 1):
        with pytest.raises(LLMResponseError):
            await client.chat_completion(MESSAGES, max_retries=retries)
    assert len(transport.requests) == 1 + 2


async def test_parse_takes_the_options_of_a_call(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer('{"name": "Ada", "age": 36}'))
    person = await client.parse(MESSAGES, Person, temperature=0, extra_headers={"X-Trace": "abc1"}, timeout=20)
    assert person.name == "Ada"
    assert scripted_server.requests[0].headers["x-trace"] == "abc1"


# Derived clients


async def test_a_derived_client_shares_the_transport_and_has_its_own_options() -> None:
    transport = MockTransport(handler)
    client = LLMClient(transport=transport, model="a")
    derived = client.with_options(model="b", timeout=7, max_retries=0, extra_headers={"X-One": "1"})
    again = derived.with_options(extra_headers={"x-two": "2"})
    for each in (client, derived, again):
        await each.chat_completion(MESSAGES)
    assert [request.json.get("model") for request in transport.requests] == ["a", "b", "b"]
    assert ["x-one" in request.headers for request in transport.requests] == [False, True, True]
    assert ["x-two" in request.headers for request in transport.requests] == [False, False, True]
    assert set(client.stats().by_model) == set(again.stats().by_model) == {"a", "b"}


async def test_closing_a_derived_client_closes_nothing(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base) as client:
        async with client.with_options(timeout=9) as derived:
            stream = await client.chat_completion(MESSAGES, stream=True)
            await derived.list_models()
        assert (await collect(stream))["choices"]
    with pytest.raises(LLMValidationError, match="api_base cannot be set"):
        derived.api_base = "http://127.0.0.1:9"


async def test_a_derived_client_follows_its_client_to_another_server(scripted_server: ScriptedServer) -> None:
    async with LLMClient("http://127.0.0.1:9") as client:
        derived = client.with_options(max_retries=0)
        client.api_base = scripted_server.api_base
        assert derived.api_base == scripted_server.api_base
        await derived.chat_completion(MESSAGES)


async def test_a_derived_client_has_its_own_policy_for_mismatches() -> None:
    transport = MockTransport(lambda request: {**CHAT, "model": "other"})
    client = LLMClient(transport=transport, model="m", model_mismatch="ignore")
    await client.chat_completion(MESSAGES)
    with pytest.raises(ModelMismatchError):
        await client.with_options(model_mismatch="raise").chat_completion(MESSAGES)


async def test_a_client_derived_from_one_of_a_pool_ends_with_it() -> None:
    async with LLMClientPool(transport=MockTransport(handler)) as pool:
        async with pool.client("m") as client:
            derived = client.with_options(timeout=9)
            await derived.chat_completion(MESSAGES)
        with pytest.raises(LLMError, match="given back"):
            await derived.chat_completion(MESSAGES, timeout=3)


# What an editor and a notebook show


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("temprature", "did you mean 'temperature'?"),
        ("max_token", "did you mean 'max_tokens'?"),
        ("timeot", "did you mean 'timeout'?"),
        ("system", "a system prompt is a message"),
    ],
)
async def test_a_parameter_that_looks_like_a_mistake_is_sent_with_one_warning(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture, name: str, hint: str
) -> None:
    _warn_about.cache_clear()
    for _ in range(2):
        parameter: dict[str, Any] = {name: 1}
        await client.chat_completion(MESSAGES, stream=False, **parameter)
        assert scripted_server.requests[-1].json[name] == 1
    assert caplog.text.count(hint) == 1


@pytest.mark.parametrize("name", ["top_k", "min_p", "top_a", "repeat_penalty", "cache_prompt", "id_slot", "n_probs"])
async def test_a_parameter_of_a_server_gives_no_warning(
    client: LLMClient, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    _warn_about.cache_clear()
    parameter: dict[str, Any] = {name: 1}
    await client.chat_completion(MESSAGES, stream=False, **parameter)
    assert "is sent to the server unchanged" not in caplog.text


@pytest.mark.parametrize("method", ["chat_completion", "parse"])
def test_the_signature_shows_the_parameters(method: str) -> None:
    shown = inspect.signature(getattr(LLMClient, method)).parameters
    expected = {
        *("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "n", "tools", "tool_choice"),
        *("parallel_tool_calls", "response_format", "logprobs", "top_logprobs", "presence_penalty"),
        *("frequency_penalty", "reasoning_effort", "stream_options"),
        *("timeout", "max_retries", "extra_headers", "extra_query", "extra_body"),
    }
    assert expected <= set(shown)
    assert shown["params"].kind is inspect.Parameter.VAR_KEYWORD


def test_each_parameter_is_documented() -> None:
    for module in (params, call_options):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Params", "Options")):
                for field, text in zip(node.body[1::2], node.body[2::2], strict=True):
                    assert isinstance(field, ast.AnnAssign)
                    assert isinstance(text, ast.Expr)
