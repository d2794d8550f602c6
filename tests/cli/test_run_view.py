"""What a person sees of a run: progress before the answer, waits in the queue, and room made in the context."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import attrs
import pytest

from lmbridge import (
    ContextCompacted,
    ModelLoading,
    ModelNudged,
    PromptProgress,
    RoundFinished,
    RoundStarted,
    RunEvent,
    RunFinished,
    RunResult,
    TextDelta,
)
from lmbridge.agent.result import CompactionKind, CompactionStep, Nudge, Round
from lmbridge.cli.answer_view import AnswerView
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.queue_times import QueueTimes
from lmbridge.cli.run import RunOutput, show_run
from lmbridge.cli.run_view import RoundMeter, show_events
from lmbridge.cli.terminal import Terminal
from lmbridge.observe import RequestAdmitted, RequestEnded, RequestQueued, RoundBegun
from lmbridge.testing import answer
from lmbridge.types import RunUsage
from tests.cli.support import Command
from tests.threaded_server import ThreadedServer

FINISHED = RunFinished(
    RunResult(
        text="Hi",
        model="m",
        rounds=1,
        stop_reason="stop",
        messages=[],
        tool_calls=(),
        usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0, "cached": 0},
        reasoning="",
    )
)
NUDGED = ModelNudged(Nudge(kind="empty", message="Answer.", reply=""))


class WatchedTerminal(Terminal):
    """A terminal with a person in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.notices_shown: list[str] = []

    @property
    def shows_answers(self) -> bool:
        return True

    @property
    def shows_notices(self) -> bool:
        return True

    def notice(self, text: str, style: str = "dim", *, end: str = "\n") -> None:
        self.notices_shown.append(text)

    @contextmanager
    def waiting(self, text: str) -> Iterator[Callable[[str], None]]:
        self.waits.append(text)
        yield self.waits.append


async def show(*events: RunEvent, queue: QueueTimes | None = None) -> WatchedTerminal:
    async def all_events() -> AsyncIterator[RunEvent]:
        for event in [*events, FINISHED]:
            yield event

    terminal = WatchedTerminal()
    with AnswerView(terminal) as view:
        assert await show_events(all_events(), view, queue) is FINISHED.result
    return terminal


def finished(number: int) -> RoundFinished:
    ended = Round(
        number=number,
        model="m",
        text="Hi",
        reasoning="",
        finish_reason="stop",
        tool_calls=(),
        usage=None,
        seconds=2.0,
    )
    return RoundFinished(ended)


def test_the_status_line_has_the_speed_and_the_context_of_the_last_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # A second passes between two events.
    monkeypatch.setattr("lmbridge.cli.run_view.monotonic", count().__next__)
    meter = RoundMeter()
    assert meter.describe_last(1000) == []
    usage: RunUsage = {"prompt_tokens": 100, "completion_tokens": 11, "total_tokens": 111, "cached": 0}
    ended = attrs.evolve(finished(1).round, usage=usage)
    for event in (RoundStarted(1, "m"), TextDelta("H"), TextDelta("i"), RoundFinished(ended)):
        meter.see(event)
    assert meter.describe_last(1000) == ["10.0 tokens/s", "context 111 of 1000 (11%)"]
    # The next round has not ended.
    meter.see(RoundStarted(2, "m"))
    meter.see(TextDelta("H"))
    assert meter.describe_last(None) == ["10.0 tokens/s", "context 111"]


# Progress before the answer


async def test_the_load_of_the_model_and_the_work_on_the_prompt_are_shown_while_the_answer_is_awaited() -> None:
    terminal = await show(
        RoundStarted(1, "m"),
        ModelLoading("m", None),
        ModelLoading("m", 0.3),
        PromptProgress(processed=45, total=100, cached=0),
        TextDelta("Hi"),
    )
    assert terminal.waits == [
        "round 1: waiting for the model ...",
        "loading the model ...",
        "loading the model 30% ...",
        "reading the prompt 45% ...",
    ]


async def test_progress_that_arrives_late_does_not_disturb_the_answer() -> None:
    terminal = await show(RoundStarted(1, "m"), TextDelta("Hi"), PromptProgress(processed=9, total=10, cached=0))
    assert terminal.waits == ["round 1: waiting for the model ..."]


async def test_progress_is_shown_again_after_the_model_was_asked_again() -> None:
    terminal = await show(RoundStarted(1, "m"), TextDelta("{"), NUDGED, PromptProgress(processed=1, total=2, cached=0))
    assert terminal.waits[-1] == "reading the prompt 50% ..."


@pytest.mark.parametrize(
    ("kind", "messages", "text"),
    [
        ("shorten", 2, "2 messages were shortened"),
        ("summarize", 4, "4 messages were summarized"),
        ("drop", 1, "1 message is no longer sent"),
        ("drop", 3, "3 messages are no longer sent"),
        ("shorten", 1, "1 message was shortened"),
    ],
)
async def test_room_that_was_made_in_the_context_is_a_line(kind: CompactionKind, messages: int, text: str) -> None:
    step = CompactionStep(kind=kind, messages=messages, tokens_before=5000, tokens_after=2000)
    terminal = await show(RoundStarted(1, "m"), ContextCompacted(step))
    assert terminal.notices_shown == [
        f"made room in the context: {text} (about 5000 tokens before, 2000 after)",
    ]


@pytest.mark.parametrize("pieces", [[], [TextDelta("H"), TextDelta("i")]])
async def test_an_answer_from_before_the_interruption_of_a_run_is_shown_once(
    pieces: list[RunEvent], capsys: pytest.CaptureFixture[str]
) -> None:
    async def all_events() -> AsyncIterator[RunEvent]:
        for event in [*pieces, FINISHED]:
            yield event

    view = RunOutput(terminal=WatchedTerminal(), as_json=False, reasoning="show")
    assert await show_run(all_events(), view, QueueTimes()) == ExitStatus.OK
    assert capsys.readouterr().out == "Hi\n"


# The time in the queue


def queue_with(waits: Sequence[tuple[int, float]]) -> QueueTimes:
    """Returns the times of a run whose requests, each in a round, have waited for that many seconds."""
    queue = QueueTimes()
    for request_id, (number, waited) in enumerate(waits):
        queue.on_event(RoundBegun(at=0, run_id="run", number=number, model=None))
        queue.on_event(_queued(request_id, "run"))
        queue.on_event(RequestAdmitted(at=0, request_id=request_id, waited=waited))
    return queue


def _queued(request_id: int, run_id: str | None) -> RequestQueued:
    return RequestQueued(
        at=0, request_id=request_id, operation="chat completion", url="http://x/v1", model=None, run_id=run_id
    )


@pytest.mark.parametrize(
    ("waited", "line"),
    [
        (0.0, "round 1 · 2.0 s"),
        (0.04, "round 1 · 2.0 s"),
        (0.05, "round 1 · queued 0.05 s · 2.0 s"),
        (1.24, "round 1 · queued 1.2 s · 2.0 s"),
    ],
)
async def test_a_wait_in_the_queue_that_a_person_notices_is_shown(waited: float, line: str) -> None:
    terminal = await show(RoundStarted(1, "m"), finished(1), queue=queue_with([(1, waited)]))
    assert terminal.notices_shown == [line]


def test_the_waits_of_all_requests_of_a_round_are_added_up() -> None:
    queue = queue_with([(1, 0.5), (1, 0.25), (2, 3.0)])
    assert [queue.seconds(number) for number in (1, 2, 3)] == [0.75, 3.0, 0.0]


def test_requests_outside_of_the_run_do_not_count() -> None:
    queue = queue_with([(1, 0.5)])
    queue.on_event(_queued(7, None))
    queue.on_event(RequestAdmitted(at=0, request_id=7, waited=9.0))
    assert queue.seconds(1) == 0.5


def test_a_wait_counts_for_the_round_in_which_the_request_was_made() -> None:
    queue = queue_with([(1, 0.5)])
    queue.on_event(_queued(7, "run"))
    queue.on_event(RoundBegun(at=0, run_id="run", number=2, model=None))
    queue.on_event(RequestAdmitted(at=0, request_id=7, waited=1.0))
    assert (queue.seconds(1), queue.seconds(2)) == (1.5, 0.0)


def test_a_request_that_has_ended_is_forgotten() -> None:
    queue = queue_with([(1, 0.5)])
    ended = RequestEnded(
        at=0,
        request_id=0,
        outcome="answer",
        status=200,
        error=None,
        attempts=1,
        prompt_tokens=None,
        completion_tokens=None,
    )
    queue.on_event(ended)
    queue.on_event(RequestAdmitted(at=0, request_id=0, waited=1.0))
    assert queue.seconds(1) == 0.5


def test_json_has_the_time_in_the_queue_for_each_round(
    command: Command, server: ThreadedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each reading of the clock is a second later, so that the request of a round waits for exactly one second.
    monkeypatch.setattr("lmbridge.observe.watches.monotonic", count().__next__)
    server.scripted.script(answer("Done."))
    events = [json.loads(line) for line in command("run", "Tidy up", "--json").output.splitlines()]
    assert [each["queue_seconds"] for each in events if each["type"] == "round_finished"] == [1]
