"""Process groups and their guardian: no server is left behind, however its host ends."""

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

from lmbridge import MCPError
from lmbridge.mcp.servers import guardian, process_groups
from lmbridge.mcp.servers.process_groups import ProcessGroups, end_group
from lmbridge.mcp.servers.server_process import ServerProcess
from tests.mcp.support import SERVER, wait_until_gone

HOST = """
import asyncio, os, signal, sys, time
from lmbridge.mcp import McpHub

# Under nohup, the tests and their children ignore this signal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

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
"""A program that starts a server and prints its process group. Its arguments say what it does after that."""
NO_SUCH_GROUP = 2**22 + 1
"""An id that no process group can have."""


@pytest.fixture
def hosts() -> Iterator[list[subprocess.Popen[str]]]:
    """A list for the hosts that a test starts; they are killed after the test, with their forks."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for host in started:
        guardian.send_signal(host.pid, signal.SIGKILL)
        host.communicate()


async def start_host(hosts: list[subprocess.Popen[str]], tmp_path: Path, *words: str, prelude: str = "") -> int:
    """Starts a program that starts a server with a grandchild, and returns the process group of the server."""
    options = {"grandchild": True, "notes": str(tmp_path / "notes")}
    entry = {"command": sys.executable, "args": ["-I", "-S", SERVER, json.dumps(options)]}
    (tmp_path / "mcp.json").write_text(json.dumps({"mcpServers": {"a": entry}}))

    def start() -> int:
        command = [sys.executable, "-c", prelude + HOST, str(tmp_path / "mcp.json"), *words]
        # In a new process group, so that a signal to the group reaches nothing else.
        pipe = subprocess.PIPE
        hosts.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, process_group=0))
        assert hosts[-1].stdout is not None
        return int(hosts[-1].stdout.readline())

    return await asyncio.to_thread(start)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGTERM, ()),
        (signal.SIGINT, ("close",)),
        (signal.SIGKILL, ()),
        pytest.param(signal.SIGINT, (), marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, (), marks=pytest.mark.slow),
    ],
)
async def test_no_server_outlives_its_host(
    hosts: list[subprocess.Popen[str]], tmp_path: Path, number: signal.Signals, words: tuple[str, ...]
) -> None:
    group = await start_host(hosts, tmp_path, *words)
    os.kill(hosts[0].pid, number)
    await wait_until_gone(group)
    code = await asyncio.to_thread(hosts[0].wait)
    # The host ended by the signal, so no handler swallowed it.
    assert code == -number


async def test_sigterm_ends_the_groups_before_the_host_ends(hosts: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    group = await start_host(hosts, tmp_path)
    hosts[0].terminate()
    await asyncio.to_thread(hosts[0].wait)
    assert await asyncio.to_thread(guardian.is_gone, group)


async def test_a_handler_for_sigterm_that_the_host_has_installed_stays(
    hosts: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    prelude = "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: os._exit(42))\n"
    group = await start_host(hosts, tmp_path, prelude=prelude)
    hosts[0].terminate()
    assert await asyncio.to_thread(hosts[0].wait) == 42
    await wait_until_gone(group)


async def test_a_host_that_forgets_to_close_its_hub_leaves_no_server(
    hosts: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    group = await start_host(hosts, tmp_path, "forget")
    _, errors = await asyncio.to_thread(hosts[0].communicate)
    assert (hosts[0].returncode, errors) == (0, "")
    await wait_until_gone(group)


async def test_a_fork_of_the_host_does_not_keep_its_servers_alive(
    hosts: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    group = await start_host(hosts, tmp_path, "fork")
    hosts[0].kill()
    await wait_until_gone(group)


def test_a_guardian_that_was_killed_is_replaced() -> None:
    groups = ProcessGroups()
    groups.add(NO_SUCH_GROUP)
    first = groups._guardian_pipe
    os.close(first)
    # Nothing can be written to a descriptor that was opened for reading.
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, first)
    groups.add(NO_SUCH_GROUP + 1)
    assert groups._guardian_pipe not in (-1, null)
    groups.discard(NO_SUCH_GROUP)
    groups.discard(NO_SUCH_GROUP + 1)
    os.close(groups._guardian_pipe)
    os.close(null)


def test_a_guardian_that_does_not_read_keeps_its_pipe_and_gets_the_rest_later() -> None:
    groups = ProcessGroups()
    reading, groups._guardian_pipe = os.pipe()
    os.set_blocking(groups._guardian_pipe, False)
    pipe, count = groups._guardian_pipe, 20_000
    for number in range(count):
        groups.add(NO_SUCH_GROUP + number)
    assert groups._guardian_pipe == pipe
    received = os.read(reading, 2**20)
    assert len(received) < count * len(b"+%d\n" % NO_SUCH_GROUP)
    while groups._unsent:
        groups.discard(NO_SUCH_GROUP)
        groups.add(NO_SUCH_GROUP)
        received += os.read(reading, 2**20)
    lines = received.split(b"\n")
    assert lines[:count] == [b"+%d" % (NO_SUCH_GROUP + number) for number in range(count)]
    os.close(reading)
    os.close(pipe)


async def test_a_guardian_that_cannot_be_started_leaves_no_descriptor_of_a_pipe_that_was_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("no more processes")

    groups = ProcessGroups()
    groups.add(NO_SUCH_GROUP)
    guardian_pipe = groups._guardian_pipe
    monkeypatch.setattr(os, "posix_spawn", fail)
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(MCPError, match="cannot be started: no more processes"):
        groups.add(NO_SUCH_GROUP + 1)
    assert groups._guardian_pipe == -1
    # A group that is gone needs no guardian.
    groups.discard(NO_SUCH_GROUP + 1)
    assert groups._groups == {NO_SUCH_GROUP}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(guardian_pipe)


def test_that_no_guardian_can_be_started_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "")
    groups = ProcessGroups()
    for number in (NO_SUCH_GROUP, NO_SUCH_GROUP + 1):
        groups.add(number)
    for number in (NO_SUCH_GROUP, NO_SUCH_GROUP + 1):
        groups.discard(number)
    assert caplog.text.count("sys.executable is empty") == 1


async def test_cancelling_the_end_of_a_group_kills_it_at_once() -> None:
    process = ServerProcess(lambda _: None, lambda _: None)
    await process.start("sh", ["-c", "trap '' TERM; sleep 600"], {}, None)
    pid = process.pid
    assert pid
    ending = asyncio.create_task(end_group(pid, patience=60))
    await asyncio.sleep(0)
    ending.cancel()
    await asyncio.wait([ending])
    assert ending.cancelled()
    assert pid not in process_groups.process_groups._groups
    await wait_until_gone(pid)
    await process.end()


def test_a_zombie_does_not_keep_its_group_alive() -> None:
    process = subprocess.Popen(["true"], process_group=0)
    while not guardian.is_gone(process.pid):
        os.sched_yield()
    assert process.wait() == 0
