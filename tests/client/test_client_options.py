"""The options of a client that concern its connection: headers, authentication, proxies, sockets, exact URLs."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest

from lmbridge import LLMAuthenticationError, LLMClient, LLMClientPool, LLMError, LLMValidationError
from lmbridge.testing import ScriptedServer, answer, reply
from tests.support import MESSAGES

BASIC = f"Basic {base64.b64encode(b'me:s3cret word').decode()}"


async def test_the_headers_of_a_client_are_sent_with_every_request(scripted_server: ScriptedServer) -> None:
    headers = {"X-Tenant": "acme", "authorization": "Token s3cret"}
    async with LLMClient(scripted_server.api_base, headers=headers, api_key="key-1") as client:
        await client.chat_completion(MESSAGES)
        await client.list_models()
        await client.chat_completion(MESSAGES, extra_headers={"x-tenant": "other"})
    assert [request.headers["x-tenant"] for request in scripted_server.requests] == ["acme", "acme", "other"]
    assert {request.headers["authorization"] for request in scripted_server.requests} == {"Token s3cret"}
    assert scripted_server.requests[0].headers["content-type"] == "application/json"


async def test_auth_is_sent_as_basic_authentication(scripted_server: ScriptedServer) -> None:
    in_url = scripted_server.api_base.replace("http://", "http://me:s3cret%20word@")
    for client in (LLMClient(scripted_server.api_base, auth=("me", "s3cret word")), LLMClient(in_url)):
        async with client:
            await client.chat_completion(MESSAGES)
            assert client.api_base == scripted_server.api_base
            assert "s3cret" not in repr(client)
    assert [request.headers["authorization"] for request in scripted_server.requests] == [BASIC, BASIC]


async def test_auth_replaces_the_key_of_the_environment(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LM_API_TOKEN", "key-of-the-environment")
    async with LLMClient(scripted_server.api_base, auth=("me", "s3cret word")) as client:
        await client.chat_completion(MESSAGES)
    assert scripted_server.requests[0].headers["authorization"] == BASIC


async def test_secrets_of_the_client_are_in_no_error(scripted_server: ScriptedServer) -> None:
    scripted_server.script(reply(401, {"error": {"message": "no: s3cret word, tenant-17"}}))
    options: Any = {"auth": ("me", "s3cret word"), "headers": {"X-Tenant": "tenant-17"}}
    async with LLMClient(scripted_server.api_base, **options) as client:
        with pytest.raises(LLMAuthenticationError) as caught:
            await client.chat_completion(MESSAGES)
    shown = f"{caught.value} {caught.value!r} {caught.value.body}"
    assert "s3cret" not in shown
    assert "tenant-17" not in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"auth": ("me", "pw"), "api_key": "key-1"}, "auth and api_key cannot be combined"),
        (
            {"api_base": "http://me:pw@box", "auth": ("me", "pw")},
            "auth and the credentials in api_base cannot",
        ),
        ({"auth": "me:s3cret"}, "auth must be a tuple of two strings"),
        ({"auth": ("me:s3cret", "")}, "the user in auth contains a colon"),
        ({"headers": {"X": "s3cret\n"}}, "headers['X'] must be printable ASCII"),
        ({"proxy": "box:3128"}, "proxy must be the URL of an HTTP proxy"),
        (
            {"api_base": "unix:///run/llm.sock", "proxy": "http://box"},
            "a Unix socket cannot be reached",
        ),
        ({"api_base": "unix://run/llm.sock"}, "api_base 'unix://run/llm.sock' does not name a Unix socket"),
        ({"api_base": "http://a", "base_url": "http://b"}, "api_base and base_url are two names of one option"),
    ],
)
@pytest.mark.parametrize("owner", [LLMClient, LLMClientPool])
def test_options_that_do_not_fit_are_refused(owner: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        owner(**options)
    assert str(caught.value).startswith(message)
    assert "s3cret" not in repr(caught.value)


def test_base_url_is_another_name_of_api_base() -> None:
    assert LLMClient(base_url="http://box:8080").api_base == "http://box:8080/v1"


async def test_a_url_with_a_hash_at_its_end_is_used_as_it_is(scripted_server: ScriptedServer) -> None:
    scripted_server.on_path("/openai/chat/completions", answer("Hello"))
    scripted_server.on_path("/openai/models", reply(200, {"data": [{"id": "m"}]}))
    async with LLMClient(f"{scripted_server.origin}/openai#") as client:
        await client.chat_completion(MESSAGES)
        assert await client.list_models() == ["m"]
        assert client.api_base == f"{scripted_server.origin}/openai#"
    assert scripted_server.requests[0].path == "/openai/chat/completions"


async def test_requests_go_through_the_proxy() -> None:
    async with ScriptedServer() as proxy:
        proxy.on_path("http://llm.test:1234/v1/chat/completions", answer("Hello"))
        address = proxy.origin.replace("http://", "http://me:pa55word@")
        async with LLMClient("http://llm.test:1234", proxy=address) as client:
            await client.chat_completion(MESSAGES)
        (request,) = proxy.requests
        assert request.headers["host"] == "llm.test:1234"
        assert request.headers["proxy-authorization"] == f"Basic {base64.b64encode(b'me:pa55word').decode()}"


async def test_a_unix_socket_is_a_server(tmp_path: Path) -> None:
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        heads.append(head)
        body = b'{"data": [{"id": "m"}]}'
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (len(body), body)
        )
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    path = tmp_path / "llm.sock"
    async with await asyncio.start_unix_server(serve, path), LLMClient(f"unix://{path}") as client:
        assert await client.list_models() == ["m"]
        assert client.api_base == f"unix://{path}"
    assert heads[0].startswith(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n")


async def test_a_unix_socket_that_does_not_exist_is_an_error_with_its_path(tmp_path: Path) -> None:
    async with LLMClient(f"unix://{tmp_path}/none.sock", max_retries=0) as client:
        with pytest.raises(LLMError, match=r"none\.sock"):
            await client.list_models()
