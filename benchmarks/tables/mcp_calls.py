"""Calls of MCP tools: through the official SDK, and through lmbridge."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Final

from benchmarks.mcp_servers import MCP_SERVERS
from benchmarks.specification import PeerInfo, Row, Table

_CALL_BAR: Final = 1.2
"""The bar of a call, as a multiple of a call through the SDK."""
_SHORT: Final = 100
_LONG: Final = 100_000
"""The sizes of the argument of a call and of its result, in characters."""


def _why_missing(server: str) -> str | None:
    if server == "time":
        return None if importlib.util.find_spec("mcp_server_time") else "mcp-server-time is not installed"
    command, script, *_ = MCP_SERVERS[server]
    if server == "stub" or (shutil.which(command) and Path(script).exists()):
        return None
    return "server-everything is not installed"


def _cpu(key: str, title: str, server: str, size: int, at_once: int = 1) -> Row:
    return Row(
        key=key,
        title=title,
        unit="µs CPU",
        workload="cpu_of_calls",
        bar=_CALL_BAR,
        full={"at_once": at_once, "size": size, "seconds": 0.3},
        tiny={"seconds": 0.0},
        renews_client=False,
        server=server,
        why_missing=lambda: _why_missing(server),
    )


def _clock(key: str, server: str, size: int) -> Row:
    return Row(
        key=key,
        title="the same, by the clock",
        unit="µs",
        workload="time_of_calls",
        bar=_CALL_BAR,
        full={"size": size, "seconds": 0.3},
        tiny={"seconds": 0.0},
        renews_client=False,
        server=server,
        why_missing=lambda: _why_missing(server),
    )


MCP_CALLS_TABLE: Final = Table(
    name="mcp-calls",
    about="calls of MCP tools",
    peers={
        "sdk": PeerInfo("the official SDK", imports="mcp", distributions=("mcp", "pydantic", "anyio")),
        "sdk-again": PeerInfo("the SDK again", imports="mcp"),
        "lmbridge": PeerInfo("lmbridge", distributions=("lmbridge", "msgspec")),
        "lmbridge-agent": PeerInfo("lmbridge, as an agent calls"),
    },
    baseline="sdk",
    worker="benchmarks.workers.mcp_calls",
    uses_stub=False,
    requires=("mcp",),
    rows=(
        _cpu("stub-cpu", "one call at a time", "stub", _SHORT),
        _clock("stub-clock", "stub", _SHORT),
        _cpu("stub-cpu-100", "100 in flight", "stub", _SHORT, at_once=100),
        _cpu("stub-cpu-long", "100 KB there and back", "stub", _LONG),
        _cpu("time-cpu", "mcp-server-time", "time", 0),
        _clock("time-clock", "time", 0),
        _cpu("everything-cpu", "server-everything", "everything", 0),
        _clock("everything-clock", "everything", 0),
    ),
)
