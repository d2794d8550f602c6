"""The process of one client: commands come in by stdin, figures go out by stdout, a JSON object a line."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from benchmarks.peers import client
from benchmarks.workloads import Bench


async def obey(bench: object, command: dict[str, Any]) -> dict[str, Any]:
    bound = command.pop("bound")
    try:
        async with asyncio.timeout(bound):
            value = await getattr(bench, command.pop("do"))(**command)
    except TimeoutError:
        return {"failed": f"not done in {bound:g} s"}
    except Exception as exc:  # noqa: BLE001 - whatever it is, it is the figure's fault
        return {"failed": f"{type(exc).__name__}: {exc}"}
    return {"value": value}


def serve(bench: object) -> None:
    """Does what it is told with the methods of `bench`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints is no answer
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            answer = runner.run(obey(bench, json.loads(line)))
            answers.write(f"{json.dumps(answer)}\n")
        answers.flush()
        os._exit(0)  # the clients are not closed one by one


def main() -> None:
    name, port = sys.argv[1], int(sys.argv[2])
    serve(Bench(lambda at_once: client(name, f"http://127.0.0.1:{port}/v1", at_once), port))


if __name__ == "__main__":
    main()
