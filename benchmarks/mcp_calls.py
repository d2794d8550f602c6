"""Calls of MCP tools side by side: through the official SDK alone, and through lmbridge.

It prints a table, and writes that into the documentation if told to.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from benchmarks import report
from benchmarks.command import arguments, publish
from benchmarks.mcp_peers import SERVERS, WAYS
from benchmarks.processes import FailedError, Worker, cores
from benchmarks.run import BOUND, Result, Results

MODULE: Final = "benchmarks.mcp_worker"
BAR: Final = 1.2
"""Ours: how much of what a call costs through the SDK."""


class CallRow(NamedTuple):
    """What is measured."""

    key: str
    title: str
    unit: str
    server: str
    workload: str
    full: Mapping[str, Any]


_TEXT: Final = 100
_LONG: Final = 100_000
ROWS: Final = (
    CallRow("cpu", "one call at a time", "µs CPU", "stub", "spend", {"at_once": 1, "size": _TEXT}),
    CallRow("wall", "the same, by the clock", "µs", "stub", "take", {"size": _TEXT}),
    CallRow("cpu-100", "100 in flight", "µs CPU", "stub", "spend", {"at_once": 100, "size": _TEXT}),
    CallRow("cpu-long", "100 KB there and back", "µs CPU", "stub", "spend", {"at_once": 1, "size": _LONG}),
    CallRow("cpu-time", "mcp-server-time", "µs CPU", "time", "spend", {"at_once": 1, "size": 0}),
    CallRow("wall-time", "the same, by the clock", "µs", "time", "take", {"size": 0}),
    CallRow("cpu-everything", "server-everything", "µs CPU", "everything", "spend", {"at_once": 1, "size": 0}),
    CallRow("wall-everything", "the same, by the clock", "µs", "everything", "take", {"size": 0}),
)


def installed(names: Sequence[str]) -> list[str]:
    """The servers that can be run here."""
    return [name for name in names if _is_there(name)]


def _is_there(server: str) -> bool:
    if server == "time":
        return importlib.util.find_spec("mcp_server_time") is not None
    command, script, *_ = SERVERS[server]
    return server == "stub" or (shutil.which(command) is not None and Path(script).exists())


def measure(servers: Sequence[str], rounds: int, *, tiny: bool) -> Results:
    """All rounds. A round has a process for each server, in which the ways take turns."""
    results: Results = defaultdict(Result)
    pinned, ways = cores(), list(WAYS)
    for number in range(rounds):
        turn = ways[number % len(ways) :] + ways[: number % len(ways)]
        for server in servers:
            with Worker(server, pinned[0] if pinned else -1, MODULE) as worker:
                for row in (each for each in ROWS if each.server == server):
                    for way in turn:
                        _figure(worker, row, way, results[row.key, way], number, seconds=0.0 if tiny else 0.3)
    return results


def _figure(worker: Worker, row: CallRow, way: str, result: Result, number: int, *, seconds: float) -> None:
    try:
        result.figures[number] = worker.measure(row.workload, {**row.full, "way": way, "seconds": seconds}, BOUND)
    except FailedError as failure:
        result.failed = str(failure)


def table(servers: Sequence[str], results: Results) -> list[list[str]]:
    """The heading, and a line for each row."""
    lines = [["", *(about.title for about in WAYS.values()), "spread", "our bar", ""]]
    for row in ROWS:
        if row.server in servers:
            sdk = results[row.key, "sdk"]
            ratios = results[row.key, "lmbridge"].ratios(sdk)
            cells = [_cell(row, way, results[row.key, way], sdk) for way in WAYS]
            kept = ("ok" if median(ratios) <= BAR else "over") if ratios else ""
            lines.append(
                [row.title, *cells, report.percent(ratios) if ratios else "", f"{BAR:.2f}{report.TIMES}", kept]
            )
    return lines


def _cell(row: CallRow, way: str, result: Result, sdk: Result) -> str:
    if result.middle is None or sdk.middle is None:
        return "failed*" if result.failed else report.DASH
    if way == "sdk":
        return f"{report.figure(result.middle)} {row.unit}"
    return report.ratio(median(result.ratios(sdk)))


def notes(servers: Sequence[str], results: Results) -> list[str]:
    """What a star means, and what is missing."""
    failed = [
        f"* {WAYS[way].title}, {key}: {each.failed.splitlines()[0][:160]}"
        for (key, way), each in results.items()
        if each.failed
    ]
    missing = [server for server in SERVERS if server not in servers]
    return [*failed, f"Not measured here: {', '.join(missing)}."] if missing else failed


def main() -> None:
    given = arguments("benchmarks.mcp_calls", __doc__, "--servers", SERVERS, "these alone")
    began, load = time.monotonic(), os.getloadavg()[0]
    servers = installed(given.chosen)
    results = measure(servers, given.rounds, tiny=given.tiny)
    lines, below = table(servers, results), notes(servers, results)
    where = report.machine(WAYS, given.rounds, load, time.monotonic() - began, WAYS)
    publish(given, "mcp-calls", lines, below, where, results)


if __name__ == "__main__":
    main()
