"""The bridge in a terminal: it says what it is and how a host is connected to it, and still serves."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.mcp.bridge.support import INITIALIZE, NO_SERVER_URL, StartBridge


class Terminal:
    """A bridge process whose stdin is a terminal, and the keyboard of that terminal."""

    def __init__(self, process: asyncio.subprocess.Process, keyboard: int) -> None:
        assert process.stdin is None
        assert process.stderr is not None
        assert process.stdout is not None
        self.process, self.keyboard = process, keyboard
        self.stderr, self.stdout = process.stderr, process.stdout

    async def read_help(self) -> str:
        """Returns what the process writes to stderr, up to the line that says how to end it."""
        return (await self.stderr.readuntil(b"lists the options.\n")).decode()

    async def end(self) -> tuple[int, bytes]:
        """Waits for the process to end, and returns its status and the rest of its stderr."""
        rest = await self.stderr.read()
        return await self.process.wait(), rest


@pytest_asyncio.fixture
async def terminal(empty_home: Path) -> AsyncIterator[Terminal]:
    keyboard, stdin = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "lmbridge.mcp",
        env={**os.environ, "LMBRIDGE_API_BASE": NO_SERVER_URL, "HOME": str(empty_home)},
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    os.close(stdin)
    yield Terminal(process, keyboard)
    if process.returncode is None:
        process.kill()
    await process.communicate()
    os.close(keyboard)


async def test_it_says_what_it_is_and_how_to_connect_a_host(terminal: Terminal) -> None:
    text = await terminal.read_help()
    assert "is an MCP server" in text
    assert "claude mcp add --transport stdio lmbridge -- " in text
    assert '"mcpServers"' in text
    assert "Press Ctrl-D or Ctrl-C" in text


@pytest.mark.slow
async def test_ctrl_d_ends_it(terminal: Terminal) -> None:
    await terminal.read_help()
    os.write(terminal.keyboard, b"\x04")
    assert await terminal.end() == (0, b"")


async def test_ctrl_c_ends_it(terminal: Terminal) -> None:
    os.write(terminal.keyboard, json_line())
    await terminal.stdout.readline()
    terminal.process.send_signal(signal.SIGINT)
    status, rest = await terminal.end()
    assert status == 0
    assert b"Traceback" not in rest


async def test_it_still_serves_a_host_that_uses_a_terminal(terminal: Terminal) -> None:
    os.write(terminal.keyboard, json_line())
    assert b'"serverInfo"' in await terminal.stdout.readline()


def json_line() -> bytes:
    return json.dumps({"jsonrpc": "2.0", **INITIALIZE}).encode() + b"\n"


@pytest.mark.slow
async def test_a_host_with_pipes_sees_nothing_of_it(start: StartBridge) -> None:
    host = await start()
    host.stdin.close()
    assert await host.end() == (0, "", b"")
