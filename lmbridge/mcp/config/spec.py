"""`ServerSpec`: one server of a configuration, its variables filled in and its values checked."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, Final, Literal
from urllib.parse import urlsplit

import attrs

from lmbridge._checks import is_number
from lmbridge.config import is_loopback
from lmbridge.errors import MCPError

logger = logging.getLogger("lmbridge.mcp")

Transport = Literal["stdio", "http", "sse"]

DEFAULT_CONNECT_TIMEOUT: Final = 30.0
"""Seconds for connecting to a server and listing its tools."""

_TRANSPORTS: Final[Mapping[str, Transport]] = {
    "stdio": "stdio",
    "http": "http",
    "streamable-http": "http",
    "streamablehttp": "http",
    "sse": "sse",
}
_OURS: Final = ("allow", "deny", "connectTimeout", "callTimeout")
_NOT_SUPPORTED: Final = (
    "auth",
    "disabledTools",
    "envFile",
    "headersHelper",
    "oauth",
    "sandbox",
    "sandboxEnabled",
    "timeout",
)
"""Keys of other hosts that change what a server does, and that are not read here."""
_VARIABLE: Final = re.compile(r"\$\{(?P<name>[^}]*)\}")
_NAME: Final = re.compile(r"(?:env:)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)
_SHORTEST_SECRET: Final = 6
"""Characters of a value from which on it is taken for a secret, and not for a word that texts need."""


@attrs.frozen(kw_only=True)
class ServerSpec:
    """How one server is reached. Two that are equal are the same server."""

    name: str
    """What it is called in the configuration."""
    transport: Transport
    command: str = ""
    """The program of a stdio server. No shell is between."""
    args: tuple[str, ...] = attrs.field(default=(), repr=False)
    env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """Variables for the program, besides the few that each one gets."""
    cwd: str | None = None
    url: str = attrs.field(default="", repr=False)
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    allow: tuple[str, ...] | None = None
    """Globs: only tools that one of them matches are offered."""
    deny: tuple[str, ...] = ()
    """Globs: tools that one of them matches are not."""
    connect_timeout: float | None = None
    """Seconds for connecting and listing tools."""
    call_timeout: float | None = None
    """Seconds that one call may take."""

    def redacted(self, text: str) -> str:
        """The text without the values of `env` and `headers`, and without what a URL may hide."""
        secrets = {part for value in (*self.env.values(), *self.headers.values()) for part in (value, *value.split())}
        if self.url:
            parts = urlsplit(self.url)
            secrets |= {parts.query, parts.password or ""}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text

    @property
    def target(self) -> str:
        """Where it is, for a message: the program, or the URL without what may be secret in it."""
        if self.transport == "stdio":
            return self.command
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

    @property
    def is_lmbridge(self) -> bool:
        """Whether it is this package's own server, as far as its command says."""
        program = PurePath(self.command).stem
        pairs = zip(self.args, self.args[1:], strict=False)
        is_module = any(flag == "-m" and module.split(".")[0] == "lmbridge" for flag, module in pairs)
        return is_module or program in ("lmbridge", "lmbridge-mcp")


def read_spec(name: str, entry: Any, where: str, folder: Path, environ: Mapping[str, str]) -> ServerSpec | None:
    """The server that an entry describes, or None if it is disabled.

    Args:
        name: Its name.
        entry: The value in the file.
        where: The file and the key, for errors.
        folder: What a relative `cwd` starts from.
        environ: The values of variables.

    Raises:
        MCPError: a value cannot be used; it names the key.
    """
    reader = _Reader(entry, where, environ)
    if reader.is_disabled():
        return None
    transport = reader.transport()
    ours = reader.part("lmbridge", _OURS)
    spec = ServerSpec(
        name=name,
        transport=transport,
        allow=ours.globs("allow"),
        deny=ours.globs("deny") or (),
        connect_timeout=ours.seconds("connectTimeout"),
        call_timeout=ours.seconds("callTimeout"),
    )
    reader.note_unsupported(name)
    if transport != "stdio":
        return attrs.evolve(spec, url=reader.url(name), headers=reader.headers())
    cwd = reader.text("cwd")
    return attrs.evolve(
        spec,
        command=_program(reader, folder),
        args=reader.texts("args"),
        env=reader.mapping("env"),
        cwd=None if cwd is None else str(folder / expanded(Path(cwd))),
    )


def expanded(path: Path) -> Path:
    """A path with the home that `~` stands for; as it is where nobody has that home."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _program(reader: _Reader, folder: Path) -> str:
    command = reader.text("command")
    if not command or not command.strip():
        raise reader.error("command", "is empty", "give the program to start")
    if "/" in command and not command.startswith("/"):
        return str(folder / expanded(Path(command)))  # not relative to wherever this program was started
    return command


class _Reader:
    """The values of an entry, checked; each error names the key."""

    def __init__(self, entry: Any, where: str, environ: Mapping[str, str]) -> None:
        self._where, self._environ = where, environ
        if not isinstance(entry, dict):
            raise MCPError(f"{where} is {_shown(entry)}", hint='make it an object, like {"command": "npx"}')
        self._entry = entry

    def error(self, key: str, what: str, hint: str) -> MCPError:
        return MCPError(f"{self._where}.{key} {what}", hint=hint)

    def is_disabled(self) -> bool:
        return self._flag("disabled", default=False) or not self._flag("enabled", default=True)

    def _flag(self, key: str, *, default: bool) -> bool:
        value = self._entry.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {_shown(value)}", "write true or false")
        return value

    def transport(self) -> Transport:
        given = self._entry.get("type", self._entry.get("transport"))
        has = [key for key in ("command", "url") if key in self._entry]
        if len(has) != 1:
            what = "has both 'command' and 'url'" if has else "has neither 'command' nor 'url'"
            hint = 'give "command" for a program to start, or "url" for a server that runs'
            raise MCPError(f"{self._where} {what}", hint=hint)
        if given is None:
            path = re.split("[?#]", self.text("url") or "")[0]
            return "stdio" if has == ["command"] else "sse" if path.rstrip("/").endswith("/sse") else "http"
        kind = _TRANSPORTS.get(given.lower()) if isinstance(given, str) else None
        if kind is None or (kind == "stdio") != (has == ["command"]):
            hint = f"with '{has[0]}' it is " + ("stdio" if has == ["command"] else "http or sse")
            raise self.error("type" if "type" in self._entry else "transport", f"is {_shown(given)}", hint)
        return kind

    def part(self, key: str, known: Sequence[str]) -> _Reader:
        part = _Reader(self._entry.get(key, {}), f"{self._where}.{key}", self._environ)
        for each in part._entry:
            if each not in known:  # a rule that is misspelled would be no rule
                raise part.error(each, "is not known", f"there are: {', '.join(known)}")
        return part

    def note_unsupported(self, name: str) -> None:
        if found := [key for key in _NOT_SUPPORTED if key in self._entry]:
            logger.warning("MCP server %r: not supported, and ignored: %s", name, ", ".join(found))

    def text(self, key: str) -> str | None:
        return None if key not in self._entry else self._filled(key, self._entry[key])

    def texts(self, key: str) -> tuple[str, ...]:
        values = self._entry.get(key, [])
        if not isinstance(values, list):
            raise self.error(key, f"is {_shown(values)}", "make it a list of texts")
        return tuple(self._filled(f"{key}[{index}]", value) for index, value in enumerate(values))

    def globs(self, key: str) -> tuple[str, ...] | None:
        return self.texts(key) if key in self._entry else None

    def mapping(self, key: str) -> dict[str, str]:
        values = self._entry.get(key, {})
        if not isinstance(values, dict):
            raise self.error(key, f"is {_shown(values)}", "make it an object of texts")
        if wrong := [name for name in values if not name or "=" in name or "\0" in name]:
            raise self.error(f"{key}.{wrong[0]}", "is no name", "give it another")
        return {name: self._filled(f"{key}.{name}", value) for name, value in values.items()}

    def headers(self) -> dict[str, str]:
        values = self.mapping("headers")
        for name, value in values.items():
            if not value.isascii() or not value.isprintable():
                raise self.error(f"headers.{name}", "is no header", "use printable ASCII")
        return values

    def url(self, name: str) -> str:
        url = self.text("url") or ""
        try:
            parts = urlsplit(url)
            _ = parts.port
        except ValueError as exc:
            raise self.error("url", f"is no URL: {exc}", "give it like http://127.0.0.1:8000/mcp") from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self.error("url", "is no http or https URL", "give it like http://127.0.0.1:8000/mcp")
        if parts.scheme == "http" and "headers" in self._entry and not is_loopback(url):
            logger.warning("MCP server %r: its headers go over the network as plain text; use https", name)
        return url

    def seconds(self, key: str) -> float | None:
        value = self._entry.get(key)
        if value is None:
            return None
        if not is_number(value) or not 0 < value < math.inf:
            raise self.error(key, f"is {_shown(value)}", "give a positive number of seconds")
        return float(value)

    def _filled(self, key: str, value: Any) -> str:
        if not isinstance(value, str):
            raise self.error(key, f"is {_shown(value)}", "make it a text")
        filled = _VARIABLE.sub(self._variable(key), value)  # once: a value that looks like a variable is none
        if "\0" in filled:
            raise self.error(key, "holds a null character", "remove it")
        return filled

    def _variable(self, key: str) -> Callable[[re.Match[str]], str]:
        def value_of(found: re.Match[str]) -> str:
            known = _NAME.fullmatch(found["name"])
            if known is None:
                raise self.error(key, f"asks for {found.group()}", "only ${VAR} and ${VAR:-default} are filled in")
            value = self._environ.get(known["name"]) or known["default"]
            if value is None:
                hint = f"set {known['name']}, or write ${{{known['name']}:-default}}"
                raise self.error(key, f"needs the environment variable {known['name']}, which is not set", hint)
            return value

        return value_of


def _shown(value: Any) -> str:
    """A value of the wrong type, without what may be secret in it."""
    if isinstance(value, str):
        return "a text" if len(value) > 20 else repr(value)
    return "null" if value is None else f"a {type(value).__name__}" if isinstance(value, dict | list) else repr(value)
