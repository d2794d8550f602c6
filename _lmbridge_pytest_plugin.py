"""The plugin that pytest loads by itself where lmbridge is installed: fixtures for programs that use lmbridge.

pytest imports it in each run, whatever the tests are about. So it is a module beside the package, as the plugin of
hypothesis is, and imports lmbridge only in its fixtures: a module of the package would import the whole package, which
takes most of a second. A suite can also do without it: `pytest -p no:lmbridge`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from lmbridge.testing import Cassette, ScriptedServer

_failed: Final = pytest.StashKey[bool]()
_MARKER: Final = (
    "lmbridge_cassette(**options): options of the Cassette of the fixture `lmbridge_cassette`, such as match_on=[...]"
)
_NEEDS_ASYNCIO: Final = "the fixture `lmbridge_server` needs pytest-asyncio: pip install pytest-asyncio"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--lmbridge-record`."""
    parser.getgroup("lmbridge").addoption(
        "--lmbridge-record",
        nargs="?",
        const="all",
        default="none",
        choices=("none", "once", "all"),
        help="record the cassettes of the fixture `lmbridge_cassette` from a real server: all of them (the default of"
        " this option), or with `once` those that have no file yet; without this option they are only replayed",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker of this plugin."""
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Notes whether a test has failed, because its cassette is not written then."""
    report = yield
    if report.failed:
        item.stash[_failed] = True
    return report


if TYPE_CHECKING:
    _asyncio_fixture = pytest.fixture
else:
    try:
        # Where it is installed, pytest has loaded it as well, or is about to.
        from pytest_asyncio import fixture as _asyncio_fixture
    except ImportError:
        _asyncio_fixture = None

if _asyncio_fixture is not None:

    @_asyncio_fixture
    async def lmbridge_server() -> AsyncIterator[ScriptedServer]:
        """Yields a running `ScriptedServer`. If one of its behaviours raises an exception, the test fails."""
        from lmbridge.testing import ScriptedServer

        async with ScriptedServer() as server:
            yield server

else:

    @pytest.fixture
    def lmbridge_server() -> None:
        """Says what has to be installed."""
        pytest.fail(_NEEDS_ASYNCIO)


@pytest.fixture
def lmbridge_cassette(request: pytest.FixtureRequest) -> Iterator[Cassette]:
    """Opens a `Cassette` for the test, which is replayed, or recorded with `--lmbridge-record`.

    Its file is `cassettes/FILE/TEST.json` beside the file of the test. The marker `lmbridge_cassette` sets options of
    the cassette, such as `match_on`. The cassette of a test that fails is not written.
    """
    from lmbridge.testing import Cassette, CassetteError

    options: dict[str, Any] = {"mode": request.config.getoption("--lmbridge-record")}
    for marker in reversed(list(request.node.iter_markers("lmbridge_cassette"))):
        options |= marker.kwargs
    path = options.pop("path", None) or _path_of(request.node)
    cassette = Cassette(path, **options)
    try:
        cassette.__enter__()
    except CassetteError as error:
        pytest.fail(f"{error}; for this fixture, run pytest with --lmbridge-record", pytrace=False)
    failure = None
    try:
        yield cassette
    finally:
        if request.node.stash.get(_failed, False):
            failure = AssertionError("the test has failed")
        cassette.__exit__(None if failure is None else type(failure), failure, None)


@pytest.fixture
def forbid_real_requests() -> Iterator[None]:
    """Makes requests to real servers raise a `RealRequestError`; see `lmbridge.testing.forbid_real_requests`."""
    from lmbridge.testing import real_requests

    with real_requests.forbid_real_requests():
        yield


@pytest.fixture
def retry_without_waiting() -> Iterator[None]:
    """Lets requests be sent again at once; see `lmbridge.testing.retry_without_waiting`."""
    from lmbridge.testing import real_requests

    with real_requests.retry_without_waiting():
        yield


def _path_of(test: pytest.Item) -> Path:
    """Returns the path of the cassette of a test. Characters that a file name should not have become dashes."""
    # With the name of the class, because two classes of a file may have tests of the same name.
    name = test.nodeid.partition("::")[2]
    return test.path.parent / "cassettes" / test.path.stem / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}.json"
