"""Requests for two models at a server that holds one, through lmbridge and through openai-python, side by side.

It prints a table, and writes that and its chart into the documentation if told to.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

from benchmarks import report
from benchmarks.processes import ROOT, Process
from benchmarks.routers import why_no_llama_server
from benchmarks.swap_chart import swap_chart
from benchmarks.swap_client import BOUND, CLIENTS, Outcome
from benchmarks.swap_servers import SEED, SERVERS, TOKENS, SwapServer, swaps
from lmbridge.testing import OneModelServer

PAGE: Final = ROOT / "docs" / "model-scheduling.md"
CHART: Final = ROOT / "docs" / "model-swaps.svg"
ROUNDS: Final = 3
REQUESTS: Final = 60
MAX_SWAPS: Final = 6
"""Our bar."""
KINDS: Final = ("whole", "truncated", "failed", "wrong model")
SCENARIOS: Final = {
    "at once": "{} at once, models at random",
    "callers": "{} callers one after another, models in turn",
}
ENOUGH: Final = 20
"""Whole answers that a 95th percentile takes."""
GAIN: Final = 0.9
"""What lmbridge's time has to be of the other's, to be called a gain."""


class Run(NamedTuple):
    """A client's requests at a fresh server."""

    outcomes: list[Outcome]
    seconds: float
    loads: list[str]

    def count(self, kind: str) -> int:
        return sum(each.kind == kind for each in self.outcomes)

    @property
    def swaps(self) -> int:
        return swaps(self.loads)

    @property
    def slow(self) -> float | None:
        """The 95th percentile of the seconds that whole answers took."""
        took = sorted(each.seconds for each in self.outcomes if each.kind == "whole")
        return took[int(0.95 * (len(took) - 1))] if len(took) >= ENOUGH else None


class Key(NamedTuple):
    """A line of the table."""

    server: str
    scenario: str
    client: str


Runs = dict[Key, list[Run]]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_swaps", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--only", choices=SERVERS, help="this server alone")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} and {CHART.name} in docs/")
    parser.add_argument("--json", type=Path, help="write every outcome to this file")
    given = parser.parse_args()
    if given.rounds < 1 or given.requests < 2:
        parser.error("--rounds is at least 1, --requests at least 2")
    if given.write and (given.only or given.requests != REQUESTS):
        parser.error("only a full run is written")
    return given


def keys(only: str | None) -> list[Key]:
    """What is measured, in the order of the table."""
    servers = [only] if only else ["killing", "embedded" if why_no_llama_server() else "llama-server"]
    # Where nothing is lost there is nothing to be asked for again.
    return [
        Key(server, scenario, client)
        for server in servers
        for scenario in SCENARIOS
        for client in CLIENTS
        if client != "openai-once" or not SERVERS[server].is_real
    ]


def measure(key: Key, requests: int) -> Run:
    """One line, once."""
    about = SERVERS[key.server]
    with SwapServer(key.server) as server, Process(1, "-m", "benchmarks.swap_client", key.client) as client:
        job = {
            "api_base": server.api_base,
            "models": models(key.scenario, server.models, requests),
            "gap": about.gap if key.scenario == "callers" else 0.0,
            "tokens": about.tokens,
            "expected": {} if about.is_real else texts(server.models),
        }
        client.write(json.dumps(job))
        told = json.loads(client.read(BOUND + 30) or '{"outcomes": [], "seconds": 0}')
        return Run([Outcome(*each) for each in told["outcomes"]], told["seconds"], server.loads())


def models(scenario: str, names: Sequence[str], requests: int) -> list[str]:
    """The model of each request: the same for every client."""
    draw = random.Random(SEED)
    return [draw.choice(names) if scenario == "at once" else names[index % 2] for index in range(requests)]


def texts(names: Sequence[str]) -> dict[str, str]:
    """What the scripted server's models answer."""
    server = OneModelServer(names, tokens=TOKENS)
    return {name: server.text(name) for name in names}


def table(runs: Runs, requests: int) -> list[list[str]]:
    """The heading, and a line for each key."""
    lines = [["server", "requests", "client", *KINDS, "swaps", "wall time", "p95", "our bar"]]
    for key, each in runs.items():
        shown = middle(each)
        counts = [told(shown.count(kind), [run.count(kind) for run in each]) for kind in KINDS]
        slow = [run.slow for run in each if run.slow is not None]
        lines.append(
            [
                SERVERS[key.server].title,
                SCENARIOS[key.scenario].format(requests),
                CLIENTS[key.client][0],
                *counts,
                told(shown.swaps, [run.swaps for run in each]),
                f"{median(run.seconds for run in each):.1f} s",
                f"{median(slow):.1f} s" if len(slow) == len(each) else report.DASH,
                verdict(each, requests) if key.client == "lmbridge" else "",
            ]
        )
    return lines


def middle(runs: Sequence[Run]) -> Run:
    """The round to show: the one in the middle by whole answers, so that its counts add up."""
    return sorted(runs, key=lambda run: run.count("whole"))[len(runs) // 2]


def told(shown: int, counts: Sequence[int]) -> str:
    """A count, and its range over the rounds if there is one."""
    low, high = min(counts), max(counts)
    return str(shown) if low == high else f"{shown} ({low}{report.DASH}{high})"


def verdict(runs: Sequence[Run], requests: int) -> str:
    """Whether lmbridge kept to our bar in every round."""
    kept = all(run.count("whole") == requests and run.swaps <= MAX_SWAPS for run in runs)
    return "ok" if kept else "over"


def notes(runs: Runs, requests: int) -> list[str]:
    """What the failures were, and where lmbridge's scheduling gains nothing."""
    lines = []
    for key, each in runs.items():
        errors = Counter(outcome.error for outcome in each[0].outcomes if outcome.error)
        if errors:
            what = "; ".join(f"{count} times `{error}`" for error, count in errors.most_common(3))
            lines.append(f"{CLIENTS[key.client][0]}, {SCENARIOS[key.scenario].format(requests)}, first round: {what}")
    return lines + [gain(runs, key, requests) for key in runs if key.client == "lmbridge"]


def gain(runs: Runs, ours: Key, requests: int) -> str:
    """What lmbridge's scheduling is good for in one place of the table, in words."""
    other = runs[ours._replace(client="openai")]
    lost = requests - middle(other).count("whole")
    seconds = [median(run.seconds for run in each) for each in (runs[ours], other)]
    where = f"{SERVERS[ours.server].title}, {SCENARIOS[ours.scenario].format(requests)}"
    if lost:
        return f"{where}: without scheduling {lost} of {requests} answers are lost"
    if seconds[0] < GAIN * seconds[1]:
        return f"{where}: nothing is lost either way; scheduling saves {seconds[1] - seconds[0]:.1f} s"
    return f"{where}: **no gain**, this server schedules by itself"


def main() -> None:
    given = arguments()
    began, load = time.monotonic(), os.getloadavg()[0]
    runs: Runs = {key: [] for key in keys(given.only)}
    for number in range(given.rounds):
        for key, each in runs.items():
            print(f"round {number + 1} of {given.rounds}: {', '.join(key)}", flush=True)
            each.append(measure(key, given.requests))
    where = report.machine(["lmbridge", "openai"], given.rounds, load, time.monotonic() - began)
    if not given.only and (missing := why_no_llama_server()):
        where.append(f"the small router instead of llama-server's own: {missing}")
    lines, below = table(runs, given.requests), notes(runs, given.requests)
    print("\n" + "\n\n".join([report.plain(lines), "\n".join(below), "\n".join(where)]))
    if given.json:
        given.json.write_text(json.dumps({" / ".join(key): each for key, each in runs.items()}, indent=1))
    if given.write:
        page = PAGE.read_text()
        for name, text in (("swaps", report.markdown(lines)), ("notes", listed(below)), ("machine", listed(where))):
            page = report.replaced(page, name, text)
        PAGE.write_text(page)
        CHART.write_text(swap_chart(bars(runs), given.requests))


def listed(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def bars(runs: Runs) -> list[tuple[str, str, dict[str, int], str]]:
    """For the chart: place, client, what became of its requests, and what to write beside the bar."""
    found = []
    for key, each in runs.items():
        shown = middle(each)
        place = f"{SERVERS[key.server].title}: {SCENARIOS[key.scenario].format(REQUESTS)}".replace("`", "")
        swapped = f"{shown.swaps} swap{'s' * (shown.swaps != 1)}"
        remark = f"{swapped}, {median(run.seconds for run in each):.1f} s"
        found.append((place, CLIENTS[key.client][0], {kind: shown.count(kind) for kind in KINDS}, remark))
    return found


if __name__ == "__main__":
    main()
