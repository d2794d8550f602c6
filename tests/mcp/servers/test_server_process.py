"""A server's child process: starting, writing, ending, and what cancellations do to each."""

from __future__ import annotations

import asyncio

import pytest

from lmbridge import MultiMCPError
from lmbridge.mcp.servers import guardian
from lmbridge.mcp.servers.server_process import ServerProcess, StderrExcerpt
from tests.mcp.conftest import MakeHub
from tests.support import turns


def make_process() -> ServerProcess:
    return ServerProcess(lambda _: None, lambda _: None)


async def test_a_cancelled_end_waits_until_the_group_is_gone() -> None:
    process = make_process()
    await process.start("sh", ["-c", "trap '' TERM; echo; sleep 600"], {}, None)
    pid = process.pid
    assert pid
    ending = asyncio.create_task(process.end())
    await turns()
    ending.cancel()
    await asyncio.wait([ending])
    assert ending.cancelled()
    assert await asyncio.to_thread(guardian.is_gone, pid)


async def test_a_cancelled_start_does_not_lose_the_process() -> None:
    process = make_process()
    starting = asyncio.create_task(process.start("sleep", ["600"], {}, None))
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])
    assert starting.cancelled()
    assert process.pid
    await process.end()
    assert await asyncio.to_thread(guardian.is_gone, process.pid)


async def test_a_start_that_is_cancelled_twice_does_not_lose_the_process_either() -> None:
    process = make_process()
    starting = asyncio.create_task(process.start("sleep", ["600"], {}, None))
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.sleep(0)
    starting.cancel()
    await asyncio.wait([starting])
    assert process.pid
    await process.end()


async def test_a_server_that_cannot_be_guarded_is_ended_and_its_start_fails(
    make_hub: MakeHub, unguarded_groups: set[int], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(MultiMCPError, match=r"cannot be started: Resource temporarily unavailable.*ulimit"):
        await make_hub({"a": {}}).tools()
    assert unguarded_groups
    assert all([await asyncio.to_thread(guardian.is_gone, group) for group in unguarded_groups])
    assert [record.name for record in caplog.records if record.name == "asyncio"] == []


async def test_a_process_that_does_not_read_blocks_only_its_writer() -> None:
    process = make_process()
    await process.start("sleep", ["600"], {}, None)
    writing = asyncio.create_task(process.write(b"x" * 2**20))
    done, _ = await asyncio.wait([writing], timeout=0.05)
    assert not done
    await process.end(patience=0)
    await writing
    with pytest.raises(ConnectionError):
        await process.write(b"x")


def test_the_first_and_the_last_lines_of_stderr_are_kept_of_what_arrives_in_pieces() -> None:
    excerpt = StderrExcerpt(first=1, last=2)
    for piece in (b"one\ntw", b"o\n\nthr", b"ee"):
        excerpt.feed(piece)
    assert excerpt.text == excerpt.tail.replace("two", "one\ntwo", 1) == "one\ntwo\nthree"
    excerpt.feed(b"\xff\nfour\n" + b"z" * 10_000)
    first, gap, *last = excerpt.text.splitlines()
    assert (first, gap) == ("one", "[... 1 line omitted]")
    assert last == ["three\ufffd", "four", "z" * 500]
    assert excerpt.tail.splitlines() == ["four", "z" * 500]


def test_lines_that_only_report_a_download_of_npm_are_left_out() -> None:
    excerpt = StderrExcerpt()
    excerpt.feed(b"npm http fetch GET 200 https://registry.npmjs.org/zod 51ms (cache miss)\n")
    excerpt.feed(b"npm http cache zod@https://registry.npmjs.org/zod/-/zod-4.6.7.tgz 0ms (cache hit)\n")
    excerpt.feed(b"npm http fetch GET 404 https://registry.npmjs.org/nope 51ms\nnpm error 404 Not Found\n")
    assert excerpt.text == "npm http fetch GET 404 https://registry.npmjs.org/nope 51ms\nnpm error 404 Not Found"
