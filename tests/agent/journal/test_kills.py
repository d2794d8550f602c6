"""Runs whose process is killed at every point go on in another process, as if nothing had happened."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lmbridge.agent.journal_interface import UNCERTAIN_RESULT
from lmbridge.testing import Exchange, ScriptedServer
from tests.agent.support import asks, calls, check_valid, tool_texts

ROOT = Path(__file__).parents[3]
REPLIES = [
    calls(asks("act", "a", name="a"), asks("act_in_thread", "b", name="b"), asks("look", "c", name="c"), text="First."),
    calls(asks("act", "d", name="d"), asks("act", "e", name="e"), text="Second."),
    calls(text="All is done."),
]
USAGE = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


async def answer_by_results(exchange: Exchange) -> None:
    """Replies to a conversation with the number of results that it has, whoever sends it."""
    results = len(tool_texts(exchange.request.json["messages"]))
    await REPLIES[{0: 0, 3: 1, 5: 2}[results]](exchange)


async def outcomes_of(server: ScriptedServer, folder: Path, kind: str, points: str) -> list[dict[str, Any]]:
    server.default = answer_by_results
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "tests.agent.journal.killed_runs", server.api_base, str(folder), kind, points),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0
    return [json.loads(line) for line in output.splitlines()]


def check(outcome: dict[str, Any]) -> None:
    assert "error" not in outcome, outcome
    assert (outcome["text"], outcome["rounds"], outcome["usage"]) == ("All is done.", 3, USAGE), outcome
    assert outcome["is_same"], outcome
    check_valid(outcome["messages"])
    times = Counter(outcome["calls"])
    for name, text in zip("abcde", tool_texts(outcome["messages"]), strict=True):
        if name == "c":
            # The tool is idempotent: an interrupted call is made again, and ends.
            assert text == "c is done", outcome
            assert 1 <= times["begin c"] <= 2, outcome
        else:
            assert times[f"begin {name}"] <= 1, outcome
            assert text in (f"{name} is done", UNCERTAIN_RESULT), outcome
            if text != UNCERTAIN_RESULT:
                assert times[f"end {name}"] == 1, outcome


async def test_a_run_goes_on_after_a_kill_at_a_write(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    outcomes = await outcomes_of(scripted_server, tmp_path, "writes", "6:13:6")
    assert [outcome["point"] for outcome in outcomes] == [6, 12]
    for outcome in outcomes:
        check(outcome)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["writes", "awaits"])
async def test_a_run_goes_on_after_a_kill_at_every_point(
    kind: str, scripted_server: ScriptedServer, tmp_path: Path
) -> None:
    outcomes = await outcomes_of(scripted_server, tmp_path, kind, "0:2000")
    for outcome in outcomes:
        check(outcome)
    # A run has 9 to 14 transactions, and about 150 turns of the loop.
    assert len(outcomes) > {"writes": 18, "awaits": 100}[kind]
    uncertain = [outcome for outcome in outcomes if UNCERTAIN_RESULT in tool_texts(outcome["messages"])]
    assert uncertain
