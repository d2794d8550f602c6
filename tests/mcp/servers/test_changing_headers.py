"""Headers of servers on HTTP that a function or a command gives, and tokens of OAuth."""

from __future__ import annotations

import asyncio
import base64
import inspect
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from aiohttp import web

from lmbridge import DynamicAutonomousAgent, LLMClient, LLMValidationError, MCPError, MultiMCPError, ToolError
from lmbridge.mcp import McpHub, load_config
from lmbridge.mcp.servers import guardian
from tests.mcp.conftest import MakeHub
from tests.mcp.http_server import HttpServer, body
from tests.mcp.support import function_of


class Guarded(HttpServer):
    """A server that accepts one token, and refuses everything else with 401."""

    def __init__(self) -> None:
        super().__init__()
        self.token = "first-token"
        self.challenge: dict[str, str] = {}
        self.before_refusal: Callable[[web.Request], Awaitable[None]] | None = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            self.requests.append(request)
            if self.before_refusal is not None:
                await self.before_refusal(request)
            sent = request.headers.get("Authorization")
            return body(401, {"error": f"{sent} is not valid"}, **self.challenge)
        return await super()._handle(request)


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Guarded]:
    server = Guarded()
    await server.start()
    yield server
    await server.stop()


class Tokens:
    """A function for the headers that counts how often it is called."""

    def __init__(self, server: Guarded) -> None:
        self.server = server
        self.calls = 0

    def __call__(self) -> Mapping[str, str]:
        self.calls += 1
        return {"Authorization": f"Bearer {self.server.token}"}

    async def later(self) -> Mapping[str, str]:
        return self()


@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_a_function_gives_the_headers_of_all_requests(make_hub: MakeHub, server: Guarded, kind: str) -> None:
    tokens = Tokens(server)
    hub = make_hub({"a": {"url": server.url}}, headers={"a": tokens if kind == "plain" else tokens.later})
    lease = await hub.tools()
    assert await function_of(lease, "echo")(text="on") == "on"
    await hub.close()
    assert tokens.calls == 1
    assert {request.headers["Authorization"] for request in server.requests} == {"Bearer first-token"}
    assert "DELETE" in server.methods


async def test_after_a_401_the_headers_are_fetched_once_and_the_call_is_made_again(
    make_hub: MakeHub, server: Guarded
) -> None:
    tokens = Tokens(server)
    hub = make_hub({"a": {"url": server.url}}, headers={"a": tokens})
    lease = await hub.tools()
    server.token = "second-token"
    calls = [function_of(lease, "echo")(text="on") for _ in range(5)]
    assert await asyncio.gather(*calls) == ["on"] * 5
    assert tokens.calls == 2
    assert hub.status()["a"].starts == 1


async def test_the_headers_are_fetched_once_for_a_connection_that_is_refused_and_again_for_the_next(
    make_hub: MakeHub, server: Guarded
) -> None:
    calls: list[str] = []

    def wrong() -> Mapping[str, str]:
        calls.append("called")
        return {"Authorization": "Bearer wrong-token"}

    hub = make_hub({"a": {"url": server.url}}, headers={"a": wrong})
    for number in (1, 2):
        with pytest.raises(MultiMCPError, match=r"401.*although they have just been fetched again") as caught:
            await hub.tools()
        assert len(calls) == 2 * number
        assert "wrong-token" not in str(caught.value)


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        (None, "must give the headers as a JSON object"),
        ({"A": 1}, "whose value is not a string"),
        ({"A b": "1"}, "whose name is not valid"),
        ({"A": "1\r\nB: 2"}, "not printable ASCII"),
        ({"Mcp-Session-Id": "1"}, "belongs to the protocol"),
    ],
)
async def test_headers_that_cannot_be_sent_are_an_error_of_the_server(
    make_hub: MakeHub, server: Guarded, headers: Any, words: str
) -> None:
    hub = make_hub({"a": {"url": server.url}}, headers={"a": lambda: headers})
    with pytest.raises(MultiMCPError, match=f"the function for its headers.*{words}"):
        await hub.tools()
    assert server.requests == []


async def test_an_exception_of_the_function_names_only_its_class(make_hub: MakeHub, server: Guarded) -> None:
    def fail() -> Mapping[str, str]:
        raise RuntimeError("Bearer secret-token expired")

    with pytest.raises(MultiMCPError, match="the function for its headers raised RuntimeError") as caught:
        await make_hub({"a": {"url": server.url}}, headers={"a": fail}).tools()
    assert "secret-token" not in str(caught.value)


async def test_a_function_that_takes_too_long_is_an_error(
    make_hub: MakeHub, server: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.changing_headers._HEADERS_TIMEOUT", 0.05)
    left = asyncio.Event()

    async def hang() -> Mapping[str, str]:
        try:
            await asyncio.Event().wait()
        finally:
            left.set()
        return {}

    with pytest.raises(MultiMCPError, match=r"did not end within 0\.05 seconds"):
        await make_hub({"a": {"url": server.url}}, headers={"a": hang}).tools()
    assert left.is_set()


@pytest.mark.parametrize(
    ("servers", "words"),
    [
        ({"b": {"url": "http://127.0.0.1:1/mcp"}}, "unknown MCP server 'a'"),
        ({"a": {"command": "x"}}, "is not on HTTP; leave it out of headers"),
        (
            {"a": {"url": "http://127.0.0.1:1/mcp", "headersHelper": "x"}},
            "has a headersHelper as well; give only one of the two",
        ),
    ],
)
async def test_a_function_for_no_server_on_http_is_an_error(
    make_hub: MakeHub, servers: dict[str, Any], words: str
) -> None:
    with pytest.raises(MCPError, match=words):
        await make_hub(servers, headers={"a": dict}).names()


def test_a_dict_of_headers_is_an_error_that_says_where_they_belong() -> None:
    with pytest.raises(LLMValidationError, match="headers"):
        McpHub("mcp.json", headers={"a": {"Authorization": "x"}})  # type: ignore[dict-item]  # on purpose
    with pytest.raises(LLMValidationError, match="configuration file"):
        McpHub("mcp.json", headers=[])  # type: ignore[arg-type]  # on purpose


async def test_an_agent_takes_the_functions_as_well(
    server: Guarded, config: Callable[[Mapping[str, Any]], Path], client: LLMClient
) -> None:
    path = config({"b": {"command": "x"}})
    async with DynamicAutonomousAgent(client, config_path=path, mcp_headers={"a": Tokens(server)}) as agent:
        with pytest.raises(MCPError, match="unknown MCP server 'a'"):
            await agent.list_available_mcps()


# Commands


def helper(server: Guarded, command: str, **entry: Any) -> dict[str, Any]:
    return {"a": {"url": server.url, "headersHelper": command, **entry}}


async def test_a_command_gives_the_headers_and_knows_for_which_server(
    make_hub: MakeHub, server: Guarded, tmp_path: Path
) -> None:
    # It is run in the folder of the file, with the whole environment, and its headers win.
    (tmp_path / "token").write_text("first-token")
    command = (
        'echo "$CLAUDE_CODE_MCP_SERVER_NAME $LMBRIDGE_MCP_SERVER_URL $HOME" > called; '
        'echo "{\\"Authorization\\": \\"Bearer $(cat token)\\"}"'
    )
    entry = helper(server, command, headers={"authorization": "Bearer old", "X-Kept": "yes"})
    lease = await make_hub(entry).tools()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert (tmp_path / "called").read_text().split() == ["a", server.url, str(tmp_path / "home")]
    assert server.requests[-1].headers["X-Kept"] == "yes"
    (tmp_path / "token").write_text("second-token")
    server.token = "second-token"
    assert await function_of(lease, "echo")(text="on") == "on"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("echo secret-output; exit 3", "ended with status 3"),
        ("echo secret-output", "did not write a JSON object"),
        ("echo '[\"secret-output\"]'", "must give the headers as a JSON object"),
        ("no-such-program-of-ours", "ended with status 127"),
        ("head -c 100000 /dev/zero", "wrote more than 65,536 bytes"),
    ],
)
async def test_a_command_that_fails_is_an_error_without_its_output(
    make_hub: MakeHub, server: Guarded, command: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(MultiMCPError, match=f"its headersHelper {words}.*run the command in a terminal") as caught:
        await make_hub(helper(server, command)).tools()
    assert "secret-output" not in str(caught.value) + caplog.text


async def test_a_command_that_hangs_is_ended_with_all_its_processes(
    make_hub: MakeHub, server: Guarded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.mcp.servers.changing_headers._HEADERS_TIMEOUT", 0.5)
    with pytest.raises(MultiMCPError, match=r"its headersHelper did not end within 0\.5 seconds"):
        await make_hub(helper(server, "sleep 600 & echo $! > pid; wait")).tools()
    pid = (tmp_path / "pid").read_text().strip()
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


async def test_a_command_that_cannot_be_guarded_is_ended(
    make_hub: MakeHub, server: Guarded, unguarded_groups: set[int]
) -> None:
    with pytest.raises(MultiMCPError, match=r"its headersHelper cannot be run: .* cannot be started: Resource.*ulimit"):
        await make_hub(helper(server, "sleep 600")).tools()
    assert unguarded_groups
    assert all([await asyncio.to_thread(guardian.is_gone, group) for group in unguarded_groups])


async def test_what_a_server_quotes_of_the_headers_is_in_no_error(make_hub: MakeHub, server: Guarded) -> None:
    entry = helper(server, 'echo \'{"Authorization": "Bearer secret-output"}\'')
    with pytest.raises(MultiMCPError, match=r"\*\*\* is not valid|Bearer \*\*\*") as caught:
        await make_hub(entry).tools()
    assert "secret-output" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"url": "http://h/", "headersHelper": ""}, "headersHelper"),
        ({"url": "http://h/", "headersHelper": ["a"]}, "headersHelper"),
        ({"command": "x", "headersHelper": "y"}, "headersHelper does not apply to a server with a command"),
        ({"command": "x", "lmbridge": {"clientCredentials": {}}}, "clientCredentials does not apply to a server with"),
        ({"url": "http://h/", "lmbridge": {"clientCredentials": {"clientId": "a"}}}, "has no clientSecret"),
        (
            {
                "url": "http://h/",
                "lmbridge": {"clientCredentials": {"clientId": "a", "clientSecret": "b", "issuer": "http://h"}},
            },
            "issuer is not an https URL",
        ),
        (
            {"url": "http://h/", "headersHelper": "x", "lmbridge": {"clientCredentials": {"clientId": "a"}}},
            "is given together with headersHelper",
        ),
    ],
)
def test_mistakes_in_the_configuration_are_named(
    config: Callable[[Mapping[str, Any]], Path], entry: dict[str, Any], words: str
) -> None:
    assert words in str(load_config(config({"a": entry})).broken["a"])


# OAuth

provider: Any = import_module("mcp.client.auth.extensions.client_credentials").ClientCredentialsOAuthProvider
CHECKS_ISSUER = "issuer" in inspect.signature(provider).parameters
needs_issuer = pytest.mark.skipif(not CHECKS_ISSUER, reason="this version of the SDK does not check the issuer")


class Authorized(Guarded):
    """A server with an authorization server beside it, which gives the token to one client."""

    def __init__(self) -> None:
        super().__init__()
        self.grants: list[Mapping[str, str]] = []
        self.secret = "very-secret"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        origin = str(request.url.origin())
        if "oauth-protected-resource" in request.path:
            return web.json_response({"resource": f"{origin}/mcp", "authorization_servers": [origin]})
        if "well-known" in request.path:
            token = {
                "issuer": origin,
                "authorization_endpoint": f"{origin}/authorize",
                "token_endpoint": f"{origin}/token",
            }
            return web.json_response(
                {**token, "response_types_supported": ["code"], "grant_types_supported": ["client_credentials"]}
            )
        if request.path == "/token":
            return await self._give_token(request)
        self.challenge = {
            "WWW-Authenticate": f'Bearer resource_metadata="{origin}/.well-known/oauth-protected-resource/mcp"'
        }
        return await super()._handle(request)

    async def _give_token(self, request: web.Request) -> web.Response:
        form = await request.post()
        self.grants.append({name: str(value) for name, value in form.items()})
        credentials = base64.b64decode(request.headers["Authorization"].removeprefix("Basic ")).decode()
        if credentials != f"us:{self.secret}":
            return web.json_response({"error": "invalid_client"}, status=401)
        return web.json_response({"access_token": self.token, "token_type": "Bearer", "expires_in": 3600})


@pytest_asyncio.fixture
async def authorized() -> AsyncIterator[Authorized]:
    server = Authorized()
    await server.start()
    yield server
    await server.stop()


def with_credentials(server: Authorized, **changes: str) -> dict[str, Any]:
    issuer = server.url.removesuffix("/mcp")
    credentials = {"clientId": "us", "clientSecret": "very-secret", "issuer": issuer, "scope": "tools", **changes}
    return {"a": {"url": server.url, "lmbridge": {"clientCredentials": credentials}}}


@needs_issuer
async def test_a_token_is_got_by_client_credentials_and_again_when_it_is_refused(
    make_hub: MakeHub, authorized: Authorized
) -> None:
    hub = make_hub(with_credentials(authorized))
    lease = await hub.tools()
    assert await function_of(lease, "echo")(text="on") == "on"
    assert [grant["grant_type"] for grant in authorized.grants] == ["client_credentials"]
    authorized.token = "second-token"
    calls = [function_of(lease, "echo")(text="on") for _ in range(5)]
    assert await asyncio.gather(*calls) == ["on"] * 5
    assert len(authorized.grants) == 2
    assert hub.status()["a"].starts == 1


@needs_issuer
async def test_a_long_call_does_not_hold_up_others(make_hub: MakeHub, authorized: Authorized) -> None:
    waiting = asyncio.Event()
    go_on = asyncio.Event()

    async def respond(message: Any, _: web.Request) -> None:
        if message["params"]["arguments"]["text"] == "slow":
            waiting.set()
            await go_on.wait()

    async def refuse_fast_call_later(request: web.Request) -> None:
        # So that it needs another token while the slow call, which has got that, is not answered.
        if b"fast" in await request.read():
            await waiting.wait()

    authorized.responses["tools/call"] = respond
    authorized.before_refusal = refuse_fast_call_later
    lease = await make_hub(with_credentials(authorized)).tools()
    authorized.token = "second-token"
    slow = asyncio.ensure_future(function_of(lease, "echo")(text="slow"))
    assert await function_of(lease, "echo")(text="fast") == "on"
    assert not slow.done()
    go_on.set()
    assert await slow == "on"


@needs_issuer
async def test_a_refused_secret_is_an_error_without_it(make_hub: MakeHub, authorized: Authorized) -> None:
    authorized.secret = "another"
    with pytest.raises(MultiMCPError, match=r'could not get a token for it.*check "clientCredentials"') as caught:
        await make_hub(with_credentials(authorized)).tools()
    assert "very-secret" not in str(caught.value)


@needs_issuer
async def test_another_authorization_server_does_not_get_the_secret(make_hub: MakeHub, authorized: Authorized) -> None:
    with pytest.raises(MultiMCPError, match="could not get a token for it"):
        await make_hub(with_credentials(authorized, issuer="https://login.example")).tools()
    assert authorized.grants == []


@needs_issuer
async def test_a_call_that_is_refused_with_another_status_is_not_made_again(
    make_hub: MakeHub, authorized: Authorized
) -> None:
    lease = await make_hub(with_credentials(authorized)).tools()
    authorized.responses["tools/call"] = lambda *_: body(403, "not for you", "text/plain")
    with pytest.raises(ToolError, match="403"):
        await function_of(lease, "echo")(text="on")
    assert authorized.methods.count("tools/call") == 1


async def test_a_version_of_the_sdk_that_does_not_check_the_issuer_is_not_used(
    make_hub: MakeHub, authorized: Authorized, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OldProvider:
        def __init__(self, server_url: str, storage: Any, client_id: str, client_secret: str) -> None:
            pytest.fail("the secret is given to a provider that does not check the issuer")

    monkeypatch.setattr(f"{provider.__module__}.ClientCredentialsOAuthProvider", OldProvider)
    with pytest.raises(MultiMCPError, match=r"does not check who gets the client secret.*pip install -U mcp"):
        await make_hub(with_credentials(authorized)).tools()


def test_secrets_are_not_in_the_description_of_a_server(config: Callable[[Mapping[str, Any]], Path]) -> None:
    credentials = {"clientId": "us", "clientSecret": "very-secret", "issuer": "https://h"}
    entry = {"url": "https://h/mcp", "lmbridge": {"clientCredentials": credentials}}
    spec = load_config(config({"a": entry})).servers["a"]
    assert "very-secret" not in repr(spec)
    assert "very-secret" not in json.dumps(spec.redact("it is very-secret"))
