"""A scripted server that does not need the event loop of the test."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from lmbridge.testing import Behaviour, ScriptedServer


class ThreadedServer:
    """A scripted server that runs in another thread's event loop, for tests that block theirs or have several."""

    def __init__(self) -> None:
        self.scripted = ScriptedServer()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Self:
        self._thread.start()
        self._run(self.scripted.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._run(self.scripted.__aexit__(kind, error, trace))
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    @property
    def api_base(self) -> str:
        return self.scripted.api_base

    def answer(self, behaviour: Behaviour) -> None:
        """Sets what the server does with every request."""
        self.scripted.default = behaviour

    def wait_until(self, condition: Callable[[ScriptedServer], object]) -> None:
        """Waits for something to come true, in the server's own loop."""
        self._run(self.scripted.wait_until(lambda: condition(self.scripted)))

    def _run(self, coroutine: Coroutine[Any, Any, object]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)


def run_program(program: str, *arguments: str, warnings: str) -> subprocess.CompletedProcess[str]:
    """Runs a program in a Python of its own, and returns what it wrote. The test fails if it ends with an error.

    Args:
        program: The source of the program.
        arguments: Its arguments.
        warnings: Which warnings it shows, as the option `-W` of Python takes it.
    """
    command = [sys.executable, "-W", warnings, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
