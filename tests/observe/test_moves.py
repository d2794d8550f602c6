"""What the observers of a client of several servers are told when one server passes a request on to another."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from lmbridge import LLMError
from lmbridge.observe import AttemptBegun, RequestEnded, RequestQueued
from lmbridge.testing import MockResponse
from tests.observe.test_requests import Recorder, recorder
from tests.support import turns
from tests.transport.fake_servers import FakeServer, client_of
from tests.transport.support import ask

__all__ = ["recorder"]

STREAM = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])


def by_request(recorder: Recorder) -> list[list[str]]:
    """Returns the names of the events of each generation."""
    generations = [event for event in recorder.of(RequestQueued) if event.operation == "chat completion"]
    return [
        [type(event).__name__ for event in recorder.events if getattr(event, "request_id", None) == each.request_id]
        for each in generations
    ]


def outcomes(recorder: Recorder) -> list[tuple[str, str | None, int | None]]:
    generations = {event.request_id for event in recorder.of(RequestQueued) if event.operation == "chat completion"}
    return [
        (event.outcome, event.error, event.status)
        for event in recorder.of(RequestEnded)
        if event.request_id in generations
    ]


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionRefusedError(),
        ConnectionResetError(),
        MockResponse(503, json={"error": "busy"}),
        MockResponse(404, json={"error": {"message": "model 'm' not found"}}),
        MockResponse(200, json={"error": {"message": "model 'm' not found"}}),
        MockResponse(401, json={"error": {"message": "invalid key"}}),
    ],
    ids=["unreachable", "broken", "busy", "missing", "missing with status 200", "key"],
)
@STREAM
async def test_a_request_that_is_passed_on_has_moved(recorder: Recorder, failure: Any, stream: bool) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.failure = failure
    async with client_of(one, two, observers=[recorder]) as client:
        assert await ask(client, stream) == "two"
    begun = ["RequestQueued", "RequestAdmitted", "AttemptBegun"]
    assert by_request(recorder) == [[*begun, "RequestEnded"], [*begun, "FirstEventArrived", "RequestEnded"]]
    assert outcomes(recorder) == [("moved", None, None), ("answer", None, 200)]
    assert [event.number for event in recorder.of(AttemptBegun)][-2:] == [1, 2]


async def test_requests_that_move_on_when_they_are_admitted_have_no_attempt(recorder: Recorder) -> None:
    one, two = FakeServer("one", slots=1), FakeServer("two", slots=1)
    one.gate, two.gate = asyncio.Event(), asyncio.Event()
    async with client_of(one, two, observers=[recorder]) as client:
        tasks = [asyncio.ensure_future(client.ask(f"Question {number}")) for number in range(4)]
        await turns(50)
        assert (one.transport.queued, two.transport.queued) == (1, 1)
        one.failure = ConnectionRefusedError()
        one.gate.set()
        await turns(50)
        two.gate.set()
        assert await asyncio.gather(*tasks) == ["two"] * 4
    moved = [event.request_id for event in recorder.of(RequestEnded) if event.outcome == "moved"]
    begun = ["RequestQueued", "RequestAdmitted"]
    assert sorted(each for each in by_request(recorder) if "FirstEventArrived" not in each) == [
        [*begun, "AttemptBegun", "RequestEnded"],
        [*begun, "RequestEnded"],
    ]
    assert len(moved) == 2


async def test_the_last_server_ends_the_request_with_an_error(recorder: Recorder) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.failure = two.failure = MockResponse(401, json={"error": {"message": "invalid key"}})
    async with client_of(one, two, observers=[recorder]) as client:
        with pytest.raises(LLMError):
            await client.ask("?")
    assert outcomes(recorder) == [("moved", None, None), ("error", None, 401)]
