"""Helpers that the tests of MCP share."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from lmbridge import Tool
from lmbridge.mcp.servers.guardian import is_gone
from lmbridge.mcp.servers.leased_tools import McpTools

T = TypeVar("T")
SERVER = str(Path(__file__).parent / "scripted_server.py")
ENTRY_KEYS = ("env", "cwd", "lmbridge", "disabled")


def scripted(options: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the entry of a scripted server with the given options.

    Options that are keys of an entry, such as "env", go into the entry. Options with a "command" or "url" are an entry
    already and are returned unchanged.
    """
    if "command" in options or "url" in options:
        return options
    entry = {key: options[key] for key in ENTRY_KEYS if key in options}
    server_options = {key: value for key, value in options.items() if key not in entry}
    return {"command": sys.executable, "args": ["-I", "-S", SERVER, json.dumps(server_options)], **entry}


def rewrite(path: Path, servers: Any) -> None:
    """Replaces a configuration by a new file, which is noticed even if the clock has not advanced."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"mcpServers": {name: scripted(entry) for name, entry in servers.items()}}))
    new.replace(path)


def function_of(lease: McpTools, name: str, server: str | None = None) -> Callable[..., Any]:
    """Returns the function of a tool; the server is needed only if several have a tool of that name."""
    (found,) = [each for each in lease.tools if each.name == name and server in (None, each.server)]
    return found.function


def names(tools: list[Tool]) -> list[str]:
    return [each.name for each in tools]


async def wait_until_gone(group: int) -> None:
    """Waits until no process of a group runs."""
    while not await asyncio.to_thread(is_gone, group):
        await asyncio.sleep(0.01)


async def wait_for_notes(notes: Path, count: int = 1) -> list[str]:
    """Waits until scripted servers have written at least `count` lines to the file, and returns all lines."""

    def read() -> list[str]:
        return notes.read_text().splitlines() if notes.exists() else []

    while len(lines := await asyncio.to_thread(read)) < count:
        await asyncio.sleep(0.01)
    return lines


class Recorder(Generic[T]):
    """A callback that records what it is called with."""

    def __init__(self) -> None:
        self.seen: list[T] = []
        self._called = asyncio.Event()

    def __call__(self, item: T) -> None:
        self.seen.append(item)
        self._called.set()

    async def wait_for(self, fits: Callable[[T], bool]) -> T:
        """Waits for the first item that fits, and returns it."""
        while not (found := [item for item in self.seen if fits(item)]):
            self._called.clear()
            await self._called.wait()
        return found[0]
