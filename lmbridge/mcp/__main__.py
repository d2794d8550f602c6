"""The command `lmbridge-mcp`, or `python -m lmbridge.mcp`: the bridge as an MCP server, over stdio or HTTP."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, Final

from lmbridge._checks import check_integer
from lmbridge._foreground import log_to_stderr, run_program
from lmbridge._http_access import HostNames, bracketed, is_host_name
from lmbridge._tasks import run_until_signal
from lmbridge._version import __version__
from lmbridge.config import check_api_key, is_loopback
from lmbridge.errors import LLMError, LLMValidationError
from lmbridge.mcp.bridge.bridge import Bridge
from lmbridge.mcp.bridge.host_link import HostLink, take_over_stdio
from lmbridge.mcp.bridge.patient_link import PatientLink
from lmbridge.mcp.sdk import load_sdk
from lmbridge.mcp.sdk.http_service import MCP_PATH, HttpAccess, serve_http
from lmbridge.mcp.sdk.server_session import build_server, serve

_DESCRIPTION = """\
Offers lmbridge's tools to an MCP host (Claude Code, LM Studio, Cursor, ...) on stdin and stdout, or with --http to any
number of hosts. The requests of all these hosts to the models are then scheduled together.

Settings that are not given here come from the environment: LMBRIDGE_API_BASE (or LMSTUDIO_HOST and LMSTUDIO_PORT),
LM_API_TOKEN, LMBRIDGE_MODEL, MCP_JSON_PATH, LMBRIDGE_TRUST_PROJECT. LMBRIDGE_MCP_TOKEN is the token that hosts have to
send over HTTP. It has no option, because other users of the machine can see the options of a running command."""

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
TOKEN_VARIABLE: Final = "LMBRIDGE_MCP_TOKEN"  # noqa: S105 - it is the name of a variable
"""The environment variable with the token that hosts have to send over HTTP."""
_HTTP_HOST: Final = "127.0.0.1"
_HTTP_PORT: Final = 8090
_HIGHEST_PORT: Final = 65535


def main(argv: list[str] | None = None) -> None:
    """Serves until SIGINT or SIGTERM arrives; on stdio, also until stdin is closed and its requests are answered.

    The process then ends with status 0. After an error it ends with one line on stderr and status 1, or status 2 if the
    arguments make no sense. A traceback is shown only with `--debug`.
    """
    parser = _argument_parser()
    options = vars(parser.parse_args(argv))
    http = {name: options.pop(name) for name in ("host", "port", "allow_host")}
    eof_timeout = options.pop("eof_timeout")
    debug = options.pop("debug")
    if options.pop("http"):
        if eof_timeout is not None:
            parser.error("--eof-timeout does not apply with --http, because there is no stdin to be closed")
        given = {name: value for name, value in http.items() if value is not None}
        _run_to_end(_serve_http(**options, **given), debug=debug)
        return
    if needing := [name for name, value in http.items() if value is not None]:
        parser.error(f"--{needing[0].replace('_', '-')} needs --http")
    if sys.stdin is None or sys.stdout is None:
        sys.exit("lmbridge-mcp: stdin or stdout is closed; an MCP host should start this program with a pipe for each")
    if sys.stdin.isatty():
        # A person has started the program in a terminal, and would otherwise wait for a prompt that never comes.
        sys.stderr.write(_terminal_help())
    _run_to_end(_serve(**options, eof_timeout=_EOF_TIMEOUT if eof_timeout is None else eof_timeout), debug=debug)


def _run_to_end(work: Coroutine[Any, Any, None], *, debug: bool) -> None:
    # The log goes to stderr, because stdout carries only messages to the host.
    log_to_stderr("%(levelname)s %(name)s: %(message)s", debug=debug)
    if status := run_program("lmbridge-mcp", run_until_signal(work), debug=debug):
        sys.exit(status)


def _argument_parser() -> argparse.ArgumentParser:
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
        help=f"how long requests are still processed after stdin has been closed; default: {_EOF_TIMEOUT:g}",
    )
    parser.add_argument("--http", action="store_true", help="serve over streamable HTTP instead of stdin and stdout")
    parser.add_argument("--host", metavar="ADDRESS", help=f"address to listen on; default: {_HTTP_HOST}")
    parser.add_argument("--port", metavar="N", type=int, help=f"port to listen on; default: {_HTTP_PORT}")
    parser.add_argument(
        "--allow-host", metavar="NAME", action="append", help="another name of this machine, such as my-pc"
    )
    parser.add_argument("--debug", action="store_true", help="log everything to stderr, and show tracebacks of errors")
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
    _check_sdk()
    with take_over_stdio() as (reading, writing):
        async with Bridge.opened(api_base, model, config_path=config_path) as bridge:
            link = HostLink(reading, writing)
            try:
                await serve(build_server(bridge), PatientLink(link, eof_timeout))
            finally:
                await link.close()
            if link.fault:
                raise OSError(f"the connection to the host was closed: {link.fault}")


async def _serve_http(
    api_base: str | None,
    model: str | None,
    config_path: str | None,
    *,
    host: str = _HTTP_HOST,
    port: int = _HTTP_PORT,
    allow_host: Sequence[str] = (),
) -> None:
    _check_sdk()
    token = check_api_key(os.environ.get(TOKEN_VARIABLE) or None)
    check_integer("--port", port, minimum=0, maximum=_HIGHEST_PORT)
    if token is None and not is_loopback(f"http://{bracketed(host)}"):
        raise LLMValidationError(
            f"listening on {host} would let everybody on the network use your models and MCP servers",
            hint=f"set {TOKEN_VARIABLE}, which hosts then have to send, or listen on {_HTTP_HOST}",
        )
    if wrong := [name for name in allow_host if not is_host_name(name)]:
        raise LLMValidationError(f"--allow-host {wrong[0]!r} is not the name of a host", hint="give it without a port")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host.strip("[]"), port), family=family)
    except OSError as exc:
        hint = "choose another --port or --host"
        raise LLMError(f"cannot listen on {host}:{port}: {exc.strerror or exc}", exc, hint=hint) from exc
    with listening:
        async with (
            Bridge.opened(api_base, model, config_path=config_path) as bridge,
            serve_http(build_server(bridge), listening, HttpAccess(HostNames(host, allow_host), token)) as serving,
        ):
            url = f"http://{bracketed(host)}:{listening.getsockname()[1]}{MCP_PATH}"
            sys.stdout.write(f"lmbridge mcp: {url}\n")
            sys.stdout.flush()
            await asyncio.wait({serving})


def _check_sdk() -> None:
    try:
        load_sdk()
    except ImportError as exc:
        raise ImportError("the bridge needs the official MCP SDK: pip install 'lmbridge[mcp]'") from exc


if __name__ == "__main__":
    main()
