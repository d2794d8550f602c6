"""The bridge on streamable HTTP: several hosts with the official client, and who may use it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from importlib import import_module
from typing import Any

import aiohttp
import mcp
import pytest

from lmbridge import DynamicAutonomousAgent, Limits, LLMClient, MultiMCPError
from lmbridge._http_access import HostNames
from lmbridge.mcp import sdk
from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.mcp.sdk.http_service import HttpAccess, serve_http
from lmbridge.mcp.sdk.server_session import build_server
from lmbridge.testing import OneModelServer, ScriptedServer, answer, stall
from tests.mcp.bridge.support import INITIALIZE, NO_SERVER_URL, TOOL_NAMES, wire_form
from tests.mcp.conftest import MakeHub
from tests.support import HALF

LOOPBACK = HttpAccess(HostNames("127.0.0.1"), None)


# It is no fixture, because it has to be left in the task that entered it.
@asynccontextmanager
async def served(bridge: Bridge, access: HttpAccess = LOOPBACK) -> AsyncIterator[str]:
    """Serves a bridge, and yields its URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
    async with serve_http(build_server(bridge), listening, access):
        yield url


@asynccontextmanager
async def official_host(url: str, headers: dict[str, str] | None = None) -> AsyncIterator[Any]:
    """Yields a session of the official client, in the newest revision that its major version speaks."""
    transport: Any = import_module("mcp.client.streamable_http")
    async with AsyncExitStack() as stack:
        httpx = import_module("httpx2" if sdk.is_v2() else "httpx")
        http = await stack.enter_async_context(httpx.AsyncClient(headers=headers, timeout=60))
        opening = transport.streamable_http_client(url, http_client=http)
        if sdk.is_v2():
            client: Any = mcp
            yield await stack.enter_async_context(client.Client(opening))
        else:
            streams = await stack.enter_async_context(opening)
            session = await stack.enter_async_context(mcp.ClientSession(*streams[:2]))
            await session.initialize()
            yield session


async def test_several_official_clients_list_and_call_the_tools_with_progress(
    bridge: Bridge, scripted_server: ScriptedServer
) -> None:
    progress: list[str | None] = []

    async def on_progress(_done: float, _total: float | None, message: str | None) -> None:
        progress.append(message)

    scripted_server.script(answer("one"), answer("two"))
    async with served(bridge) as url, official_host(url) as first, official_host(url) as second:
        tools = wire_form(await first.list_tools())["tools"]
        assert [tool["name"] for tool in tools] == TOOL_NAMES
        for host, text in ((first, "one"), (second, "two")):
            got = wire_form(await host.call_tool("chat_completion", {"prompt": "?"}, progress_callback=on_progress))
            assert got["content"] == [{"type": "text", "text": text}]
    assert progress.count("started") == 2


async def test_the_hosts_of_one_bridge_have_one_schedule(tmp_path: Any) -> None:
    # The server kills each generation when a request names another model, so that only a schedule lets all succeed.
    async with (
        OneModelServer(["a", "b"], load_seconds=0.01, token_seconds=0.001) as server,
        LLMClient(server.api_base, limits=Limits(max_loaded_models=1)) as client,
        DynamicAutonomousAgent(client, config_path=tmp_path / "none.json") as agent,
        served(Bridge(client, agent)) as url,
        official_host(url) as first,
        official_host(url) as second,
    ):
        calls = [
            host.call_tool("chat_completion", {"prompt": "?", "model": model})
            for _ in range(5)
            for host, model in ((first, "a"), (second, "b"))
        ]
        results = [wire_form(result) for result in await asyncio.gather(*calls)]
        assert not [result for result in results if result.get("isError")]
        assert server.double_loads == 0
        assert server.swaps <= 2


async def test_our_own_hub_refuses_the_bridge_on_http(bridge: Bridge, make_hub: MakeHub) -> None:
    async with served(bridge) as url:
        with pytest.raises(MultiMCPError, match="it is lmbridge itself"):
            await make_hub({"a": {"url": url}}).tools()


@pytest.mark.skipif(not sdk.is_v2(), reason="the client of SDK 1.x does not tell the server")
async def test_a_cancelled_call_stops_the_generation(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall([*HALF]))
    async with served(bridge) as url, official_host(url) as host:
        call = asyncio.ensure_future(host.call_tool("chat_completion", {"prompt": "?"}))
        await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
        call.cancel()
        await asyncio.wait({call})
        await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)


async def test_closing_ends_calls_and_connections(bridge: Bridge, scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall([*HALF]))
    params = INITIALIZE["params"]
    arguments = {"name": "chat_completion", "arguments": {"prompt": "?"}}
    async with aiohttp.ClientSession(headers={"Accept": "application/json, text/event-stream"}) as http:

        async def post(url: str, session: str | None, **message: Any) -> aiohttp.ClientResponse:
            headers = {} if session is None else {"Mcp-Session-Id": session}
            return await http.post(url, json={"jsonrpc": "2.0", **message}, headers=headers)

        async with served(bridge) as url:
            opened = await post(url, None, id=1, method="initialize", params=params)
            session = opened.headers["Mcp-Session-Id"]
            await opened.read()
            await (await post(url, session, method="notifications/initialized")).read()
            call = asyncio.ensure_future(post(url, session, id=2, method="tools/call", params=arguments))
            await scripted_server.wait_until(lambda: scripted_server.in_flight == 1)
        await scripted_server.wait_until(lambda: len(scripted_server.aborts) == 1)
        with contextlib.suppress(aiohttp.ClientError):
            await (await call).read()
        with pytest.raises(aiohttp.ClientConnectorError):
            await http.get(url)


@pytest.mark.parametrize("disabled", [True, False])
async def test_the_logger_of_the_sdk_is_afterwards_as_the_program_has_left_it(
    bridge: Bridge, monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    logger = logging.getLogger("mcp.server.streamable_http")
    monkeypatch.setattr(logger, "disabled", disabled)
    filters = [*logger.filters]
    async with served(bridge), served(bridge):
        pass
    assert (logger.disabled, logger.filters) == (disabled, filters)


# Who may use it


async def status_of(url: str, **headers: str) -> int:
    async with aiohttp.ClientSession() as http, http.post(url, json={}, headers=headers) as response:
        return response.status


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, "passes"),
        ({"Host": "localhost:9"}, "passes"),
        ({"Host": "127.0.0.1"}, "passes"),
        ({"Host": "[::1]:8090"}, "passes"),
        ({"Host": "evil.example"}, 403),
        ({"Host": "evil.example:8090"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:9", "Origin": "http://localhost:9"}, "passes"),
    ],
)
async def test_only_the_names_of_the_machine_may_be_used(
    bridge: Bridge, headers: dict[str, str], expected: Any
) -> None:
    async with served(bridge) as url:
        status = await status_of(url, **headers)
    assert (status if status == 403 else "passes") == expected


@pytest.mark.parametrize(
    ("authorization", "status"),
    [(None, 401), ("Bearer wrong", 401), ("Basic s3cret", 401), ("Bearer ", 401), ("Bearer s3crét", 401)],
)
async def test_a_missing_or_wrong_token_is_refused(bridge: Bridge, authorization: str | None, status: int) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    async with served(bridge, HttpAccess(HostNames("127.0.0.1"), "s3cret")) as url:
        assert await status_of(url, **headers) == status
        assert await status_of(url.replace("/mcp", "/other"), **headers) == status


async def test_the_official_client_and_our_hub_use_the_bridge_with_its_token(bridge: Bridge) -> None:
    async with served(bridge, HttpAccess(HostNames("127.0.0.1"), "s3cret")) as url:
        async with official_host(url, {"Authorization": "Bearer s3cret"}) as host:
            assert wire_form(await host.call_tool("list_models", {}))["content"]
        assert await status_of(url.replace("/mcp", "/other"), Authorization="Bearer s3cret") == 404


def test_the_token_is_in_no_repr() -> None:
    assert "s3cret" not in repr(HttpAccess(HostNames("127.0.0.1"), "s3cret"))


# As a process


async def start(*options: str, **env: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "lmbridge.mcp",
        *options,
        env={**os.environ, "LMBRIDGE_API_BASE": NO_SERVER_URL, **env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@pytest.mark.slow
async def test_the_command_serves_until_a_signal() -> None:
    process = await start("--http", "--port", "0", LMBRIDGE_MCP_TOKEN="s3cret")
    assert process.stdout
    url = (await process.stdout.readline()).decode().removeprefix("lmbridge mcp: ").strip()
    async with official_host(url, {"Authorization": "Bearer s3cret"}) as host:
        assert wire_form(await host.call_tool("health_check", {}))["structuredContent"]["healthy"] is False
        process.send_signal(signal.SIGTERM)
        _, errors = await process.communicate()
    assert (process.returncode, errors) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--http", "--host", "0.0.0.0"], "LMBRIDGE_MCP_TOKEN"),
        (["--http", "--port", "99999"], "--port"),
        (["--http", "--allow-host", "my-pc:8090"], "--allow-host"),
        (["--port", "1"], "--port needs --http"),
        (["--http", "--eof-timeout", "3"], "--eof-timeout does not apply with --http"),
        (["--api-base", "no URL"], "api_base"),
    ],
)
async def test_arguments_that_make_no_sense_are_one_line_and_status_2(options: list[str], words: str) -> None:
    process = await start(*options)
    _, errors = await process.communicate()
    assert process.returncode == 2
    assert words in errors.decode().splitlines()[-1]


@pytest.mark.slow
async def test_a_port_that_is_taken_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = await start("--http", "--port", str(taken.getsockname()[1]))
        _, errors = await process.communicate()
    assert process.returncode == 1
    (line,) = errors.decode().splitlines()
    assert "cannot listen on 127.0.0.1" in line
