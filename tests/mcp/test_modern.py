"""The newest revision of the protocol, on HTTP, where changes have to be asked for."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from lmbridge.mcp import McpEvent, ToolsChanged, sdk
from tests.mcp.conftest import MakeHub
from tests.mcp.support import Recorder, names, tool

pytestmark = pytest.mark.skipif(not sdk.is_v2(), reason="the first major of the SDK does not speak it")


@pytest_asyncio.fixture
async def url() -> AsyncIterator[str]:
    """The URL of a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(__file__).parent / "modern_server.py")
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, str(port), stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL
    )
    assert process.stderr is not None
    async for line in process.stderr:
        if b"running on" in line:
            break
    yield f"http://127.0.0.1:{port}/mcp"
    process.kill()
    await process.stderr.read()
    await process.wait()


async def test_its_tools_work_and_their_changes_are_heard_of(
    make_hub: MakeHub, recorder: Recorder[McpEvent], url: str
) -> None:
    hub = make_hub({"a": {"url": url}}, on_event=recorder)
    lease = await hub.tools()
    assert hub.status()["a"].protocol == "2026-07-28"
    assert names(lease.tools) == ["echo", "change"]
    assert await tool(lease, "echo")(text="on") == "on"
    assert await tool(lease, "change")() == "changed"
    await recorder.wait_for(lambda event: event == ToolsChanged("a"))
    assert names((await hub.tools()).tools) == ["echo", "change", "new"]
    await hub.close()
