"""Many agent runs on one server: how much of their conversations the server processes again, and when the runs end."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, Final

from benchmarks.report import DASH
from benchmarks.results import Result, Results
from benchmarks.specification import OURS, PeerInfo, Row, Table, TableLines

_RUNS: Final = 24
_ROUNDS: Final = 4
_WORDS: Final = 750
_TOLERANCE: Final = 1.1
"""The bar: lmbridge may have at most this multiple of the fewest tokens and the earliest mean end of the other agents,
and of lmbridge's last end with `order="request"`."""

Run = Mapping[str, Any]
"""A measurement: `ended`, the seconds after which each run had ended, and the `tokens` of prompts processed."""


def _why_missing() -> str | None:
    return None if importlib.util.find_spec("xllamacpp") else "lmbridge[local] is not installed"


def _row(slots: int, *, has_cache: bool) -> Row:
    return Row(
        key=f"{slots}-slots-{'cache' if has_cache else 'no-cache'}",
        title=f"{slots} slots, {'with a prompt cache' if has_cache else 'without a prompt cache'}",
        unit="",
        workload="fleet",
        full={"slots": slots, "has_cache": has_cache, "runs": _RUNS, "rounds": _ROUNDS, "words": _WORDS},
        tiny={"runs": 3, "rounds": 2, "words": 20},
        fresh_process=True,
        bound=1800.0,
        why_missing=_why_missing,
    )


def _tokens(result: Result) -> float:
    return float(median(run["tokens"] for run in result.figures.values()))


def _end(result: Result, summarize: Callable[[list[float]], float]) -> float:
    """Returns the median of the rounds. A round in which no run was whole counts as infinity."""
    whole = [[each for each in run["ended"] if each is not None] for run in result.figures.values()]
    return median(summarize(each) if each else math.inf for each in whole)


def _mean_end(result: Result) -> float:
    return _end(result, fmean)


def _last_end(result: Result) -> float:
    return _end(result, max)


def _seconds(end: float) -> str:
    return DASH if math.isinf(end) else f"{end:.0f} s"


def _format(table: Table, rows: Sequence[Row], results: Results) -> TableLines:
    lines = [["server", "agents", "whole runs", "prompt tokens processed", "mean end", "last end", "our bar"]]
    for row in rows:
        measured = {name: each for name in table.peers if (each := results.get((row.key, name))) and each.figures}
        others = [each for name, each in measured.items() if name != OURS]
        for name, result in measured.items():
            runs: list[Run] = list(result.figures.values())
            whole = min(sum(each is not None for each in run["ended"]) for run in runs)
            bar = ""
            if name == OURS and others:
                is_met = whole == len(runs[0]["ended"]) and all(
                    measure(result) <= _TOLERANCE * min(map(measure, others)) for measure in (_tokens, _mean_end)
                )
                if (by_request := measured.get(table.baseline)) is not None:
                    is_met = is_met and _last_end(result) <= _TOLERANCE * _last_end(by_request)
                bar = "ok" if is_met else "over"
            lines.append(
                [
                    row.title,
                    table.peers[name].title,
                    f"{whole} of {len(runs[0]['ended'])}",
                    f"{_tokens(result):,.0f}",
                    _seconds(_mean_end(result)),
                    _seconds(_last_end(result)),
                    bar,
                ]
            )
    return lines


FLEET_TABLE: Final = Table(
    name="fleet",
    about="many agent runs on one real server",
    peers={
        "lmbridge": PeerInfo("lmbridge", distributions=("lmbridge", "aiohttp", "xllamacpp")),
        "lmbridge-request": PeerInfo('lmbridge, `order="request"`'),
        "agents-semaphore": PeerInfo(
            "openai-agents, semaphore of the slots", imports="agents", distributions=("openai-agents", "openai")
        ),
        "agents": PeerInfo("openai-agents", imports="agents"),
    },
    baseline="lmbridge-request",
    worker="benchmarks.workers.fleet",
    rounds=2,
    uses_stub=False,
    page="concurrency.md",
    format=_format,
    rows=tuple(_row(slots, has_cache=has_cache) for slots in (2, 4) for has_cache in (True, False)),
)
