"""Gives a model the tools of one MCP server, the clock of `mcp-server-time`.

    pip install 'lmbridge[local,mcp]' mcp-server-time
    python examples/mcp_one_server.py
    python examples/mcp_one_server.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "Is it late in Lima?"

If neither `--api-base` nor the variable LMBRIDGE_API_BASE is set, it starts the server of `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmbridge import (
    DynamicAutonomousAgent,
    LLMClient,
    LLMError,
    LocalServer,
    MaxRoundsExceededError,
    RunFinished,
    TextDelta,
    ToolCallFinished,
)

TASK = "What is the current time in the timezone Asia/Tokyo?"
SERVERS = {"time": {"command": sys.executable, "args": ["-m", "mcp_server_time"]}}


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of an embedded server that it starts if no URL is given."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def work(agent: DynamicAutonomousAgent, task: str) -> None:
    """Prints the task, each tool call with its result, and the answer as it arrives."""
    print(f"servers: {', '.join(await agent.list_available_mcps())}\n> {task}\n")
    try:
        async with await agent.autonomous_with_mcp("time", task, stream=True) as events:
            async for event in events:
                match event:
                    case ToolCallFinished():
                        print(f"{event.call.name}({event.call.arguments}) -> {event.text}\n")
                    case TextDelta(text):
                        print(text, end="", flush=True)
                    case RunFinished(result):
                        print(f"\n\n{result.stop_reason}: {result.rounds} rounds, {len(result.tool_calls)} calls")
    except MaxRoundsExceededError as error:
        # Small models sometimes call tools until they run out of rounds.
        print(f"\n\nno answer: {error}")


async def main() -> None:
    """Reads the arguments, writes a configuration file, and runs the task."""
    parser = argparse.ArgumentParser(description="Lets a model use the tools of an MCP server.")
    parser.add_argument("task", nargs="?", default=TASK)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="URL of your model server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="name of a model on that server")
    args = parser.parse_args()
    # A real program would use an existing file, such as ~/.mcp.json or the one of LM Studio.
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "mcp.json"
        config.write_text(json.dumps({"mcpServers": SERVERS}))
        async with (
            connect(args.api_base, args.model) as client,
            DynamicAutonomousAgent(client, config_path=config, max_rounds=6, max_tokens=300) as agent,
        ):
            await work(agent, args.task)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"mcp_one_server: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
