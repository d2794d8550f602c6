"""Growth of the cost: with the age of the client, the length of a stream, and the number of waiting requests."""

from __future__ import annotations

from typing import Any, Final

from benchmarks.peers import PEERS
from benchmarks.specification import Growth, Row, Table

_GROWTH_BAR: Final = 1.1


def _row(key: str, title: str, workload: str, full: dict[str, Any], tiny: dict[str, Any], **options: Any) -> Row:
    return Row(key=key, title=title, unit="µs CPU", workload=workload, full=full, tiny=tiny, **options)


def _chunks(count: int, tiny: int) -> Row:
    full = {"chunks": count, "per_write": 20, "at_once": 1, "seconds": 0.2}
    title = f"a chunk of a stream of {count:,}"
    return _row(f"length-{count}", title, "chunks", full, {"chunks": tiny, "seconds": 0.0})


def _waiters(count: int, tiny: int) -> Row:
    full = {"waiters": count, "at_once": 10, "seconds": 0.2}
    title = f"a plain request, {count:,} at once, 10 at a time"
    return _row(f"waiters-{count}", title, "waiters", full, {"waiters": tiny, "at_once": 5, "seconds": 0.0})


GROWTH_TABLE: Final = Table(
    name="growth",
    about="growth of the cost with age, length and waiting requests",
    peers={name: PEERS[name] for name in ("limit", "lmbridge")},
    baseline="limit",
    worker="benchmarks.workers.clients",
    rounds=7,
    rows=(
        _row(
            "age-100",
            "a plain request after 100 others",
            "aged",
            {"before": 100, "requests": 1000},
            {"before": 2, "requests": 3},
        ),
        # This row continues with the client of the row before, which has made 1,100 requests by then.
        _row(
            "age-20000",
            "a plain request after 20,000 others",
            "aged",
            {"before": 20_000, "requests": 1000},
            {"before": 10, "requests": 3},
            renews_client=False,
        ),
        _chunks(10, 10),
        _chunks(1_000, 20),
        _chunks(100_000, 40),
        _waiters(100, 10),
        _waiters(1_000, 20),
        _waiters(10_000, 40),
    ),
    growths=(
        Growth(title="growth with age", first="age-100", last="age-20000", bar=_GROWTH_BAR),
        # In a stream of 10 chunks, most of the cost is that of the request.
        Growth(title="growth from 1,000 to 100,000 chunks", first="length-1000", last="length-100000", bar=_GROWTH_BAR),
        Growth(title="growth from 100 to 10,000 at once", first="waiters-100", last="waiters-10000", bar=_GROWTH_BAR),
    ),
)
