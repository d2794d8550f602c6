"""Clients of completions: the CPU of a chunk and of a request, the time to the first chunk, memory, import, closing."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any, Final

from benchmarks.chart import COLOURS, draw_ratios
from benchmarks.peers import PEERS
from benchmarks.results import Results
from benchmarks.specification import IMPORT, Row, Table

_COST_BAR: Final = 1.5
"""The bar for chunks and requests, as a multiple of the limit."""
_FIRST_CHUNK_BAR: Final = 1.4
_FOOTPRINT_BAR: Final = 1.3
"""The bar for memory and import, as a multiple of the limit."""
_CLOSING_BAR: Final = 1.0
"""The most milliseconds by which the server may see a connection closed later than with the limit."""


def _chunks(key: str, title: str, at_once: int, reduced: Mapping[str, Any]) -> Row:
    full = {"chunks": 1000, "per_write": 20, "at_once": at_once, "seconds": 0.2}
    tiny = {"chunks": 50, "at_once": min(at_once, 5), "seconds": 0.0}
    return Row(
        key=key, title=title, unit="µs CPU", workload="chunks", bar=_COST_BAR, full=full, tiny=tiny, reduced=reduced
    )


def _requests(key: str, title: str, at_once: int, each: int) -> Row:
    # With many requests at a time, garbage collection makes most of the difference, so the measurement has to be long
    # enough to include several full collections.
    full = {"at_once": at_once, "each": each, "seconds": 0.2 if at_once < 100 else 0.4}
    tiny = {"at_once": min(at_once, 20), "each": 2, "seconds": 0.0}
    reduced = {"each": 1} if at_once > 100 else {}
    return Row(
        key=key, title=title, unit="µs CPU", workload="requests", bar=_COST_BAR, full=full, tiny=tiny, reduced=reduced
    )


def _leave(how: str, title: str) -> Row:
    return Row(
        key=f"leave-{how}",
        title=title,
        unit="ms",
        workload="leave",
        bar=_CLOSING_BAR,
        is_absolute=True,
        full={"how": how, "times": 5},
        tiny={"times": 1},
        reduced={"times": 2},
    )


def _draw(table: Table, results: Results) -> str:
    bars = []
    for row in table.rows:
        if not row.is_absolute:
            baseline = results[row.key, table.baseline]
            ratios = {name: results[row.key, name].ratios(baseline) for name in COLOURS}
            bars.append((row.title, {name: median(values) for name, values in ratios.items() if values}))
    return draw_ratios(bars, {name: table.peers[name].title for name in COLOURS})


CLIENTS_TABLE: Final = Table(
    name="clients",
    about="clients of completions",
    peers=PEERS,
    baseline="limit",
    worker="benchmarks.workers.clients",
    rounds=15,
    chart="performance.svg",
    draw=_draw,
    rows=(
        _chunks("stream", "a chunk of a stream, 20 a write", 1, {}),
        _chunks("stream-100", "a chunk, 100 streams at a time", 100, {"chunks": 200}),
        _requests("request", "a plain request, one by one", 1, 100),
        _requests("request-10", "a plain request, 10 at a time", 10, 20),
        _requests("request-100", "a plain request, 100 at a time", 100, 10),
        _requests("request-1000", "a plain request, 1,000 at a time", 1000, 8),
        Row(
            key="first",
            title="first chunk, warm connection",
            unit="µs",
            workload="first_chunk",
            bar=_FIRST_CHUNK_BAR,
            full={"times": 150},
            tiny={"times": 3},
            reduced={"times": 50},
        ),
        Row(
            key="memory",
            title="an open stream, 1,000 open",
            unit="KiB",
            workload="memory",
            bar=_FOOTPRINT_BAR,
            full={"streams": 1000},
            tiny={"streams": 20},
            reduced={"streams": 200},
            fresh_process=True,
        ),
        Row(key="import", title="import, new process", unit="ms CPU", workload=IMPORT, bar=_FOOTPRINT_BAR),
        _leave("break", "left by `break`: closed after"),
        _leave("close", "left by `aclose`: closed after"),
        _leave("cancel", "reader cancelled: closed after"),
    ),
)
