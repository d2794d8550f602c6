"""Programs that download a server before they start it, such as `npx` and `uvx`: time limits and typical failures.

The first start with `npx` downloads a package and everything that it depends on. This takes 14 to 26 seconds for a
small server on a fast line, and minutes for a server that brings a browser or a model. The rules here follow from what
npm 11.19 and uv 0.13 do:

- npx writes nothing to stderr while it downloads, unless `npm_config_loglevel` is "http": then it writes one line for
  each file. uvx writes a line when the download of a large file begins, and another when it is complete.
- If npx is killed by SIGKILL during a download, it leaves `_npx/<hash>/concurrency.lock` behind. The next npx waits in
  silence until the lock is 60 seconds old, and then repairs the rest by itself. After SIGTERM, no lock is left.
- npm 10 has no lock. In most cases, it also repairs what a killed npx has left behind. Otherwise each start fails
  (ENOTEMPTY, EEXIST, TAR_ENTRY_ERROR), or starts an incomplete package ("Cannot find module").

So a package runner may be silent for two minutes, which is longer than the lock's 60 seconds, and each line on stderr
restarts this limit. There is also a limit for the whole start. Without it, the wait for a server that logs but never
answers would never end. For all other programs, the connect timeout is the time for the whole start. The alternative to
lines on stderr, watching the processor or network usage of the processes, would work only on Linux.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path, PurePath
from typing import Final

import attrs

from lmbridge.mcp.config.server_spec import DEFAULT_CONNECT_TIMEOUT, ServerSpec

_PACKAGE_RUNNERS: Final = frozenset(
    {"npx", "npm", "pnpm", "pnpx", "yarn", "bun", "bunx", "deno", "uv", "uvx", "pipx", "docker", "podman"}
)
_NPM_PROGRAMS: Final = frozenset({"npx", "npm"})
_SHELLS: Final = frozenset({"sh", "bash", "dash", "zsh", "ash", "ksh", "fish"})
"""Programs whose argument after `-c` is a command line."""
_WRAPPERS: Final = frozenset({"cmd", "env", "nice", "exec", "time", "nohup", "stdbuf"})
"""Programs whose arguments are options and then a command. Entries for Windows often begin with `cmd /c npx`."""
_PREFIXES: Final = _WRAPPERS | {"if", "then", "else", "do", "while", "sudo", "command"}
"""Words of a shell script that precede a program."""
_OPTIONS_WITH_VALUE: Final = ("-u", "-C", "-n")
"""The options of wrappers whose value is the next word, as in `env -u NAME` and `nice -n 5`."""
_BEFORE_PROGRAM: Final = re.compile(r"-|/[a-zA-Z]$|\d+$|\w+=")
"""Matches the words before a program that are options, numbers or variables. `/c` is an option of cmd."""
_RUNNER_SILENCE_SECONDS: Final = 120.0
"""Seconds for which a package runner may write nothing to stderr, unless a connect timeout was given."""
_RUNNER_START_SECONDS: Final = 300.0
"""Seconds that a start with a package runner may take, unless a longer connect timeout was given."""
_NPM_DOWNLOAD_LINE: Final = re.compile(rb"npm (?:http|HTTP) (?:fetch \w+ [23]\d\d|cache) ")
_CACHE_FOLDER: Final = re.compile(r"(?P<folder>/[^\s'\"]*?/_npx/[0-9a-f]{16})\b")
_DAMAGED_CACHE: Final = re.compile(
    r"ENOTEMPTY|EEXIST|TAR_ENTRY_ERROR|EINTEGRITY|ECOMPROMISED|could not determine executable to run|"
    r"sh: (?:\d+: |line \d+: )?\S+: (?:command )?not found"
)
"""What npx writes to stderr if its cache is damaged."""
_FAILED_DOWNLOAD: Final = re.compile(
    r"attempt \d+ failed with|npm (?:error|ERR!) code (?:ECONN|ENOTFOUND|ETIMEDOUT|EAI_AGAIN|\w*CERT)"
)
"""What npx writes to stderr if it cannot reach the registry."""
_INCOMPLETE_PACKAGE: Final = re.compile(r"Cannot find (?:module|package)|ERR_MODULE_NOT_FOUND|ENOENT")
"""What an incomplete package writes to stderr. Such a line may have other causes, unless it names the cache of npx."""


@attrs.frozen
class StartPatience:
    """How long the start of a server may take."""

    silence: float
    """Seconds without any output on stderr after which the start has failed."""
    total: float
    """Seconds after which the start has failed in any case."""


def package_runner_of(command: str, args: Sequence[str] = ()) -> str | None:
    """Returns the name of the program that may download a server before it starts it, or None.

    This program is the command itself, or what a shell or a wrapper starts, as in `sh -c "npx -y x"`, `cmd /c npx x`
    and `env A=1 uvx x`.
    """
    program = _program_name(command)
    if program in _PACKAGE_RUNNERS:
        return program
    if program in _SHELLS:
        scripts = [script for option, script in pairwise(args) if re.fullmatch(r"-[a-z]*c", option)]
        commands = _split_script(scripts[0]) if scripts else []
    else:
        commands = [list(args)] if program in _WRAPPERS else []
    programs = (_program_of(words) for words in commands)
    return next((name for name in programs if name in _PACKAGE_RUNNERS), None)


def _program_of(words: Sequence[str]) -> str | None:
    """Returns the name of the program that a command starts. Wrappers before it are skipped with their options."""
    rest = iter(words)
    for word in rest:
        if word in _OPTIONS_WITH_VALUE:
            next(rest, None)
        elif not _BEFORE_PROGRAM.match(word) and (name := _program_name(word.partition(" ")[0])) not in _PREFIXES:
            return name
    return None


def _program_name(path: str) -> str:
    """Returns the name of a program, without its folders and without a suffix such as `.cmd`."""
    return PurePath(re.split(r"[/\\]", path)[-1]).stem.lower()


def _split_script(script: str) -> list[list[str]]:
    """Returns the words of each command in a shell script, roughly: quoting is respected, most syntax is not."""
    try:
        words = list(shlex.shlex(script.replace("\n", ";"), posix=True, punctuation_chars=";&|()"))
    except ValueError:
        words = script.split()
    is_end = [not word.strip(";&|(){}") for word in words]
    ends = [-1, *(number for number, ends_command in enumerate(is_end) if ends_command), len(words)]
    return [words[begin + 1 : end] for begin, end in pairwise(ends)]


def start_patience(spec: ServerSpec, connect_timeout: float | None) -> StartPatience:
    """Returns how long a server may take to start.

    Args:
        spec: The server.
        connect_timeout: The connect timeout that was given for this server or for all, or None for the default.
    """
    if spec.transport == "stdio" and package_runner_of(spec.command, spec.args):
        silence = connect_timeout or _RUNNER_SILENCE_SECONDS
        return StartPatience(silence, max(_RUNNER_START_SECONDS, silence))
    timeout = connect_timeout or DEFAULT_CONNECT_TIMEOUT
    return StartPatience(timeout, timeout)


def runner_environment(command: str, args: Sequence[str]) -> dict[str, str]:
    """Returns the variables that make npx and npm write a line for each file that they download; none for others."""
    return {"npm_config_loglevel": "http"} if package_runner_of(command, args) in _NPM_PROGRAMS else {}


def is_download_line(line: bytes) -> bool:
    """Returns whether a line of stderr only says that npm has downloaded a file."""
    return _NPM_DOWNLOAD_LINE.match(line) is not None


def npx_hint(spec: ServerSpec, stderr: str, *, timed_out: bool) -> str | None:
    """Returns what to do about a failed start with npx if the network or the npx cache is the reason, or else None.

    The cache may be damaged because an earlier npx was killed in the middle of a download.

    Args:
        spec: The server.
        stderr: What npx and the server wrote to stderr.
        timed_out: Whether the start took too long, which may mean that npx waited for the lock of a killed npx.
    """
    if package_runner_of(spec.command, spec.args) not in _NPM_PROGRAMS:
        return None
    found = _CACHE_FOLDER.search(stderr)
    folder = found["folder"] if found else str(_npm_cache_folder(spec) / "_npx")
    if _DAMAGED_CACHE.search(stderr) or (found and _INCOMPLETE_PACKAGE.search(stderr)):
        return (
            "the cache of npx seems to be damaged, as happens when it is killed while it downloads: delete the folder "
            f"{folder} and try again"
        )
    if _FAILED_DOWNLOAD.search(stderr):
        return "npx cannot download the server: check the network, HTTPS_PROXY and NODE_EXTRA_CA_CERTS"
    if timed_out:
        return (
            "if an earlier npx was killed during a download, this one may be waiting for the lock that it left behind: "
            f"delete the folder {folder} and try again"
        )
    return None


def _npm_cache_folder(spec: ServerSpec) -> Path:
    """Returns the folder in which npm keeps its cache, unless an `.npmrc` names another one."""
    configured = spec.env.get("npm_config_cache") or spec.env.get("NPM_CONFIG_CACHE")
    home = spec.env.get("HOME") or os.environ.get("HOME") or "~"
    return Path(configured) if configured else Path(home) / ".npm"
