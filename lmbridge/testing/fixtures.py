"""One fixture that pytest does not load by itself. The pytest plugin of lmbridge is `_lmbridge_pytest_plugin`.

To use the fixture, put `pytest_plugins = ["lmbridge.testing.fixtures"]` into the top-level `conftest.py`. The plugin,
which pytest loads by itself, has more fixtures and needs no such line.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

try:
    import pytest_asyncio
except ImportError as _error:
    raise ImportError(
        "lmbridge.testing.fixtures needs pytest and pytest-asyncio: pip install pytest pytest-asyncio"
    ) from _error

from lmbridge.testing.scripted_server import ScriptedServer


@pytest_asyncio.fixture
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    """Yields a running `ScriptedServer`. If one of its behaviours raises an exception, the test fails."""
    async with ScriptedServer() as server:
        yield server
