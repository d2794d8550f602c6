"""What stands in the tables, how much of it is done, and where our bars are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple


class Row(NamedTuple):
    """A row of the first table: one workload, all clients."""

    key: str
    title: str
    unit: str
    workload: str
    """A method of `workloads.Bench`, or "import"."""
    bar: float
    """For lmbridge: the ratio to the limit, or milliseconds more than the limit for a row in milliseconds."""
    full: Mapping[str, Any]
    tiny: Mapping[str, Any]
    """For a look whether it works."""
    far: Mapping[str, Any] = {}
    """What is less for the clients that are far off."""
    fresh: bool = False
    """Whether each figure takes a process of its own."""

    @property
    def absolute(self) -> bool:
        """Whether its figures are shown as they are, not as ratios."""
        return self.workload == "leave"


class Sweep(NamedTuple):
    """A row of the second table: one workload in several sizes, the limit and lmbridge."""

    key: str
    title: str
    workload: str
    vary: str
    """The argument that grows."""
    values: tuple[int, ...]
    since: int
    """The value that the growth is counted from."""
    bar: float
    """How much more lmbridge may grow than the limit."""
    full: Mapping[str, Any]
    tiny_values: tuple[int, ...]
    tiny: Mapping[str, Any]


def _chunks(key: str, title: str, at_once: int, far: Mapping[str, Any]) -> Row:
    full = {"chunks": 1000, "per_write": 20, "at_once": at_once, "seconds": 0.2}
    tiny = {"chunks": 50, "per_write": 20, "at_once": min(at_once, 5), "seconds": 0.0}
    return Row(key, title, "µs CPU", "chunks", 1.25, full, tiny, far)


def _requests(key: str, title: str, at_once: int, each: int) -> Row:
    # Many at a time, most of what differs is garbage collection; the figure has to last for several full ones.
    full = {"at_once": at_once, "each": each, "seconds": 0.2 if at_once < 100 else 0.4}
    tiny = {"at_once": min(at_once, 20), "each": 2, "seconds": 0.0}
    return Row(key, title, "µs CPU", "requests", 1.25, full, tiny, {"each": 1} if at_once > 100 else {})


def _leave(how: str, title: str) -> Row:
    return Row(
        f"leave-{how}", title, "ms", "leave", 1.0, {"how": how, "times": 5}, {"how": how, "times": 1}, {"times": 2}
    )


ROWS: Final = (
    _chunks("stream", "a chunk of a stream, 20 a write", 1, {}),
    _chunks("stream-100", "a chunk, 100 streams at a time", 100, {"chunks": 200}),
    _requests("request", "a plain request, one by one", 1, 100),
    _requests("request-10", "a plain request, 10 at a time", 10, 20),
    _requests("request-100", "a plain request, 100 at a time", 100, 10),
    _requests("request-1000", "a plain request, 1,000 at a time", 1000, 8),
    Row("first", "first chunk, warm connection", "µs", "first_chunk", 1.2, {"times": 150}, {"times": 3}, {"times": 50}),
    Row(
        "memory",
        "an open stream, 1,000 open",
        "KiB",
        "memory",
        1.2,
        {"streams": 1000},
        {"streams": 20},
        {"streams": 200},
        fresh=True,
    ),
    Row("import", "import, fresh process", "ms CPU", "import", 1.15, {}, {}, fresh=True),
    _leave("break", "left by `break`: closed after"),
    _leave("close", "left by `aclose`: closed after"),
    _leave("cancel", "reader cancelled: closed after"),
)

SWEEPS: Final = (
    Sweep(
        "age",
        "a plain request after {} others",
        "aged",
        vary="before",
        values=(100, 20_000),
        since=100,
        bar=1.1,
        full={"requests": 1000},
        tiny_values=(2, 10),
        tiny={"requests": 3},
    ),
    Sweep(
        "length",
        "a chunk of a stream of {}",
        "chunks",
        vary="chunks",
        values=(10, 1_000, 100_000),
        since=1_000,
        bar=1.1,
        full={"per_write": 20, "at_once": 1, "seconds": 0.2},
        tiny_values=(10, 20, 40),
        tiny={"per_write": 20, "at_once": 1, "seconds": 0.0},
    ),
    Sweep(
        "waiters",
        "a plain request, {} at once on 10 places",
        "waiters",
        vary="waiters",
        values=(100, 1_000, 10_000),
        since=100,
        bar=1.1,
        full={"places": 10, "seconds": 0.2},
        tiny_values=(10, 20, 40),
        tiny={"places": 5, "seconds": 0.0},
    ),
)
