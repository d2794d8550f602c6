"""Finds out what the user can do about a server that could not be started."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence

from lmbridge.mcp.config.server_spec import ServerSpec
from lmbridge.mcp.sdk import RequestRejectedError, SessionLostError
from lmbridge.mcp.servers.package_runners import npx_hint


def start_hint(
    spec: ServerSpec, error: BaseException | None, stderr: str, missing_variables: Sequence[str]
) -> str | None:
    """Returns what to do after a failed start, or None if there is nothing to suggest.

    Args:
        spec: The server.
        error: The error of the session, whose cause is the original error; None if the server has not answered in time.
        stderr: What the server wrote to stderr.
        missing_variables: The environment variables that the server may need and did not get.
    """
    hints: list[str] = []
    cause = None if error is None else error.__cause__
    if isinstance(cause, OSError) and spec.transport == "stdio":
        hints += _program_hint(spec, cause)
    if isinstance(cause, RequestRejectedError):
        hints += filter(None, [cause.hint])
    elif isinstance(cause, SessionLostError) and spec.transport != "stdio":
        hints.append("check that it is running, and that its URL is right")
    if found := npx_hint(spec, stderr, timed_out=error is None):
        hints.append(found)
    if missing_variables:
        name = missing_variables[0]
        example = f'{{"{name}": "${{{name}}}"}}'
        hints.append(f'if it needs one of the variables, pass it on with "env": {example} in the configuration')
    if error is None:
        hints.append('allow it more time with "lmbridge": {"connectTimeout": ...} in the configuration')
    return "; ".join(hints) or None


def _program_hint(spec: ServerSpec, error: OSError) -> list[str]:
    """Returns what to do if the program of a server cannot be executed."""
    if spec.cwd is not None and error.filename == spec.cwd:
        return ['create that folder, or correct "cwd" in the configuration']
    if words := _split_command(spec.command):
        program, arguments = json.dumps(words[0]), json.dumps(words[1:], ensure_ascii=False)
        split = f'split it: "command": {program}, "args": {arguments}'
        if _can_be_path(words):
            return [f"check the path of the command; or, if it contains its arguments, {split}"]
        return [f"the command contains its arguments, so {split}"]
    if isinstance(error, FileNotFoundError):
        return ["install it, or give its full path in the configuration"]
    if isinstance(error, PermissionError):
        return ["make the file executable, or start it with its interpreter, such as python or node"]
    return []


def _split_command(command: str) -> list[str]:
    """Returns the words of a command that seems to be a whole command line, or an empty list."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    return words if len(words) > 1 else []


def _can_be_path(words: Sequence[str]) -> bool:
    """Returns whether the words of a command may also be the path of a program in a folder whose name has a space."""
    return re.search(r"[/\\]", words[0]) is not None and re.match(r"[^-/\\].*[/\\]", words[1]) is not None
