"""Plain chat completions, the checks of arguments and options, model lists and health checks."""

from __future__ import annotations

import logging
import ssl
from typing import Any

import pytest

from lmbridge import (
    Limits,
    LLMClient,
    LLMError,
    LLMResponseError,
    LLMValidationError,
    ModelLoadError,
    ModelMismatchError,
    Timeouts,
    Transport,
    collect,
)
from lmbridge.testing import ScriptedServer, answer, reply
from tests.support import MESSAGES


async def test_the_reply_is_the_dict_that_the_server_sent(scripted_server: ScriptedServer, client: LLMClient) -> None:
    sent = {"choices": [{"message": {"content": "Hi", "odd": [1]}}], "model": "test-model", "strange": {"a": None}}
    scripted_server.script(reply(200, sent))
    assert await client.chat_completion(MESSAGES) == sent


async def test_nothing_is_added_to_a_request(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base) as client:
        await client.chat_completion(MESSAGES)
        await client.chat_completion(MESSAGES, model="m", temperature=0, stop=None, anything={"x": [1]})
        await collect(await client.chat_completion(MESSAGES, stream=True))
    assert [request.json for request in scripted_server.requests] == [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "model": "m", "temperature": 0, "stop": None, "anything": {"x": [1]}},
        {"messages": MESSAGES, "stream": True},
    ]
    assert scripted_server.requests[0].path == "/v1/chat/completions"
    assert scripted_server.requests[0].headers["content-type"] == "application/json"


async def test_defaults_come_from_the_environment(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMBRIDGE_API_BASE", scripted_server.origin)
    monkeypatch.setenv("DEFAULT_MODEL", "from-environment")
    monkeypatch.setenv("LM_API_TOKEN", "secret-token")
    async with LLMClient() as client:
        assert client.model == "from-environment"
        await client.chat_completion(MESSAGES)
        await client.chat_completion(MESSAGES, model="explicit")
    first, second = scripted_server.requests
    assert (first.json["model"], second.json["model"]) == ("from-environment", "explicit")
    assert first.headers["authorization"] == "Bearer secret-token"


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_v1_is_added_to_a_base_url(scripted_server: ScriptedServer, suffix: str) -> None:
    async with LLMClient(scripted_server.origin + suffix) as client:
        await client.chat_completion(MESSAGES)
        assert client.api_base == scripted_server.api_base


BAD_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages must be a list of messages, not None; for example"),
    ({"messages": []}, "messages is empty"),
    ({"messages": "Hello"}, "messages must be a list of messages, not str"),
    ({"messages": ["Hello"]}, r"messages\[0\] must be a dict, not str"),
    ({"messages": [{"content": "Hello"}]}, r"messages\[0\] has no role; add 'role'"),
    ({"messages": [{"role": "user", "content": b"Hello"}]}, r"messages\[0\]\.content must be .*, not bytes"),
    ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]\.content must be .*, not int"),
    ({"messages": [{"role": "user", "content": [{"x": object()}]}]}, r"messages\[0\]\.content\[0\]\.x"),
    ({"messages": MESSAGES, "seed": object()}, "seed is of type object, which cannot be sent as JSON"),
    ({"messages": MESSAGES, "temperature": float("nan")}, "temperature is nan"),
    ({"messages": MESSAGES, "stop": "\ud83d"}, "stop cannot be sent as JSON: it has half"),
    ({"messages": MESSAGES, "model": ""}, r"model must be the name of a model or None, not ''; list_models\(\)"),
    ({"messages": MESSAGES, "model": 7}, "model must be .*, not 7"),
]


@pytest.mark.parametrize(("arguments", "expected_text"), BAD_REQUESTS)
@pytest.mark.parametrize("stream", [True, False])
async def test_bad_input_is_refused_before_anything_is_sent(
    scripted_server: ScriptedServer, client: LLMClient, arguments: dict[str, Any], expected_text: str, stream: bool
) -> None:
    with pytest.raises(LLMValidationError, match=expected_text) as caught:
        await client.chat_completion(**arguments, stream=stream)
    assert isinstance(caught.value, ValueError)
    assert scripted_server.connections == 0


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"api_base": "localhost:1234"}, "is not an http or https URL; write it like 'http://127.0.0.1:1234/v1'"),
    ({"api_base": ""}, "api_base must be a URL, not ''"),
    ({"api_base": 7}, "api_base must be a URL, not 7"),
    ({"api_base": "http://two words"}, "api_base must be a URL, not 'http://two words'"),
    ({"api_base": "ftp://x"}, "is not an http or https URL"),
    ({"api_base": "http://x:99999"}, "is not a valid URL"),
    ({"model": " "}, "model must be .*, not ' '"),
    ({"api_key": "two words"}, "api_key must be printable ASCII"),
    ({"api_key": "new\nline"}, "api_key must be printable ASCII"),
    ({"timeout": "5"}, "timeout must be a positive number of seconds, an instance of Timeouts, or None, not '5'"),
    ({"max_retries": -1}, "max_retries must be an integer of at least 0, not -1"),
    ({"max_retries": 1.5}, "max_retries must be .*, not 1.5"),
    ({"limits": 5}, "limits must be an instance of Limits or None, not 5"),
    ({"model_mismatch": "explode"}, "model_mismatch must be 'warn', 'raise' or 'ignore', not 'explode'"),
    ({"ssl": False}, "ssl must be an instance of SSLContext or None, not False"),
    ({"transport": Transport("http://x"), "api_base": ""}, "api_base cannot be combined with transport="),
    ({"transport": Transport("http://x"), "limits": Limits(), "api_key": "sk-1"}, "api_key and limits cannot be"),
]


@pytest.mark.parametrize(("options", "expected_text"), BAD_OPTIONS)
def test_an_invalid_option_is_refused_when_the_client_is_created(options: dict[str, Any], expected_text: str) -> None:
    with pytest.raises(LLMValidationError, match=expected_text) as caught:
        LLMClient(**options)
    # Even a key that is not valid is a secret.
    assert "api_key" not in options or options["api_key"] not in str(caught.value)


def test_a_negative_timeout_is_refused_when_it_is_created() -> None:
    with pytest.raises(
        LLMValidationError, match=r"Timeouts\.idle must be a positive number of seconds or None, not -1"
    ):
        Timeouts(idle=-1)


def test_valid_options_are_accepted() -> None:
    context = ssl.create_default_context()
    client = LLMClient("https://x", "m", "key", ssl=context, trust_env=True, max_retries=0, model_mismatch="raise")
    assert client.api_base == "https://x/v1"
    assert "key" not in repr(client)


@pytest.mark.parametrize(
    "body", [{}, {"choices": []}, {"choices": [{}]}, {"choices": [None]}, {"choices": {"a": 1}}, {"choices": "x"}, []]
)
async def test_a_reply_that_is_not_a_completion_raises(
    scripted_server: ScriptedServer, client: LLMClient, body: Any
) -> None:
    scripted_server.script(reply(200, body))
    with pytest.raises(LLMResponseError) as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.status == 200
    assert caught.value.body is not None


@pytest.mark.parametrize("body", ["Model unloaded.", '"Model unloaded."'])
async def test_bare_text_in_place_of_a_reply_raises_the_error_that_it_describes(
    scripted_server: ScriptedServer, client: LLMClient, body: str
) -> None:
    scripted_server.script(reply(200, body))
    with pytest.raises(ModelLoadError):
        await client.chat_completion(MESSAGES)


async def test_a_byte_order_mark_before_a_reply_is_accepted(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(reply(200, b'\xef\xbb\xbf{"choices": [{"message": {"content": "Hi"}}]}'))
    assert (await client.chat_completion(MESSAGES))["choices"][0]["message"]["content"] == "Hi"


# Answers of another model


async def test_a_mismatch_is_logged_once_for_each_pair_of_models(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.default = answer("x", model="other")
    with caplog.at_level(logging.WARNING, "lmbridge"):
        for _ in range(3):
            await client.chat_completion(MESSAGES)
            await collect(await client.chat_completion(MESSAGES, stream=True))
        await client.chat_completion(MESSAGES, model="third")
    assert len(caplog.records) == 2
    assert "asked for model 'test-model', but 'other' answered" in caplog.text


async def test_a_mismatch_can_raise(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("x", model="other")
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="raise") as client:
        with pytest.raises(ModelMismatchError) as plain:
            await client.chat_completion(MESSAGES)
        stream = await client.chat_completion(MESSAGES, stream=True)
        with pytest.raises(ModelMismatchError) as streamed:
            await anext(stream)
        assert client._server.transport.in_flight == 0
    for caught in (plain, streamed):
        assert (caught.value.asked, caught.value.served) == ("test-model", "other")
        assert caught.value.status == 200
        assert scripted_server.api_base in str(caught.value)
    # The answer is not lost.
    assert plain.value.partial["choices"][0]["message"]["content"] == "x"


@pytest.mark.parametrize("served", ["test-model", "test-model:2", "test-model@q4_k_m", None])
async def test_an_instance_or_a_quantization_counts_as_the_same_model(
    scripted_server: ScriptedServer, served: str | None
) -> None:
    scripted_server.default = reply(200, {"choices": [{"message": {"content": "x"}}], "model": served})
    async with LLMClient(scripted_server.api_base, "test-model", model_mismatch="raise") as client:
        await client.chat_completion(MESSAGES)


# Model lists and health checks


async def test_models_are_listed_by_id(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.models = ["a", "b:2", "c@q4"]
    assert await client.list_models() == ["a", "b:2", "c@q4"]


@pytest.mark.parametrize(
    "body", [{}, {"data": 5}, {"data": "x"}, {"data": [1]}, {"data": [{}]}, {"models": []}, [], "x"]
)
async def test_a_malformed_list_of_models_raises(scripted_server: ScriptedServer, client: LLMClient, body: Any) -> None:
    scripted_server.on_path("/v1/models", reply(200, body))
    with pytest.raises(LLMResponseError, match="something that is n"):
        await client.list_models()


async def test_the_list_of_an_ollama_without_models_is_empty(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.on_path("/v1/models", reply(200, {"object": "list", "data": None}))
    assert await client.list_models() == []


async def test_a_server_that_lists_models_is_healthy(client: LLMClient) -> None:
    assert await client.health_check() is True


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_a_server_that_loads_or_fails_is_not_healthy(
    scripted_server: ScriptedServer, client: LLMClient, status: int
) -> None:
    scripted_server.on_path("/v1/models", reply(status, {"error": {"message": "Loading model"}}))
    assert await client.health_check() is False
    assert len(scripted_server.requests) == 1  # it neither retries nor polls


async def test_a_server_that_is_not_there_is_not_healthy() -> None:
    async with ScriptedServer() as gone:
        pass
    async with LLMClient(gone.api_base) as client:
        assert await client.health_check() is False


@pytest.mark.parametrize(
    ("status", "body"), [(401, {"error": "no"}), (404, {"error": "what?"}), (200, {"error": "Unexpected endpoint"})]
)
async def test_the_health_check_raises_if_something_else_answers(
    scripted_server: ScriptedServer, client: LLMClient, status: int, body: dict[str, str]
) -> None:
    scripted_server.on_path("/v1/models", reply(status, body))
    with pytest.raises(LLMError):
        await client.health_check()
