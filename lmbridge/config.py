"""Options, checked when they are made, and the environment, read here and nowhere else."""

from __future__ import annotations

import ipaddress
import os
from typing import Any, Final, TypeVar
from urllib.parse import SplitResult, urlsplit

import attrs

from lmbridge._checks import as_validator, check_integer, check_seconds
from lmbridge.errors import LLMValidationError

_T = TypeVar("_T")

DEFAULT_API_BASE: Final = "http://127.0.0.1:1234/v1"  # not "localhost": that may try ::1 first and wait there


def _duration(owner: str, default: float | None) -> Any:
    hint = "use None to switch the limit off"
    return attrs.field(default=default, validator=as_validator(check_seconds, owner=owner, hint=hint))


@attrs.frozen(kw_only=True)
class Timeouts:
    """How long to wait for what, in seconds; None switches a limit off."""

    connect: float | None = _duration("Timeouts", 5)
    """For the socket to be connected."""
    load: float | None = _duration("Timeouts", 300)
    """For a server that answers "loading": from its first such answer to its first other one."""
    first_byte: float | None = _duration("Timeouts", 600)
    """For the first event of a stream, or for the whole of a plain reply, in each attempt."""
    idle: float | None = _duration("Timeouts", 300)
    """The longest gap between two events of a stream. Comments and pings are no events."""
    total: float | None = _duration("Timeouts", None)
    """From admission to the end of the body, retries and polls included."""


@attrs.frozen(kw_only=True)
class Limits:
    """How much may be going on at one server at a time."""

    max_concurrency: int = attrs.field(default=10, validator=as_validator(check_integer, owner="Limits"))
    """Generations in flight."""
    max_loaded_models: int | None = attrs.field(
        default=None, validator=as_validator(check_integer, owner="Limits", optional=True)
    )
    """Models with generations in flight, for a server that holds no more; None: as many as are asked for."""
    max_wait: float | None = _duration("Limits", 30.0)
    """Seconds after which a request that waits for its model is overdue; None: never, whatever goes on."""
    max_queue: float | None = _duration("Limits", 600.0)
    """Seconds that a request may wait to be admitted; None: as long as it takes."""


def default_api_base() -> str:
    """`LMBRIDGE_API_BASE`, else `LMSTUDIO_HOST` and `LMSTUDIO_PORT`, else LM Studio's own default."""
    if base := os.environ.get("LMBRIDGE_API_BASE"):
        return base
    host, port = os.environ.get("LMSTUDIO_HOST"), os.environ.get("LMSTUDIO_PORT")
    if not host and not port:
        return DEFAULT_API_BASE
    host = host or "127.0.0.1"
    if "://" not in host:
        host = f"http://[{host}]" if host.count(":") > 1 and not host.startswith("[") else f"http://{host}"
    parts = _split(host)
    if not isinstance(parts, SplitResult) or parts.port is not None:
        return host  # with its own port, or else for `normalize_api_base` to complain of
    return parts._replace(netloc=f"{parts.netloc.removesuffix(':')}:{port or 1234}").geturl()


def default_api_key() -> str | None:
    """`LM_API_TOKEN`, the name that LM Studio's documentation and SDKs use."""
    return os.environ.get("LM_API_TOKEN") or None


def default_model() -> str | None:
    """`DEFAULT_MODEL`."""
    return os.environ.get("DEFAULT_MODEL") or None


def normalize_api_base(api_base: str) -> str:
    """The base URL with `/v1` and without a trailing slash.

    Raises:
        LLMValidationError: it is no http(s) URL, or holds credentials, a query or a fragment.
    """
    hint = f"give it like {DEFAULT_API_BASE!r}"
    told = repr(api_base)
    secret = any(mark in told for mark in "@?#")  # it may be: a password or a key
    if secret:
        told = "'...'"
    if not isinstance(api_base, str) or not api_base or " " in api_base or not api_base.isprintable():
        raise LLMValidationError(f"api_base is {told}", hint=hint)
    parts = _split(api_base)
    if not isinstance(parts, SplitResult):
        reason = "" if secret else f": {parts}"
        raise LLMValidationError(f"api_base {told} is no URL{reason}", None if secret else parts, hint=hint)
    if parts.username is not None or parts.password is not None:
        raise LLMValidationError("api_base holds credentials", hint="give the key by api_key=, the URL without it")
    if parts.query or parts.fragment:
        raise LLMValidationError("api_base has a query or a fragment", hint=hint)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise LLMValidationError(f"api_base {told} is no http or https URL", hint=hint)
    path = parts.path.rstrip("/")
    if not _is_version(path.rpartition("/")[2]):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}"


def _split(url: str) -> SplitResult | ValueError:
    """The parts of a URL, or why it is none: returned, because what it says may have to stay unsaid."""
    try:
        parts = urlsplit(url)
        _ = (parts.hostname or "").encode("idna"), parts.port
    except ValueError as exc:
        return exc
    return parts


def _is_version(segment: str) -> bool:
    return segment[:1] == "v" and segment[1:].isdigit()


def checked(name: str, value: _T, kind: type[Any]) -> _T:
    """The value of an option, if it is of its kind.

    Raises:
        LLMValidationError: it is not.
    """
    if not isinstance(value, kind):
        raise LLMValidationError(f"{name} is {value!r}", hint=f"give a {kind.__name__}, or None for the default")
    return value


def checked_key(key: str | None) -> str | None:
    """An API key that fits into a header, or None.

    Raises:
        LLMValidationError: it does not.
    """
    if key is None:
        return None
    if not isinstance(key, str) or not key or not key.isascii() or not key.isprintable() or " " in key:
        # The value is not repeated: it is meant to be a secret.
        raise LLMValidationError("api_key is no key", hint="give a string of printable ASCII without spaces")
    return key


def is_loopback(url: str) -> bool:
    """Whether a URL's host is this machine's loopback interface."""
    host = (urlsplit(url).hostname or "").removesuffix(".")
    try:
        address = ipaddress.ip_address(host)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
