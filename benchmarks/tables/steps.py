"""The longest step of the event loop while something huge is read, in multiples of decoding its JSON."""

from __future__ import annotations

from typing import Any, Final

from benchmarks.specification import Growth, PeerInfo, Row, Table

_TEXT_BAR: Final = 25.0
"""The bar for one huge text, as a multiple of decoding it, which is little more than copying."""
_EVENT_BAR: Final = 4.0
"""The bar for one event with many calls, as a multiple of decoding it."""
_GROWTH_BAR: Final = 0.62
"""The bar for four times as many calls. Decoding them takes four times as long. The longest step may grow by
0.62 times that factor, so that it takes 2.5 times as long."""
_TEXT_BYTES: Final = 5_000_000
_TINY_BYTES: Final = 10_000


def _row(key: str, title: str, workload: str, full: dict[str, Any], tiny: dict[str, Any], bar: float | None) -> Row:
    return Row(key=key, title=title, unit="ms CPU", workload=workload, full=full, tiny=tiny, bar=bar)


def _text(key: str, title: str, reader: str, piece: str = "x") -> Row:
    full = {"reader": reader, "piece": piece, "size": _TEXT_BYTES}
    return _row(key, title, "text", full, {"size": _TINY_BYTES}, _TEXT_BAR)


def _calls(key: str, title: str, reader: str, calls: int, each: int, bar: float | None) -> Row:
    return _row(
        key,
        title,
        "calls",
        {"reader": reader, "calls": calls, "each": each},
        {"calls": 20, "each": min(each, 20)},
        bar,
    )


STEPS_TABLE: Final = Table(
    name="steps",
    about="the longest step of the event loop while something huge is read",
    peers={
        "decoding": PeerInfo("decoding", "", "msgspec", ("msgspec",)),
        "lmbridge": PeerInfo("lmbridge", "", "lmbridge", ("lmbridge",)),
    },
    baseline="decoding",
    worker="benchmarks.workers.steps",
    rounds=5,
    uses_stub=False,
    rows=(
        _text("text-plain", "a reply of 5 MB", "plain"),
        _text("text-stream", "an event of 5 MB", "stream"),
        _text("text-run", "… in a run", "run"),
        _text("text-events", "… in a run whose events are read", "events"),
        _text("text-think", "… with nothing but `<think>`", "run", "think"),
        _text("text-space", "… with nothing but white space", "run", "space"),
        _text("text-tags", "… with nothing but `<tool_call>`", "run", "tags"),
        _text("text-calls", "… with nothing but calls", "run", "calls"),
        _text("text-tokens", "… with nothing but tokens of a template", "run", "tokens"),
        _row("error", "an error of 5 MB", "error", {"size": _TEXT_BYTES}, {"size": _TINY_BYTES}, _TEXT_BAR),
        _calls("event-stream", "an event with 10,000 calls", "stream", 10_000, 10_000, _EVENT_BAR),
        _calls("event-run", "… in a run", "run", 10_000, 10_000, _EVENT_BAR),
        _calls("event-events", "… in a run whose events are read", "events", 10_000, 10_000, _EVENT_BAR),
        _calls("calls-1500", "a run with 1,500 calls, in as many events", "run", 1_500, 1, None),
        _calls("calls-6000", "a run with 6,000", "run", 6_000, 1, None),
    ),
    growths=(Growth(title="growth from 1,500 to 6,000 calls", first="calls-1500", last="calls-6000", bar=_GROWTH_BAR),),
)
