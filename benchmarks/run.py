"""Rounds: every client in every row, one beside the other, and again from the start."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import median, quantiles
from typing import Any, Final

from benchmarks.peers import PEERS
from benchmarks.processes import FailedError, Stub, Worker, measure_import
from benchmarks.rows import Row, Sweep

BOUND: Final = 60.0
"""Seconds that a client may take for one figure."""
PATIENCE: Final = 30.0
"""Seconds after which a client is not asked again for a row."""
FAR_ROUNDS: Final = 3
STEADY: Final = ("limit", "lmbridge")
STEADY_ROUNDS: Final = 7

Figures = dict[int, float | None]
"""By round; None is "never"."""


class Result:
    """The figures of one client in one row."""

    def __init__(self) -> None:
        self.figures: Figures = {}
        self.failed = ""
        self.seconds = 0.0

    @property
    def known(self) -> dict[int, float]:
        return {number: value for number, value in self.figures.items() if value is not None}

    @property
    def never(self) -> bool:
        """Whether what was waited for did not come, in more than half of the rounds."""
        return len(self.known) * 2 < len(self.figures)

    @property
    def middle(self) -> float | None:
        """The median."""
        return median(self.known.values()) if self.known and not self.never else None

    def ratios(self, limit: Result) -> list[float]:
        """To the limit, in each round that has both."""
        return [value / limit.known[number] for number, value in self.known.items() if number in limit.known]

    def as_json(self) -> dict[str, Any]:
        return {"figures": self.figures, "failed": self.failed}


Results = dict[tuple[str, str], Result]
"""By row (for a sweep: key and value, like "length 10") and client."""


def spread(values: Sequence[float]) -> float:
    """Half the range of the middle half."""
    if len(values) < 3:
        return (max(values) - min(values)) / 2 if values else 0.0
    low, _, high = quantiles(values, n=4, method="inclusive")
    return (high - low) / 2


def rows_of(
    rows: Sequence[Row], names: Sequence[str], rounds: int, tell: Callable[[str], None], *, tiny: bool = False
) -> Results:
    """All rounds of the first table. A round has processes of its own: that one is a little slower than another
    with the same code, for as long as it lives, does not decide anything."""
    results: Results = defaultdict(Result)
    far_rounds = {index * (rounds - 1) // max(1, FAR_ROUNDS - 1) for index in range(FAR_ROUNDS)}
    with Stub() as stub:
        for number in range(rounds):
            taking = [name for name in names if not PEERS[name].far or number in far_rounds]
            taking = taking[number % len(taking) :] + taking[: number % len(taking)]
            with _Clients(stub.port) as clients:
                for row in rows:
                    tell(f"round {number + 1} of {rounds}: {row.key}")
                    for name in taking:
                        result = results[row.key, name]
                        if not result.failed and result.seconds < PATIENCE:
                            clients.renew(name)
                            arguments = row.tiny if tiny else {**row.full, **(row.far if PEERS[name].far else {})}
                            clients.measure(row, name, arguments, result, number)
    return results


def sweeps_of(sweeps: Sequence[Sweep], rounds: int, tell: Callable[[str], None], *, tiny: bool = False) -> Results:
    """All rounds of the second table."""
    results: Results = defaultdict(Result)
    with Stub() as stub:
        for number in range(rounds):
            with _Clients(stub.port) as clients:
                for sweep in sweeps:
                    tell(f"steady, round {number + 1} of {rounds}: {sweep.key}")
                    for name in STEADY:
                        clients.renew(name)
                    for value in sweep.tiny_values if tiny else sweep.values:
                        arguments = {**(sweep.tiny if tiny else sweep.full), sweep.vary: value}
                        for name in STEADY if number % 2 else STEADY[::-1]:
                            clients.measure(sweep, name, arguments, results[f"{sweep.key} {value}", name], number)
    return results


class _Clients(ExitStack):
    """The processes of a round. One that failed is replaced."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._workers: dict[str, Worker] = {}

    def measure(self, row: Row | Sweep, name: str, arguments: Any, result: Result, number: int) -> None:
        began = time.monotonic()
        try:
            if row.workload == "import":
                result.figures[number] = measure_import(name, BOUND)
            elif isinstance(row, Row) and row.fresh:
                with Worker(name, self._port) as worker:
                    result.figures[number] = worker.measure(row.workload, arguments, BOUND)
            else:
                result.figures[number] = self._worker(name).measure(row.workload, arguments, BOUND)
        except FailedError as failure:
            result.failed = str(failure)
            if (worker := self._workers.pop(name, None)) is not None:
                worker.__exit__(None, None, None)
        result.seconds += time.monotonic() - began

    def renew(self, name: str) -> None:
        """Gives a client's process a new client, if it has one."""
        if name in self._workers:
            self._workers[name].measure("renew", {}, BOUND)

    def _worker(self, name: str) -> Worker:
        if name not in self._workers:
            self._workers[name] = self.enter_context(Worker(name, self._port))
        return self._workers[name]
