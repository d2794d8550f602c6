"""Answers a question about the files in a folder: an agent with tools to look around, shown with rich.

    python examples/folder_agent.py "Which file explains how streams end?" docs
    python examples/folder_agent.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b "What is this project?" .

It needs rich (`pip install rich`), which lmbridge itself does not. The tools read only files inside the folder.

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts a server (`lmbridge[local]`). The
model of that server is too small to answer well, but it shows how the program works.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmbridge import (
    Agent,
    LLMClient,
    LLMError,
    LocalServer,
    RunFinished,
    TextDelta,
    ToolCallFinished,
    ToolCallStarted,
    ToolError,
)

try:
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.text import Text
except ImportError:
    sys.exit("this example needs rich: pip install rich")

TASK = "Answer the question about the files. Look at them with the tools first. Name the files that you used."
READABLE = (".md", ".txt", ".py", ".toml", ".cfg", ".json")


class Folder:
    """The tools of the agent."""

    def __init__(self, root: Path) -> None:
        self._root = root.resolve()

    def list_files(self) -> list[str]:
        """Lists the text files of the folder, with their sizes in bytes."""
        return [f"{path.relative_to(self._root)} ({path.stat().st_size})" for path in self._files()]

    def search(self, text: str) -> list[str]:
        """Finds lines that contain a text, in all files. Upper and lower case do not matter.

        Args:
            text: A word or a few, as they stand in the file.
        """
        found = [
            f"{path.relative_to(self._root)}:{number}: {line.strip()}"
            for path in self._files()
            for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
            if text.casefold() in line.casefold()
        ]
        return found[:20] or [f"no line contains {text!r}"]

    def read_file(self, name: str) -> str:
        """Returns the text of a file.

        Args:
            name: The name, as list_files gives it, without the size.
        """
        path = (self._root / name).resolve()
        # The model may ask for any path, and a text in a file may tell it to.
        if path not in self._files():
            raise ToolError(f"there is no file {name!r}; list_files() lists them")
        return path.read_text(errors="replace")

    def _files(self) -> list[Path]:
        paths = [path for path in self._root.rglob("*") if path.suffix in READABLE]
        return sorted(path for path in paths if path.is_file() and path.resolve().is_relative_to(self._root))


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a server that is started for this program."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def answer(client: LLMClient, question: str, folder: Folder, console: Console) -> None:
    """Runs the agent, prints its calls as they happen, and its answer as Markdown."""
    agent = Agent(
        client,
        tools=[folder.list_files, folder.search, folder.read_file],
        system_prompt=TASK,
        max_rounds=12,
        max_tokens=500,
        max_tool_output=4000,
    )
    console.rule(Text(question))
    with console.status("reading ...") as status:
        async with agent.stream(question) as events:
            async for event in events:
                match event:
                    case ToolCallStarted(call):
                        status.update(Text(f"{call.name} ..."))
                    case ToolCallFinished():
                        arguments = ", ".join(map(repr, (event.call.arguments or {}).values()))
                        result = event.text if event.is_error else f"{len(event.text)} characters"
                        # Text, because markup in the name of a file would be interpreted otherwise.
                        console.print(
                            Text(f"{event.call.name}({arguments}): {result}", "red" if event.is_error else "dim")
                        )
                    case TextDelta():
                        status.update("writing ...")
                    case RunFinished(result):
                        console.print(Markdown(result.text))
                        tokens = result.usage["total_tokens"]
                        console.print(Text(f"{result.stop_reason}: {result.rounds} rounds, {tokens} tokens", "dim"))


async def main() -> None:
    """Parses the arguments and answers the question."""
    parser = argparse.ArgumentParser(description="Answers a question about the files in a folder.")
    parser.add_argument("question", nargs="?", default="What is in these files? Look at one of them.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of your server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        await answer(client, args.question, Folder(args.folder), Console())


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError) as error:
        sys.exit(f"folder_agent: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
