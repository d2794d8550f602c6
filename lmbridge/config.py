"""Options that several layers share, and everything that is read from the environment.

Options are frozen and are checked when they are created, so that a wrong value is reported where it was written and not
by a request an hour later. No other module reads the environment variables that configure a client.
"""

from __future__ import annotations

import enum
import ipaddress
import logging
import math
import os
import socket
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import SplitResult, unquote, urlsplit

import attrs

from lmbridge._checks import (
    as_validator,
    check_choice,
    check_integer,
    check_seconds,
    hint_for,
    invalid_argument,
    is_integer,
    is_number,
)
from lmbridge.errors import LLMValidationError

logger: logging.Logger = logging.getLogger("lmbridge.client")

# The name "localhost" would be tried as ::1 first, which can cost seconds before 127.0.0.1 is tried.
DEFAULT_API_BASE: Final = "http://127.0.0.1:1234/v1"
"""The base URL of a server that runs with LM Studio's default settings."""


QUESTION_HEADER: Final = ("X-Lmbridge-Purpose", "limits")
"""The name and the value of a header that marks certain requests: those that a client sends on its own initiative to
find out the limits of its server. The header explains these requests to the reader of the server's log, and lets
`lmbridge.testing.ScriptedServer` leave them out of its list of requests."""


class Unset(enum.Enum):
    """The type of `UNSET`."""

    UNSET = "UNSET"

    def __repr__(self) -> str:
        return "UNSET"


UNSET: Final = Unset.UNSET
"""The default of options for which None has a meaning. It says that the option was not given."""


def _duration(owner: str, default: float | None) -> Any:
    """Returns an attrs field for a number of seconds. `owner` is the class that errors name together with the field."""
    hint = "use None to switch the limit off"
    return attrs.field(default=default, validator=as_validator(check_seconds, owner=owner, hint=hint))


@attrs.frozen(kw_only=True)
class Timeouts:
    """How long a client waits, in seconds. None switches a limit off.

    By default a whole generation may take any amount of time, because a local model may write for minutes. Instead,
    each period of silence is limited. An interactive program may want to notice a dead or busy server sooner::

        LLMClient(timeout=Timeouts(connect=2, first_byte=60))

    Raises:
        LLMValidationError: A value is not a positive number or None.
    """

    connect: float | None = _duration("Timeouts", 5)
    """The most seconds that it may take to connect the socket. Default: 5."""
    load: float | None = _duration("Timeouts", 300)
    """The most seconds for which a server may keep answering that it is loading, counted from the first such answer.
    Default: 300."""
    first_byte: float | None = _duration("Timeouts", 600)
    """The most seconds until the first event of a stream, or until the end of a plain reply. The limit applies to each
    attempt, and includes the time in the server's own queue and the processing of the prompt. Default: 600."""
    idle: float | None = _duration("Timeouts", 300)
    """The most seconds between two events of a stream. Comments and pings do not count as events. Default: 300."""
    total: float | None = _duration("Timeouts", None)
    """The most seconds from admission to the end of the reply, including retries and the time that the server is
    loading. Default: None."""


def as_timeouts(timeout: Timeouts | float | None, name: str = "timeout") -> Timeouts:
    """Converts the value of an option `timeout` to `Timeouts`.

    A number limits each wait: `t` becomes `Timeouts(connect=min(5, t), first_byte=t, idle=t)`. None switches every
    limit off.

    Raises:
        LLMValidationError: The value is neither `Timeouts`, nor a positive number, nor None.
    """
    if isinstance(timeout, Timeouts):
        return timeout
    if timeout is None:
        return Timeouts(connect=None, load=None, first_byte=None, idle=None)
    if not is_number(timeout) or not 0 < timeout < math.inf:
        expected = "a positive number of seconds, an instance of Timeouts, or None"
        raise invalid_argument(name, expected, timeout, hint="for example timeout=60 or Timeouts(first_byte=60)")
    return Timeouts(connect=min(5, timeout), first_byte=timeout, idle=timeout)


@attrs.frozen(kw_only=True)
class Limits:
    """How many requests and models may be active at one server at the same time.

    The limits belong to a transport, so clients share them by sharing a transport. docs/model-scheduling.md describes
    the order in which waiting requests are admitted.

    Raises:
        LLMValidationError: A value is not valid.
    """

    max_concurrency: int = attrs.field(default=10, validator=as_validator(check_integer, owner="Limits"))
    """The most generations in flight. Further requests wait in the client. Default: 10."""
    max_loaded_models: int | None = attrs.field(
        default=None, validator=as_validator(check_integer, owner="Limits", optional=True)
    )
    """The most models with generations in flight. Set it to the number of models that the server keeps loaded, so that
    no request makes it drop a model that is generating. None, the default, switches model scheduling off."""
    max_wait: float | None = _duration("Limits", 30.0)
    """The seconds after which a request that waits for its model to become active is overdue. The model that has been
    active longest then gets no new requests, and makes room as soon as it has finished those in flight. A lower value
    is fairer, and makes the server load models more often. With None, no request ever becomes overdue, so each waits
    until some active model happens to be idle. `max_wait` is also the time in which the priority of a waiting request
    rises by one. Default: 30."""
    max_queue: float | None = _duration("Limits", 600.0)
    """The most seconds that a request may wait until it is admitted. None switches the limit off. Default: 600."""
    # pyright infers the type `str` for the default of such a field, which is wider than the literal.
    order: Literal["run", "request"] = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="run", validator=as_validator(check_choice, owner="Limits", choices=("run", "request"))
    )
    """Which of the waiting requests with the same priority goes first. With "run", the default, it is the one that
    belongs to the oldest run of an agent, so that runs finish one after the other, and the server still has their
    prompts in its cache. A request outside of any run counts as a run of its own. With "request", it is the one that
    arrived first."""
    # pyright infers the type `str`, as it does for `order`.
    max_begun_runs: int | Literal["auto"] | None = attrs.field(  # pyright: ignore[reportAssignmentType]
        default="auto", validator=as_validator(check_integer, owner="Limits", optional=True, keyword="auto")
    )
    """The most runs of agents that may be in progress at the same time. As long as they are few, the server still has
    their conversations in its cache. The first request of a further run waits until one of these runs ends or no longer
    counts, even if a permit is free.

    A run no longer counts if its tools are slow. While they are running, it counts for as long as the server took to
    begin the answer to its first request, but for at most 3 seconds. If most of the latest tool calls, of any run, have
    taken longer than that, a run does not count at all while its tools are running.

    The first request of a run also waits while the server would give it the slot of a run that counts. A slot holds one
    conversation in the server's cache, and a new conversation gets the slot that was used least recently. A server that
    also remembers conversations without a slot makes this unnecessary. Runs of a lower priority are never waited for,
    and nothing waits for runs while a request for another model is overdue.

    "auto", the default, stands for the value of `max_concurrency` with `order="run"`, until a reply shows that the
    server remembers conversations without a slot; from then on, and with `order="request"`, it stands for None. With
    None, a run begins whenever a permit is free."""

    @property
    def begun_runs(self) -> int | None:
        """The value of `max_begun_runs` with "auto" replaced by what it stands for."""
        if self.max_begun_runs == "auto":
            return self.max_concurrency if self.order == "run" else None
        return self.max_begun_runs


Priority: TypeAlias = Literal["interactive", "normal", "batch"] | int
"""How urgent the requests of a client or an agent are. The names stand for the numbers 1, 0 and -1; a higher number
goes first. The priority of a waiting request rises by one for each `Limits.max_wait` seconds, up to the highest
priority among the waiting requests, so that urgent requests cannot keep others waiting forever."""

_PRIORITIES: Final = {"interactive": 1, "normal": 0, "batch": -1}


def check_priority(value: Priority) -> int:
    """Returns a priority as a number.

    Raises:
        LLMValidationError: The value is neither a known name nor an integer.
    """
    if isinstance(value, str) and value in _PRIORITIES:
        return _PRIORITIES[value]
    if is_integer(value):
        return value
    raise invalid_argument(
        "priority",
        "'interactive', 'normal', 'batch' or an integer",
        value,
        hint="it orders requests within lmbridge; send a server's own `priority` in extra_body",
    )


def default_api_base() -> str:
    """Returns the base URL from the environment: `LMBRIDGE_API_BASE`, else `LMSTUDIO_HOST` and `LMSTUDIO_PORT`.

    If none of these variables is set, it returns `DEFAULT_API_BASE`. The result has not been checked yet; see
    `normalize_api_base`.
    """
    if base := os.environ.get("LMBRIDGE_API_BASE"):
        logger.info("api_base comes from the environment variable LMBRIDGE_API_BASE")
        return base
    host, port = os.environ.get("LMSTUDIO_HOST"), os.environ.get("LMSTUDIO_PORT")
    if not host and not port:
        return DEFAULT_API_BASE
    logger.info("api_base comes from the environment variable %s", "LMSTUDIO_HOST" if host else "LMSTUDIO_PORT")
    host = host or "127.0.0.1"
    if "://" not in host:
        host = f"http://[{host}]" if host.count(":") > 1 and not host.startswith("[") else f"http://{host}"
    parts = _split_url(host)
    # A port in LMSTUDIO_HOST takes precedence over LMSTUDIO_PORT. An invalid URL is reported by `normalize_api_base`.
    if not isinstance(parts, SplitResult) or parts.port is not None:
        return host
    return parts._replace(netloc=f"{parts.netloc.removesuffix(':')}:{port or 1234}").geturl()


def default_api_key() -> str | None:
    """Returns the key from the environment: `LM_API_TOKEN`, which LM Studio's documentation and SDKs use as well."""
    key = os.environ.get("LM_API_TOKEN") or None
    if key is not None:
        logger.info("api_key comes from the environment variable LM_API_TOKEN")
    return key


def default_model() -> str | None:
    """Returns the model that the environment names: `LMBRIDGE_MODEL`, else `DEFAULT_MODEL`.

    Other programs also read `DEFAULT_MODEL`, for models of other providers. So it is used only if the environment names
    the server as well.
    """
    if model := os.environ.get("LMBRIDGE_MODEL"):
        logger.info("model %r comes from the environment variable LMBRIDGE_MODEL", model)
        return model
    model = os.environ.get("DEFAULT_MODEL")
    if not model:
        return None
    if not any(os.environ.get(name) for name in ("LMBRIDGE_API_BASE", "LMSTUDIO_HOST", "LMSTUDIO_PORT")):
        logger.info("DEFAULT_MODEL is ignored, because the environment names no server; set LMBRIDGE_MODEL instead")
        return None
    logger.info("model %r comes from the environment variable DEFAULT_MODEL", model)
    return model


def split_credentials(api_base: Any) -> tuple[Any, tuple[str, str] | None]:
    """Returns a base URL without its credentials, and the credentials: a user and a password, or None.

    An invalid URL is returned unchanged; `normalize_api_base` reports it.
    """
    if not isinstance(api_base, str) or "@" not in api_base or not api_base.isprintable() or " " in api_base:
        return api_base, None
    parts = _split_url(api_base)
    if not isinstance(parts, SplitResult) or parts.scheme not in ("http", "https") or not parts.hostname:
        return api_base, None
    if parts.username is None:
        return api_base, None
    host = parts.netloc.rpartition("@")[2]
    return api_base.replace(parts.netloc, host, 1), (unquote(parts.username), unquote(parts.password or ""))


def socket_path_of(api_base: str) -> str | None:
    """Returns the path of the Unix socket that a base URL names, or None if it names a host."""
    return api_base.removeprefix("unix://") if api_base.startswith("unix://") else None


_MISPLACED_IN_API_BASE: Final = {
    "LLMClient": "client.with_options() returns a variant of a client, and LLMClient(client.api_base) another client",
    "LLMClientPool": "a pool hands out clients: async with pool.client() as client",
    "Transport": "pass it as transport=: LLMClient(transport=transport)",
    "LocalServer": "pass its api_base: LLMClient(server.api_base, server.model)",
    "Timeouts": "pass it as timeout=",
    "Limits": "pass it as limits=",
    "list": "one transport is one server: NodePool([Transport(url), ...])",
    "tuple": "one transport is one server: NodePool([Transport(url), ...])",
    "set": "pass a list of URLs",
}

_ENDPOINT_PATHS: Final = ("chat/completions", "completions", "responses", "embeddings", "models", "messages")
"""The paths that follow a base URL in examples for curl, from which people copy the URL."""


def normalize_api_base(api_base: str) -> str:
    """Returns a server's base URL without a trailing slash, and with `/v1` appended if it does not end with a version.

    If a URL ends with `#`, nothing is appended to it. This is for servers whose paths have no version. The path of a
    Unix socket, such as `unix:///run/llm.sock`, is returned unchanged, and requests go to `/v1` on it.

    A URL may contain a secret by mistake. So an error quotes the URL only if it contains none of the characters that
    mark credentials, a query or a fragment (`@`, `?`, `#`).

    Raises:
        LLMValidationError: The text is not an http or https URL, it has credentials, a query or a fragment, or it ends
            with the path of an endpoint.
    """
    hint = f"write it like {DEFAULT_API_BASE!r}"
    shown = repr(api_base)
    may_hold_secret = any(character in shown for character in "@?#")
    if may_hold_secret:
        shown = "'...'"
    if not isinstance(api_base, str) or not api_base or " " in api_base or not api_base.isprintable():
        hint = hint_for(api_base, _MISPLACED_IN_API_BASE, hint) or hint
        raise LLMValidationError(f"api_base must be a URL, not {shown}", hint=hint)
    if (path := socket_path_of(api_base)) is not None:
        if not hasattr(socket, "AF_UNIX"):
            raise LLMValidationError(
                f"api_base {shown} is a Unix socket, which Python cannot use on this system",
                hint="let the server listen on a port, and use its URL",
            )
        if not path.startswith("/") or path.endswith("/"):
            raise LLMValidationError(
                f"api_base {shown} does not name a Unix socket", hint="write it like 'unix:///run/llm.sock'"
            )
        return api_base
    parts = _split_url(api_base)
    if not isinstance(parts, SplitResult):
        reason = "" if may_hold_secret else f": {parts}"
        cause = None if may_hold_secret else parts
        raise LLMValidationError(f"api_base {shown} is not a valid URL{reason}", cause, hint=hint)
    if parts.username is not None or parts.password is not None:
        raise LLMValidationError(
            "api_base contains credentials", hint="pass the key as api_key=, and the URL without credentials"
        )
    if parts.query or parts.fragment:
        raise LLMValidationError("api_base has a query or a fragment", hint=hint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LLMValidationError(f"api_base {shown} is not an http or https URL", hint=hint)
    path = parts.path.rstrip("/")
    if api_base.endswith("#"):
        return f"{parts.scheme}://{parts.netloc}{path}#"
    _refuse_endpoint(shown, path)
    if not _is_version(path.rpartition("/")[2]):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _refuse_endpoint(shown: str, path: str) -> None:
    for endpoint in _ENDPOINT_PATHS:
        if path.endswith(f"/{endpoint}"):
            raise LLMValidationError(
                f"api_base {shown} is the URL of an endpoint", hint=f"leave out '/{endpoint}' at its end"
            )


def _split_url(url: str) -> SplitResult | ValueError:
    """Returns the parts of a URL, or the exception that says why it is not valid.

    The exception is returned instead of raised. It may quote a secret, and if it were raised, it would become the
    `__context__` of the error that the caller raises.
    """
    try:
        parts = urlsplit(url)
        # Both of these raise for a URL that urlsplit alone accepts.
        _ = (parts.hostname or "").encode("idna"), parts.port
    except ValueError as error:
        return error
    return parts


def _is_version(segment: str) -> bool:
    return segment[:1] == "v" and segment[1:].isdigit()


def check_api_key(key: str | None) -> str | None:
    """Returns the key if it can be sent in a header, or if it is None.

    Raises:
        LLMValidationError: The key cannot be sent. The error does not quote it, because it is meant to be secret.
    """
    if key is None:
        return None
    if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
        raise LLMValidationError(
            "api_key must be printable ASCII without spaces", hint="leave it out to send LM_API_TOKEN, or no key at all"
        )
    return key


def check_auth(auth: Any) -> tuple[str, str] | None:
    """Returns a user and a password for basic authentication, or None.

    Raises:
        LLMValidationError: The value is something else. The error does not quote it, because it is meant to be secret.
    """
    if auth is None:
        return None
    if not isinstance(auth, tuple) or len(auth) != 2 or not all(isinstance(part, str) for part in auth):
        raise LLMValidationError("auth must be a tuple of two strings", hint="for example auth=('user', 'password')")
    if ":" in auth[0]:
        raise LLMValidationError("the user in auth contains a colon", hint="basic authentication cannot send it")
    return auth[0], auth[1]


def check_proxy(proxy: str | None, *, name: str = "proxy") -> str | None:
    """Returns the URL of an HTTP proxy, or None.

    Raises:
        LLMValidationError: The value is something else. The error does not quote it, because it may contain a password.
    """
    if proxy is None:
        return None
    hint = "write it like 'http://127.0.0.1:3128'"
    parts = _split_url(proxy) if isinstance(proxy, str) and proxy.isprintable() and " " not in proxy else None
    if not isinstance(parts, SplitResult):
        raise LLMValidationError(f"{name} must be the URL of an HTTP proxy", hint=hint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LLMValidationError(f"{name} must be the URL of an HTTP proxy", hint=hint)
    return proxy


def environment_proxy(url: str) -> str | None:
    """Returns the URL of the proxy that the environment names for requests to a URL, or None."""
    # Imported here because the import takes milliseconds, and few programs use the proxies of the environment.
    from urllib.request import getproxies, proxy_bypass  # noqa: PLC0415

    parts = urlsplit(url)
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


_NEAR_SUFFIXES: Final = (".localhost", ".local", ".lan", ".home.arpa", ".internal")
_CARRIER_NETWORK: Final = ipaddress.ip_network("100.64.0.0/10")
"""The addresses that carriers use within their networks, and that Tailscale uses as well."""


def is_near(url: str) -> bool:
    """Returns whether the host in a URL is this machine or one in a private network, judging by its name or address.

    Addresses of private networks are near, and so are those that Tailscale uses, names without a dot, and names that
    end as those of local networks do. A Unix socket is near as well.
    """
    if url.startswith("unix://"):
        return True
    host = (urlsplit(url).hostname or "").removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "." not in host or host.endswith(_NEAR_SUFFIXES)
    return address.is_private or address.is_loopback or address.is_link_local or address in _CARRIER_NETWORK


def is_loopback(url: str) -> bool:
    """Returns whether the host in a URL is the loopback interface of this machine."""
    host = (urlsplit(url).hostname or "").removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
