"""`ServerSpec`: one entry of a configuration file, after its values have been checked and its variables expanded.

An entry is checked as a whole before anything is started, and each error names the file and the key. Mistakes are
errors and not warnings: a misspelled `deny` that is ignored would offer a tool that its user meant to forbid. Keys
outside the object `lmbridge` that lmbridge does not know or support are the exception: other programs use them, so they
cause at most a warning.

Which keys of a file hold its entries is decided in `files`.
"""

from __future__ import annotations

import difflib
import glob
import json
import logging
import math
import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePath
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

import attrs

from lmbridge._checks import is_number
from lmbridge.config import is_loopback
from lmbridge.errors import MCPError

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

TransportKind = Literal["stdio", "http", "sse"]
"""How messages are exchanged with a server: over a process's stdin and stdout, streamable HTTP, or the older SSE."""

DEFAULT_CONNECT_TIMEOUT: Final = 30.0
"""The time limit for connecting to a server and listing its tools, in seconds, unless the configuration or the caller
sets another one. Programs that download a server before they start it get more time; see
`lmbridge.mcp.servers.package_runners`."""

_TRANSPORT_NAMES: Final[Mapping[str, TransportKind]] = {
    "stdio": "stdio",
    "http": "http",
    "streamable-http": "http",
    "streamablehttp": "http",
    "sse": "sse",
}
HeadersFunction: TypeAlias = Callable[[], Mapping[str, str] | Awaitable[Mapping[str, str]]]
"""A function, async or plain, that returns additional HTTP headers for the requests to a server."""

_LMBRIDGE_KEYS: Final = (
    "allow",
    "deny",
    "connectTimeout",
    "callTimeout",
    "toolTimeouts",
    "maxCallTimeout",
    "clientCredentials",
)
"""The keys of the object `lmbridge` in an entry. Each may also be written with underscores, as in `call_timeout`."""
_ENTRY_KEYS: Final = (
    "args",
    "command",
    "cwd",
    "disabled",
    "disabledTools",
    "enabled",
    "env",
    "headers",
    "headersHelper",
    "lmbridge",
    "transport",
    "type",
    "url",
)
"""The keys of an entry. Other programs add further ones, so an unknown key is not an error."""
_OTHER_NAMES: Final = {"arguments": "args", "cmd": "command", "environment": "env", "workingDirectory": "cwd"}
"""Keys that users often write by mistake, and the keys that they mean."""
_MINIMUM_SIMILARITY: Final = 0.8
"""How similar an unknown key must be to a known one to be taken for a misspelling of it, from 0 to 1."""
_UNSUPPORTED_KEYS: Final = (
    "auth",
    "envFile",
    "oauth",
    "sandbox",
    "sandboxEnabled",
    "timeout",
)
"""Keys that other programs support and that change what a server does. lmbridge warns about them and ignores them."""
_PLACEHOLDER: Final = re.compile(r"\$\{(?P<content>[^}]*)\}")
_VARIABLE: Final = re.compile(r"(?:env:)?(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)
_SHORTEST_SECRET: Final = 6
"""The minimum length of a value that is redacted. Shorter values are often ordinary words, such as "true" or "en"."""
_LONGEST_SHOWN_STRING: Final = 20
"""The maximum length of an invalid string that an error repeats. A longer string may be a secret."""


_CREDENTIALS_KEYS: Final = ("clientId", "clientSecret", "issuer", "scope")
_REMEMBERED_SECRETS: Final = 32
"""How many secrets of a server that are not in its entry, such as tokens, are remembered. When there are more, the
oldest ones are forgotten."""


@attrs.frozen(kw_only=True)
class ClientCredentials:
    """The credentials with which a token for a server is requested, by OAuth's grant "client_credentials"."""

    client_id: str
    """The name under which the authorization server knows this program."""
    client_secret: str = attrs.field(repr=False)
    """The secret that belongs to `client_id`."""
    issuer: str
    """The URL of the authorization server. The secret is sent to no other server."""
    scope: str | None = None
    """The scopes to ask for, separated by spaces. Default: None, which asks for the scopes that the server names."""


@attrs.frozen(kw_only=True)
class ServerSpec:
    """Describes how one server is started or reached.

    When a configuration file is read again, a server whose spec is equal to its previous one is not restarted.
    """

    name: str
    """The key of the entry in the configuration file."""
    transport: TransportKind
    """How messages are exchanged: over a process's stdin and stdout, over streamable HTTP, or over the older SSE."""
    command: str = ""
    """The program of a stdio server, started without a shell."""
    args: tuple[str, ...] = attrs.field(default=(), repr=False)
    """The arguments of the program."""
    env: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """The environment variables of the program, in addition to the few that every server inherits."""
    cwd: str | None = None
    """The working directory of the program. Default: the working directory of this process."""
    url: str = attrs.field(default="", repr=False)
    """The URL of an HTTP or SSE server."""
    headers: Mapping[str, str] = attrs.field(factory=dict, repr=False)
    """HTTP headers that are sent with every request, such as Authorization."""
    headers_helper: str = attrs.field(default="", repr=False)
    """A command that writes further headers to stdout, as a JSON object; it is run by the shell in the folder `cwd`."""
    headers_function: HeadersFunction | None = attrs.field(default=None, repr=False)
    """A function that returns further headers. It comes from the argument `headers` of `McpHub`, not from the file."""
    client_credentials: ClientCredentials | None = attrs.field(default=None, repr=False)
    """The credentials with which a token for the server is requested; None if none has to be requested."""
    allow: tuple[str, ...] | None = None
    """Glob patterns: only tools whose name matches one of them are offered. Default: None, which allows all."""
    deny: tuple[str, ...] = ()
    """Glob patterns: tools whose name matches one of them are not offered."""
    connect_timeout: float | None = None
    """The time limit for connecting and listing tools, in seconds. Default: the `connect_timeout` of the hub."""
    call_timeout: float | None = None
    """The time limit of one call in seconds, which reports of progress extend. Default: the `call_timeout` of
    `McpHub.tools`, or else the agent's `tool_timeout`."""
    tool_timeouts: Mapping[str, float] = attrs.field(factory=dict)
    """The time limits of single tools in seconds, by their names or by glob patterns. They take precedence over
    `call_timeout`."""
    max_call_timeout: float | None = None
    """The time limit for the whole of a call in seconds, which reports of progress do not extend. Default: ten times
    the time limit of the call."""
    _secrets: deque[str] = attrs.field(
        factory=partial(deque, maxlen=_REMEMBERED_SECRETS), init=False, eq=False, repr=False
    )

    def offers(self, tool: str) -> bool:
        """Returns True if the configuration allows a tool and does not deny it."""
        is_allowed = self.allow is None or any(fnmatchcase(tool, pattern) for pattern in self.allow)
        return is_allowed and not any(fnmatchcase(tool, pattern) for pattern in self.deny)

    def timeout_of(self, tool: str) -> float | None:
        """Returns the time limit of a tool's calls in seconds, or None if the configuration does not set it.

        The exact name of a tool takes precedence over patterns, and an earlier pattern in the file over later ones.
        """
        matching = (seconds for pattern, seconds in self.tool_timeouts.items() if fnmatchcase(tool, pattern))
        return self.tool_timeouts.get(tool) or next(matching, self.call_timeout)

    @property
    def has_changing_headers(self) -> bool:
        """Whether some headers come from a function or a command."""
        return bool(self.headers_helper) or self.headers_function is not None

    def remember_secrets(self, values: Iterable[str]) -> None:
        """Remembers values that are sent to the server, so that `redact` removes them from now on."""
        self._secrets.extend(each for each in values if each not in self._secrets)

    def redact(self, text: str) -> str:
        """Returns the text with `***` in place of each secret.

        The secrets are the values in `env` and `headers` and the words in them, the query and the password of the URL,
        the secret of `client_credentials`, and what `remember_secrets` was given. Short ones are not replaced, because
        they are often ordinary words.
        """
        values = (*self.env.values(), *self.headers.values(), *self._secrets)
        secrets = {part for value in values for part in (value, *value.split())}
        if self.client_credentials is not None:
            secrets.add(self.client_credentials.client_secret)
        if self.url:
            parts = urlsplit(self.url)
            secrets |= {parts.query, parts.password or ""}
        for secret in sorted(secrets, key=len, reverse=True):
            if len(secret) >= _SHORTEST_SECRET:
                text = text.replace(secret, "***")
        return text

    @property
    def target(self) -> str:
        """The program, or the URL without its password, query and fragment, for use in messages."""
        if self.transport == "stdio":
            return self.command
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

    @property
    def is_lmbridge(self) -> bool:
        """True if the command starts this package's own MCP server. A wrapper script around it is not recognized."""
        program = PurePath(self.command).stem
        pairs = zip(self.args, self.args[1:], strict=False)
        is_module = any(flag == "-m" and module.split(".")[0] == "lmbridge" for flag, module in pairs)
        return is_module or program in ("lmbridge", "lmbridge-mcp")


def read_spec(name: str, entry: Any, location: str, folder: Path, environ: Mapping[str, str]) -> ServerSpec | None:
    """Returns the server that an entry describes, or None if it is disabled.

    Args:
        name: The key of the entry.
        entry: The value of the entry.
        location: The file and the key, for errors.
        folder: The folder of the configuration file. A relative `cwd` or `command` is resolved against it, and a
            `headersHelper` runs in it.
        environ: The environment variables that replace `${VAR}`.

    Raises:
        MCPError: A value is not valid; the text names its key.
    """
    reader = _EntryReader(entry, location, environ)
    if reader.is_disabled():
        return None
    transport = reader.transport()
    options = reader.nested("lmbridge", _LMBRIDGE_KEYS)
    spec = ServerSpec(
        name=name,
        transport=transport,
        allow=options.optional_strings("allow"),
        # `deny` has patterns. `disabledTools` comes from other programs, and has the names of tools.
        deny=(*options.strings("deny"), *map(glob.escape, reader.strings("disabledTools"))),
        connect_timeout=options.seconds("connectTimeout"),
        call_timeout=options.seconds("callTimeout"),
        tool_timeouts=options.seconds_by_name("toolTimeouts"),
        max_call_timeout=options.seconds("maxCallTimeout"),
    )
    reader.warn_unsupported(name)
    if transport != "stdio":
        return attrs.evolve(
            spec,
            url=reader.url(name),
            headers=reader.headers(),
            headers_helper=(helper := reader.headers_helper()),
            cwd=str(folder) if helper else None,
            client_credentials=_read_credentials(options, reader),
        )
    reader.check_only_for_url("headersHelper")
    options.check_only_for_url("clientCredentials")
    cwd = reader.string("cwd")
    return attrs.evolve(
        spec,
        command=_resolve_command(reader, folder),
        args=reader.strings("args"),
        env=reader.mapping("env"),
        cwd=None if cwd is None else str(folder / expand_home(Path(cwd))),
    )


def _read_credentials(options: _EntryReader, reader: _EntryReader) -> ClientCredentials | None:
    """Returns the client credentials of a server, or None if it has none."""
    if not options.has("clientCredentials"):
        return None
    if reader.has("headersHelper"):
        raise options.error("clientCredentials", "is given together with headersHelper", "keep one of them")
    values = options.nested("clientCredentials", _CREDENTIALS_KEYS)
    found = {key: values.string(key) for key in _CREDENTIALS_KEYS}
    if missing := [key for key in _CREDENTIALS_KEYS[:3] if not found[key]]:
        raise options.error("clientCredentials", f"has no {missing[0]}", "give clientId, clientSecret and issuer")
    issuer = found["issuer"] or ""
    if not issuer.startswith("https://") and not (issuer.startswith("http://") and is_loopback(issuer)):
        raise values.error("issuer", "is not an https URL", "give the URL of the authorization server")
    return ClientCredentials(
        client_id=found["clientId"] or "",
        client_secret=found["clientSecret"] or "",
        issuer=issuer,
        scope=found["scope"],
    )


def _find_meant_key(key: str) -> str | None:
    """Returns the key that a user probably meant by an unknown one, or None."""
    similar = difflib.get_close_matches(key, [*_ENTRY_KEYS, *_OTHER_NAMES], n=1, cutoff=_MINIMUM_SIMILARITY)
    return _OTHER_NAMES.get(similar[0], similar[0]) if similar else None


def expand_home(path: Path) -> Path:
    """Returns the path with `~` or `~user` replaced by the home directory, or unchanged if that is not known."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def _resolve_command(reader: _EntryReader, folder: Path) -> str:
    command = reader.string("command")
    if not command or not command.strip():
        raise reader.error("command", "is empty", "give the program to start")
    # A path such as ./server is relative to the file, not to the directory in which this program was started.
    if "/" in command and not command.startswith("/") and not _is_command_line(command):
        return str(folder / expand_home(Path(command)))
    return command


def _is_command_line(command: str) -> bool:
    """Returns whether a command looks like a program with arguments, one of which contains the slash.

    Such a command is not made a path, so that the error of its start can say that the arguments belong in `args`.
    """
    program, *arguments = command.split()
    is_runner = program in ("npx", "uvx", "bunx", "docker", "node", "python", "python3", "deno")
    return bool(arguments) and "/" not in program and (is_runner or any(each[0] in "-@" for each in arguments))


class _EntryReader:
    """Reads the values of an entry and checks them; each error names the key.

    Args:
        entry: The value of the entry.
        location: The file and the key, for errors.
        environ: The environment variables that replace `${VAR}`.
    """

    def __init__(self, entry: Any, location: str, environ: Mapping[str, str]) -> None:
        self._location, self._environ = location, environ
        if not isinstance(entry, dict):
            raise MCPError(f"{location} is {show_value(entry)}", hint='make it an object, like {"command": "npx"}')
        self._entry = entry

    def error(self, key: str, problem: str, hint: str) -> MCPError:
        return MCPError(f"{self._location}.{key} {problem}", hint=hint)

    def is_disabled(self) -> bool:
        return self._flag("disabled", default=False) or not self._flag("enabled", default=True)

    def _flag(self, key: str, *, default: bool) -> bool:
        value = self._entry.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {show_value(value)}", "write true or false")
        return value

    def transport(self) -> TransportKind:
        given = self._entry.get("type", self._entry.get("transport"))
        present = [key for key in ("command", "url") if key in self._entry]
        if len(present) != 1:
            problem = "has both 'command' and 'url'" if present else "has neither 'command' nor 'url'"
            hint = 'give "command" for a program to start, or "url" for a server that is running'
            raise MCPError(f"{self._location} {problem}", hint=hint)
        is_program = present == ["command"]
        if given is None:
            path = re.split("[?#]", self.string("url") or "")[0]
            return "stdio" if is_program else "sse" if path.rstrip("/").endswith("/sse") else "http"
        kind = _TRANSPORT_NAMES.get(given.lower()) if isinstance(given, str) else None
        if kind is None or (kind == "stdio") != is_program:
            hint = f"with '{present[0]}' it must be " + ("stdio" if is_program else "http or sse")
            raise self.error("type" if "type" in self._entry else "transport", f"is {show_value(given)}", hint)
        return kind

    def nested(self, key: str, known: Sequence[str]) -> _EntryReader:
        nested = _EntryReader(self._entry.get(key, {}), f"{self._location}.{key}", self._environ)
        values: dict[str, Any] = {}
        for each, value in nested._entry.items():
            name = re.sub("_([a-z])", lambda found: found[1].upper(), each)
            # A misspelled rule must not be ignored: it would offer a tool that the user meant to forbid.
            if name not in known:
                raise nested.error(each, "is not a known key", f"the keys are: {', '.join(known)}")
            if name in values:
                raise nested.error(each, "is given twice", f"keep one of the two spellings of {name}")
            values[name] = value
        nested._entry = values
        return nested

    def warn_unsupported(self, name: str) -> None:
        if found := [key for key in _UNSUPPORTED_KEYS if key in self._entry]:
            logger.warning("MCP server %r: these keys are not supported and are ignored: %s", name, ", ".join(found))
        for key in self._entry:
            if key not in _ENTRY_KEYS and key not in _UNSUPPORTED_KEYS and (meant := _find_meant_key(key)):
                logger.warning("MCP server %r: the key %r is ignored; did you mean %r?", name, key, meant)

    def string(self, key: str) -> str | None:
        return None if key not in self._entry else self._fill_in(key, self._entry[key])

    def has(self, key: str) -> bool:
        return key in self._entry

    def check_only_for_url(self, key: str) -> None:
        if key in self._entry:
            raise self.error(key, "does not apply to a server with a command", 'remove it, or give a "url"')

    def headers_helper(self) -> str:
        """Returns the command for the headers, or an empty string. The shell expands its variables."""
        command = self._entry.get("headersHelper", "")
        if not isinstance(command, str) or ("headersHelper" in self._entry and not command.strip()) or "\0" in command:
            raise self.error("headersHelper", f"is {show_value(command)}", "give a command for the shell")
        return command

    def strings(self, key: str) -> tuple[str, ...]:
        values = self._entry.get(key, [])
        if not isinstance(values, list):
            raise self.error(key, f"is {show_value(values)}", "make it a list of strings")
        return tuple(self._fill_in(f"{key}[{index}]", value) for index, value in enumerate(values))

    def optional_strings(self, key: str) -> tuple[str, ...] | None:
        return self.strings(key) if key in self._entry else None

    def mapping(self, key: str) -> dict[str, str]:
        values = self._entry.get(key, {})
        if not isinstance(values, dict):
            raise self.error(key, f"is {show_value(values)}", "make it an object whose values are strings")
        if wrong := [name for name in values if not name or "=" in name or "\0" in name]:
            raise self.error(f"{key}.{wrong[0]}", "is not a valid name", "rename it")
        return {name: self._fill_in(f"{key}.{name}", value) for name, value in values.items()}

    def headers(self) -> dict[str, str]:
        values = self.mapping("headers")
        for name, value in values.items():
            if not value.isascii() or not value.isprintable():
                raise self.error(f"headers.{name}", "is not a valid header", "use printable ASCII characters")
        return values

    def url(self, name: str) -> str:
        url = self.string("url") or ""
        example = "write it like http://127.0.0.1:8000/mcp"
        try:
            parts = urlsplit(url)
            # Reading the property raises ValueError if the port is not valid.
            _ = parts.port
        except ValueError as exc:
            raise self.error("url", f"is not a valid URL: {exc}", example) from exc
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise self.error("url", "is not an http or https URL", example)
        has_headers = "headers" in self._entry or "headersHelper" in self._entry
        if parts.scheme == "http" and has_headers and not is_loopback(url):
            logger.warning(
                "MCP server %r: its headers are sent over the network without encryption; use an https URL", name
            )
        return url

    def seconds_by_name(self, key: str) -> dict[str, float]:
        values = self._entry.get(key) or {}
        if not isinstance(values, dict):
            raise self.error(key, f"is {show_value(values)}", 'make it an object, like {"build_*": 600}')
        return {name: self._check_seconds(f"{key}.{name}", value) for name, value in values.items()}

    def seconds(self, key: str) -> float | None:
        value = self._entry.get(key)
        return None if value is None else self._check_seconds(key, value)

    def _check_seconds(self, key: str, value: Any) -> float:
        if not is_number(value) or not 0 < value < math.inf:
            raise self.error(key, f"is {show_value(value)}", "give a positive number of seconds")
        return float(value)

    def _fill_in(self, key: str, value: Any) -> str:
        """Returns a string with its variables expanded. A variable in the value of another variable is not expanded."""
        if not isinstance(value, str):
            raise self.error(key, f"is {show_value(value)}", "make it a string")
        filled = _PLACEHOLDER.sub(self._variable_lookup(key), value)
        if "\0" in filled:
            raise self.error(key, "contains a null character", "remove it")
        return filled

    def _variable_lookup(self, key: str) -> Callable[[re.Match[str]], str]:
        def look_up(placeholder: re.Match[str]) -> str:
            variable = _VARIABLE.fullmatch(placeholder["content"])
            if variable is None:
                problem = f"contains {placeholder.group()}, which is not supported"
                raise self.error(key, problem, "only ${VAR} and ${VAR:-default} are expanded")
            name = variable["name"]
            # As in a shell, `:-` applies to an empty variable as well.
            value = self._environ.get(name) or variable["default"]
            if value is None:
                problem = f"needs the environment variable {name}, which is not set"
                raise self.error(key, problem, f"set {name}, or write ${{{name}:-default}}")
            return value

        return look_up


def show_value(value: Any) -> str:
    """Describes a JSON value that is not valid, without repeating what may be a secret."""
    if isinstance(value, str):
        return "a string" if len(value) > _LONGEST_SHOWN_STRING else repr(value)
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    return json.dumps(value, default=repr)
