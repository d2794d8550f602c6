"""Tests with the mocks of aioresponses, where these work.

aioresponses 0.7.9 cannot create a response with aiohttp 3.14 (docs/dependencies.md says why). In that case the tests in
this folder are not collected; the nox session `aioresponses` runs them with a version of aiohttp that is supported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
import pytest_asyncio
from aioresponses import aioresponses

from lmbridge import LLMClient

API_BASE = "http://127.0.0.1:1234/v1"


def mocks_work() -> bool:
    """Returns whether the installed aioresponses can answer a request of the installed aiohttp."""

    async def ask() -> None:
        with aioresponses() as mock:
            mock.get(API_BASE)
            async with aiohttp.ClientSession() as session, session.get(API_BASE):
                pass

    try:
        asyncio.run(ask())
    # The constructor of ClientResponse has changed since.
    except TypeError:
        return False
    return True


collect_ignore_glob = [] if mocks_work() else ["test_*.py"]


@pytest.fixture
def mock() -> Iterator[aioresponses]:
    """Answers every request of aiohttp. A request without a prepared answer fails to connect."""
    with aioresponses() as mock:
        yield mock


@pytest_asyncio.fixture
async def client(mock: aioresponses) -> AsyncIterator[LLMClient]:
    """A client whose requests the mock answers."""
    async with LLMClient(API_BASE, "test-model", "a-secret-key") as client:
        yield client
