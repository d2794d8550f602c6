"""pytest fixtures; take them with `pytest_plugins = ["lmbridge.testing.fixtures"]` in the top `conftest.py`."""

from __future__ import annotations

from collections.abc import AsyncIterator

try:
    import pytest_asyncio
except ImportError as error:
    raise ImportError(
        "lmbridge.testing.fixtures needs pytest and pytest-asyncio: pip install pytest pytest-asyncio"
    ) from error

from lmbridge.testing.server import ScriptedServer


@pytest_asyncio.fixture
async def scripted_server() -> AsyncIterator[ScriptedServer]:
    """A running `ScriptedServer`; what its behaviours raised fails the test."""
    async with ScriptedServer() as server:
        yield server
