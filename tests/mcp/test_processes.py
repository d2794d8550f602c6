"""What is left of servers when their host ends, by whatever."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmbridge.mcp.servers import guardian, processes
from lmbridge.mcp.servers.processes import Child, Tail, end_group
from tests.mcp.support import SERVER, gone
from tests.support import turns

HOST = """
import asyncio, os, sys, time
from lmbridge.mcp import McpHub

async def main():
    hub = McpHub(sys.argv[1])
    await hub.tools()
    print(hub.status()["a"].pid, flush=True)
    if "fork" in sys.argv and os.fork() == 0:
        time.sleep(600)
    if "forget" in sys.argv:
        return
    try:
        await asyncio.sleep(600)
    finally:
        if "close" in sys.argv:
            await hub.close()

asyncio.run(main())
"""


@pytest.fixture
def hosts() -> Iterator[list[subprocess.Popen[str]]]:
    """Hosts that a test started; none is left."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for host in started:
        guardian.send(host.pid, signal.SIGKILL)  # its forks as well
        host.communicate()


async def host_of(hosts: list[subprocess.Popen[str]], tmp_path: Path, *words: str, prelude: str = "") -> int:
    """Starts a program that has started a server with a grandchild; returns the server's process group."""
    told = {"grandchild": True, "notes": str(tmp_path / "notes")}
    entry = {"command": sys.executable, "args": ["-I", "-S", SERVER, json.dumps(told)]}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"a": entry}}))

    def start() -> int:
        command = [sys.executable, "-c", prelude + HOST, str(tmp_path / "mcp.json"), *words]
        # A group of its own, so that a signal for its group hits nobody else.
        pipe = subprocess.PIPE
        hosts.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, process_group=0))
        assert hosts[-1].stdout is not None
        return int(hosts[-1].stdout.readline())

    return await asyncio.to_thread(start)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGTERM, ()),
        (signal.SIGINT, ()),
        (signal.SIGINT, ("close",)),
        (signal.SIGKILL, ()),
        (signal.SIGHUP, ()),
    ],
)
async def test_no_server_outlives_its_host(
    hosts: list[subprocess.Popen[str]], tmp_path: Path, number: signal.Signals, words: tuple[str, ...]
) -> None:
    group = await host_of(hosts, tmp_path, *words)
    os.kill(hosts[0].pid, number)
    await gone(group)
    code = await asyncio.to_thread(hosts[0].wait)
    assert code == -number  # nothing swallowed it


async def test_sigterm_ends_the_groups_before_the_host_ends(hosts: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    group = await host_of(hosts, tmp_path)
    hosts[0].terminate()
    await asyncio.to_thread(hosts[0].wait)
    assert await asyncio.to_thread(guardian.is_gone, group)


async def test_a_handler_of_the_host_for_sigterm_stays(hosts: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    prelude = "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(42))\n"
    group = await host_of(hosts, tmp_path, prelude=prelude)
    hosts[0].terminate()
    assert await asyncio.to_thread(hosts[0].wait) == 42
    await gone(group)


async def test_a_host_that_forgets_to_close_leaves_no_server(
    hosts: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    group = await host_of(hosts, tmp_path, "forget")
    _, errors = await asyncio.to_thread(hosts[0].communicate)
    assert (hosts[0].returncode, errors) == (0, "")
    await gone(group)


async def test_a_fork_of_the_host_does_not_keep_its_servers(hosts: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    group = await host_of(hosts, tmp_path, "fork")
    hosts[0].kill()
    await gone(group)


def test_a_guardian_that_somebody_ended_is_replaced() -> None:
    groups = processes.Groups()
    groups.add(2**22 + 1)
    first = groups._pipe
    os.close(first)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, first)  # nothing can be written to it
    groups.add(2**22 + 2)
    assert groups._pipe not in (-1, null)
    groups.discard(2**22 + 1)
    groups.discard(2**22 + 2)
    os.close(groups._pipe)
    os.close(null)


async def test_a_cancel_of_the_end_kills_the_group_at_once() -> None:
    child = Child(lambda _: None, lambda _: None)
    await child.start("sh", ["-c", "trap '' TERM; sleep 600"], {}, None)
    pid = child.pid
    assert pid
    ending = asyncio.create_task(end_group(pid, patience=60))
    await asyncio.sleep(0)
    ending.cancel()
    await asyncio.wait([ending])
    assert ending.cancelled()
    assert pid not in processes.groups._groups
    await gone(pid)
    await child.end()


async def test_a_cancel_waits_until_the_group_is_gone() -> None:
    child = Child(lambda _: None, lambda _: None)
    await child.start("sh", ["-c", "trap '' TERM; echo; sleep 600"], {}, None)
    pid = child.pid
    assert pid
    ending = asyncio.create_task(child.end())
    await turns()
    ending.cancel()
    await asyncio.wait([ending])
    assert ending.cancelled()
    assert await asyncio.to_thread(guardian.is_gone, pid)


async def test_a_cancel_of_the_start_loses_no_process() -> None:
    child = Child(lambda _: None, lambda _: None)
    starting = asyncio.create_task(child.start("sleep", ["600"], {}, None))
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])
    assert starting.cancelled()
    assert child.pid
    await child.end()
    assert await asyncio.to_thread(guardian.is_gone, child.pid)


async def test_a_second_cancel_of_the_start_loses_no_process_either() -> None:
    child = Child(lambda _: None, lambda _: None)
    starting = asyncio.create_task(child.start("sleep", ["600"], {}, None))
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])
    assert child.pid
    await child.end()


async def test_a_guardian_that_cannot_be_started_leaves_no_pipe_that_is_somebody_elses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    groups = processes.Groups()
    groups.add(2**22 + 1)
    guardian_pipe = groups._pipe
    monkeypatch.setattr(os, "posix_spawn", fails)
    monkeypatch.setattr(os, "write", fails)
    with pytest.raises(OSError, match="no more"):
        groups.add(2**22 + 2)
    assert groups._pipe == -1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(guardian_pipe)


def fails(*_: object, **__: object) -> None:
    raise OSError("no more")


async def test_a_server_that_does_not_read_holds_up_only_its_writer() -> None:
    child = Child(lambda _: None, lambda _: None)
    await child.start("sleep", ["600"], {}, None)
    writing = asyncio.create_task(child.write(b"x" * 2**20))
    done, _ = await asyncio.wait([writing], timeout=0.05)
    assert not done
    await child.end(patience=0)
    await writing
    with pytest.raises(ConnectionError):
        await child.write(b"x")


def test_a_process_that_ended_and_that_nobody_waited_for_does_not_count() -> None:
    process = subprocess.Popen(["true"], process_group=0)
    while not guardian.is_gone(process.pid):
        os.sched_yield()
    assert process.wait() == 0


def test_the_tail_keeps_the_last_lines_of_what_comes_in_pieces() -> None:
    tail = Tail(lines=2)
    for piece in (b"one\ntw", b"o\n\nthr", b"ee"):
        tail.feed(piece)
    assert tail.text == "two\nthree"
    tail.feed(b"\xff\n" + b"z" * 10_000)
    assert tail.text.splitlines()[0] == "three\ufffd"
    assert tail.text.splitlines()[1] == "z" * 500
