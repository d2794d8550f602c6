"""Requests for two models to servers that hold one at a time: the fate of each request, and the swaps of the server."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Final

from benchmarks.report import DASH
from benchmarks.results import Result, Results
from benchmarks.routers import why_no_llama_server
from benchmarks.specification import OURS, PeerInfo, Row, Table, TableLines
from benchmarks.swap_chart import FATES, draw_swaps
from benchmarks.swap_servers import SWAP_SERVERS

_REQUESTS: Final = 60
_MAX_SWAPS: Final = 6
"""The bar: the most swaps that a round may have. All of its answers have to be whole, too."""
_PERCENTILE_ANSWERS: Final = 20
"""The number of whole answers that a 95th percentile needs."""
_CLEAR_GAIN: Final = 0.9
"""The fraction of the other client's time below which lmbridge's time counts as a gain."""
_SCENARIOS: Final = {
    "at-once": "{} at once, models at random",
    "callers": "{} callers one after another, models in turn",
}

Run = Mapping[str, Any]
"""A measurement: `outcomes` as (fate, seconds, error), the `seconds` of all requests, and the number of `swaps`."""


def why_no_swap_server(server: str) -> str | None:
    """Returns what this machine lacks to run one of the servers, or None."""
    if server == "killing":
        return None
    if importlib.util.find_spec("xllamacpp") is None:
        return "lmbridge[local] is not installed"
    reason = why_no_llama_server()
    if server == "llama-server":
        return reason
    return None if reason else "it is only needed where llama-server cannot run"


def _row(server: str, scenario: str) -> Row:
    info = SWAP_SERVERS[server]
    # Real servers lose nothing, so a client without retries would show nothing new.
    peers = (OURS, "openai") if info.is_real else None

    return Row(
        key=f"{server}-{scenario}",
        title=f"{info.title}, {_SCENARIOS[scenario].format(_REQUESTS)}",
        unit="",
        workload="answers",
        full={"server": server, "scenario": scenario, "requests": _REQUESTS},
        tiny={"requests": 12},
        fresh_process=True,
        peers=peers,
        bound=300.0,
        why_missing=lambda: why_no_swap_server(server),
    )


def _runs(result: Result) -> list[Run]:
    return list(result.figures.values())


def _count(run: Run, fate: str) -> int:
    return sum(outcome[0] == fate for outcome in run["outcomes"])


def _is_complete(run: Run) -> bool:
    return _count(run, "whole") == len(run["outcomes"])


def _percentile(run: Run) -> float | None:
    """Returns the 95th percentile of the seconds that whole answers took, or None if there are too few."""
    seconds = sorted(outcome[1] for outcome in run["outcomes"] if outcome[0] == "whole")
    return seconds[int(0.95 * (len(seconds) - 1))] if len(seconds) >= _PERCENTILE_ANSWERS else None


def _middle_run(result: Result) -> Run:
    """Returns the run with the median number of whole answers.

    The table shows one run, because its counts add up to the number of requests; medians of several runs may not.
    """
    runs = sorted(_runs(result), key=lambda run: _count(run, "whole"))
    return runs[len(runs) // 2]


def _with_range(shown: int, counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(shown) if low == high else f"{shown} ({low}{DASH}{high})"


def _measured(table: Table, rows: Sequence[Row], results: Results) -> list[tuple[Row, str, Result]]:
    cells = [(row, name, results.get((row.key, name))) for row in rows for name in table.peers]
    return [(row, name, result) for row, name, result in cells if result is not None and result.figures]


def format_fates(table: Table, rows: Sequence[Row], results: Results) -> TableLines:
    lines = [["requests", "client", *FATES, "swaps", "wall time", "p95", "our bar"]]
    for row, name, result in _measured(table, rows, results):
        runs, shown = _runs(result), _middle_run(result)
        percentiles = [each for run in runs if (each := _percentile(run)) is not None]
        met_bar = all(_is_complete(run) and run["swaps"] <= _MAX_SWAPS for run in runs)
        lines.append(
            [
                row.title,
                table.peers[name].title,
                *(_with_range(_count(shown, fate), [_count(run, fate) for run in runs]) for fate in FATES),
                _with_range(shown["swaps"], [run["swaps"] for run in runs]),
                f"{median(run['seconds'] for run in runs):.1f} s",
                f"{median(percentiles):.1f} s" if len(percentiles) == len(runs) else DASH,
                ("ok" if met_bar else "over") if name == OURS else "",
            ]
        )
    return lines


def list_errors_and_gains(table: Table, rows: Sequence[Row], results: Results) -> list[str]:
    """Lists the errors of the first round, and what lmbridge's scheduling gains in each row."""
    lines = []
    for row, name, result in _measured(table, rows, results):
        errors = Counter(outcome[2] for outcome in _runs(result)[0]["outcomes"] if outcome[2])
        if errors:
            listed = "; ".join(f"{count} times `{error}`" for error, count in errors.most_common(3))
            lines.append(f"{table.peers[name].title}, {row.title}, first round: {listed}")
    for row in rows:
        ours, other = results.get((row.key, OURS)), results.get((row.key, "openai"))
        if ours is not None and other is not None and ours.figures and other.figures:
            lines.append(f"{row.title}: {_describe_gain(ours, other)}")
    return lines


def _describe_gain(ours: Result, other: Result) -> str:
    run = _middle_run(other)
    requests = len(run["outcomes"])
    if lost := requests - _count(run, "whole"):
        return f"without scheduling {lost} of {requests} answers are lost"
    own_seconds, other_seconds = (median(run["seconds"] for run in _runs(each)) for each in (ours, other))
    if own_seconds < _CLEAR_GAIN * other_seconds:
        return f"nothing is lost either way; scheduling saves {other_seconds - own_seconds:.1f} s"
    return "**no gain**, this server schedules by itself"


def _draw(table: Table, results: Results) -> str:
    bars = []
    for row, name, result in _measured(table, table.rows, results):
        shown = _middle_run(result)
        swaps = f"{shown['swaps']} swap{'s' * (shown['swaps'] != 1)}"
        remark = f"{swaps}, {median(run['seconds'] for run in _runs(result)):.1f} s"
        counts = {fate: _count(shown, fate) for fate in FATES}
        bars.append((row.title.replace("`", ""), table.peers[name].title, counts, remark))
    return draw_swaps(bars, _REQUESTS)


MODEL_SWAPS_TABLE: Final = Table(
    name="model-swaps",
    about="requests for two models to servers that hold one",
    peers={
        "lmbridge": PeerInfo("lmbridge", distributions=("lmbridge", "aiohttp", "msgspec")),
        "openai": PeerInfo("openai-python", imports="openai", distributions=("openai", "httpx2", "pydantic")),
        "openai-once": PeerInfo("openai-python, max_retries=0", imports="openai"),
    },
    baseline="openai",
    worker="benchmarks.workers.model_swaps",
    rounds=3,
    uses_stub=False,
    page="model-scheduling.md",
    chart="model-swaps.svg",
    draw=_draw,
    format=format_fates,
    notes=list_errors_and_gains,
    rows=tuple(_row(server, scenario) for server in SWAP_SERVERS for scenario in _SCENARIOS),
)
