"""The parts of the Ray backend that need no cluster."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmbridge import Agent

pytest.importorskip("ray", reason="needs lmbridge[ray]")

import ray

from lmbridge.fleet.ray_backend import RayBackend


class FakeCluster:
    """Stands in for the functions of Ray, and counts what is started and ended.

    Args:
        patch: Replaces the functions.
        fails_at: The number of the actor that cannot be created, or None.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, fails_at: int | None = None) -> None:
        self.begun, self.may_start = threading.Event(), threading.Event()
        self.may_start.set()
        self.created: list[object] = []
        self.killed: list[object] = []
        self.is_connected = False
        self._fails_at = fails_at
        patch.setattr(ray, "is_initialized", lambda: self.is_connected)
        patch.setattr(ray, "init", self._init)
        patch.setattr(ray, "shutdown", self._shutdown)
        patch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
        patch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))
        patch.setattr(ray, "remote", lambda _class: SimpleNamespace(options=self._options))
        patch.setattr(ray, "kill", lambda actor, **_options: self.killed.append(actor))

    def _init(self, **_options: Any) -> None:
        self.begun.set()
        self.may_start.wait(60)
        self.is_connected = True

    def _shutdown(self) -> None:
        self.is_connected = False

    def _options(self, **_options: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=self._create)

    def _create(self, *_arguments: Any) -> object:
        if len(self.created) == self._fails_at:
            raise RuntimeError("no room for another actor")
        self.created.append(object())
        return self.created[-1]


def no_agent() -> Agent:
    raise AssertionError("the factory is only called in the actors")


@pytest.fixture
def make_backend(tmp_path: Path) -> Callable[[], RayBackend]:
    checkpoint = str(tmp_path / "fleet.db")
    return lambda: RayBackend(no_agent, slots=2, retries=0, checkpoint=checkpoint)


async def test_a_backend_whose_opening_is_cancelled_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, make_backend: Callable[[], RayBackend]
) -> None:
    cluster = FakeCluster(monkeypatch)
    cluster.may_start.clear()
    opening = asyncio.ensure_future(make_backend().__aenter__())
    await asyncio.to_thread(cluster.begun.wait, 60)
    opening.cancel()
    await asyncio.sleep(0)
    cluster.may_start.set()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert len(cluster.created) == 3
    assert sorted(map(id, cluster.killed)) == sorted(map(id, cluster.created))
    assert not cluster.is_connected


@pytest.mark.parametrize("fails_at", [0, 1, 2])
@pytest.mark.parametrize("was_connected", [False, True])
async def test_a_backend_that_cannot_be_opened_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, make_backend: Callable[[], RayBackend], fails_at: int, was_connected: bool
) -> None:
    cluster = FakeCluster(monkeypatch, fails_at=fails_at)
    cluster.is_connected = was_connected
    with pytest.raises(RuntimeError, match="no room"):
        await make_backend().__aenter__()
    assert len(cluster.created) == fails_at
    assert sorted(map(id, cluster.killed)) == sorted(map(id, cluster.created))
    assert cluster.is_connected is was_connected, "a connection of the program stays"
