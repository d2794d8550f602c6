"""Configuration files for MCP servers: where they are, what is in them, and whose programs they start.

The formats are those of Claude, LM Studio and Cursor (`mcpServers`) and of VS Code (`servers`, with comments).
Nothing of the SDK is needed here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import attrs

from lmbridge.errors import MCPError
from lmbridge.mcp.config.jsonc import parse_json
from lmbridge.mcp.config.spec import ServerSpec, expanded, read_spec

__all__ = ["McpConfig", "ServerSpec", "load_config"]

logger = logging.getLogger("lmbridge.mcp")

_KEYS: Final = ("mcpServers", "servers")
_LARGEST: Final = 4 * 2**20
"""Bytes of a file that are read at most: a larger one is not a configuration."""


@attrs.frozen
class McpConfig:
    """What a configuration file says.

    Attributes:
        path: The file; None if there is none.
        names: The enabled servers, in the order of the file.
        servers: Those that can be used.
        broken: Those whose entry cannot be used, and why.
        disabled: Servers that are not enabled.
        untrusted: A file in the working directory that was skipped, because it may be anybody's.
        searched: The places that were looked at, if there is no file.
        stamp: Changes when the file does.
    """

    path: Path | None = None
    names: tuple[str, ...] = ()
    servers: Mapping[str, ServerSpec] = attrs.field(factory=dict)
    broken: Mapping[str, MCPError] = attrs.field(factory=dict)
    disabled: tuple[str, ...] = ()
    untrusted: Path | None = None
    searched: tuple[Path, ...] = attrs.field(default=(), eq=False)
    stamp: object = attrs.field(default=None, eq=False)

    def unknown(self, name: str) -> MCPError:
        """The error for a name that is not an enabled server."""
        known = ", ".join(self.names) or "none"
        if name in self.disabled:
            what = f"the MCP server {name!r} is disabled; there are: {known}"
            return MCPError(what, hint=f"enable it in {self.path}")
        where = f" in {self.path}" if self.path else ""
        return MCPError(f"there is no MCP server {name!r}; there are: {known}", hint=f"add it{where}" + self._skipped())

    def none_enabled(self) -> MCPError:
        """The error for who wants all servers that are enabled, where there are none."""
        where = f"enable one in {self.path}" if self.path else "write a configuration"
        return MCPError("no MCP server is enabled", hint=where + self._skipped())

    def _skipped(self) -> str:
        if self.untrusted is None:
            return "" if self.path else f"; looked for {', '.join(map(str, self.searched))}"
        return f"; {self.untrusted} was skipped: {_TRUST_HINT}"


_TRUST_HINT: Final = (
    "it starts programs of whoever wrote it; if you trust it, pass trust_project=True or set LMBRIDGE_TRUST_PROJECT=1"
)


def load_config(path: str | os.PathLike[str] | None = None, *, trust_project: bool = False) -> McpConfig:
    """Reads the configuration: from the path, or from the first file there is of the places below.

    These are `MCP_JSON_PATH`, `./.mcp.json` (if it is trusted), `~/.lmstudio/mcp.json` and `~/.mcp.json`. It reads
    files, so it blocks.

    Args:
        path: The file.
        trust_project: Whether programs named in `./.mcp.json` may be started. `LMBRIDGE_TRUST_PROJECT=1` says so too.

    Raises:
        MCPError: a file that was named is not there, or the file cannot be read; the text says where.
    """
    found, untrusted = find_config(path, trust_project=trust_project)
    if found is None:
        return McpConfig(untrusted=untrusted, searched=tuple(_searched()))
    stamp = file_stamp(found)
    return attrs.evolve(_read(found), untrusted=untrusted, stamp=stamp)


def find_config(path: str | os.PathLike[str] | None, *, trust_project: bool) -> tuple[Path | None, Path | None]:
    """The file to read, and the one that was skipped because nobody said that it is trusted.

    Raises:
        MCPError: a file that was named is not there.
    """
    if path is not None:
        return _named(path, "config_path"), None
    if given := os.environ.get("MCP_JSON_PATH"):
        return _named(given, "MCP_JSON_PATH"), None
    trusted = trust_project or os.environ.get("LMBRIDGE_TRUST_PROJECT") == "1"
    untrusted = None
    own = _own()
    project = _project()
    if project is not None and _is_there(project) and not any(_is_same(project, each) for each in own):
        if trusted:
            return project, None
        untrusted = project
    return next((each for each in own if _is_there(each)), None), untrusted


def warn_of_untrusted(path: Path) -> None:
    """Says in the log that a file was skipped."""
    logger.warning("the MCP configuration %s is skipped: %s", path, _TRUST_HINT)


def file_stamp(path: Path) -> object:
    """What changes when a file does; None if it is not there."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)


def is_offered(tool: str, spec: ServerSpec) -> bool:
    """Whether the configuration lets a tool of a server be called: it is allowed and not denied."""
    allowed = spec.allow is None or any(fnmatchcase(tool, glob) for glob in spec.allow)
    return allowed and not any(fnmatchcase(tool, glob) for glob in spec.deny)


def _searched() -> list[Path]:
    project = _project()
    return [*([] if project is None else [project]), *_own()]


def _project() -> Path | None:
    try:
        return Path.cwd() / ".mcp.json"
    except OSError:  # somebody removed the folder
        return None


def _own() -> list[Path]:
    try:
        home = Path.home()
    except RuntimeError:  # a container may have a user without one
        return []
    return [home / ".lmstudio" / "mcp.json", home / ".mcp.json"]


def _is_there(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # it is in a folder that is closed to us, or no file can have that name
        return False


def _is_same(one: Path, other: Path) -> bool:
    return _is_there(other) and one.samefile(other)


def _named(given: str | os.PathLike[str], source: str) -> Path:
    path = expanded(Path(given))
    if not _is_there(path):
        raise MCPError(f"{source} is {str(path)!r}, and there is no such file", hint="give the path of an mcp.json")
    return path.absolute()


def _read(path: Path) -> McpConfig:
    """What a file says.

    Raises:
        MCPError: it cannot be read as a whole. What is wrong with one server is in `broken`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise MCPError(f"{path} is larger than {_LARGEST // 2**20} MiB", hint="give the path of an mcp.json")
        document = parse_json(content.decode("utf-8-sig"))
    except OSError as exc:
        raise MCPError(f"{path} cannot be read: {exc.strerror}", exc, hint="check its permissions") from exc
    except ValueError as exc:
        raise MCPError(f"{path} is no JSON: {exc}", exc, hint="correct it there") from exc
    return _servers(_entries(document, path), path)


def _entries(document: Any, path: Path) -> Mapping[str, Any]:
    found = [key for key in _KEYS if isinstance(document, dict) and key in document]
    if len(found) != 1:
        what = "both 'mcpServers' and 'servers'" if found else "neither 'mcpServers' nor 'servers'"
        raise MCPError(f"{path} has {what}", hint='put all servers under "mcpServers": {"name": {"command": ...}}')
    entries = document[found[0]]
    if not isinstance(entries, dict):
        raise MCPError(f"{path}: {found[0]} is {_kind(entries)}", hint="make it an object, with a key for each server")
    return {name: (found[0], entry) for name, entry in entries.items()}


def _servers(entries: Mapping[str, Any], path: Path) -> McpConfig:
    servers: dict[str, ServerSpec] = {}
    broken: dict[str, MCPError] = {}
    disabled: list[str] = []
    for name, (key, entry) in entries.items():
        try:
            spec = read_spec(name, entry, f"{path}: {key}.{name}", path.parent, os.environ)
        except MCPError as error:
            broken[name] = error
            continue
        if spec is None:
            disabled.append(name)
        else:
            servers[name] = spec
    names = tuple(name for name in entries if name not in disabled)
    return McpConfig(path, names, servers, broken, tuple(disabled))


def _kind(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"
