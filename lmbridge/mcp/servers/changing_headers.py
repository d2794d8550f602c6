"""Gets the headers of a server that change while it is used: from a function, or from a command (`headersHelper`).

The command follows the convention of Claude Code: it is run by the shell, and has to write a JSON object of strings to
stdout within ten seconds (https://code.claude.com/docs/en/mcp). Its output is a secret, so neither its stdout nor its
stderr ever appears in a log or an error. Unlike a server, the command gets the whole environment, because it acts for
the user and fetches the user's credentials.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from lmbridge._tasks import settle
from lmbridge.errors import MCPError
from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk import RequestRejectedError
from lmbridge.mcp.servers.process_groups import end_group, process_groups
from lmbridge.mcp.servers.user_functions import call_function

_HEADERS_TIMEOUT: Final = 10.0
"""How long a function or a command may take, in seconds."""
_LARGEST_OUTPUT: Final = 2**16
"""The maximum size of the output of a command, in bytes."""
_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_RESERVED_HEADERS: Final = frozenset(
    {
        "accept",
        "connection",
        "content-length",
        "content-type",
        "host",
        "last-event-id",
        "mcp-protocol-version",
        "mcp-session-id",
        "transfer-encoding",
    }
)
"""The headers that the protocol itself sets, so that a function or command must not."""


class ChangingHeaders:
    """Fetches the headers of one server.

    Args:
        spec: The server, which has a `headers_function` or a `headers_helper`.
    """

    def __init__(self, spec: ServerSpec) -> None:
        self._spec = spec
        self._source = "the function for its headers" if spec.headers_function is not None else "its headersHelper"

    async def fetch(self) -> Mapping[str, str]:
        """Returns the headers.

        Raises:
            RequestRejectedError: The headers cannot be fetched. The text says why, without quoting any of them.
        """
        function = self._spec.headers_function
        try:
            async with asyncio.timeout(_HEADERS_TIMEOUT):
                headers = await (self._run_helper() if function is None else call_function(function))
        except TimeoutError as exc:
            raise self._error(f"did not end within {_HEADERS_TIMEOUT:g} seconds") from exc
        except RequestRejectedError:
            raise
        # A function of the program may raise anything, and the text of its exception may contain a secret.
        except Exception as exc:
            raise self._error(f"raised {type(exc).__name__}") from exc
        return self._checked(headers)

    def _error(self, problem: str) -> RequestRejectedError:
        hint = "" if self._spec.headers_function is not None else "run the command in a terminal to see what is wrong"
        return RequestRejectedError(f"{self._source} {problem}", hint=hint)

    def _checked(self, headers: Any) -> dict[str, str]:
        if not isinstance(headers, Mapping):
            raise self._error("must give the headers as a JSON object or a dict")
        for name, value in headers.items():
            if not isinstance(name, str) or not _NAME.fullmatch(name) or not isinstance(value, str):
                raise self._error("gives a header whose name is not valid, or whose value is not a string")
            if not value.isascii() or not value.isprintable():
                raise self._error(f"gives a value of {name} that is not printable ASCII")
            if name.lower() in _RESERVED_HEADERS:
                raise self._error(f"gives the header {name}, which belongs to the protocol")
        self._spec.remember_secrets(headers.values())
        return dict(headers)

    async def _run_helper(self) -> Any:
        """Runs the command, and returns the JSON value that it writes."""
        if sys.platform == "win32":
            raise self._error("cannot be run on Windows; give a function for the headers instead")
        named = {"MCP_SERVER_NAME": self._spec.name, "MCP_SERVER_URL": self._spec.url}
        # The names that begin with CLAUDE_CODE are for scripts that were written for Claude Code.
        names = {f"{prefix}_{key}": value for prefix in ("CLAUDE_CODE", "LMBRIDGE") for key, value in named.items()}
        starting = asyncio.ensure_future(
            asyncio.create_subprocess_shell(
                self._spec.headers_helper,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                env={**os.environ, **names},
                cwd=self._spec.cwd,
                start_new_session=True,
            )
        )
        try:
            # A process that has been created must not be lost, even if the caller is cancelled.
            await settle(starting)
        except BaseException:
            if not starting.cancelled() and starting.exception() is None:
                await _end_helper(starting.result())
            raise
        process = starting.result()
        try:
            process_groups.add(process.pid)
            output = await _read_helper_output(process)
            status = await process.wait()
        except MCPError as exc:
            await _end_helper(process)
            raise RequestRejectedError(f"{self._source} cannot be run: {exc.message}", hint=exc.hint or "") from exc
        except BaseException:
            await _end_helper(process)
            raise
        process_groups.discard(process.pid)
        if output is None:
            raise self._error(f"wrote more than {_LARGEST_OUTPUT:,} bytes")
        if status:
            raise self._error(f"ended with status {status}")
        try:
            return msgspec.json.decode(output)
        except msgspec.DecodeError as exc:
            # Unlike the exceptions of the standard library, this one does not quote the output.
            raise self._error("did not write a JSON object to stdout") from exc


async def _read_helper_output(process: asyncio.subprocess.Process) -> bytes | None:
    """Returns what a command writes to stdout. If it writes too much, the process is ended and None is returned."""
    output = b""
    while process.stdout is not None and (piece := await process.stdout.read(_LARGEST_OUTPUT)):
        output += piece
        if len(output) > _LARGEST_OUTPUT:
            await _end_helper(process)
            return None
    return output


async def _end_helper(process: asyncio.subprocess.Process) -> None:
    await end_group(process.pid, patience=0.0)
    await process.wait()
