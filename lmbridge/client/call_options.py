"""Options of a single call, and options of the client or of other libraries that are mistaken for parameters.

A call takes options of lmbridge (`timeout`, `extra_headers`, ...) beside the parameters of the API, which are sent
unchanged, whether lmbridge knows them or not. An option of the client or of another library, which may be an API key,
would therefore be sent to the server, and would have no effect. So the names of such options are refused, and the error
names the right option.

`LLMClient.with_options` (in `llm`) sets some of them for all calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypedDict

import attrs

from lmbridge._checks import check_integer, is_number, wrong_type
from lmbridge.config import Priority, Timeouts, as_timeouts, check_priority
from lmbridge.errors import LLMValidationError
from lmbridge.transport.headers import check_headers, check_query


class RequestOptions(TypedDict, total=False):
    """Options of a call that asks about the server."""

    timeout: Timeouts | float | None
    """The timeouts of this call, in place of the client's. A number of seconds limits each wait:
    `Timeouts(connect=min(5, t), first_byte=t, idle=t)`. None switches all limits off."""
    max_retries: int
    """How often this request may be sent again, in place of the client's `max_retries`."""
    extra_headers: Mapping[str, str] | None
    """Headers of this request, in addition to the client's or in their place. Errors and logs never repeat them."""
    extra_query: Mapping[str, Any] | None
    """Query parameters of this request."""


class ManagementOptions(RequestOptions, total=False):
    """Options of a call that has a body, and that does not queue behind generations."""

    extra_body: Mapping[str, Any] | None
    """Fields that are put into the JSON body last, so they replace others of the same name."""


class CallOptions(ManagementOptions, total=False):
    """Options of a call that has a body, and that may have to wait behind other requests."""

    priority: Priority
    """How urgent this call is, in place of the client's `priority`. It is not sent to the server."""


@attrs.frozen(kw_only=True)
class CallSettings:
    """The checked options of a call. None stands for the client's own value."""

    timeouts: Timeouts | None = None
    """The timeouts of the call."""
    max_retries: int | None = None
    """How often the request may be sent again."""
    headers: Mapping[str, str] | None = attrs.field(default=None, repr=False)
    """Headers in addition to the client's, or in their place."""
    query: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    """Query parameters of the URL."""
    body: Mapping[str, Any] | None = None
    """Fields that are put into the JSON body last."""
    priority: int | None = None
    """How urgent the call is."""


_OPTIONS: Final = ("timeout", "max_retries", "extra_headers", "extra_query", "extra_body", "priority")
_CLIENT_OPTION: Final = "it belongs to the client: give it to LLMClient({}=...)"
_OTHER_CLIENT: Final = "it belongs to the client: create another LLMClient(api_base=...) for another server"
_FOREIGN: Final = {
    "api_key": "give it to LLMClient(api_key=...), or send it with extra_headers={'Authorization': 'Bearer ...'}",
    "api_base": _OTHER_CLIENT,
    "base_url": _OTHER_CLIENT,
    "api_version": "send it with extra_query={'api-version': ...}",
    "auth": _CLIENT_OPTION.format("auth"),
    "default_headers": "use extra_headers=, or LLMClient(headers=...) for every request",
    "default_query": "use extra_query=",
    "extra_params": "use extra_query=, or extra_body= for fields of the JSON",
    "headers": "use extra_headers=, or LLMClient(headers=...) for every request",
    "http_client": "use LLMClient(transport=...), or its options proxy=, ssl= and headers=",
    "limits": _CLIENT_OPTION.format("limits"),
    "max_retry": "use max_retries=",
    "model_mismatch": "use client.with_options(model_mismatch=...)",
    "num_retries": "use max_retries=",
    "organization": "send it with extra_headers={'OpenAI-Organization': ...}",
    "proxies": _CLIENT_OPTION.format("proxy"),
    "proxy": _CLIENT_OPTION.format("proxy"),
    "request_timeout": "use timeout=",
    "retries": "use max_retries=",
    "ssl": _CLIENT_OPTION.format("ssl"),
    "stream_timeout": "use timeout=Timeouts(idle=...)",
    "timeouts": "use timeout=",
    "transport": _CLIENT_OPTION.format("transport"),
    "trust_env": _CLIENT_OPTION.format("trust_env"),
    "max_reply_bytes": _CLIENT_OPTION.format("max_reply_bytes"),
    "verify": _CLIENT_OPTION.format("ssl"),
}
"""Options that cannot be meant for the server, and the hint that says what to use instead."""
_SPECIAL: Final = frozenset({*_OPTIONS, *_FOREIGN})


def take_options(params: dict[str, Any]) -> CallSettings | None:
    """Removes the options of a call from its parameters, and returns them, or None if the caller gave no options.

    Raises:
        LLMValidationError: An option is not valid, or belongs to the client or to another library. A value is never
            repeated if it may be secret.
    """
    if _SPECIAL.isdisjoint(params):
        return None
    for name in params:
        if name in _FOREIGN:
            raise LLMValidationError(f"{name} is not a parameter of a request", hint=_FOREIGN[name])
    given = {name: params.pop(name) for name in _OPTIONS if name in params}
    return CallSettings(
        timeouts=as_timeouts(given["timeout"]) if "timeout" in given else None,
        max_retries=check_integer("max_retries", given["max_retries"], minimum=0) if "max_retries" in given else None,
        headers=check_headers("extra_headers", given.get("extra_headers")),
        query=check_query("extra_query", given.get("extra_query")),
        body=_check_extra_body(given.get("extra_body")),
        priority=check_priority(given["priority"]) if "priority" in given else None,
    )


def take_management_options(params: dict[str, Any]) -> CallSettings | None:
    """Removes the options of a call that loads, unloads or downloads a model, and returns them, as `take_options` does.

    Raises:
        LLMValidationError: An option is not valid, or has no effect on such a call.
    """
    settings = take_options(params)
    if settings is not None and settings.priority is not None:
        raise LLMValidationError(
            "priority has no effect on the models of a server", hint="leave it out: such a call does not queue"
        )
    return settings


def limit_load(options: dict[str, Any]) -> None:
    """If the `timeout` of a call is a number of seconds, makes it limit the loading of a model as well.

    For other calls, a number does not change `Timeouts.load`. A call that loads a model has nothing else to wait for.

    Args:
        options: The options of the call. In them, a `Timeouts` replaces the number.

    Raises:
        LLMValidationError: The number is not valid.
    """
    seconds = options.get("timeout")
    if is_number(seconds):
        options["timeout"] = attrs.evolve(as_timeouts(seconds), load=seconds)


def take_request_options(options: dict[str, Any], method: str, *, retries: bool = True) -> CallSettings | None:
    """Returns the options of a call without parameters, such as `list_models`, or None if none is set.

    Args:
        options: The keyword arguments of the call.
        method: The name of the method, for the error.
        retries: Whether the method accepts `max_retries`.

    Raises:
        LLMValidationError: An option is not valid.
        TypeError: An option is unknown.
    """
    if not options:
        return None
    settings = take_options(options)
    if settings is not None and settings.body:
        options["extra_body"] = settings.body
    if settings is not None and settings.priority is not None:
        options["priority"] = settings.priority
    if settings is not None and settings.max_retries is not None and not retries:
        options["max_retries"] = settings.max_retries
    if options:
        raise TypeError(f"{method}() got an unexpected keyword argument {next(iter(options))!r}")
    return settings


def _check_extra_body(body: Any) -> Mapping[str, Any] | None:
    if body is not None and not isinstance(body, Mapping):
        raise wrong_type("extra_body", "a dict of JSON fields", body, "for example {'top_k': 40}")
    if body and "stream" in body:
        raise LLMValidationError(
            "extra_body must not contain stream",
            hint="pass stream= to the call itself, because it decides what the call returns",
        )
    return body
