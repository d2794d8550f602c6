from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

CONFTEST = 'pytest_plugins = ["lmbridge.testing.fixtures"]'
TESTS = """
import pytest
from lmbridge.testing import ScriptedServer

@pytest.mark.asyncio
async def test_serves(scripted_server: ScriptedServer) -> None:
    assert scripted_server.origin

@pytest.mark.asyncio
async def test_fails(scripted_server: ScriptedServer) -> None:
    scripted_server.errors.append(ValueError("a behaviour raised"))
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


# It starts pytest in a process of its own, which takes a while on a busy machine.
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mode", [pytest.param("auto", marks=pytest.mark.slow), "strict"])
def test_the_fixture_serves_and_fails_a_test_whose_behaviours_raised(pytester: pytest.Pytester, mode: str) -> None:
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    pytester.makeini(
        f"[pytest]\nasyncio_mode = {mode}\nasyncio_default_fixture_loop_scope = function\nfilterwarnings = error"
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=2, errors=1)
    result.stdout.fnmatch_lines(["*ValueError: a behaviour raised*"])


def test_without_pytest_asyncio_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['pytest_asyncio'] = None; import lmbridge.testing.fixtures"
    result = python(code)
    assert result.returncode
    assert "pip install pytest pytest-asyncio" in result.stderr


def test_the_doubles_do_not_need_pytest() -> None:
    code = "import sys; sys.modules['pytest'] = sys.modules['pytest_asyncio'] = None; import lmbridge.testing"
    result = python(code)
    assert (result.returncode, result.stderr) == (0, "")
