"""The file of a journal: what it lists, what it refuses, and who may use it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import stat
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import lmbridge.sync
from lmbridge import Agent, Journal, JournalError, LLMClient, LLMResponseError, LLMValidationError
from lmbridge.agent.journal.database import Database
from lmbridge.agent.journal.journal_file import JournalFile
from lmbridge.agent.journal.locks import RunLocks, _byte_of
from lmbridge.agent.journal.run_store import FileStore
from lmbridge.agent.journal.steps import BegunStep, RunStart
from lmbridge.testing import ScriptedServer, answer, reply
from tests.agent.journal.support import interrupt_after
from tests.agent.support import add, asks, calls
from tests.threaded_server import ThreadedServer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def make(path: Path) -> None:
    """Makes a journal with one run, which has some steps."""
    database = Database(path, create=True)
    with database.transaction():
        database.add_run("one", "unfinished", "{}")
        database.add_steps("one", 0, [("begun", json.dumps({"model": None, "tools": ["x" * 5000]}))] * 1)
    database.close()


async def test_it_lists_the_runs(scripted_server: ScriptedServer, client: LLMClient, path: Path) -> None:
    agent, journal = Agent(client), Journal(path)
    before = datetime.now(UTC)
    await interrupt_after(scripted_server, agent, path, task="First.")
    scripted_server.script(reply(400, {"error": "no"}), answer("Done."))
    with pytest.raises(LLMResponseError):
        await agent.run("Second.", journal=path)
    await agent.run([{"type": "text", "text": "Third."}], journal=journal, model="other")
    runs = await journal.runs()
    assert [(run.task, run.state, run.model) for run in runs] == [
        ("First.", "unfinished", "test-model"),
        ("Second.", "failed", "test-model"),
        ([{"type": "text", "text": "Third."}], "finished", "other"),
    ]
    for run in runs:
        assert before - timedelta(seconds=1) <= run.began <= run.updated <= datetime.now(UTC) + timedelta(seconds=1)
    assert repr(journal) == f"<Journal {str(path)!r}>"


async def test_it_exports_a_run_as_json(scripted_server: ScriptedServer, client: LLMClient, path: Path) -> None:
    scripted_server.script(calls(asks("add", a=1, b=2)), answer("It is 3. \u2713"))
    await Agent(client, tools=[add]).run("1 + 2?", journal=path)
    (run,) = await Journal(path).runs()
    exported = json.loads(await Journal(path).export(run.id))
    assert (exported["id"], exported["state"], exported["start"]["task"]) == (run.id, "finished", "1 + 2?")
    kinds = [step["kind"] for step in exported["steps"]]
    assert kinds == ["begun", "reply", "planned", "started", "done", "reply", "ended"]
    assert exported["steps"][-1]["data"]["text"] == "It is 3. \u2713"
    assert exported["steps"][4]["data"]["result"]["text"] == "3"
    with pytest.raises(JournalError, match="has no run 'x'"):
        await Journal(path).export("x")


async def test_only_its_owner_can_read_it(scripted_server: ScriptedServer, client: LLMClient, path: Path) -> None:
    modes: set[int] = set()

    def look() -> str:
        """Looks at the files while the run is in progress."""
        names.update(each.name for each in path.parent.iterdir())
        modes.update(stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir())
        return "seen"

    names: set[str] = set()
    old = os.umask(0)
    try:
        scripted_server.script(calls(asks("look")), answer("Done."))
        await Agent(client, tools=[look]).run("Go.", journal=path)
    finally:
        os.umask(old)
    assert names == {"runs.db", "runs.db-wal", "runs.db-shm", "runs.db-lock"}
    assert modes == {0o600}


@pytest.fixture(params=[errno.EPERM, errno.ENOTSUP, errno.EINVAL])
def no_links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the disk one without hard links, as file systems differ in saying it."""

    def link(source: Path, target: Path) -> None:
        if target.exists():
            raise FileExistsError(errno.EEXIST, "File exists", str(target))
        raise OSError(request.param, os.strerror(request.param), str(source))

    monkeypatch.setattr(os, "link", link)


@pytest.mark.usefixtures("no_links")
async def test_a_disk_without_hard_links_can_have_journals(
    scripted_server: ScriptedServer, client: LLMClient, path: Path
) -> None:
    scripted_server.script(answer("Done."), answer("Done."))
    for _ in range(2):
        await Agent(client).run("Go.", journal=path)
    assert [run.state for run in await Journal(path).runs()] == ["finished", "finished"]
    assert list(path.parent.glob("*.new")) == []
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.usefixtures("no_links")
def test_a_journal_that_appears_in_the_meantime_is_not_replaced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linked = os.link

    def link_late(source: Path, target: Path) -> None:
        try:
            linked(source, target)
        finally:
            monkeypatch.undo()
            make(path)

    monkeypatch.setattr(os, "link", link_late)
    database = Database(path, create=True)
    assert [run.id for run in database.runs()] == ["one"]
    database.close()
    assert list(path.parent.glob("*.new")) == []


@pytest.mark.usefixtures("no_links")
def test_a_journal_that_cannot_be_created_leaves_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_source: Path, _target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(JournalError, match="could not open the journal") as caught:
        Database(path, create=True)
    assert caught.value.problem == "unwritable"
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_synced_can_have_journals(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    make(path)
    database = Database(path, create=False)
    assert [run.id for run in database.runs()] == ["one"]
    database.close()


async def test_every_step_is_flushed_to_the_disk(path: Path) -> None:
    file = await JournalFile.open(path)
    try:
        settings = await file.submit(
            lambda database: [database._execute(f"PRAGMA {each}")[0][0] for each in ("synchronous", "journal_mode")],
            create=True,
        )
    finally:
        file.release()
    assert settings == [2, "wal"]


def foreign_database(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE runs (id TEXT)")


def newer_version(path: Path) -> None:
    make(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def cut(path: Path, size: int) -> None:
    make(path)
    os.truncate(path, size)


@pytest.mark.parametrize(
    ("spoil", "problem", "text"),
    [
        (lambda path: path.write_text("Dear diary, "), "foreign", "is not a journal"),
        (lambda path: path.write_bytes(os.urandom(5000)), "foreign", "is not a journal"),
        (foreign_database, "foreign", "is a database of another program"),
        (newer_version, "version", "has version 99, and this version of lmbridge reads version 1"),
        (lambda path: path.touch(), "damaged", "is empty"),
        (lambda path: cut(path, 50), "damaged", "is cut off"),
        (lambda path: cut(path, 4096), "damaged", "malformed"),
        (lambda path: cut(path, 10_000), "damaged", "malformed"),
        (lambda path: path.mkdir(), "unwritable", "directory"),
    ],
)
async def test_a_file_that_is_no_journal_of_this_version_is_refused_and_not_touched(
    spoil: Callable[[Path], object],
    problem: str,
    text: str,
    scripted_server: ScriptedServer,
    client: LLMClient,
    path: Path,
) -> None:
    await asyncio.to_thread(spoil, path)
    before = path.read_bytes() if path.is_file() else b""
    for attempt in (
        lambda: Agent(client).run("Go.", journal=path),
        lambda: Agent.resume(path, client=client),
        lambda: Journal(path).runs(),
        lambda: Journal(path).export("one"),
    ):
        with pytest.raises(JournalError, match=text) as caught:
            await attempt()
        assert (caught.value.problem, caught.value.path) == (problem, str(path))
    assert (path.read_bytes() if path.is_file() else b"") == before
    assert not scripted_server.requests


async def test_a_missing_file_is_not_made_by_those_who_read(client: LLMClient, path: Path) -> None:
    for attempt in (lambda: Agent.resume(path, client=client), lambda: Journal(path).runs()):
        with pytest.raises(JournalError, match="does not exist") as caught:
            await attempt()
        assert caught.value.problem == "missing"
    assert not list(path.parent.iterdir())
    for wrong in (7, "", b"runs.db"):
        with pytest.raises(LLMValidationError, match="path must be the path of a file"):
            Journal(wrong)  # type: ignore[arg-type]  # the point of this test


@pytest.mark.parametrize(
    "change", ["UPDATE steps SET kind = 'x'", "UPDATE steps SET data = '{}'", "UPDATE runs SET start = '[]'"]
)
async def test_rows_that_something_else_has_changed_are_named(
    change: str, scripted_server: ScriptedServer, client: LLMClient, path: Path
) -> None:
    await interrupt_after(scripted_server, Agent(client, tools=[add]), path, calls(asks("add", a=1, b=2)))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(change)
        connection.commit()
    with pytest.raises(JournalError, match="cannot be read") as caught:
        await Agent.resume(path, client=client, tools=[add])
    assert caught.value.problem == "damaged"


def other_process(path: Path, run_id: str, then: str) -> Sequence[str]:
    """Returns the command of a process that claims a run and prints whether it could."""
    program = f"""
import fcntl
file = open({str(path)!r} + "-lock", "w")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, {_byte_of(run_id)})
    print(True, flush=True)
except BlockingIOError:
    print(False, flush=True)
{then}
"""
    # Without the package, it starts in milliseconds.
    return sys.executable, "-I", "-S", "-c", program


async def test_a_run_in_another_process_is_in_progress_until_that_process_ends(path: Path) -> None:
    command = other_process(path, "one", "input()")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"True\n"
    locks, owner = RunLocks(path), object()
    assert not await asyncio.to_thread(locks.claim, "one", owner)
    assert await asyncio.to_thread(locks.claim, "two", owner)
    process.kill()
    await process.communicate()
    assert await asyncio.to_thread(locks.claim, "one", owner)
    locks.close()


async def test_a_journal_that_is_opened_again_at_once_keeps_its_locks(path: Path) -> None:
    # The locks of a process are released when it closes the file anywhere.
    first = await JournalFile.open(path)
    assert await first.submit(lambda database: database.locks.claim("one", first), create=True)
    may_close = threading.Event()
    waiting = first.submit(lambda _: may_close.wait())
    first.release()
    second = await JournalFile.open(path)
    claim = second.submit(lambda database: database.locks.claim("one", second))
    may_close.set()
    assert await waiting
    assert await claim
    process = await asyncio.create_subprocess_exec(*other_process(path, "one", ""), stdout=asyncio.subprocess.PIPE)
    assert (await process.communicate())[0] == b"False\n"
    second.release()


async def test_the_thread_of_a_journal_ends_with_its_last_user(
    scripted_server: ScriptedServer, client: LLMClient, path: Path
) -> None:
    scripted_server.default = answer("Done.")
    await Agent(client).run("Go.", journal=path)
    for thread in [each for each in threading.enumerate() if each.name == "lmbridge-journal"]:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
    assert (JournalFile._files, JournalFile._closing) == ({}, {})
    assert sorted(each.name for each in path.parent.iterdir()) == ["runs.db", "runs.db-lock"]


async def test_work_that_fails_does_not_undo_the_work_beside_it(path: Path) -> None:
    file = await JournalFile.open(path)
    held = threading.Event()
    waiting = file.submit(lambda _: held.wait(), create=True)

    def fail(database: Database) -> None:
        database.add_run("bad", "unfinished", "{}")
        raise ZeroDivisionError

    # The three wait together, and would be written in one transaction.
    good = file.submit(lambda database: database.add_run("good", "unfinished", "{}"))
    bad = file.submit(fail)
    other = file.submit(lambda database: database.add_run("other", "unfinished", "{}"))
    held.set()
    with pytest.raises(ZeroDivisionError):
        await bad
    await asyncio.gather(waiting, good, other)
    assert [run.id for run in await file.submit(lambda database: database.runs())] == ["good", "other"]
    file.release()


async def test_a_cancelled_opening_leaves_no_thread_behind(path: Path) -> None:
    opening = asyncio.ensure_future(JournalFile.open(path))
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    while JournalFile._files or JournalFile._closing:
        await asyncio.sleep(0)


def test_the_blocking_classes_have_journals(path: Path) -> None:
    with ThreadedServer() as server, lmbridge.sync.LLMClient(server.api_base, "m") as client:
        server.scripted.script(calls(asks("add", a=1, b=2)), answer("It is 3."))
        journal = lmbridge.sync.Journal(path)
        result = lmbridge.sync.Agent(client, tools=[add]).run("1 + 2?", journal=journal)
        (run,) = journal.runs()
        assert (result.text, run.state, journal.path) == ("It is 3.", "finished", str(path))
        again = lmbridge.sync.Agent.resume(path, client=client, tools=[add], run_id=run.id)
        assert again.text == "It is 3."
        assert json.loads(journal.export(run.id))["id"] == run.id


def make_with_damaged_run(path: Path) -> None:
    """Makes a journal with one run, and another one whose row something else has changed."""
    make(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("INSERT INTO runs VALUES ('two', 'long ago', 'unfinished', '{}')")
        connection.commit()


async def test_a_run_that_is_named_is_found_although_another_one_is_damaged(path: Path) -> None:
    await asyncio.to_thread(make_with_damaged_run, path)
    assert json.loads(await Journal(path).export("one"))["id"] == "one"


async def test_a_run_that_is_opened_twice_at_once_leaves_no_file_behind(path: Path) -> None:
    start = RunStart(
        task="Go.",
        messages=None,
        model=None,
        settings={},
        has_approve=False,
        output_schema=None,
        extra={},
        version="1",
    )
    store = FileStore(path)
    steps = await asyncio.gather(store.open_run("one", start), store.open_run("one", start))
    assert list(steps) == [[], []]
    await store.add_step("one", 0, BegunStep(model=None, tools=[]), None)
    await store.release_run("one")
    assert not any(path.parent.name in each for each in JournalFile._files), "it is closed"
    with pytest.raises(JournalError, match="was released while it was in progress") as caught:
        await store.add_step("one", 1, BegunStep(model=None, tools=[]), None)
    assert (caught.value.problem, caught.value.path) == ("in_use", str(path))
    await store.release_run("one")
