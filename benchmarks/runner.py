"""Measures any table in rounds.

In each round, the peers measure one row after another. They take turns in each row, in an order that changes from
round to round, and a ratio compares two figures of the same round. Whatever slows the machine down for a while
therefore slows all peers alike. Each round uses new processes, because the same code can be a little slower in one
process than in another for as long as the process lives.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Final

from benchmarks.processes import MeasurementError, Stub, Worker, measure_import
from benchmarks.results import Result, Results
from benchmarks.specification import IMPORT, Row, Table

FEW_ROUNDS: Final = 3
"""The number of rounds for peers that are far from the baseline."""


def measure_table(
    table: Table,
    rows: Sequence[Row],
    peers: Sequence[str],
    rounds: int,
    report_progress: Callable[[str], None],
    *,
    tiny: bool = False,
) -> Results:
    """Measures the rows of a table for these peers.

    Args:
        table: The table.
        rows: The rows to measure, in the order of the table.
        peers: The names of the peers to measure.
        rounds: The number of rounds.
        report_progress: A function that is called with a text about the row that is being measured.
        tiny: Whether to use small sizes, which only show that everything works.
    """
    results: Results = defaultdict(Result)
    few_rounds = {index * (rounds - 1) // (FEW_ROUNDS - 1) for index in range(FEW_ROUNDS)}
    with ExitStack() as stack:
        port = stack.enter_context(Stub()).port if table.uses_stub else 0
        for number in range(rounds):
            participants = [name for name in peers if not table.peers[name].few_rounds or number in few_rounds]
            start = number % len(participants) if participants else 0
            with _RoundWorkers(table, port) as workers:
                for row in rows:
                    report_progress(f"{table.name}, round {number + 1} of {rounds}: {row.key}")
                    for name in participants[start:] + participants[:start]:
                        result = results[row.key, name]
                        is_measured = row.peers is None or name in row.peers
                        if is_measured and not result.failure and result.seconds < row.bound:
                            workers.measure(row, name, result, number, tiny=tiny)
    return results


class _RoundWorkers(ExitStack):
    """The processes of one round. A process whose measurement failed is replaced."""

    def __init__(self, table: Table, port: int) -> None:
        super().__init__()
        self._table = table
        self._port = port
        self._workers: dict[str, Worker] = {}

    def measure(self, row: Row, peer: str, result: Result, number: int, *, tiny: bool) -> None:
        """Adds the figure of this round to a result, or the reason why there is none."""
        began = time.monotonic()
        try:
            result.figures[number] = self._figure(row, peer, tiny=tiny)
        except MeasurementError as error:
            result.failure = str(error)
            if (worker := self._workers.pop(row.server or peer, None)) is not None:
                worker.close()
        result.seconds += time.monotonic() - began

    def _figure(self, row: Row, peer: str, *, tiny: bool) -> Any:
        info = self._table.peers[peer]
        if row.workload == IMPORT:
            return measure_import(info.imports, row.bound)
        arguments = {**row.full, **(row.reduced if info.few_rounds else {}), **(row.tiny if tiny else {})}
        if row.server:
            arguments["peer"] = peer
        if row.fresh_process:
            with Worker(self._table.worker, row.server or peer, self._port) as worker:
                return worker.measure(row.workload, arguments, row.bound)
        worker, is_new = self._shared_worker(row.server or peer)
        if row.renews_client and not is_new:
            worker.measure("renew", {}, row.bound)
        return worker.measure(row.workload, arguments, row.bound)

    def _shared_worker(self, name: str) -> tuple[Worker, bool]:
        is_new = name not in self._workers
        if is_new:
            self._workers[name] = self.enter_context(Worker(self._table.worker, name, self._port))
        return self._workers[name], is_new
