"""The command line with the embedded server, as a newcomer uses it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from lmbridge import LocalServer
from tests.cli.test_real_terminal import Screen

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def local_server() -> AsyncIterator[LocalServer]:
    async with LocalServer() as server:
        yield server


def lmbridge(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmbridge", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_shortest_way_to_an_answer() -> None:
    done = lmbridge("chat", "--local", "-t", "0", "What is the capital of France?")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout


def test_a_conversation_in_a_terminal_shows_answers_as_they_arrive_and_survives_ctrl_c(tmp_path: Path) -> None:
    arguments = ["chat", "--local", "--no-log", "-t", "0", "--max-tokens", "400"]
    screen = Screen(arguments, {"LMBRIDGE_DATA_HOME": str(tmp_path)})
    try:
        screen.shows("\n>")
        screen.type("Write a long story about a fox.\r")
        begun = screen.shows("Once upon a time")
        screen.wait_for(lambda text: len(text) > len(begun) + 100)
        screen.type("\x03")
        screen.shows("[stopped]")
        # The embedded server goes on to answer in the same conversation.
        screen.type("What is the capital of France?\r")
        # Only an answer that is complete has a speed.
        screen.wait_for(lambda text: " tokens/s" in text.rpartition("the capital of France?")[2])
        screen.type("\x04")
        assert screen.wait_end() == 0
    finally:
        screen.program.close(force=True)


@pytest.mark.asyncio(loop_scope="module")
async def test_doctor_finds_nothing_broken_at_the_embedded_server(local_server: LocalServer) -> None:
    done = lmbridge("doctor", "--json", LMBRIDGE_API_BASE=local_server.api_base)
    report = json.loads(done.stdout)
    states = {each["check"]: each["state"] for each in report["findings"]}
    assert done.returncode == 0, report
    assert states["server"] == states["model"] == states["streaming"] == states["long prompts"] == "ok"


@pytest.mark.asyncio(loop_scope="module")
async def test_its_model_is_listed(local_server: LocalServer) -> None:
    done = lmbridge("models", "--json", LMBRIDGE_API_BASE=local_server.api_base)
    (server,) = json.loads(done.stdout)
    assert server["models"][0]["id"] == local_server.model
