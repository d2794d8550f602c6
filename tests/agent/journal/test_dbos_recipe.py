"""The recipe of docs/durable-runs.md for DBOS, whose process is killed in a call of a tool."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from lmbridge.testing import Exchange, ScriptedServer, answer
from tests.agent.support import asks, calls, tool_texts

pytest.importorskip("dbos", reason="`nox -s dbos` installs it")

PAGE = Path(__file__).parents[3] / "docs" / "durable-runs.md"
RECIPE = re.compile(r"^```text\n(import asyncio\n.*?^from dbos import.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAM = """
import asyncio, os, signal, sys
import recipe

def look_up(name: str) -> str:
    "Looks up the address of somebody."
    os.kill(os.getpid(), signal.SIGKILL)
    return ""

if sys.argv[1] == "die":
    recipe.look_up = look_up
asyncio.run(recipe.main("letter-1", "Hello!"))
"""


async def behave(exchange: Exchange) -> None:
    results = tool_texts(exchange.request.json["messages"])
    await (answer(f"Dear Ada. {results[0]}") if results else calls(asks("look_up", name="Ada")))(exchange)


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_a_workflow_goes_on_in_the_middle_of_its_agent(scripted_server: ScriptedServer, tmp_path: Path) -> None:
    (recipe,) = RECIPE.findall(PAGE.read_text())
    assert recipe.count("\n") < 60
    (tmp_path / "recipe.py").write_text(recipe)
    (tmp_path / "program.py").write_text(PROGRAM)
    scripted_server.default = behave
    env = os.environ | {"LMBRIDGE_API_BASE": scripted_server.api_base, "LMBRIDGE_MODEL": "test-model"}
    statuses, printed = [], b""
    for how in ("die", "live"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "program.py", how, cwd=tmp_path, env=env, stdout=asyncio.subprocess.PIPE
        )
        printed, _ = await process.communicate()
        statuses.append(process.returncode)
    assert statuses == [-signal.SIGKILL, 0]
    assert "Dear Ada. No result: the program was interrupted" in printed.decode()
    with closing(sqlite3.connect(tmp_path / "runs.db")) as journal:
        kinds = [kind for (kind,) in journal.execute("SELECT kind FROM steps ORDER BY number")]
    assert kinds == ["begun", "reply", "planned", "started", "done", "reply", "ended"]
