"""The gateway: what programs that know nothing of each other gain from it, and what it costs."""

from __future__ import annotations

from typing import Any, Final

from benchmarks.specification import PeerInfo, Row, Table
from benchmarks.swap_servers import SWAP_SERVERS
from benchmarks.tables.model_swaps import format_fates, list_errors_and_gains, why_no_swap_server

_REQUESTS: Final = 60
_PROCESSES: Final = 4
_CHUNK_BAR: Final = 1.5
"""The bar for a chunk, as a multiple of a hand-written reverse proxy."""
_FIRST_BYTE_BAR: Final = 1.0
"""The most milliseconds by which the gateway may delay the first byte."""
_GROWTH_BAR: Final = 4.0
"""The most MiB by which the gateway may grow more than a hand-written reverse proxy."""
_PROXIES: Final = ("bare", "lmbridge", "litellm")


def _swaps(server: str) -> Row:
    return Row(
        key=server,
        title=f"{SWAP_SERVERS[server].title}, {_REQUESTS} from {_PROCESSES} programs",
        unit="",
        workload="answers",
        full={"server": server, "requests": _REQUESTS, "processes": _PROCESSES},
        tiny={"requests": 12, "processes": 2},
        fresh_process=True,
        bound=300.0,
        why_missing=lambda: why_no_swap_server(server),
    )


def _chunks(key: str, title: str, **full: Any) -> Row:
    return Row(
        key=key,
        title=title,
        unit="µs CPU",
        workload="chunks",
        full=full,
        tiny={"chunks": 20, "at_once": min(full["at_once"], 5)},
        bar=_CHUNK_BAR,
        # LiteLLM's proxy takes up to a minute to start.
        bound=180.0,
        peers=_PROXIES,
    )


GATEWAY_SWAPS_TABLE: Final = Table(
    name="gateway-swaps",
    about="several programs with openai-python at a server that holds one model, with and without the gateway",
    peers={
        "lmbridge": PeerInfo("openai-python through the gateway", distributions=("lmbridge", "aiohttp")),
        "openai": PeerInfo("openai-python", imports="openai", distributions=("openai",)),
    },
    baseline="openai",
    worker="benchmarks.workers.gateway_swaps",
    rounds=3,
    uses_stub=False,
    requires=("openai",),
    page="gateway.md",
    format=format_fates,
    notes=list_errors_and_gains,
    rows=tuple(map(_swaps, SWAP_SERVERS)),
)

GATEWAY_COST_TABLE: Final = Table(
    name="gateway-cost",
    about="what a gateway costs, beside other proxies",
    peers={
        "direct": PeerInfo("nothing in between"),
        "bare": PeerInfo("a bare aiohttp proxy", distributions=("aiohttp",)),
        "lmbridge": PeerInfo("lmbridge's gateway", distributions=("lmbridge",)),
        "litellm": PeerInfo("LiteLLM's proxy", imports="litellm,fastapi", distributions=("litellm",), few_rounds=True),
    },
    baseline="bare",
    worker="benchmarks.workers.gateway_cost",
    rounds=5,
    page="gateway.md",
    rows=(
        _chunks("chunk", "a chunk, one stream", chunks=1000, milliseconds=2, at_once=1),
        _chunks("chunk-100", "a chunk, 100 streams at a time", chunks=100, milliseconds=25, at_once=100),
        Row(
            key="first-byte",
            title="first byte, warm connection",
            unit="ms",
            workload="first_byte",
            baseline="direct",
            is_absolute=True,
            full={"times": 200},
            tiny={"times": 3},
            bound=180.0,
            bar=_FIRST_BYTE_BAR,
        ),
        Row(
            key="memory",
            title="an open stream, 1,000 open",
            unit="KiB",
            workload="memory",
            full={"streams": 1000},
            tiny={"streams": 20},
            reduced={"streams": 200},
            fresh_process=True,
            bound=180.0,
            peers=_PROXIES,
        ),
        Row(
            key="growth",
            title="growth while 1,000 streams at a time follow each other",
            unit="MiB",
            workload="growth",
            is_absolute=True,
            full={"streams": 1000, "chunks": 20, "waves": 4},
            tiny={"streams": 10, "chunks": 3, "waves": 1},
            reduced={"streams": 200, "waves": 2},
            fresh_process=True,
            bar=_GROWTH_BAR,
            bound=240.0,
            peers=_PROXIES,
        ),
    ),
)
