"""`python -m lmbridge.mcp`: the bridge as an MCP server on stdin and stdout."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from lmbridge._version import __version__
from lmbridge.errors import LLMError
from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.mcp.bridge.host import HostLink, taken_over
from lmbridge.mcp.sdk import load
from lmbridge.mcp.sdk.server_session import build, serve

_HELP = """\
Serves lmbridge's tools to an MCP host (Claude Code, LM Studio, Cursor, ...), on stdin and stdout.

What is not given comes from the environment: LMBRIDGE_API_BASE (or LMSTUDIO_HOST and LMSTUDIO_PORT), LM_API_TOKEN,
DEFAULT_MODEL, MCP_JSON_PATH, LMBRIDGE_TRUST_PROJECT."""


def main(argv: list[str] | None = None) -> None:
    """Serves until the host closes stdin, or SIGINT or SIGTERM: status 0. After an error it is 1, with a line."""
    options = vars(_parser().parse_args(argv))
    if sys.stdin is None or sys.stdout is None:
        sys.exit("lmbridge-mcp: its stdin or stdout is closed; an MCP host is to start it, with a pipe for each")
    # To stderr: stdout is for messages alone.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        asyncio.run(_until_signal(_serve(**options)))
    except (LLMError, ImportError, OSError) as error:
        sys.exit(f"lmbridge-mcp: {error}")
    except KeyboardInterrupt:  # before the signals were ours
        sys.exit(130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmbridge-mcp", description=_HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"lmbridge {__version__}")
    parser.add_argument("--api-base", metavar="URL", help="the model server; default: LM Studio on this machine")
    parser.add_argument(
        "--model", metavar="NAME", help="the model where a call names none; default: the server's choice"
    )
    parser.add_argument("--config", metavar="FILE", dest="config_path", help="the file that names MCP servers")
    return parser


async def _serve(api_base: str | None, model: str | None, config_path: str | None) -> None:
    try:
        load()
    except ImportError as exc:
        raise ImportError("it needs the official MCP SDK: pip install 'lmbridge[mcp]'") from exc
    with taken_over() as (reading, writing):
        async with Bridge.opened(api_base, model, config_path=config_path) as bridge:
            link = HostLink(reading, writing)
            try:
                await serve(build(bridge), link)
            finally:
                await link.close()
            if link.fault:
                raise OSError(f"the host cannot be understood: {link.fault}")


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Does the work, or cancels it at SIGINT or SIGTERM, and waits for its clean-up."""
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(work)
    is_told = False

    def stop() -> None:
        nonlocal is_told
        is_told = True
        task.cancel()

    with contextlib.suppress(NotImplementedError):  # the loop of Windows has no handlers
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
    try:
        await task
    except asyncio.CancelledError:
        if not is_told:
            raise


if __name__ == "__main__":
    main()
