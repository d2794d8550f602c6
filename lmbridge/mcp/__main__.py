"""The command `lmbridge-mcp`, or `python -m lmbridge.mcp`: the bridge as an MCP server on stdin and stdout."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import math
import shlex
import shutil
import sys
from typing import Any, Final

from lmbridge._tasks import run_until_signal
from lmbridge._version import __version__
from lmbridge.errors import LLMError
from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.mcp.bridge.host import HostLink, take_over_stdio
from lmbridge.mcp.bridge.patient_link import PatientLink
from lmbridge.mcp.sdk import load_sdk
from lmbridge.mcp.sdk.server_session import build_server, serve

_DESCRIPTION = """\
Offers lmbridge's tools to an MCP host (Claude Code, LM Studio, Cursor, ...) on stdin and stdout.

Settings that are not given here come from the environment: LMBRIDGE_API_BASE (or LMSTUDIO_HOST and LMSTUDIO_PORT),
LM_API_TOKEN, LMBRIDGE_MODEL, MCP_JSON_PATH, LMBRIDGE_TRUST_PROJECT."""

_TERMINAL_HELP = """\
lmbridge-mcp {version} is an MCP server: an MCP host (Claude Code, LM Studio, Cursor, ...) starts it and exchanges JSON
messages with it on stdin and stdout. It has no commands to type in a terminal.

To connect Claude Code to it:

  claude mcp add --transport stdio lmbridge -- {command}

For other hosts, add this to their mcp.json:

{configuration}

It now waits for messages on stdin. Press Ctrl-D or Ctrl-C to end it; `lmbridge-mcp --help` lists the options.
"""


_EOF_TIMEOUT: Final = 10.0
"""How long requests are still processed after the host has closed stdin, in seconds; the default of `--eof-timeout`."""


def main(argv: list[str] | None = None) -> None:
    """Serves until the host has closed stdin and its requests have been answered, or until SIGINT or SIGTERM arrives.

    The process then ends with status 0. After an error it ends with status 1 and one line on stderr.
    """
    options = vars(_parser().parse_args(argv))
    if sys.stdin is None or sys.stdout is None:
        sys.exit("lmbridge-mcp: stdin or stdout is closed; an MCP host should start this program with a pipe for each")
    if sys.stdin.isatty():
        # A person has started the program in a terminal, and would otherwise wait for a prompt that never comes.
        sys.stderr.write(_terminal_help())
    # The log goes to stderr, because stdout carries only messages to the host.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        asyncio.run(run_until_signal(_serve(**options)))
    except (LLMError, ImportError, OSError) as error:
        sys.exit(f"lmbridge-mcp: {error}")
    except KeyboardInterrupt:
        # SIGINT arrived before the signal handlers were installed.
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmbridge-mcp", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"lmbridge {__version__}")
    parser.add_argument("--api-base", metavar="URL", help="URL of the model server; default: LM Studio on this machine")
    parser.add_argument(
        "--model", metavar="NAME", help="model for calls that do not name one; default: the server chooses"
    )
    parser.add_argument("--config", metavar="FILE", dest="config_path", help="configuration file with the MCP servers")
    parser.add_argument(
        "--eof-timeout",
        metavar="SECONDS",
        type=_seconds,
        default=_EOF_TIMEOUT,
        help="how long requests are still processed after stdin has been closed; default: %(default)g",
    )
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _terminal_help() -> str:
    """Returns the explanation for a person who starts this program in a terminal: its purpose, and how to use it."""
    command = [found] if (found := shutil.which("lmbridge-mcp")) else [sys.executable, "-m", "lmbridge.mcp"]
    entry: dict[str, Any] = {"command": command[0]}
    if command[1:]:
        entry["args"] = command[1:]
    return _TERMINAL_HELP.format(
        version=__version__,
        command=shlex.join(command),
        configuration=json.dumps({"mcpServers": {"lmbridge": entry}}, indent=2),
    )


async def _serve(api_base: str | None, model: str | None, config_path: str | None, eof_timeout: float) -> None:
    try:
        load_sdk()
    except ImportError as exc:
        raise ImportError("the bridge needs the official MCP SDK: pip install 'lmbridge[mcp]'") from exc
    with take_over_stdio() as (reading, writing):
        async with Bridge.opened(api_base, model, config_path=config_path) as bridge:
            link = HostLink(reading, writing)
            try:
                await serve(build_server(bridge), PatientLink(link, eof_timeout))
            finally:
                await link.close()
            if link.fault:
                raise OSError(f"the connection to the host was closed: {link.fault}")


if __name__ == "__main__":
    main()
