"""Fixtures for the tests of the bridge: a bridge in this process, and bridges that run as processes."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.testing import ScriptedServer
from tests.mcp.bridge.support import INITIALIZE, Host, StartBridge, WriteConfig
from tests.mcp.support import scripted


@pytest_asyncio.fixture
async def bridge(scripted_server: ScriptedServer, config: WriteConfig, notes: Path) -> AsyncIterator[Bridge]:
    """A bridge to the scripted server, with two MCP servers that work and one that cannot be started."""
    servers = {
        "one": scripted({"tools": ["echo", "sleep"], "noted": ["sleep"], "notes": str(notes)}),
        "two": scripted({"tools": ["count"]}),
        "broken": {"command": sys.executable, "args": ["-c", "raise SystemExit('no key')"]},
    }
    path = config(servers)
    async with Bridge.opened(scripted_server.api_base, "test-model", config_path=path) as bridge:
        yield bridge


@pytest_asyncio.fixture
async def start(scripted_server: ScriptedServer, empty_home: Path) -> AsyncIterator[StartBridge]:
    """Starts bridge processes that use the scripted server. They are initialised unless the test says otherwise."""
    hosts: list[Host] = []

    async def start(*args: str, initialise: bool = True, **env: str) -> Host:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(args or ("-m", "lmbridge.mcp")),
            env={**os.environ, "LMBRIDGE_API_BASE": scripted_server.api_base, "HOME": str(empty_home), **env},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        host = Host(process)
        hosts.append(host)
        if initialise:
            host.send(INITIALIZE, {"method": "notifications/initialized"})
            assert (await host.receive())["id"] == 0
        return host

    yield start
    for host in hosts:
        host.stdin.close()
        if host.process.returncode is None:
            host.process.kill()
        await host.end()
