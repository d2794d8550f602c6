"""Conversations on two servers: at the server that has the prompt in its cache, or at the least loaded one."""

from __future__ import annotations

from typing import Any, Final

from benchmarks.specification import OURS, PeerInfo, Row, Table

_TURNS: Final = 5


def _row(key: str, title: str, unit: str, workload: str, conversations: int, **options: Any) -> Row:
    return Row(
        key=f"{key}-{conversations}",
        title=f"{title}, {conversations} conversations at once",
        unit=unit,
        workload=workload,
        is_absolute=True,
        fresh_process=True,
        full={"conversations": conversations, "turns": _TURNS, "words": 80},
        tiny={"conversations": 2, "turns": 2, "words": 20},
        bound=600.0,
        **options,
    )


NODES_TABLE: Final = Table(
    name="nodes",
    about="conversations on two servers",
    peers={
        "least-loaded": PeerInfo("the least loaded server", imports="xllamacpp"),
        OURS: PeerInfo("lmbridge", distributions=("lmbridge", "xllamacpp")),
    },
    baseline="least-loaded",
    worker="benchmarks.workers.nodes",
    requires=("xllamacpp",),
    page="several-servers.md",
    rounds=3,
    uses_stub=False,
    rows=(
        _row("first-token", "time to the first token of a later turn", "ms", "first_token", 3),
        _row("prompt", "tokens of the prompt that are read for a later turn", "tokens", "tokens_read", 3),
        _row("first-token", "time to the first token of a later turn", "ms", "first_token", 6),
        _row("prompt", "tokens of the prompt that are read for a later turn", "tokens", "tokens_read", 6),
    ),
)
