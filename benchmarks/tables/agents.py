"""Agent loops: the CPU of a round, its growth with the conversation, and the memory of a run."""

from __future__ import annotations

from typing import Final

from benchmarks.agent_peers import AGENT_PEERS
from benchmarks.specification import Growth, Row, Table

_ROUND_BAR: Final = 2.5
"""The bar of a round, as a multiple of the hand-written loop that streams."""


def _rounds(calls: int, title: str) -> Row:
    return Row(
        key=f"calls-{calls}",
        title=f"a round of a run with {title}",
        unit="µs CPU",
        workload="calls",
        bar=_ROUND_BAR,
        full={"calls": calls, "seconds": 0.3},
        tiny={"calls": min(calls, 3), "seconds": 0.0},
        fresh_process=True,
    )


AGENTS_TABLE: Final = Table(
    name="agents",
    about="agent loops",
    peers=AGENT_PEERS,
    baseline="limit",
    worker="benchmarks.workers.agents",
    rows=(
        _rounds(1, "1 tool call"),
        _rounds(20, "20"),
        _rounds(100, "100"),
        Row(
            key="memory",
            title="a run, 1,000 in flight",
            unit="KiB",
            workload="memory",
            full={"runs": 1000},
            tiny={"runs": 5},
            fresh_process=True,
        ),
    ),
    growths=(Growth(title="growth of a round, 20 to 100", first="calls-20", last="calls-100", bar=1.1),),
)
