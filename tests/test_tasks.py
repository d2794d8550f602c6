"""The task helpers: what they return, and what a cancellation does to them."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from lmbridge._tasks import LoopGuard, SingleFlight, call_in_loop, end_task, run_together, run_until_signal, settle
from lmbridge.errors import LLMConnectionError, LLMError, MCPError, TaskCancelledError
from tests.support import turns

# settle


async def test_settled_work_returns_its_result_and_raises_its_error() -> None:
    assert await settle(asyncio.sleep(0, "result")) == "result"
    with pytest.raises(ZeroDivisionError):
        await settle(asyncio.to_thread(lambda: 1 // 0))


async def test_settled_work_is_finished_before_a_cancellation_is_raised() -> None:
    gate, done = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await gate.wait()
        done.set()

    task = asyncio.create_task(settle(work()))
    for _ in range(3):
        await turns(1)
        task.cancel("the caller's")
    await turns(1)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError, match="the caller's"):
        await task
    assert done.is_set()


async def test_a_cancellation_takes_precedence_over_the_error_of_settled_work() -> None:
    gate = asyncio.Event()

    async def work() -> None:
        await gate.wait()
        raise OSError

    task = asyncio.create_task(settle(work()))
    await turns(1)
    task.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task


# end_task


async def test_coroutines_that_run_together_return_their_results_in_order() -> None:
    second_is_done = asyncio.Event()

    async def first() -> int:
        await second_is_done.wait()
        return 1

    async def second() -> int:
        second_is_done.set()
        return 2

    assert await run_together([first(), second()]) == [1, 2]
    assert await run_together([]) == []


@pytest.mark.parametrize("error", [ValueError("x"), LLMError("x"), ExceptionGroup("x", [OSError()]), GeneratorExit()])
async def test_the_error_of_one_of_them_arrives_unchanged_when_the_others_have_ended(error: BaseException) -> None:
    ended = []

    async def wait() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append(True)
            raise LLMError("in the clean-up")

    async def fail() -> None:
        await asyncio.sleep(0)
        raise error

    with pytest.raises(type(error)) as caught:
        await run_together([wait(), fail(), wait()])
    assert caught.value is error
    assert error.__context__ is error.__cause__ is None
    assert ended == [True, True]


async def test_a_cancelled_caller_cancels_what_runs_together() -> None:
    ended = asyncio.Semaphore(0)
    begun = asyncio.Semaphore(0)

    async def wait() -> None:
        begun.release()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.release()

    task = asyncio.create_task(run_together([wait(), wait()]))
    for _ in range(2):
        await begun.acquire()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    for _ in range(2):
        assert not ended.locked()
        await ended.acquire()


async def test_a_cancellation_is_not_lost_in_an_error_of_a_clean_up() -> None:
    begun = asyncio.Event()

    async def fail_in_the_clean_up() -> None:
        try:
            begun.set()
            await asyncio.get_running_loop().create_future()
        finally:
            raise ValueError("in the clean-up")

    task = asyncio.create_task(run_together([fail_in_the_clean_up()]))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_an_error_of_what_runs_together_leaves_no_cancel_request_behind() -> None:
    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    async def fail() -> None:
        raise ValueError("x")

    current = asyncio.current_task()
    assert current is not None
    with pytest.raises(ValueError, match="x"):
        await run_together([wait(), fail()])
    # With a request left, an `asyncio.timeout` around it would raise a CancelledError in place of a TimeoutError.
    assert current.cancelling() == 0


async def test_an_ended_task_has_cleaned_up() -> None:
    cleaned_up = False

    async def work() -> None:
        nonlocal cleaned_up
        try:
            await asyncio.Event().wait()
        finally:
            await turns()
            cleaned_up = True

    task = asyncio.create_task(work())
    await turns(1)
    assert await end_task(task)
    assert task.cancelled()
    assert cleaned_up


async def test_a_task_that_fails_while_it_is_ended_is_not_reported_as_lost() -> None:
    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError

    task = asyncio.create_task(work())
    await turns(1)
    assert await end_task(task)
    del task  # pytest fails on what asyncio would report now


async def test_a_task_that_does_not_end_within_its_grace_period_is_left_running() -> None:
    gate = asyncio.Event()
    ended = asyncio.Event()

    async def work() -> None:
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
        ended.set()

    task = asyncio.create_task(work())
    await turns(1)
    assert not await end_task(task, grace=0.01)
    del task
    gate.set()
    await ended.wait()


async def test_a_cancellation_of_the_caller_reaches_a_task_that_hangs_in_its_clean_up() -> None:
    in_clean_up = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            in_clean_up.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await turns(1)
    ending = asyncio.create_task(end_task(task))
    await in_clean_up.wait()
    assert not ending.done()
    ending.cancel("the caller's")
    with pytest.raises(asyncio.CancelledError, match="the caller's"):
        await ending
    assert task.cancelled()


# SingleFlight


class Lookup:
    """A call that waits to be answered, and counts how often it was made."""

    def __init__(self) -> None:
        self.made = self.cancelled = 0
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self) -> str:
        self.made += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        return f"answer {self.made}"


async def test_concurrent_callers_share_one_call_and_later_ones_make_another() -> None:
    flight, lookup = SingleFlight[str]("closed"), Lookup()
    callers = [asyncio.create_task(flight.run("key", lookup)) for _ in range(5)]
    other = asyncio.create_task(flight.run("another key", Lookup()))
    await turns()
    assert lookup.made == 1
    lookup.gate.set()
    assert await asyncio.gather(*callers) == ["answer 1"] * 5
    assert await flight.run("key", lookup) == "answer 2"
    assert not other.done()
    other.cancel()
    await asyncio.wait({other})


async def test_a_cancelled_caller_does_not_fail_the_others() -> None:
    flight, lookup = SingleFlight[str]("closed"), Lookup()
    callers = [asyncio.create_task(flight.run("key", lookup)) for _ in range(3)]
    await turns()
    callers[0].cancel()
    await turns()
    assert callers[0].cancelled()
    lookup.gate.set()
    assert await asyncio.gather(*callers[1:]) == ["answer 1"] * 2


async def test_the_call_is_cancelled_with_its_last_caller() -> None:
    flight, lookup = SingleFlight[str]("closed"), Lookup()
    callers = [asyncio.create_task(flight.run("key", lookup)) for _ in range(2)]
    await turns()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    assert all(caller.cancelled() for caller in callers)
    assert lookup.cancelled == 1


async def test_a_caller_that_comes_while_a_call_is_being_cancelled_makes_a_new_one() -> None:
    flight, lookup = SingleFlight[str]("closed"), Lookup()
    first = asyncio.create_task(flight.run("key", lookup))
    await turns()
    first.cancel()
    lookup.gate.set()
    second = asyncio.create_task(flight.run("key", lookup))
    assert await second == "answer 2"
    assert first.cancelled()


async def test_a_call_that_is_to_keep_going_outlives_its_callers() -> None:
    flight, lookup = SingleFlight[str]("closed", keep_going=True), Lookup()
    first = asyncio.create_task(flight.run("key", lookup))
    await turns()
    first.cancel()
    await asyncio.wait({first})
    second = asyncio.create_task(flight.run("key", lookup))
    await turns()
    lookup.gate.set()
    assert await second == "answer 1"
    assert (lookup.made, lookup.cancelled) == (1, 0)


async def test_each_caller_gets_an_error_of_its_own_and_the_error_is_not_kept() -> None:
    flight, lookup = SingleFlight[str]("closed"), Lookup()
    lookup.error = LLMConnectionError("could not connect", OSError("refused"))
    lookup.gate.set()
    callers = [asyncio.create_task(flight.run("key", lookup)) for _ in range(2)]
    await asyncio.wait(callers)
    first, second = (caller.exception() for caller in callers)
    assert isinstance(first, LLMConnectionError)
    assert isinstance(second, LLMConnectionError)
    assert first is not second
    assert isinstance(first.__cause__, OSError)
    lookup.error = None
    assert await flight.run("key", lookup) == "answer 2"


async def test_ending_all_calls_gives_their_callers_an_error_of_ours() -> None:
    flight, lookup = SingleFlight[str]("the validator was closed"), Lookup()
    caller = asyncio.create_task(flight.run("key", lookup))
    await turns()
    await flight.cancel_all()
    with pytest.raises(TaskCancelledError, match="the validator was closed"):
        await caller
    await flight.cancel_all()


def test_a_call_of_a_loop_that_is_gone_is_not_shared() -> None:
    flight = SingleFlight[str]("closed", keep_going=True)

    async def start() -> None:
        caller = asyncio.create_task(flight.run("key", Lookup()))
        await turns()
        caller.cancel()

    async def again() -> str:
        lookup = Lookup()
        lookup.gate.set()
        return await flight.run("key", lookup)

    asyncio.run(start())
    assert asyncio.run(again()) == "answer 1"


# LoopGuard


def test_an_object_is_bound_to_one_loop_at_a_time() -> None:
    guard = LoopGuard("this pool", MCPError)

    async def enter() -> bool:
        assert guard.is_running() is (guard.loop is asyncio.get_running_loop())
        entered = guard.enter()
        assert guard.is_running()
        assert not guard.enter()
        guard.check()
        return entered

    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        assert not first.run_until_complete(enter())
        assert not guard.is_running()
        with pytest.raises(MCPError, match=r"^this pool is in use in another event loop .* close\(\) this one"):
            second.run_until_complete(enter())
        first.close()
        assert second.run_until_complete(enter())
        assert guard.loop is second
    finally:
        first.close()
        second.close()


def test_a_check_binds_nothing() -> None:
    async def check(guard: LoopGuard) -> None:
        guard.check()

    guard = LoopGuard("this pool")
    asyncio.run(check(guard))
    assert guard.loop is None


# run_until_signal

_PROGRAM = """
import asyncio, sys
from lmbridge._tasks import run_until_signal

async def work():
    print("started", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        print("cleaning up", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        print("cleaned up", flush=True)

print("result", asyncio.run(run_until_signal(work())), flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_program_after_its_clean_up_and_more_signals_change_nothing(number: signal.Signals) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _PROGRAM]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "started\n"
        program.send_signal(number)
        assert program.stdout.readline() == "cleaning up\n"
        for again in (signal.SIGINT, signal.SIGTERM):
            program.send_signal(again)
        out, err = program.communicate("\n")
    assert (out, err, program.returncode) == ("cleaned up\nresult None\n", "", 0)


def run_program(body: str) -> subprocess.CompletedProcess[str]:
    """Runs code in another process, because it changes the handlers of signals."""
    code = f"import asyncio\nfrom lmbridge._tasks import run_until_signal\n{body}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_a_signal_the_result_and_the_errors_are_those_of_the_work() -> None:
    done = run_program(
        """
async def main():
    print(await run_until_signal(asyncio.sleep(0, "result")))
    async def fail():
        raise OSError("mine")
    try:
        await run_until_signal(fail())
    except OSError as error:
        print(error)
asyncio.run(main())
"""
    )
    assert (done.stdout, done.stderr) == ("result\nmine\n", "")


def test_work_that_cancels_itself_is_not_taken_for_a_signal() -> None:
    done = run_program(
        """
async def main():
    async def work():
        raise asyncio.CancelledError
    try:
        await run_until_signal(work())
    except asyncio.CancelledError:
        print("cancelled")
asyncio.run(main())
"""
    )
    assert (done.stdout, done.stderr) == ("cancelled\n", "")


def test_a_cancelled_caller_ends_the_work() -> None:
    done = run_program(
        """
async def main():
    async def work():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            print("cleaned up")
    caller = asyncio.create_task(run_until_signal(work()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    caller.cancel()
    try:
        await caller
    except asyncio.CancelledError:
        print("cancelled")
asyncio.run(main())
"""
    )
    assert (done.stdout, done.stderr) == ("cleaned up\ncancelled\n", "")


def test_work_is_not_begun_outside_the_main_thread() -> None:
    async def work() -> None:
        pytest.fail("the work has begun")

    async def main() -> None:
        with pytest.raises(ValueError, match="main thread"):
            await run_until_signal(work())
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with ThreadPoolExecutor() as threads:
        threads.submit(asyncio.run, main()).result()


# call_in_loop


def test_a_call_in_a_loop_that_is_closed_or_is_being_closed_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.new_event_loop()
    called: list[int] = []
    call_in_loop(loop, called.append, 1)
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    call_in_loop(loop, called.append, 2)
    # Its thread closes the loop after another one has asked it.
    monkeypatch.setattr(loop, "is_closed", lambda: False)
    call_in_loop(loop, called.append, 3)
    assert called == [1]
