"""What the tests of MCP share."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from lmbridge import Tool
from lmbridge.mcp.servers.guardian import is_gone
from lmbridge.mcp.servers.hub import McpTools

T = TypeVar("T")
SERVER = str(Path(__file__).parent / "scripted_server.py")


def scripted(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """The entry of a scripted server; one that has a "command" or "url" stays."""
    if "command" in options or "url" in options:
        return options
    entry = {key: options[key] for key in ("env", "cwd", "lmbridge", "disabled") if key in options}
    told = {key: value for key, value in options.items() if key not in entry}
    return {"command": sys.executable, "args": ["-I", "-S", SERVER, json.dumps(told)], **entry}


def tool(lease: McpTools, name: str, server: str | None = None) -> Callable[..., Any]:
    """The function of a tool."""
    (found,) = [each for each in lease.tools if each.name == name and server in (None, each.server)]
    return found.function


def names(tools: list[Tool]) -> list[str]:
    return [each.name for each in tools]


async def gone(group: int) -> None:
    """Waits until nothing of a process group runs."""
    while not await asyncio.to_thread(is_gone, group):
        await asyncio.sleep(0.01)


async def noted(notes: Path, count: int = 1) -> list[str]:
    """Waits until a scripted server has noted as many lines."""

    def read() -> list[str]:
        return notes.read_text().splitlines() if notes.exists() else []

    while len(lines := await asyncio.to_thread(read)) < count:
        await asyncio.sleep(0.01)
    return lines


class Recorder(Generic[T]):
    """Notes what it is called with."""

    def __init__(self) -> None:
        self.seen: list[T] = []
        self._news = asyncio.Event()

    def __call__(self, item: T) -> None:
        self.seen.append(item)
        self._news.set()

    async def wait_for(self, fits: Callable[[T], bool]) -> T:
        """The first that fits, when there is one."""
        while not (found := [item for item in self.seen if fits(item)]):
            self._news.clear()
            await self._news.wait()
        return found[0]
