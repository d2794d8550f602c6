"""Shows that a blocking call of the package fails the test that makes it: the fixture that does so has to work."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from blockbuster import BlockingError

import lmbridge


def package_function(source: str, name: str) -> Callable[[], None]:
    """Compiles a function as if a file of the package contained it."""
    namespace: dict[str, Callable[[], None]] = {}
    exec(compile(source, str(Path(lmbridge.__file__).with_name("blocking.py")), "exec"), namespace)
    return namespace[name]


async def test_a_blocking_call_of_the_package_in_the_event_loop_is_an_error() -> None:
    block = package_function("import time\ndef block(): time.sleep(0.001)", "block")
    with pytest.raises(BlockingError):
        block()


async def test_a_blocking_call_of_a_test_is_allowed() -> None:
    time.sleep(0.001)
