"""Keys: they are sent, and never shown."""

from __future__ import annotations

import json
import logging
import pickle
import traceback

import pytest

from lmbridge import (
    LLMAuthenticationError,
    LLMClient,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    Timeouts,
)
from lmbridge.testing import Behaviour, ScriptedServer, hang_up, raw, reply, reset, sse
from lmbridge.transport.headers import secret_pattern
from tests.support import MESSAGES, piece
from tests.transport.support import ask


async def test_a_key_in_the_reply_of_a_loading_server_is_not_shown(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    scripted_server.default = reply(503, {"error": "Loading model for sk-secret-1"})
    timeouts = Timeouts(load=0.05)
    async with LLMClient(scripted_server.api_base, api_key="sk-secret-1", timeout=timeouts) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.body == '{"error":"Loading model for [api_key]"}'


async def test_a_very_short_key_is_not_replaced_in_errors(scripted_server: ScriptedServer) -> None:
    scripted_server.script(reply(400, {"error": "no such thing"}))
    async with LLMClient(scripted_server.api_base, api_key="no") as client:
        with pytest.raises(LLMResponseError, match="no such thing"):
            await client.chat_completion(MESSAGES)


@pytest.mark.parametrize("key", ["ab", "x", "1+"])
@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: {}.",
        "Incorrect API key: {}",
        "invalid key '{}'",
        'invalid key "{}"',
        "api_key={}",
        "Authorization: Bearer {}",
        "the key {}, which is not known",
    ],
)
async def test_a_very_short_key_is_not_shown_where_it_looks_like_one(
    scripted_server: ScriptedServer, key: str, text: str
) -> None:
    scripted_server.script(reply(400, {"error": text.format(key)}))
    async with LLMClient(scripted_server.api_base, api_key=key) as client:
        with pytest.raises(LLMResponseError) as caught:
            await client.chat_completion(MESSAGES)
    assert text.format("[api_key]") in caught.value.message
    assert json.dumps(text.format("[api_key]")) in (caught.value.body or "")


@pytest.mark.parametrize(
    ("key", "behaviour"),
    [
        ("sk+a/secret", reply(401, rb'{"error": "Incorrect API key: sk\u002Ba\/secret"}')),
        ("sk-a-secret", raw(b"sk-a-secret\r\n\r\n")),
        ("sk-a-secret", raw(b"HTTP/1.1 200 OK\r\nsk-a-secret\r\n\r\n")),
    ],
)
async def test_a_key_that_is_repeated_in_another_notation_is_not_shown(
    scripted_server: ScriptedServer, key: str, behaviour: Behaviour
) -> None:
    scripted_server.script(behaviour)
    async with LLMClient(scripted_server.api_base, api_key=key, max_retries=0) as client:
        with pytest.raises(LLMError) as caught:
            await client.chat_completion(MESSAGES)
    assert "secret" not in f"{caught.value} {vars(caught.value)} {caught.value.__cause__!r}"
    assert b"secret" not in pickle.dumps(caught.value)
    assert "[api_key]" in str(caught.value)


@pytest.mark.parametrize("target", ["http://other/#token=secret", "http://user:p@secret@other/v1"])
async def test_the_secret_parts_of_a_redirect_target_are_not_shown(
    scripted_server: ScriptedServer, target: str
) -> None:
    scripted_server.script(reply(307, b"", {"Location": target}))
    async with LLMClient(scripted_server.api_base) as client:
        with pytest.raises(LLMResponseError, match="http://other/") as caught:
            await client.chat_completion(MESSAGES)
    assert "secret" not in str(caught.value)


async def test_a_key_is_never_shown(scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    key = "sk-lm-very-secret"
    error_body = {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_api_key"}}
    async with LLMClient(scripted_server.api_base, api_key=key, max_retries=0) as client:
        with caplog.at_level(logging.DEBUG):
            for behaviour in (
                reply(401, error_body),
                reply(200, error_body),
                reply(200, {"echo": key}),
                sse(error_body),
                sse(f"data: nonsense {key}\n\n"),
                sse(piece(choices=key)),
                sse(piece("a"), f"proxy error: {key}"),
                raw(b"no HTTP\r\n\r\n"),
                hang_up(),
                reset(),
            ):
                for stream in (True, False):
                    scripted_server.script(behaviour)
                    with pytest.raises(LLMError) as caught:
                        await ask(client, stream)
                    error = caught.value
                    shown = [str(error), repr(error), repr(vars(error)), repr(error.__cause__), repr(error.__context__)]
                    shown += traceback.format_exception(error)
                    assert key not in "".join(shown)
                    assert key.encode() not in pickle.dumps(error)
        assert key not in repr(client)
    assert key not in caplog.text
    assert scripted_server.requests[0].headers["authorization"] == f"Bearer {key}"


async def test_a_refused_key_is_an_authentication_error(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(reply(401, {"error": {"message": "Invalid API Key", "type": "authentication_error"}}))
    with pytest.raises(LLMAuthenticationError, match="pass api_key=, or set LM_API_TOKEN"):
        await client.chat_completion(MESSAGES)


@pytest.mark.parametrize(
    "secret",
    ["\u043f\u0430\u0440\u043e\u043b\u044c1", "pass\u20ac", "key\U0001f600", "a\tbcd", "k\u00fc1", '"a\\b"'],
)
def test_a_secret_is_found_in_json_whatever_its_characters_are(secret: str) -> None:
    pattern = secret_pattern([secret])
    assert pattern is not None
    escaped = json.dumps(f"key={secret}")
    for text in (f"key={secret}", escaped, json.dumps(f"key={secret}", ensure_ascii=False)):
        assert pattern.search(text), text
    units = secret.encode("utf-16-be").hex().upper()
    assert pattern.search("=" + "".join(rf"\u{units[at : at + 4]}" for at in range(0, len(units), 4)))
