"""Every endpoint, in every framing, with a fault at every byte: `make faults`.

A client asks a `FaultProxy`, which stands in front of a server that replays recorded exchanges. A call may need several
of them; each case has a fault in one. What has to hold for each fault:

- The call returns the whole right value, or raises a named `LLMError`; no other exception, and no value that lacks
  something.
- An error has what had arrived by then, and nothing else: that of a stream in `partial`, that of a plain reply in
  `body`.
- It ends within the time limits of the client.
- The client has no permit left, and its next call returns the right value.
- No descriptor, no task and no warning is left.

One thing is exempt: a byte that is changed, dropped or repeated such that the response is again a valid one. Nobody can
notice that, because HTTP and JSON have no checksums. What is valid is decided by `strict_reader`, which is strict and
shares no code with lmbridge, and the call then has to return what it returns if the changed body arrives undamaged.

The progress of loads, which llama.cpp's router reports as events without an end, may be silent for any time, and events
may be missing: so it is only cut and divided, and what is returned has to be a beginning of it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from math import inf
from multiprocessing import get_context
from typing import Any, Final, TypeAlias
from unittest.mock import patch

import attrs

from lmbridge import LLMClient, LLMError, LLMTimeoutError, Timeouts
from lmbridge.client import api_requests, llm, lmstudio, model_backends, token_count
from lmbridge.testing import FaultKind, FaultProxy, MockRequest, MockResponse, MockTransport, WireFault
from tests.reliability import report
from tests.reliability.exchanges import MODEL, recorded_calls
from tests.reliability.jumping_clock import JumpingLoop
from tests.reliability.leftovers import allow_descriptors, complaints, holdings, settled_holdings
from tests.reliability.replay_server import ReplayServer
from tests.reliability.steps import FRAMINGS, Framing, RecordedCall, Script, Step
from tests.reliability.strict_reader import NotStrictError, StrictResponse, check_response, read_response

KINDS: Final[tuple[FaultKind, ...]] = ("end", "reset", "stall", "flip", "drop", "repeat", "split")
BLOCK: Final = 16
"""The number of bytes that are dropped or repeated."""
_CUTS: Final = ("end", "reset", "stall")
_PATIENCE: Final = 300.0
"""The time limit of each wait of a call, in seconds, which pass in no time if nothing happens."""
_MOST_SECONDS: Final = _PATIENCE + 60.0
"""The seconds within which a call has to end: one time limit, and what the calls beside it take on a busy machine."""
_SECONDS: Final = (
    # A jump of the clock takes a moment, and a client that asks how far a server is would make many.
    (lmstudio, "POLL_SECONDS", 0.001),
    (model_backends, "POLL_SECONDS", 0.001),
    (model_backends, "_LOAD_POLL_SECONDS", 0.001),
    # These limits are shorter than that of a call, and a busy machine is slow.
    (api_requests, "PROBE_SECONDS", _PATIENCE),
    (token_count, "PROBE_SECONDS", _PATIENCE),
    (llm, "HEALTH_CHECK_SECONDS", _PATIENCE),
)
"""Waits and limits of the client that are other ones here."""
_LANES: Final = 100
"""How many calls are made at a time in one process."""
_WAITING_KINDS: Final = ("stall", "flip", "drop", "repeat")
"""The faults after which a client may wait for bytes that never come, until its time limit."""
_MOST_FINDINGS: Final = 20
_FIRSTS: Final = (0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15)
"""The passes of a run over every byte. Each tries one byte of 16, so that an early end has tried an even part."""

Outcomes: TypeAlias = Counter[str]


@attrs.define
class Tally:
    """What happened in a number of cases."""

    outcomes: Outcomes = attrs.field(factory=Counter)
    errors: Outcomes = attrs.field(factory=Counter)
    findings: list[str] = attrs.field(factory=list)

    def add(self, other: Tally) -> None:
        self.outcomes += other.outcomes
        self.errors += other.errors
        self.findings += other.findings


@attrs.frozen
class Case:
    """One call with one fault."""

    name: str
    position: int
    """The position of the exchange that has the fault."""
    fault: WireFault
    sent: bytes
    """All bytes of the response that has the fault, without the fault."""
    expected: Any
    """What the call returns without a fault, or None if it raises."""

    @property
    def call(self) -> RecordedCall:
        return recorded_calls()[self.name]

    @property
    def step(self) -> Step:
        return self.call.steps[self.position]

    @property
    def responses(self) -> list[tuple[str, bytes]]:
        """The bytes of all responses. Those without the fault have connections of their own."""
        others = [(step.request, _on_own_connection(step)) for step in self.call.steps]
        return [*others[: self.position], (self.step.request, self.sent), *others[self.position + 1 :]]


@attrs.frozen
class Group:
    """All cases in one framing with one kind of fault."""

    names: tuple[str, ...]
    framing: Framing
    kind: FaultKind
    step: int = 1
    first: int = 0
    """The first of the bytes, of which each `step`th has a case."""

    def __str__(self) -> str:
        return f"{self.framing}, {self.kind}, from byte {self.first} on"

    @property
    def waits(self) -> bool:
        return self.kind in _WAITING_KINDS

    @property
    def places(self) -> Iterator[tuple[str, int]]:
        """The names of the calls, and the positions of the exchanges that get a fault."""
        for name in self.names:
            call = recorded_calls()[name]
            if not (call.is_endless and self.waits):
                yield from ((name, position) for position in call.faulted)

    @property
    def size(self) -> int:
        steps = (recorded_calls()[name].steps[position] for name, position in self.places)
        return sum(len(self._offsets(step.framed(self.framing))) for step in steps)

    async def cases(self) -> AsyncIterator[Case]:
        for name, position in self.places:
            sent, expected = recorded_calls()[name].steps[position].framed(self.framing), await clean_value(name)
            for at in self._offsets(sent):
                fault = WireFault(self.kind, at=at, length=BLOCK if self.kind in ("drop", "repeat") else 1)
                yield Case(name, position, fault, sent, expected)

    def _offsets(self, sent: bytes) -> range:
        # One-byte pieces from the start contain those from any other offset.
        if self.kind == "split":
            return range(1 if self.first == 0 else 0)
        # A block that reaches beyond the end would repeat the beginning of the next response, which may then be valid.
        return range(self.first, len(sent) - BLOCK + 1 if self.kind == "repeat" else len(sent), self.step)


def run_group(group: Group) -> Tally:
    """Tries all cases of a group, in a process that may have tried others before."""
    allow_descriptors()
    with ExitStack() as stack:
        for module, name, seconds in _SECONDS:
            stack.enter_context(patch.object(module, name, seconds))
        runner = stack.enter_context(asyncio.Runner(loop_factory=JumpingLoop))
        return runner.run(_run_group(group))


async def _run_group(group: Group) -> Tally:
    tally = Tally()
    before = holdings()
    with complaints() as found:
        async with AsyncExitStack() as stack:
            lanes = [await _Lane.open(stack, group, tally) for _ in range(min(group.size, _LANES))]
            cases = iter([case async for case in group.cases()])
            await asyncio.gather(*(lane.run(cases) for lane in lanes))
        left = (await settled_holdings(before)).more_than(before)
    tally.findings += [f"{group}: {each}" for each in (*found, left) if each]
    return tally


class _Lane:
    """One of the places in which cases are tried one after another, with a server and a proxy of its own."""

    def __init__(self, group: Group, tally: Tally, server: ReplayServer, proxy: FaultProxy) -> None:
        self._group = group
        self._tally = tally
        self._server = server
        self._proxy = proxy

    @classmethod
    async def open(cls, stack: AsyncExitStack, group: Group, tally: Tally) -> _Lane:
        server = await stack.enter_async_context(ReplayServer())
        proxy = await stack.enter_async_context(FaultProxy(server.origin))
        return cls(group, tally, server, proxy)

    async def run(self, cases: Iterator[Case]) -> None:
        for case in cases:
            try:
                outcome = await self._try(case)
            except _Finding as finding:
                outcome = "broken"
                place = f"{case.name}, {case.step.request}, {self._group.framing}"
                self._tally.findings.append(f"{place}, {case.fault}: {finding}")
            self._tally.outcomes[outcome] += 1

    async def _try(self, case: Case) -> str:
        self._server.begin(case.responses)
        # Each of the exchanges before it has a connection of its own.
        self._proxy.script(*[None] * case.position, case.fault)
        timeouts = Timeouts(connect=_PATIENCE, load=_PATIENCE, first_byte=_PATIENCE, idle=_PATIENCE)
        async with LLMClient(self._proxy.api_base, MODEL, timeout=timeouts, max_retries=0) as client:
            try:
                async with asyncio.timeout(_MOST_SECONDS):
                    value = await case.call.make(client)
            except LLMError as error:
                self._tally.errors[type(error).__name__] += 1
                self._check_error(case, error)
                outcome = "error"
            except TimeoutError as error:
                raise _Finding(f"it has not ended after {_MOST_SECONDS} s") from error
            except Exception as error:
                raise _Finding(f"raised {error!r}") from error
            else:
                outcome = await self._check_value(case, value)
            transport = client._server.transport
            if transport.in_flight or transport.queued:
                raise _Finding(f"{transport.in_flight} permits and {transport.queued} waiting requests are left")
            await self._check_next_call(case, client)
        return outcome

    def _check_error(self, case: Case, error: LLMError) -> None:
        kind = case.fault.kind
        if "could not connect" in str(error):
            # The fault was not even tried, for example because the machine has no free ports.
            raise _Finding(f"{error!r}")
        if kind == "split" and case.expected is not None:
            raise _Finding(f"one-byte pieces raised {error!r}")
        if isinstance(error, LLMTimeoutError) and not self._group.waits:
            raise _Finding(f"{error!r}, although there was nothing to wait for")
        if kind == "stall" and not isinstance(error, LLMTimeoutError) and case.expected is not None:
            raise _Finding(f"a stall raised {error!r}")
        if kind in _CUTS and not (case.call.limits_all and isinstance(error, LLMTimeoutError)):
            self._check_arrived(case, error)

    def _check_arrived(self, case: Case, error: LLMError) -> None:
        arrived = case.sent[: case.fault.at]
        if not case.step.is_stream:
            # A reply that is a refusal may be quoted by another error, and a later request may fail because of it.
            body = body_before(arrived, self._group.framing)
            # If the head is all that arrived, the body may be empty, or not there at all.
            if (error.body or "") != body and case.step.status == 200:
                raise _Finding(f"body is {error.body!r} instead of {body!r}: {error!r}")
        elif not case.call.is_endless:
            text, allowed = text_in(error.partial), texts_before(arrived, self._group.framing)
            if text not in allowed:
                raise _Finding(f"partial has {text!r} instead of one of {allowed}: {error!r}")

    async def _check_value(self, case: Case, value: Any) -> str:
        if value == case.expected:
            return "whole"
        if case.call.is_endless and value == case.expected[: len(value)]:
            return "exempt"
        if case.step.is_stream and answers_of(value) == answers_of(case.expected):
            return "without usage"
        is_unanswered = case.call.unanswered is not None and value == case.call.unanswered
        if case.fault.kind in _CUTS or case.fault.kind == "split":
            if is_unanswered and case.fault.kind != "split":
                return "error"
            raise _Finding(f"returned {_shown(value)}")
        try:
            ended, is_stream = self._group.framing == "close", case.step.is_stream
            response = read_response(damaged(case.sent, case.fault), ended=ended, is_stream=is_stream)
            check_response(case.step, response)
        except NotStrictError as error:
            if is_unanswered:
                return "error"
            raise _Finding(f"returned {_shown(value)} although {error}") from error
        if with_known_ids(value) != with_known_ids(await clean_value(case.name, case.position, response)):
            raise _Finding(f"returned {_shown(value)}, which is not what the changed bytes say")
        return "exempt"

    async def _check_next_call(self, case: Case, client: LLMClient) -> None:
        """The connection may have been kept; what is left on it must not become the answer of the next call."""
        self._server.begin(case.responses)
        try:
            async with asyncio.timeout(_MOST_SECONDS):
                value = await case.call.make(client)
        except LLMError as error:
            # The fault may lie at the end of the first response, and damage the head of the second one as well.
            if case.expected is not None:
                self._tally.errors[f"next call: {type(error).__name__}"] += 1
        except TimeoutError as error:
            raise _Finding(f"the next call has not ended after {_MOST_SECONDS} s") from error
        else:
            if value not in (case.expected, case.call.unanswered):
                raise _Finding(f"the next call returned {_shown(value)}")


class _Finding(Exception):  # noqa: N818 - it is not raised to anybody
    """Something that must not happen has happened."""


def damaged(sent: bytes, fault: WireFault) -> bytes:
    """Returns all bytes of a response after a fault that changes bytes."""
    before, affected, after = sent[: fault.at], sent[fault.at :][: fault.length], sent[fault.at + fault.length :]
    match fault.kind:
        case "flip":
            return before + bytes(byte ^ 1 for byte in affected) + after
        case "drop":
            return before + after
        case "repeat" if len(affected) == fault.length:
            return before + affected + affected + after
        case _:
            return sent


async def clean_value(name: str, position: int = 0, changed: StrictResponse | None = None) -> Any:
    """Returns what a call returns if its responses arrive without any fault, or None if it raises.

    Args:
        name: The name of the call.
        position: The position of the response that is another one.
        changed: That response. By default, all are those that were recorded.
    """
    call = recorded_calls()[name]
    answers = [(step.request, StrictResponse(step.status, step.content_type, step.body)) for step in call.steps]
    if changed is not None:
        request, original = answers[position]
        answers[position] = (request, changed)
        if request not in [each for each, _ in answers[position + 1 :]]:
            # The last response to a request remains, but without the fault.
            answers.append((request, original))
    script = Script(answers)

    def answer(request: MockRequest) -> MockResponse:
        found = script.next(f"{request.method} {request.path}")
        if found is None:
            return MockResponse(404, json={"error": {"code": 404, "message": "File Not Found"}})
        return MockResponse(found.status, body=found.body, headers={"Content-Type": found.content_type})

    client = LLMClient(model=MODEL, transport=MockTransport(answer), max_retries=0)
    try:
        return await call.make(client)
    except LLMError:
        return None


def _on_own_connection(step: Step) -> bytes:
    """Returns a response after which the server closes the connection, so that the next request makes another one."""
    if step.is_stream:
        return step.framed("close")
    head, blank, body = step.framed("length").partition(b"\r\n\r\n")
    return head + b"\r\nConnection: close" + blank + body


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 300 else f"{text[:150]} ... {text[-150:]}"


def answers_of(value: Any) -> Any:
    """Returns what a stream is read for. What follows the finish reason, such as the usage, is not part of it."""
    return value.get("choices", value)


def with_known_ids(value: Any) -> str:
    """Returns a value as text, in which the ids that lmbridge makes up for tool calls without one are equal."""
    return re.sub(r'"call_[0-9a-f]{24}"', '"call"', json.dumps(value, sort_keys=True))


# What has arrived


def body_before(sent: bytes, framing: Framing) -> str:
    """Returns the part of the body that is in the first bytes of a response."""
    return _body_in(sent, framing).decode(errors="replace")


def _body_in(sent: bytes, framing: Framing) -> bytes:
    _, _, rest = sent.partition(b"\r\n\r\n")
    body = _unchunked(rest) if framing in ("chunked", "gzip") else rest
    return zlib.decompressobj(wbits=31).decompress(body) if framing == "gzip" else body


def texts_before(sent: bytes, framing: Framing) -> list[str]:
    """Returns the text of the events that are complete in the first bytes of a response.

    There are two answers if the line of an event is complete, and only the blank line after it is missing.
    """
    *complete, last = _body_in(sent, framing).split(b"\n\n")
    texts = "".join(map(_text_of_event, complete))
    return [texts, texts + _text_of_event(last)]


def _unchunked(sent: bytes) -> bytes:
    body = b""
    while sent:
        size, end_of_line, sent = sent.partition(b"\r\n")
        if not end_of_line:
            break
        body, sent = body + sent[: int(size, 16)], sent[int(size, 16) + 2 :]
    return body


def _text_of_event(event: bytes) -> str:
    try:
        data = json.loads(event[event.index(b"data: ") + 6 :])
    except ValueError:
        return ""
    if "delta" in data:
        return str(data["delta"])
    for choice in data.get("choices", ()):
        delta = choice.get("delta", choice)
        calls = delta.get("tool_calls") or ()
        return "".join(
            [
                delta.get("content") or delta.get("text") or "",
                *(call["function"].get("arguments") or "" for call in calls),
            ]
        )
    return ""


def text_in(value: Any) -> str:
    """Returns the text and the arguments of calls in a reply."""
    if value is None:
        return ""
    if "output" in value:
        return "".join(part.get("text", "") for item in value["output"] for part in item.get("content", ()))
    choice = value["choices"][0] if value["choices"] else {}
    message = choice.get("message", choice)
    calls = message.get("tool_calls") or ()
    return "".join(
        [
            message.get("content") or message.get("text") or "",
            *(call["function"].get("arguments") or "" for call in calls),
        ]
    )


# The command


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability.faults", description=__doc__)
    parser.add_argument("--step", type=int, default=1, help="try only every STEPth byte")
    parser.add_argument("--minutes", type=float, help="begin nothing after this time, and say what was tried")
    parser.add_argument("--jobs", type=int, default=2, help="the number of processes")
    parser.add_argument("--only", default="", help="only the exchanges whose name contains this")
    parser.add_argument("--kind", default="", help="only this kind of fault")
    parser.add_argument("--write", action="store_true", help="write the figures into docs/reliability.md")
    arguments = parser.parse_args()
    began = time.monotonic()
    names = tuple(name for name in recorded_calls() if arguments.only in name)
    kinds: list[FaultKind] = [kind for kind in KINDS if arguments.kind in kind]
    seconds = inf if arguments.minutes is None else arguments.minutes * 60
    by_kind: dict[FaultKind, Tally] = {}
    total = Tally()
    passes = 0
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for first in _FIRSTS if arguments.step == 1 else (0,):
            if time.monotonic() - began > seconds:
                break
            step = arguments.step * len(_FIRSTS) if arguments.step == 1 else arguments.step
            chosen = [Group(names, framing, kind, step, first) for kind in kinds for framing in FRAMINGS]
            for group, tally in zip(chosen, pool.map(run_group, chosen), strict=True):
                by_kind.setdefault(group.kind, Tally()).add(tally)
                total.add(tally)
                report.progress(f"{group}: {dict(tally.outcomes)}")
                for finding in tally.findings[:_MOST_FINDINGS]:
                    report.progress(f"  {finding}")
            passes += 1
    lines = [["fault", "cases", "whole value", "whole answer, no usage", "named error", "exempt", "broken"]]
    for kind, tally in [*by_kind.items(), ("all", total)]:
        figures = [tally.outcomes[name] for name in ("whole", "without usage", "error", "exempt", "broken")]
        lines.append([_TITLES[kind], *(f"{each:,}" for each in (sum(figures), *figures))])
    is_part = arguments.step == 1 and passes < len(_FIRSTS)
    notes = [f"tried at {passes} bytes of {len(_FIRSTS)}" if is_part else report.describe_step(arguments.step, "byte")]
    notes.append(", ".join(f"{name}: {count:,}" for name, count in sorted(total.errors.items())))
    report.publish("faults", lines, notes, began, write=arguments.write)
    if total.findings:
        sys.exit(f"{len(total.findings)} findings")


_TITLES: Final = {
    "end": "the connection ends",
    "reset": "the connection is reset",
    "stall": "the server falls silent",
    "flip": "a bit of a byte is flipped",
    "drop": f"{BLOCK} bytes are dropped",
    "repeat": f"{BLOCK} bytes come twice",
    "split": "every byte in a packet of its own",
    "all": "all",
}

if __name__ == "__main__":
    main()
