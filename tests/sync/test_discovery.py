"""`lmbridge.sync.discover`, which blocks until the ports have answered."""

from __future__ import annotations

import inspect

import lmbridge
from lmbridge import sync
from tests.threaded_server import ThreadedServer


def test_servers_are_found_without_async(server: ThreadedServer) -> None:
    port = int(server.scripted.origin.rpartition(":")[2])
    (found,) = sync.discover([port], timeout=10)
    assert found.api_base == server.api_base


def test_it_has_the_parameters_of_the_asynchronous_function() -> None:
    assert inspect.signature(sync.discover) == inspect.signature(lmbridge.discover)
