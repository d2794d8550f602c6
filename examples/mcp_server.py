"""Starts the bridge as an MCP host does, lists its tools, and asks a question with progress.

    python examples/mcp_server.py
    python examples/mcp_server.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "Why is the sky blue?"

It needs `lmbridge[mcp]`, with either major version of the SDK. If neither `--api-base` nor the environment variable
LMBRIDGE_API_BASE is set, it starts the server of `lmbridge[local]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

try:
    from mcp import ClientSession, StdioServerParameters
    from mcp.client.stdio import stdio_client
except ImportError:
    sys.exit("mcp_server: this example needs the official MCP SDK: pip install 'lmbridge[mcp]'")

from lmbridge import LLMError, LocalServer

PROMPT = "Tell me a story about a lighthouse, in a few sentences."


@asynccontextmanager
async def model_server(api_base: str | None, model: str | None) -> AsyncIterator[dict[str, str]]:
    """Yields the environment variables of the bridge. It starts an embedded server if no URL is given."""
    if api_base:
        env = {"LMBRIDGE_API_BASE": api_base, "LMBRIDGE_MODEL": model, "LM_API_TOKEN": os.environ.get("LM_API_TOKEN")}
        yield {name: value for name, value in env.items() if value}
    else:
        async with LocalServer() as server:
            yield {"LMBRIDGE_API_BASE": server.api_base, "LMBRIDGE_MODEL": server.model}


async def show_progress(progress: float, total: float | None, message: str | None) -> None:
    """Prints a progress notification. The bridge sends no total, because it cannot know one."""
    print(f".. {progress:g}{f' of {total:g}' if total else ''}: {message}")


async def call(session: ClientSession, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the result of a call as a dict in wire format, which is the same in both major versions of the SDK."""
    result = await session.call_tool(tool, arguments, progress_callback=show_progress)
    wire: dict[str, Any] = result.model_dump(by_alias=True, mode="json", exclude_none=True)
    if wire["isError"]:
        raise LLMError(wire["content"][0]["text"])
    return wire


async def work(env: dict[str, str], prompt: str) -> None:
    """Starts the bridge as a host does, lists its tools, and asks a question."""
    bridge = StdioServerParameters(command=sys.executable, args=["-m", "lmbridge.mcp"], env=env)
    async with stdio_client(bridge) as (reading, writing), ClientSession(reading, writing) as session:
        await session.initialize()
        for tool in (await session.list_tools()).tools:
            print(f"{tool.name}: {(tool.description or '').splitlines()[0]}")
        print(f"\n> {prompt}\n")
        result = await call(session, "chat_completion", {"prompt": prompt, "max_tokens": 200})
        for part in result["content"]:
            print(part["text"])
        data = result["structuredContent"]
        print(f"\n{data['model']}: {data['finish_reason']}")


async def main() -> None:
    """Reads the arguments and drives the bridge."""
    parser = argparse.ArgumentParser(description="Drives lmbridge's MCP server.")
    parser.add_argument("prompt", nargs="?", default=PROMPT)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="URL of your model server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="name of a model on that server")
    args = parser.parse_args()
    async with model_server(args.api_base, args.model) as env:
        await work(env, args.prompt)


def reason(error: BaseException) -> str:
    """Returns the text of an error. The task groups of the SDK wrap it in exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return str(error)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except* (LLMError, ImportError) as errors:
        sys.exit(f"mcp_server: {reason(errors)}")
    except* KeyboardInterrupt:
        sys.exit(130)
