"""Finds and reads the configuration file that names MCP servers.

The formats are those of Claude, LM Studio and Cursor (`mcpServers`) and of VS Code (`servers`, with comments), so that
one file serves lmbridge and the programs that its user already has. A file in the working directory is read only if it
is trusted, because it may have come with somebody else's repository and names programs to start.

`McpHub.reload` decides when a file is read again. If the file is broken then, the last good configuration stays in use.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import attrs

from lmbridge.errors import MCPError
from lmbridge.mcp.config.jsonc import parse_jsonc
from lmbridge.mcp.config.server_spec import ServerSpec, expand_home, read_spec, show_value

__all__ = ["McpConfig", "ServerSpec", "load_config"]

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

_SERVER_KEYS: Final = ("mcpServers", "servers")
_LARGEST_FILE: Final = 4 * 2**20
"""The maximum size of a file in bytes. A larger file is not a configuration, and reading it would take too long."""
_TRUST_HINT: Final = (
    "it may start programs that somebody else has chosen; if you trust it, pass trust_project=True or set "
    "LMBRIDGE_TRUST_PROJECT=1"
)


@attrs.frozen
class McpConfig:
    """The content of a configuration file."""

    path: Path | None = None
    """The path of the file, or None if no file was found."""
    names: tuple[str, ...] = ()
    """The names of the enabled servers, in the order of the file."""
    servers: Mapping[str, ServerSpec] = attrs.field(factory=dict)
    """The enabled servers whose entry is valid. The keys are the names."""
    broken: Mapping[str, MCPError] = attrs.field(factory=dict)
    """The errors of the enabled servers whose entry is not valid. The keys are the names."""
    disabled: tuple[str, ...] = ()
    """The names of the servers that are disabled."""
    untrusted: Path | None = None
    """A file in the working directory that was skipped because it is not trusted, or None."""
    searched: tuple[Path, ...] = attrs.field(default=(), eq=False)
    """The paths that were tried, if no file was found."""
    fingerprint: object = attrs.field(default=None, eq=False)
    """A value that changes when the file does; see `file_fingerprint`."""

    def unknown_server(self, name: str) -> MCPError:
        """Returns the error for a name that is not the name of an enabled server."""
        known = ", ".join(self.names) or "none"
        if name in self.disabled:
            return MCPError(
                f"MCP server {name!r} is disabled; the enabled ones are: {known}", hint=f"enable it in {self.path}"
            )
        location = f" in {self.path}" if self.path else ""
        return MCPError(
            f"unknown MCP server {name!r}; the enabled ones are: {known}",
            hint=f"add it{location}{self._describe_skipped()}",
        )

    def no_server_enabled(self) -> MCPError:
        """Returns the error for a caller that asked for all enabled servers although no server is enabled."""
        advice = f"enable one in {self.path}" if self.path else "write a configuration file"
        return MCPError("no MCP server is enabled", hint=advice + self._describe_skipped())

    def _describe_skipped(self) -> str:
        if self.untrusted is not None:
            return f"; {self.untrusted} was skipped: {_TRUST_HINT}"
        return "" if self.path else f"; looked for {', '.join(map(str, self.searched))}"


def load_config(path: str | os.PathLike[str] | None = None, *, trust_project: bool = False) -> McpConfig:
    """Reads the configuration from the given file, or from the first of the default files that exists.

    The default files are, in this order: the one that the environment variable `MCP_JSON_PATH` names, `./.mcp.json` if
    it is trusted, `~/.lmstudio/mcp.json`, and `~/.mcp.json`. The function blocks while it reads the file::

        config = load_config("mcp.json")
        print(config.names, config.servers["files"].command)

    Args:
        path: The path of the file. Default: the first of the default files that exists. If `MCP_JSON_PATH` is set, its
            file must exist.
        trust_project: Whether `./.mcp.json` may be read. Default: False, because that file names programs to start, and
            somebody else may have written it. The environment variable `LMBRIDGE_TRUST_PROJECT=1` has the same effect.

    Raises:
        MCPError: The file that `path` or `MCP_JSON_PATH` names does not exist, or the file cannot be read or parsed;
            the message says where the mistake is. An invalid entry does not raise an error; see `McpConfig.broken`.
    """
    found, untrusted = find_config(path, trust_project=trust_project)
    if found is None:
        return McpConfig(untrusted=untrusted, searched=tuple(_searched_paths()))
    # The fingerprint is taken before the file is read. If the file changes in between, the next use reads it again.
    fingerprint = file_fingerprint(found)
    return attrs.evolve(_read_config(found), untrusted=untrusted, fingerprint=fingerprint)


def find_config(path: str | os.PathLike[str] | None, *, trust_project: bool) -> tuple[Path | None, Path | None]:
    """Returns the file to read, and the file in the working directory that was skipped because it is not trusted.

    Raises:
        MCPError: The file that `path` or `MCP_JSON_PATH` names does not exist.
    """
    if path is not None:
        return _existing_file(path, "config_path"), None
    if from_environment := os.environ.get("MCP_JSON_PATH"):
        return _existing_file(from_environment, "MCP_JSON_PATH"), None
    is_trusted = trust_project or os.environ.get("LMBRIDGE_TRUST_PROJECT") == "1"
    untrusted = None
    home_files = _home_files()
    project = _project_file()
    if project is not None and _is_file(project) and not any(_is_same_file(project, each) for each in home_files):
        if is_trusted:
            return project, None
        untrusted = project
    return next((each for each in home_files if _is_file(each)), None), untrusted


def warn_untrusted(path: Path) -> None:
    """Logs a warning that a file in the working directory was skipped."""
    logger.warning("the MCP configuration %s was skipped: %s", path, _TRUST_HINT)


def file_fingerprint(path: Path) -> object:
    """Returns a value that changes when the file does, or None if the file does not exist."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return (str(path), stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _searched_paths() -> list[Path]:
    project = _project_file()
    return [*([] if project is None else [project]), *_home_files()]


def _project_file() -> Path | None:
    try:
        return Path.cwd() / ".mcp.json"
    except OSError:
        # The working directory has been removed.
        return None


def _home_files() -> list[Path]:
    try:
        home = Path.home()
    except RuntimeError:
        # In a container, the user may have no home directory.
        return []
    return [home / ".lmstudio" / "mcp.json", home / ".mcp.json"]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        # The folder may not be accessible, or the name may be too long for a file.
        return False


def _is_same_file(one: Path, other: Path) -> bool:
    return _is_file(other) and one.samefile(other)


def _existing_file(given: str | os.PathLike[str], source: str) -> Path:
    path = expand_home(Path(given))
    if not _is_file(path):
        raise MCPError(f"{source} is {str(path)!r}, but that file does not exist", hint="give the path of an mcp.json")
    return path.absolute()


def _read_config(path: Path) -> McpConfig:
    """Reads and parses a file.

    Raises:
        MCPError: The file as a whole cannot be used. Errors of single servers are in `McpConfig.broken`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
        if len(content) > _LARGEST_FILE:
            raise MCPError(f"{path} is larger than {_LARGEST_FILE // 2**20} MiB", hint="give the path of an mcp.json")
        document = parse_jsonc(content.decode("utf-8-sig"))
    except OSError as exc:
        raise MCPError(f"{path} cannot be read: {exc.strerror}", exc, hint="check its permissions") from exc
    except ValueError as exc:
        raise MCPError(f"{path} is not valid JSON: {exc}", exc, hint="correct the file") from exc
    key, entries = _find_entries(document, path)
    return _parse_entries(key, entries, path)


def _find_entries(document: Any, path: Path) -> tuple[str, Mapping[str, Any]]:
    keys = [key for key in _SERVER_KEYS if isinstance(document, dict) and key in document]
    if len(keys) != 1:
        problem = "both 'mcpServers' and 'servers'" if keys else "neither 'mcpServers' nor 'servers'"
        raise MCPError(f"{path} has {problem}", hint='put all servers under "mcpServers": {"name": {"command": ...}}')
    (key,) = keys
    entries = document[key]
    if not isinstance(entries, dict):
        raise MCPError(f"{path}: {key} is {show_value(entries)}", hint="make it an object with one key for each server")
    return key, entries


def _parse_entries(key: str, entries: Mapping[str, Any], path: Path) -> McpConfig:
    servers: dict[str, ServerSpec] = {}
    broken: dict[str, MCPError] = {}
    disabled: list[str] = []
    for name, entry in entries.items():
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
