"""Agent loops side by side: CPU of a round, its growth with the conversation, memory of a run.

It prints a table, and writes that into the documentation if told to.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

from benchmarks import report
from benchmarks.agent_peers import AGENTS
from benchmarks.command import arguments, publish
from benchmarks.processes import FailedError, Stub, Worker
from benchmarks.run import BOUND, FAR_ROUNDS, Result, Results

MODULE: Final = "benchmarks.agent_worker"
SHORT: Final = "calls-20"
LONG: Final = "calls-100"
MOST_GROWTH: Final = 1.1
"""Our bar: how much more than the limit's."""


class AgentRow(NamedTuple):
    """What is measured."""

    key: str
    title: str
    unit: str
    bar: float | None
    """Our ratio to the limit."""
    workload: str
    full: Mapping[str, Any]
    tiny: Mapping[str, Any]


def _calls(calls: int, title: str) -> AgentRow:
    full, tiny = {"calls": calls, "seconds": 0.3}, {"calls": min(calls, 3), "seconds": 0.0}
    return AgentRow(f"calls-{calls}", f"a round of a run with {title}", "µs CPU", 2.0, "calls", full, tiny)


ROWS: Final = (
    _calls(1, "1 tool call"),
    _calls(20, "20"),
    _calls(100, "100"),
    AgentRow("memory", "a run, 1,000 in flight", "KiB", None, "memory", {"runs": 1000}, {"runs": 5}),
)


def installed(names: Sequence[str]) -> list[str]:
    """Those that can be imported here, the limit first."""
    return [
        name
        for name, about in AGENTS.items()
        if name == "limit" or (name in names and importlib.util.find_spec(about.imports))
    ]


def measure(names: Sequence[str], rounds: int, *, tiny: bool) -> Results:
    """All rounds: each row of each loop in a process of its own, in an order that turns."""
    results: Results = defaultdict(Result)
    far_rounds = {index * (rounds - 1) // max(1, FAR_ROUNDS - 1) for index in range(FAR_ROUNDS)}
    with Stub() as stub:
        for number in range(rounds):
            taking = [name for name in names if not AGENTS[name].far or number in far_rounds]
            taking = taking[number % len(taking) :] + taking[: number % len(taking)]
            for row in ROWS:
                for name in taking:
                    result = results[row.key, name]
                    try:
                        with Worker(name, stub.port, MODULE) as worker:
                            figure = worker.measure(row.workload, row.tiny if tiny else row.full, BOUND)
                        result.figures[number] = figure
                    except FailedError as failure:
                        result.failed = str(failure)
    return results


def table(names: Sequence[str], results: Results) -> list[list[str]]:
    """The heading, a line for each row, and one for the growth."""
    lines = [["", *(AGENTS[name].title for name in names), "spread", "our bar", ""]]
    for row in ROWS:
        limit, ours = results[row.key, "limit"], results[row.key, "lmbridge"].ratios(results[row.key, "limit"])
        bar = f"{row.bar:.2f}{report.TIMES}" if row.bar else ""
        kept = ("ok" if median(ours) <= row.bar else "over") if row.bar and ours else ""
        cells = [_cell(row, name, results[row.key, name], limit) for name in names]
        lines.append([row.title, *cells, report.percent(ours) if ours else "", bar, kept])
    growths = {name: results[LONG, name].ratios(results[SHORT, name]) for name in names}
    more = [ours / limit for ours, limit in zip(growths.get("lmbridge", ()), growths["limit"], strict=False)]
    cells = [report.ratio(median(each)) if each else report.DASH for each in growths.values()]
    kept = ("ok" if median(more) <= MOST_GROWTH else "over") if more else ""
    bar = f"{MOST_GROWTH:.2f}{report.TIMES} the limit's"
    return [*lines, ["growth of a round, 20 to 100", *cells, report.percent(more) if more else "", bar, kept]]


def _cell(row: AgentRow, name: str, result: Result, limit: Result) -> str:
    if result.middle is None or limit.middle is None:
        return "failed*" if result.failed else report.DASH
    if name == "limit":
        return f"{report.figure(result.middle)} {row.unit}"
    return report.ratio(median(result.ratios(limit)))


def notes(results: Results) -> list[str]:
    """What a star means, and what is missing."""
    failed = [
        f"* {AGENTS[name].title}, {key}: {each.failed.splitlines()[0][:160]}"
        for (key, name), each in results.items()
        if each.failed
    ]
    missing = [about.title for name, about in AGENTS.items() if (ROWS[0].key, name) not in results]
    return [*failed, f"Not measured here: {', '.join(missing)}."] if missing else failed


def main() -> None:
    given = arguments("benchmarks.agents", __doc__, "--peers", AGENTS, "these alone; the limit is always one")
    began, load = time.monotonic(), os.getloadavg()[0]
    names = installed(given.chosen)
    results = measure(names, given.rounds, tiny=given.tiny)
    lines, below = table(names, results), notes(results)
    where = report.machine(names, given.rounds, load, time.monotonic() - began, AGENTS)
    publish(given, "agents", lines, below, where, results)


if __name__ == "__main__":
    main()
