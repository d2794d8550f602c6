"""Very many things at a time: what each costs, and that memory does not grow from one wave to the next."""

from __future__ import annotations

from typing import Final

from benchmarks.peers import PEERS
from benchmarks.specification import Row, Table

_GROWTH_BAR: Final = 4.0
"""The most MiB by which a process may grow more than with the limit, over all waves."""
_WAVES: Final = 6


def _rows(kind: str, title: str, at_once: int) -> tuple[Row, Row]:
    """Returns the rows for the cost of each unit, and for the growth of the process."""
    cost = Row(
        key=kind,
        title=title,
        unit="µs CPU",
        workload="cost",
        full={"kind": kind, "at_once": at_once, "seconds": 0.5},
        tiny={"at_once": 20, "seconds": 0.0},
        is_absolute=True,
        fresh_process=True,
        bound=180.0,
    )
    growth = Row(
        key=f"{kind}-growth",
        title=f"… growth over {_WAVES} waves",
        unit="MiB",
        workload="growth",
        full={"kind": kind, "at_once": at_once, "waves": _WAVES},
        tiny={"at_once": 20, "waves": 1},
        # Ten thousand requests take openai-python a quarter of a minute.
        reduced={"waves": 2},
        bar=_GROWTH_BAR,
        is_absolute=True,
        fresh_process=True,
        bound=180.0,
    )
    return cost, growth


LOAD_TABLE: Final = Table(
    name="load",
    about="very many streams, runs and queued requests at a time",
    peers={name: PEERS[name] for name in ("limit", "lmbridge", "openai")},
    baseline="limit",
    worker="benchmarks.workers.load",
    rounds=3,
    page="reliability.md",
    rows=(
        *_rows("streams", "a stream of 20 chunks, 1,000 at a time", 1000),
        *_rows("queued", "a request, 10,000 waiting, 10 at a time", 10_000),
        *_rows("through_gateway", "a stream through the gateway, 1,000 at a time", 1000),
        *_rows("runs", "an agent run with two calls, 1,000 at a time", 1000),
    ),
)
