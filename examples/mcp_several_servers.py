"""Gives a model the tools of several MCP servers, one of which cannot be started.

    pip install 'lmbridge[mcp]' mcp-server-time mcp-server-git
    python examples/mcp_several_servers.py "What is the current time in the timezone Asia/Tokyo?"

It uses the server of LMBRIDGE_API_BASE, or LM Studio. `autonomous_with_multiple_mcps` would raise `MultiMCPError`
because of the missing server; this way, the run goes on without it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from pathlib import Path

from lmbridge import DynamicAutonomousAgent, LLMClient, LLMError

TIME, GIT = ({"command": sys.executable, "args": ["-m", f"mcp_server_{name}"]} for name in ("time", "git"))
SERVERS = {
    # A small model copes better with few tools.
    "time": TIME | {"lmbridge": {"allow": ["get_current_time"]}},
    "git": GIT | {"lmbridge": {"allow": ["git_status"]}},
    "calendar": {"command": "a-calendar-that-is-not-installed"},
}


async def main(task: str = "What is the current time in the timezone Asia/Tokyo?") -> None:
    """Runs the task, and prints each call with its server, the answer, and the servers that were missing."""
    # A real program would use an existing file, such as ~/.mcp.json or the one of LM Studio.
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "mcp.json"
        config.write_text(json.dumps({"mcpServers": SERVERS}))
        async with (
            LLMClient() as client,
            DynamicAutonomousAgent(
                client, config_path=config, max_rounds=6, max_tokens=300, on_limit="answer"
            ) as agent,
        ):
            print(f"servers: {', '.join(await agent.list_available_mcps())}\n> {task}")
            result = await agent.autonomous_discover_and_execute(task, full=True)
    for done in result.log:
        for call in done.tool_calls:
            server = call.call.tool.server if call.call.tool else "unknown tool"
            print(f"-- {server}: {call.call.name}({call.call.arguments}) -> {call.text}")
    print(f"{result.text}\n-- {result.stop_reason}, without {', '.join(result.errors)}")


if __name__ == "__main__":
    try:
        asyncio.run(main(*sys.argv[1:2]))
    except (LLMError, ImportError) as error:
        sys.exit(f"mcp_several_servers: {error}")
