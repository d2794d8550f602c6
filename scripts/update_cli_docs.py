"""Runs the commands of docs/cli.md with the embedded server, and writes their outputs into the page.

    python scripts/update_cli_docs.py                 runs all of them, which takes minutes
    python scripts/update_cli_docs.py models bench    runs those that contain one of these words

It needs `pip install -e '.[cli,local,mcp]' --group dev`. A command is run if a `text` block stands directly behind its
`shell` block. It runs in a pseudo-terminal that calls itself "dumb", so that its output has no escape sequences.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

import pexpect
import pyte

from lmbridge import LocalServer, discover

ROOT: Final = Path(__file__).parent.parent
PAGE: Final = ROOT / "docs" / "cli.md"
PORT: Final = 9931
COLUMNS: Final = 110
SECONDS: Final = 600
"""How long a command may take to write something, in seconds."""
BLOCK: Final = re.compile(
    r"```shell\n(?P<command>(?:(?!```).)*)```\n\n```text\n(?P<output>(?:(?!```).)*)```", re.DOTALL
)

WITHOUT_SERVER: Final = 'lmbridge chat "Hello"'
"""The command that shows what happens if there is no server."""
CONVERSATION_COMMAND: Final = "lmbridge chat -t 0"
CONVERSATION: Final = ("/help", "What is the capital of France?", "And of Italy?")
"""What is typed in the conversation, which ends with Ctrl-D."""


def environment(folder: Path) -> dict[str, str]:
    """Returns the environment of a command, without the servers, the log and the configuration of the user."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LMBRIDGE_", "LMSTUDIO_", "LM_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "TERM": "dumb", "HOME": str(folder), "LMBRIDGE_DATA_HOME": str(folder / "data")}


def run(command: str, folder: Path) -> str:
    """Returns what a command writes to a terminal."""
    program = pexpect.spawn(
        "bash", ["-c", command], cwd=folder, env=environment(folder), dimensions=(50, COLUMNS), timeout=SECONDS
    )
    output = program.read().decode()
    program.close()
    return "\n".join(line.rstrip() for line in output.replace("\r", "").splitlines()).strip("\n")


def converse(command: str, folder: Path) -> str:
    """Returns the screen after a conversation, without its last prompt and the line at its bottom."""
    screen = pyte.Screen(COLUMNS, 60)
    stream = pyte.ByteStream(screen)
    program = pexpect.spawn(
        "bash",
        ["-c", command],
        cwd=folder,
        env={**environment(folder), "TERM": "xterm-256color"},
        dimensions=(60, COLUMNS),
        timeout=SECONDS,
    )
    screen.write_process_input = program.send  # type: ignore[method-assign]  # how pyte answers

    def wait_for_prompt(count: int) -> None:
        while sum(line.startswith(">") for line in screen.display) < count or not has_toolbar():
            stream.feed(program.read_nonblocking(4096, timeout=SECONDS))

    def has_toolbar() -> bool:
        shown = [line for line in screen.display if line.strip()]
        return bool(shown) and shown[-1].startswith("smollm2")

    for number, line in enumerate(CONVERSATION, 1):
        wait_for_prompt(number)
        program.send(f"{line}\r")
    wait_for_prompt(len(CONVERSATION) + 1)
    shown = [line.rstrip() for line in screen.display]
    program.send("\x04")
    program.close(force=True)
    last = max(index for index, line in enumerate(shown) if line == ">")
    toolbar = next(line for line in reversed(shown) if line)
    return "\n".join([*shown[:last], "> ", toolbar]).strip("\n").replace("> \n", ">\n")


async def update(words: list[str]) -> None:
    """Runs the commands, and writes the page."""
    # Another server there would answer in place of the embedded one.
    if any(server.api_base.endswith(f":{PORT}/v1") for server in await discover()):
        sys.exit(f"end the server on port {PORT} first")
    text = PAGE.read_text()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        servers = {"time": {"command": sys.executable, "args": ["-m", "mcp_server_time", "--local-timezone", "UTC"]}}
        (folder / "mcp.json").write_text(json.dumps({"mcpServers": servers}))
        outputs: dict[str, str] = {}
        commands = [found["command"] for found in BLOCK.finditer(text)]
        wanted = [each for each in commands if not words or any(word in each for word in words)]
        for command in wanted:
            if command.strip() == WITHOUT_SERVER:
                outputs[command] = await asyncio.to_thread(run, command, folder)
        async with LocalServer(port=PORT):
            for command in wanted:
                if command not in outputs:
                    work = converse if command.strip() == CONVERSATION_COMMAND else run
                    outputs[command] = await asyncio.to_thread(work, command, folder)
                    print(f"$ {command}{outputs[command]}\n", flush=True)

    def replace(found: re.Match[str]) -> str:
        output = outputs.get(found["command"])
        shown = found["output"] if output is None else f"{output}\n"
        return f"```shell\n{found['command']}```\n\n```text\n{shown}```"

    # The page may have been edited meanwhile.
    PAGE.write_text(BLOCK.sub(replace, PAGE.read_text()))


if __name__ == "__main__":
    asyncio.run(update(sys.argv[1:]))
