"""A model uses several MCP servers, one of which cannot be started: as an error, and as something to go on without.

    pip install '.[local,mcp]' mcp-server-time mcp-server-git
    python examples/mcp_several_servers.py
    python examples/mcp_several_servers.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "Is it late in Lima?"

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts the server of `lmbridge[local]`.
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
        "lmbridge": {"allow": ["get_current_time"]},  # fewer tools are easier for a small model
    },
    "git": {"command": sys.executable, "args": ["-m", "mcp_server_git"], "lmbridge": {"allow": ["git_status"]}},
    "calendar": {"command": "a-calendar-that-is-not-installed"},
}


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """A client of the server at `api_base`, or else of one that is started here."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def insist(agent: DynamicAutonomousAgent, task: str) -> None:
    """All servers are needed: nothing is done unless all of them are there."""
    print("== raise")
    try:
        print(await agent.autonomous_with_multiple_mcps(list(SERVERS), task))
    except MultiMCPError as error:
        for name, reason in error.errors.items():
            print(f"-- {name}: {reason}")


async def make_do(agent: DynamicAutonomousAgent, task: str) -> None:
    """Whatever is there will do; the model is told what is missing."""
    print("== continue")
    try:
        result = await agent.autonomous_discover_and_execute(task, full=True)
    except MaxRoundsExceededError as error:  # a small model may not come to an answer
        result = error.result
    for done in result.log:
        for call in done.tool_calls:
            tool = call.call.tool
            print(f"-- {tool.server if tool else 'nobody'}: {call.call.name}({call.call.arguments}) -> {call.text}")
    print(f"{result.text}\n-- {result.stop_reason}, without {', '.join(result.errors)}")


async def main() -> None:
    """Reads the arguments, writes a configuration, and shows both."""
    parser = argparse.ArgumentParser(description="Lets a model use several MCP servers, of which one fails.")
    parser.add_argument("task", nargs="?", default=TASK)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="a server of your own")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="a model of that server")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:  # yours is ~/.mcp.json, or that of LM Studio
        config = Path(folder) / "mcp.json"
        config.write_text(json.dumps({"mcpServers": SERVERS}))
        async with (
            connect(args.api_base, args.model) as client,
            DynamicAutonomousAgent(client, config_path=config, max_rounds=6, max_tokens=300) as agent,
        ):
            print(f"servers: {', '.join(await agent.list_available_mcps())}\n> {args.task}")
            await insist(agent, args.task)
            await make_do(agent, args.task)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"mcp_several_servers: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
