"""Kills a run in the middle of its work, and resumes it in another process.

    python examples/resumed_run.py
    python examples/resumed_run.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

The program starts itself twice. The first child process begins a run, whose tool kills the process after the second
call, as a power failure would. The second one resumes the run from its journal: no letter is posted twice. Without
`--api-base` and without LMBRIDGE_API_BASE in the environment, it starts the embedded server, which needs the extra
`lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

from lmbridge import Agent, LLMClient, LLMError, LocalServer, Tool

TASK = "Post a letter to Ada, then one to Bob, then one to Eve, with one call of post_letter each. Then say 'Done.'"


def make_tool(posted: Path, dies_after: int | None = None) -> Tool:
    """Returns a tool that notes each letter, and that kills the process after some of them."""

    def post_letter(name: str) -> str:
        """Posts a letter to somebody.

        Args:
            name: The name.
        """
        with posted.open("a") as file:
            file.write(f"{name}\n")
        print(f"  posted a letter to {name}", flush=True)
        if len(posted.read_text().splitlines()) == dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return f"posted to {name}"

    return Tool.from_function(post_letter)


async def begin(folder: Path, api_base: str, model: str | None) -> None:
    """Begins the run. The process does not survive it, unless the model posts fewer than two letters."""
    async with LLMClient(api_base, model) as client:
        agent = Agent(client, tools=[make_tool(folder / "posted.txt", dies_after=2)])
        await agent.run(TASK, journal=folder / "runs.db")


async def go_on(folder: Path, api_base: str, model: str | None) -> None:
    """Resumes the run from its journal."""
    async with LLMClient(api_base, model) as client:
        result = await Agent.resume(folder / "runs.db", client=client, tools=[make_tool(folder / "posted.txt")])
    for record in (record for each in result.log for record in each.tool_calls):
        print(f"  {record.call.arguments}: {record.text}")
    print(f"  answer: {' '.join(result.text.split())}", flush=True)


async def show(api_base: str, model: str | None) -> None:
    """Starts the two processes, one after the other."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("begin", "go_on"):
            print("the first process" if part == "begin" else "the second process", flush=True)
            options = ["--api-base", api_base, *(["--model", model] if model else []), "--part", part, folder]
            process = await asyncio.create_subprocess_exec(sys.executable, __file__, *options)
            status = await process.wait()
            if status == -signal.SIGKILL:
                print("  was killed")
            elif status:
                sys.exit(status)


async def main() -> None:
    """Reads the arguments, and shows both parts or does one of them."""
    parser = argparse.ArgumentParser(description="Kills a run, and resumes it in another process.")
    parser.add_argument("folder", nargs="?", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--part", choices=["begin", "go_on"], help=argparse.SUPPRESS)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", help="a model of that server")
    args = parser.parse_args()
    if args.part:
        await {"begin": begin, "go_on": go_on}[args.part](args.folder, args.api_base, args.model)
    elif args.api_base:
        await show(args.api_base, args.model)
    else:
        async with LocalServer() as server:
            await show(server.api_base, server.model)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"resumed_run: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
