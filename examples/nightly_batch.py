"""Summarizes every .txt file in a folder overnight. Started again, it continues where it stopped.

    python examples/nightly_batch.py notes/

Each summary is written beside its text, as `NAME.summary`. The checkpoint is `night.db` in the folder: stop the program
with Ctrl-C, or kill it, and start it again. Texts that are finished are not read again. It uses the server of
LMBRIDGE_API_BASE, or LM Studio.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from pathlib import Path

from lmbridge import Agent, LLMClient, LLMError
from lmbridge.fleet import ProgressBar, map_runs


async def summarize(texts: list[Path], tasks: list[str], night: Path) -> int:
    """Summarizes the texts, and returns how many of them failed."""
    failed = 0
    async with LLMClient(priority="batch") as client:
        agent = Agent(client, max_tokens=200)
        fleet = map_runs(tasks, lambda: agent, max_in_flight=4, checkpoint=night, on_progress=ProgressBar("texts"))
        async with aclosing(fleet):
            async for outcome in fleet:
                path = texts[outcome.index]
                if outcome.result is None:
                    failed += 1
                    print(f"{path.name}: {outcome.error}", file=sys.stderr)
                else:
                    path.with_suffix(".summary").write_text(outcome.result.text)
                    print(f"{path.name}: {len(outcome.result.text)} characters", flush=True)
    return failed


def main(folder: Path) -> int:
    """Reads the texts of a folder, and summarizes them."""
    if not (texts := sorted(folder.glob("*.txt"))):
        sys.exit(f"nightly_batch: there is no file whose name ends with .txt in {folder}")
    tasks = [f"Summarize this text in two sentences.\n\n{path.read_text()}" for path in texts]
    return asyncio.run(summarize(texts, tasks, folder / "night.db"))


if __name__ == "__main__":
    try:
        sys.exit(1 if main(Path(*sys.argv[1:2])) else 0)
    except LLMError as error:
        sys.exit(f"nightly_batch: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
