"""A scripted server in a thread of its own, because the tests here block theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lmbridge.sync import LLMClient
from tests.threaded_server import ThreadedServer


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    """A scripted server that does not need the event loop of the test."""
    with ThreadedServer() as server:
        yield server


@pytest.fixture
def client(server: ThreadedServer) -> Iterator[LLMClient]:
    """A blocking client of the scripted server."""
    with LLMClient(server.api_base, "test-model") as client:
        yield client
