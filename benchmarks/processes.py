"""The processes: the stub server on one core, the clients on another."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from benchmarks.peers import PEERS, environment

ROOT: Final = Path(__file__).parent.parent
PRIORITY: Final = -15
_IMPORT: Final = """
import time
began = time.process_time()
import {}
print((time.process_time() - began) * 1e3)
"""


class FailedError(Exception):
    """There is no figure, and why."""


def cores() -> tuple[int, int] | None:
    """The server's core and the clients'; None where processes cannot be pinned, or there is but one core."""
    if not hasattr(os, "sched_setaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else None


class Process:
    """A Python process on one of the cores, spoken to by lines.

    Args:
        core: Which of `cores()`.
        *args: For the interpreter.
    """

    def __init__(self, core: int, *args: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *args],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        if pinned := cores():
            os.sched_setaffinity(self._process.pid, {pinned[core]})
        with suppress(AttributeError, PermissionError):  # what else runs on this machine shall wait, if it may be told
            os.setpriority(os.PRIO_PROCESS, self._process.pid, PRIORITY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def read(self, bound: float) -> str:
        """The next line that it prints."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], bound)[0]:
            raise FailedError(f"not done in {bound:g} s")
        return self._process.stdout.readline()

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()


class Stub(Process):
    """The server."""

    def __init__(self) -> None:
        super().__init__(0, "-m", "benchmarks.stub")
        self.port = int(self.read(10))


class Worker(Process):
    """A client in a process of its own.

    Args:
        name: Which client.
        port: The server's.
        module: Its program.
    """

    def __init__(self, name: str, port: int, module: str = "benchmarks.worker") -> None:
        super().__init__(1, "-m", module, name, str(port))

    def measure(self, workload: str, arguments: Mapping[str, Any], bound: float) -> float | None:
        """A figure of a workload; None is "never".

        Raises:
            FailedError: there is none.
        """
        self.write(json.dumps({"do": workload, "bound": bound, **arguments}))
        line = self.read(bound * 1.5 + 10)  # what blocks its loop does not see the bound
        if not line:
            raise FailedError("its process died")
        answer = json.loads(line)
        if "failed" in answer:
            raise FailedError(answer["failed"])
        value: float | None = answer["value"]
        return value


def measure_import(name: str, bound: float) -> float:
    """CPU milliseconds that the import of a client takes in a fresh process."""
    modules = PEERS[name].imports
    with Process(1, "-c", _IMPORT.format(modules)) as process:
        line = process.read(bound)
    if not line:
        raise FailedError(f"cannot import {modules}")
    return float(line)
