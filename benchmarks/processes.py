"""The processes of a measurement: servers on one core, the peers on another."""

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

ROOT: Final = Path(__file__).parent.parent
SERVER_CORE: Final = 0
"""The index, in `cores()`, of the core that servers run on."""
PEER_CORE: Final = 1
"""The index, in `cores()`, of the core that the peers run on."""
PRIORITY: Final = -15
"""The niceness of the processes, so that other work on the machine waits."""
START_SECONDS: Final = 10.0
"""The seconds that the stub server may take to start, and the margin for a worker that overruns its bound."""
_CORES_VARIABLE: Final = "LMBRIDGE_BENCHMARK_CORES"
"""The environment variable that passes the cores on to processes that are pinned to one of them."""
_REMOVED_VARIABLES: Final = (
    "PYTHONDONTWRITEBYTECODE",
    "PYTHONOPTIMIZE",
    "PYTHONASYNCIODEBUG",
    "PYTHONDEVMODE",
    "PYTHONTRACEMALLOC",
)
_IMPORT_PROGRAM: Final = """
import time
began = time.process_time()
import {}
print((time.process_time() - began) * 1e3)
"""


class MeasurementError(Exception):
    """A figure could not be measured. The text gives the reason."""


def cores() -> tuple[int, int] | None:
    """Returns the cores for servers and peers, or None if processes cannot be pinned or there is only one core."""
    if passed_on := os.environ.get(_CORES_VARIABLE):
        server, peer = map(int, passed_on.split(","))
        return server, peer
    if not hasattr(os, "sched_setaffinity"):
        return None
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else None


def environment() -> dict[str, str]:
    """Returns the environment of all processes: no proxies, no keys, no downloads, no telemetry, and a stable heap.

    asyncio reads into a new buffer of 256 KiB each time. Whether its memory is returned to the system after each read,
    which costs two page faults and 20 microseconds a request, depends on the accidental layout of the heap. Therefore
    the allocator is set to keep all memory.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in _REMOVED_VARIABLES and not name.lower().endswith("_proxy")
    }
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "CRITICAL", "DO_NOT_TRACK": "1"}
    defaults = {"LMBRIDGE_API_BASE": "", "LM_API_TOKEN": "", "DEFAULT_MODEL": ""}
    heap = {"MALLOC_TRIM_THRESHOLD_": str(2**28), "MALLOC_TOP_PAD_": str(2**26)}
    pinned = {_CORES_VARIABLE: "{},{}".format(*pair)} if (pair := cores()) else {}
    return {**inherited, **quiet, **defaults, **heap, **pinned}


class PinnedProcess:
    """A Python process on one of the cores, which reads commands and prints answers, one a line.

    Args:
        core: `SERVER_CORE` or `PEER_CORE`.
        *args: The arguments of the interpreter.
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
        if pair := cores():
            os.sched_setaffinity(self._process.pid, {pair[core]})
        # Raising the priority may not be permitted. Then other work on the machine increases the spread.
        with suppress(AttributeError, PermissionError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, PRIORITY)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.communicate()

    def read(self, bound: float) -> str:
        """Returns the next line that the process prints; it is empty if the process has ended.

        Raises:
            MeasurementError: Nothing was printed within `bound` seconds.
        """
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], bound)[0]:
            raise MeasurementError(f"not finished within {bound:g} s")
        return self._process.stdout.readline()

    def write(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()


class Stub(PinnedProcess):
    """The stub server of completions."""

    def __init__(self) -> None:
        super().__init__(SERVER_CORE, "-m", "benchmarks.stub")
        self.port = int(self.read(START_SECONDS))


class Worker(PinnedProcess):
    """A process that measures.

    Args:
        module: Its program, which calls `benchmarks.workers.serve`.
        name: The peer or the server that it works with.
        port: The port of the stub server, or 0.
    """

    def __init__(self, module: str, name: str, port: int) -> None:
        super().__init__(PEER_CORE, "-m", module, name, str(port))

    def measure(self, workload: str, arguments: Mapping[str, Any], bound: float) -> Any:
        """Returns the figure of a workload, or None if the awaited event never came.

        Raises:
            MeasurementError: The workload failed, or took more than `bound` seconds.
        """
        try:
            self.write(json.dumps({"workload": workload, "bound": bound, **arguments}))
            # The worker enforces the bound itself, but not while its event loop is blocked.
            line = self.read(bound * 1.5 + START_SECONDS)
        except BrokenPipeError:
            line = ""
        if not line:
            raise MeasurementError("its process died")
        answer = json.loads(line)
        if "failure" in answer:
            raise MeasurementError(answer["failure"])
        return answer["value"]


def measure_import(modules: str, bound: float) -> float:
    """Returns the CPU milliseconds of an import in a new interpreter.

    Raises:
        MeasurementError: The modules cannot be imported.
    """
    with PinnedProcess(PEER_CORE, "-c", _IMPORT_PROGRAM.format(modules)) as process:
        line = process.read(bound)
    if not line:
        raise MeasurementError(f"cannot import {modules}")
    return float(line)
