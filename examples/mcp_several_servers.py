"""Gives a model the tools of several MCP servers, one of which cannot be started.

The first part treats that as an error, the second continues with the servers that work.

    pip install 'lmbridge[local,mcp]' mcp-server-time mcp-server-git
    python examples/mcp_several_servers.py
    python examples/mcp_several_servers.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "Is it late in Lima?"

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

from lmbridge import DynamicAutonomousAgent, LLMClient, LLMError, LocalServer, MaxRoundsExceededError, MultiMCPError

TASK = "What is the current time in the timezone Asia/Tokyo?"
SERVERS = {
    "time": {
        "command": sys.executable,
        "args": ["-m", "mcp_server_time"],
        # A small model copes better with few tools.
        "lmbridge": {"allow": ["get_current_time"]},
    },
    "git": {"command": sys.executable, "args": ["-m", "mcp_server_git"], "lmbridge": {"allow": ["git_status"]}},
    "calendar": {"command": "a-calendar-that-is-not-installed"},
}


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of an embedded server that it starts if no URL is given."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def require_all_servers(agent: DynamicAutonomousAgent, task: str) -> None:
    """Runs the task only if all servers can be started, and prints why it could not."""
    print("== raise")
    try:
        print(await agent.autonomous_with_multiple_mcps(list(SERVERS), task))
    except MultiMCPError as error:
        for name, reason in error.errors.items():
            print(f"-- {name}: {reason}")


async def continue_without_missing_servers(agent: DynamicAutonomousAgent, task: str) -> None:
    """Runs the task with the servers that can be started; the model learns which are missing."""
    print("== continue")
    try:
        result = await agent.autonomous_discover_and_execute(task, full=True)
    except MaxRoundsExceededError as error:
        # Small models sometimes call tools until they run out of rounds.
        result = error.result
    for done in result.log:
        for call in done.tool_calls:
            server = call.call.tool.server if call.call.tool else "unknown tool"
            print(f"-- {server}: {call.call.name}({call.call.arguments}) -> {call.text}")
    print(f"{result.text}\n-- {result.stop_reason}, without {', '.join(result.errors)}")


async def main() -> None:
    """Reads the arguments, writes a configuration file, and shows both ways."""
    parser = argparse.ArgumentParser(description="Lets a model use several MCP servers, one of which is missing.")
    parser.add_argument("task", nargs="?", default=TASK)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="URL of your model server")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="name of a model on that server")
    args = parser.parse_args()
    # A real program would use an existing file, such as ~/.mcp.json or the one of LM Studio.
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "mcp.json"
        config.write_text(json.dumps({"mcpServers": SERVERS}))
        async with (
            connect(args.api_base, args.model) as client,
            DynamicAutonomousAgent(client, config_path=config, max_rounds=6, max_tokens=300) as agent,
        ):
            print(f"servers: {', '.join(await agent.list_available_mcps())}\n> {args.task}")
            await require_all_servers(agent, args.task)
            await continue_without_missing_servers(agent, args.task)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"mcp_several_servers: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
