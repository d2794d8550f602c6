"""Solved tasks: the same scripted model with the mistakes of small models, and one agent after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from benchmarks.results import Results
from benchmarks.solving_peers import LONG_TASK_SOLVERS, SOLVERS
from benchmarks.specification import Row, Table, TableLines

TASKS: Final = 60


def _row(key: str, title: str, groups: Sequence[str], rate: float) -> Row:
    return Row(
        key=key,
        title=title,
        unit="solved",
        workload="solve",
        full={"tasks": TASKS, "rate": rate, "groups": list(groups), "seed": 1},
        tiny={"tasks": 4},
        renews_client=False,
        bound=600.0,
    )


_ALL: Final = ("structured", "text")


def format_solved(table: Table, rows: Sequence[Row], results: Results) -> TableLines:
    """Returns a line for each row, with the numbers of solved tasks."""
    peers = [name for name in table.peers if any((row.key, name) in results for row in rows)]
    heading = ["", *(table.peers[name].title for name in peers)]
    return [heading, *([row.title, *(_cell(results, row, name) for name in peers)] for row in rows)]


def _cell(results: Results, row: Row, name: str) -> str:
    runs: list[Any] = list(results[row.key, name].known.values())
    if not runs:
        return "failed*" if results[row.key, name].failure else "\N{EN DASH}"
    solved, tasks = sum(run["solved"] for run in runs), sum(run["tasks"] for run in runs)
    requests, invalid = sum(run["requests"] for run in runs), sum(run["invalid"] for run in runs)
    return f"{solved} of {tasks} ({requests} requests{f', {invalid} invalid' if invalid else ''})"


SOLVING_TABLE: Final = Table(
    name="solving",
    about="tasks that agents solve with a model that makes mistakes",
    peers=SOLVERS,
    baseline="lmbridge",
    worker="benchmarks.workers.solving",
    uses_stub=False,
    rounds=1,
    page="small-models.md",
    format=format_solved,
    rows=(
        _row("all-30", "all mistakes, three replies in ten", _ALL, 0.3),
        _row("structured-30", "mistakes in calls, three replies in ten", ("structured",), 0.3),
        _row("all-10", "all mistakes, one reply in ten", _ALL, 0.1),
        _row("structured-10", "mistakes in calls, one reply in ten", ("structured",), 0.1),
        _row("none", "no mistakes", _ALL, 0.0),
    ),
)

LONG_TASKS_TABLE: Final = Table(
    name="long-tasks",
    about="long tasks that agents solve with a model whose context they fill several times",
    peers=LONG_TASK_SOLVERS,
    baseline="lmbridge",
    worker="benchmarks.workers.solving",
    uses_stub=False,
    rounds=1,
    page="small-models.md",
    format=format_solved,
    rows=tuple(
        Row(
            key=f"pages-{pages}",
            title=f"{pages} pages, {pages // 8} times the context",
            unit="solved",
            workload="solve_long",
            full={"tasks": 30, "pages": pages},
            tiny={"tasks": 3},
            renews_client=False,
            bound=600.0,
        )
        for pages in (16, 32, 48)
    ),
)
