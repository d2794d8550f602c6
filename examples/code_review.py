"""Reviews the last changes of a git repository: one run of an agent for each file, 20 of them at the same time.

    python examples/code_review.py ~/src/project HEAD~10..HEAD

It uses the server of LMBRIDGE_API_BASE, or LM Studio, and asks it for its number of slots; further requests wait.
"""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from typing import Literal

from lmbridge import Agent, LLMClient, LLMError, ToolError
from lmbridge.fleet import map_runs

TASK = "Review this change of {name}. Look at the code around it if you have to.\n\n{change}"


@dataclass
class Review:
    """What is wrong with a change; the severity is "none" if it is good."""

    severity: Literal["none", "minor", "serious"]
    comment: str


async def git(folder: str, *command: str) -> str:
    """Returns what git prints; the model reads the text of a ToolError."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec("git", "-C", folder, *command, stdout=pipe, stderr=pipe)
    output, errors = await process.communicate()
    if process.returncode:
        raise ToolError(errors.decode().strip())
    return output.decode(errors="replace")


async def main(folder: str = ".", changes: str = "HEAD~1..HEAD") -> None:
    """Reviews each file of the changes, and prints each review as soon as it is finished."""

    async def read_file(name: str) -> str:
        """Returns the text of a file of the repository, as it was committed last."""
        return await git(folder, "show", f"HEAD:./{name}")

    names = (await git(folder, "diff", "--name-only", "--relative", "--diff-filter=d", changes)).splitlines()
    tasks = [TASK.format(name=name, change=await git(folder, "diff", changes, "--", name)) for name in names]
    async with LLMClient(priority="batch") as client:
        agent = Agent(client, tools=[read_file], output_type=Review, max_rounds=4, max_tokens=300, on_limit="answer")
        async for outcome in map_runs(tasks, lambda: agent, max_in_flight=20, retries=0):
            found = outcome.result.output if outcome.result else outcome.error
            print(f"{names[outcome.index]}: {found}", flush=True)


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:3]))
    except LLMError as error:
        sys.exit(f"code_review: {error}")
