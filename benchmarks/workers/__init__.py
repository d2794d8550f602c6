"""The programs that measure, each in a separate process.

A worker reads commands from stdin and writes figures to stdout, one JSON object a line. Its object has a method for
each workload; the names of the methods and of their arguments are those in `benchmarks.tables`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any


async def _execute(workloads: object, command: dict[str, Any]) -> dict[str, Any]:
    bound = command.pop("bound")
    try:
        async with asyncio.timeout(bound):
            value = await getattr(workloads, command.pop("workload"))(**command)
    except TimeoutError:
        return {"failure": f"not finished within {bound:g} s"}
    except Exception as exc:  # noqa: BLE001 - a peer may raise any exception
        return {"failure": f"{type(exc).__name__}: {exc}"}
    return {"value": value}


def serve(workloads: object) -> None:
    """Executes commands with the methods of an object until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # The output of libraries goes to stderr, so that it is not mistaken for an answer.
    os.dup2(2, 1)
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            answer = runner.run(_execute(workloads, json.loads(line)))
            answers.write(f"{json.dumps(answer)}\n")
        answers.flush()
        # The process ends without closing its clients one by one.
        os._exit(0)
