"""Simulates agent runs on 1, 10 and 100 servers, and shows where more servers stop helping.

    python -m benchmarks.scale           # a minute or two; the last rows have a million tasks
    python -m benchmarks.scale --tiny    # some seconds, and figures that mean little
    python -m benchmarks.scale --write   # writes the table, the chart and the gateway's limit into docs/scaling.md

The same seed gives the same figures on every machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from benchmarks.chart import svg_page
from benchmarks.processes import ROOT
from benchmarks.report import DASH, as_markdown, as_plain, replace_section
from benchmarks.scale_simulation import ANSWER_TOKENS, GATEWAY_CHUNK, GATEWAY_REQUEST, Outcome, Scenario, Simulation

SIZES: Final = {1: 10_000, 10: 100_000, 100: 1_000_000}
"""The tasks for each number of servers."""
FEWER: Final = 100_000
"""The most tasks of the variants that lmbridge is compared with."""
OURS: Final = "lmbridge"
VARIANTS: Final[Mapping[str, Mapping[str, Any]]] = {
    OURS: {},
    "the least loaded server": {"prefers_warm": False},
    'order="request"': {"order": "request"},
    "one gateway": {"has_gateway": True},
    "servers 10 times as fast": {"speed": 10.0},
    "these through one gateway": {"speed": 10.0, "has_gateway": True},
}
"""What differs from lmbridge's defaults in each bar of the chart."""
COLOURS: Final = {
    "variant-0": ("#0b7a4b", "#3ecf8e"),
    "variant-1": ("#cf222e", "#f85149"),
    "variant-2": ("#bf8700", "#d29922"),
    "variant-3": ("#0969da", "#58a6ff"),
    "variant-4": ("#8250df", "#b392f0"),
    "variant-5": ("#bc4c00", "#f0883e"),
}
_LEFT: Final = 220
_WIDTH: Final = 860
_RIGHT: Final = 170
_BAR: Final = 18
_STEP: Final = 24

Results = Sequence[tuple[str, Scenario, Outcome]]


def scenarios(divisor: int = 1) -> Iterator[tuple[str, Scenario]]:
    """Yields the scenarios to simulate, each with the name of its variant.

    Args:
        divisor: By how much to divide the number of tasks.
    """
    for servers, tasks in SIZES.items():
        for name, options in VARIANTS.items():
            # With one server, the choice of the least loaded one changes nothing.
            if servers > 1 or options.get("prefers_warm", True):
                count = tasks if name == OURS else min(tasks, FEWER)
                yield name, Scenario(servers=servers, tasks=count // divisor, **options)


def format_table(results: Results) -> list[list[str]]:
    heading = [
        "servers",
        "what",
        "tasks",
        "tasks/s",
        "efficiency",
        "median",
        "p99",
        "fairness",
        "cache hits",
        "gateway",
    ]
    return [heading] + [
        [
            str(scenario.servers),
            name,
            f"{scenario.tasks:,}",
            f"{outcome.tasks_per_second:.2f}",
            f"{outcome.efficiency:.0%}",
            f"{outcome.median:.1f} s",
            f"{outcome.p99:.1f} s",
            f"{outcome.fairness:.2f}",
            f"{outcome.hits:.0%}",
            f"{outcome.gateway_load:.0%}" if scenario.has_gateway else DASH,
        ]
        for name, scenario, outcome in results
    ]


def draw_chart(results: Results) -> str:
    """Returns a chart of the efficiency of each variant for each number of servers."""
    names = list(VARIANTS)
    parts: list[str] = []
    y, last = 0, 0
    for name, scenario, outcome in results:
        if scenario.servers != last:
            y, last = y + 28, scenario.servers
            title = f"{last} server{'s' if last > 1 else ''}"
            parts.append(f'<text x="16" y="{y}" font-weight="600">{title}</text>')
            y += 10
        width = (_WIDTH - _LEFT - _RIGHT) * outcome.efficiency
        label = f"{outcome.efficiency:.0%} · {outcome.tasks_per_second:.3g} tasks/s"
        parts += [
            f'<text x="{_LEFT - 12}" y="{y + 13}" text-anchor="end">{name.replace(chr(34), "&quot;")}</text>',
            f'<rect class="variant-{names.index(name)}" x="{_LEFT}" y="{y}" width="{width:.1f}" height="{_BAR}"/>',
            f'<text class="small" x="{_LEFT + width + 6:.1f}" y="{y + 13}">{label}</text>',
        ]
        y += _STEP
    return svg_page(_WIDTH, y + 10, "The efficiency of each variant, by the number of servers", COLOURS, parts)


def describe_limit() -> str:
    answers = round(1 / (GATEWAY_REQUEST + ANSWER_TOKENS * GATEWAY_CHUNK), -2)
    chunks = round(1 / GATEWAY_CHUNK, -2)
    return (
        f"The gateway's process needs {GATEWAY_REQUEST * 1e3:.2f} ms for a request and {GATEWAY_CHUNK * 1e6:.0f} µs\n"
        f"for a chunk. So it passes at most about {answers:,.0f} answers a second, of {ANSWER_TOKENS} chunks each, or\n"
        f"{chunks:,.0f} chunks a second if the answers are long."
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="simulate a thousandth of the tasks")
    parser.add_argument("--write", action="store_true", help="write the table and the chart in docs/")
    arguments = parser.parse_args()
    if arguments.tiny and arguments.write:
        parser.error("--write needs all tasks: leave out --tiny")
    began, results = time.process_time(), []
    for name, scenario in scenarios(1000 if arguments.tiny else 1):
        results.append((name, scenario, Simulation(scenario).run()))
        if sys.stderr.isatty():
            print(f"\r\033[K{scenario.servers} servers, {name}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    lines = format_table(results)
    print(f"{as_plain(lines)}\n\n{describe_limit()}\nIt took {time.process_time() - began:.0f} s of CPU time.")
    if arguments.write:
        page = ROOT / "docs" / "scaling.md"
        text = replace_section(page.read_text(), "scale", as_markdown(lines))
        page.write_text(replace_section(text, "scale-gateway", describe_limit()))
        (ROOT / "docs" / "scaling.svg").write_text(draw_chart(results))


if __name__ == "__main__":
    main()
