"""Each example runs as a user runs it: as a program."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NamedTuple

import pytest

from lmbridge.testing import ScriptedServer, answer, reply

EXAMPLES = Path(__file__).parent.parent / "examples"
FOX = "The quick brown fox jumps over the lazy dog."


class Outcome(NamedTuple):
    status: int
    pieces: list[str]
    """What it printed, as it arrived."""
    errors: str

    @property
    def output(self) -> str:
        return "".join(self.pieces)


async def run(example: str, *args: str, **env: str) -> Outcome:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-W", "error", str(EXAMPLES / example), *args),
        env=os.environ | env,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors = asyncio.create_task(process.stderr.read())
    pieces = [piece.decode() async for piece in _as_it_arrives(process.stdout)]
    return Outcome(await process.wait(), pieces, (await errors).decode())


async def _as_it_arrives(stream: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await stream.read(65536):
        yield piece


async def test_quickstart_streams_from_the_server_that_it_is_given(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(FOX)
    outcome = await run(
        "quickstart.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b", "What does the fox do?"
    )
    assert (outcome.status, outcome.errors) == (0, "")
    question, text, summary = outcome.output.split("\n\n")
    assert question == "> What does the fox do?"
    assert text == FOX
    assert summary.startswith("qwen3-4b: 9 tokens in ")
    (request,) = scripted_server.requests
    assert request.json["messages"] == [{"role": "user", "content": "What does the fox do?"}]


async def test_quickstart_prints_each_chunk_when_it_arrives(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.default = answer(FOX, gate=gate)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(EXAMPLES / "quickstart.py"),
        "--api-base",
        scripted_server.api_base,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert (await process.stdout.readuntil(b"The")).endswith(b"\n\nThe")
    gate.set()
    assert (await process.stdout.read()).startswith(b" quick brown")
    assert await process.wait() == 0


async def test_quickstart_takes_the_server_of_the_environment(scripted_server: ScriptedServer) -> None:
    outcome = await run("quickstart.py", LMBRIDGE_API_BASE=scripted_server.api_base, DEFAULT_MODEL="gemma-3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    assert "gemma-3-4b: " in outcome.output


@pytest.mark.parametrize("example", ["quickstart.py", "streaming.py"])
async def test_an_error_is_told_in_a_line(example: str, scripted_server: ScriptedServer) -> None:
    scripted_server.default = reply(400, {"error": "no such thing"})
    outcome = await run(example, "--api-base", scripted_server.api_base)
    assert outcome.status == 1
    assert outcome.errors.startswith(f"{example.removesuffix('.py')}: chat completion at {scripted_server.api_base}")
    assert len(outcome.errors.splitlines()) == 1


async def test_streaming_shows_all_its_parts(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer(f"{FOX} " * 10)
    outcome = await run("streaming.py", "--api-base", scripted_server.api_base, "--model", "qwen3-4b")
    assert (outcome.status, outcome.errors) == (0, "")
    assert outcome.output.count("\n== ") == 5
    assert len(scripted_server.requests) == 12
    assert scripted_server.max_in_flight <= 2


async def test_streaming_stops_a_stream_that_goes_on(scripted_server: ScriptedServer) -> None:
    endless = asyncio.Event()
    long = answer("", chunks=[f"{FOX} " * 5, FOX], gate=endless)
    scripted_server.script(long, answer(FOX, gate=endless), answer(FOX, gate=endless))
    outcome = await run("streaming.py", "--api-base", scripted_server.api_base)
    assert (outcome.status, outcome.errors) == (0, "")
    assert "-- stopped after 3 characters" in outcome.output
    assert "no end within 1 s" in outcome.output
    assert "-- .partial has 3 characters" in outcome.output
    assert "-- left" in outcome.output
    assert scripted_server.aborts == scripted_server.requests[:3]


@pytest.mark.real
@pytest.mark.timeout(180)
async def test_quickstart_streams_from_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("quickstart.py")
    assert outcome.status == 0, outcome.errors
    _, _, text = outcome.output.partition("\n\n")
    text, _, summary = text.rpartition("\n\n")
    assert len(text.split()) > 10
    assert summary.startswith("smollm2-135m-instruct: ")
    assert len(outcome.pieces) > 5


@pytest.mark.real
@pytest.mark.timeout(180)
async def test_streaming_runs_on_the_embedded_server() -> None:
    pytest.importorskip("xllamacpp", reason="needs lmbridge[local]")
    outcome = await run("streaming.py")
    assert outcome.status == 0, outcome.errors
    assert outcome.output.count("\n== ") == 5
