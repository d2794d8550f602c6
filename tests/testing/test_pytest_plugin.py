"""The pytest plugin, in runs of pytest of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[2]
OPTIONS = ("-p", "pytest_asyncio.plugin", "-p", "_lmbridge_pytest_plugin")
TESTS = """
import asyncio
import pytest
from lmbridge import LLMClient
from lmbridge.testing import RealRequestError, ScriptedServer, answer, reply

async def test_server(lmbridge_server):
    async with LLMClient(lmbridge_server.api_base) as client:
        assert await client.ask("?")

async def test_forbidden(forbid_real_requests):
    async with LLMClient("http://127.0.0.1:1/v1") as client:
        with pytest.raises(RealRequestError):
            await client.ask("?")

async def test_at_once(lmbridge_server, retry_without_waiting):
    lmbridge_server.script(reply(429, {}, {"Retry-After": "30"}), answer("Hello"))
    async with asyncio.timeout(5), LLMClient(lmbridge_server.api_base) as client:
        assert await client.ask("?") == "Hello"
"""
CASSETTE_TESTS = """
import pytest
from lmbridge import LLMClient
from lmbridge.testing import ScriptedServer

@pytest.mark.parametrize("name", ["Ann", "B/b"])
async def test_asks(lmbridge_cassette, name):
    if lmbridge_cassette.is_recording:
        async with ScriptedServer() as server, LLMClient(server.api_base) as client:
            assert await client.ask(name)
    else:
        async with LLMClient("http://127.0.0.1:1/v1") as client:
            assert await client.ask(name)

class TestOthers:
    async def test_asks(self, lmbridge_cassette):
        pass

@pytest.mark.lmbridge_cassette(match_on=["path"], path="elsewhere.json")
async def test_fails(lmbridge_cassette):
    assert not lmbridge_cassette.is_recording
"""


@pytest.fixture(autouse=True)
def plain_pytest(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeini(
        "[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error\n"
        "addopts = --strict-markers"
    )


def test_the_fixtures_work(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(TESTS)
    pytester.runpytest_inprocess(*OPTIONS).assert_outcomes(passed=3)


def test_cassettes_are_recorded_on_request_and_replayed_otherwise(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CASSETTE_TESTS)
    without = pytester.runpytest_inprocess(*OPTIONS)
    without.assert_outcomes(errors=4)
    without.stdout.fnmatch_lines(["*the cassette * does not exist*run pytest with --lmbridge-record"])
    pytester.runpytest_inprocess(*OPTIONS, "--lmbridge-record").assert_outcomes(passed=3, failed=1)
    folder = pytester.path / "cassettes"
    written = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.json"))
    file = "test_cassettes_are_recorded_on_request_and_replayed_otherwise"
    assert written == [f"{file}/{name}.json" for name in ("TestOthers-test_asks", "test_asks-Ann-", "test_asks-B-b-")]
    assert not (pytester.path / "elsewhere.json").exists()
    (pytester.path / "elsewhere.json").write_text(json.dumps({"lmbridge_cassette": 1, "exchanges": []}))
    pytester.runpytest_inprocess(*OPTIONS).assert_outcomes(passed=4)


# It starts pytest in a process of its own, which takes a while on a busy machine.
@pytest.mark.timeout(240)
@pytest.mark.slow
def test_without_pytest_asyncio_only_the_server_is_missing(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]")
    pytester.makeconftest(
        "import sys; sys.modules['pytest_asyncio'] = None\npytest_plugins = ['_lmbridge_pytest_plugin']"
    )
    pytester.makepyfile("def test_server(lmbridge_server): pass\ndef test_other(forbid_real_requests): pass")
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*pip install pytest-asyncio*"])


def test_a_suite_that_does_not_use_the_plugin_does_not_pay_for_the_package() -> None:
    program = (
        "import sys, _lmbridge_pytest_plugin; print([name for name in sys.modules if name.startswith('lmbridge')])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_pytest_finds_the_plugin_by_its_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"lmbridge": "_lmbridge_pytest_plugin"}
