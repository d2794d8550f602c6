"""The options of an agent that are sent to the server as parameters of each request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any, Final, Literal, TypedDict

from lmbridge._checks import check_bool, invalid_argument, is_integer, is_number
from lmbridge.errors import LLMValidationError


class SamplingOptions(TypedDict, total=False):
    """The request parameters of an agent or of one of its runs. None means that the default applies."""

    temperature: float | None
    """How freely the model chooses the next token; 0 means the most likely one."""
    top_p: float | None
    """Chooses among the most likely tokens whose probabilities add up to this number, from 0 to 1."""
    seed: int | None
    """Makes sampling repeatable, if the server supports it."""
    stop: str | Sequence[str] | None
    """One or several texts at which the model stops."""
    tool_choice: Literal["none", "auto", "required"] | str | Mapping[str, Any] | None  # noqa: PYI051 - editors offer these
    """Whether the model calls a tool. A choice that forces a call applies only to the first round, so that runs end.

    With "none", a call that the model requests nevertheless is not made, and the model reads the reason.
    """
    parallel_tool_calls: bool | None
    """Whether the model may call several tools in one reply. With False, several calls are made one after the other."""
    extra_body: Mapping[str, Any] | None
    """Further fields of each request, such as `{"top_k": 20}`, which replace fields of the same name."""


_OWN_FIELDS: Final = ("messages", "model", "stream", "tools")
"""Fields of a request that the run itself sets."""
_KNOWN_FIELDS: Final = ("tool_choice", "parallel_tool_calls", "stop", "max_tokens", "response_format")
"""Fields that the run has rules for, or by which it reads replies. They can be in `extra_body`, too."""


def check_sampling(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that are set.

    Raises:
        LLMValidationError: An option is not valid.
        TypeError: An option is unknown.
    """
    for name, value in options.items():
        if name not in SamplingOptions.__annotations__:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if value is not None:
            _check_option(name, value)
    return {name: value for name, value in options.items() if value is not None}


def _check_option(name: str, value: Any) -> None:
    if name in ("temperature", "top_p"):
        _check_number(name, value)
    elif name == "seed":
        if not is_integer(value):
            raise invalid_argument(name, "an integer", value)
    elif name == "stop":
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise invalid_argument(name, "a string or a list of strings", value)
    elif name == "tool_choice":
        if not isinstance(value, str | Mapping):
            raise invalid_argument(name, "'none', 'auto', 'required' or a dict that names a tool", value)
    elif name == "parallel_tool_calls":
        check_bool(name, value)
    elif not isinstance(value, Mapping):
        raise invalid_argument(name, "a dict of JSON fields", value)
    elif own := [field for field in _OWN_FIELDS if field in value]:
        raise LLMValidationError(f"extra_body has {' and '.join(own)}, which the run sets itself", hint="leave it out")


def _check_number(name: str, value: object) -> None:
    is_share = name == "top_p"
    if not is_number(value) or not 0 <= value < inf or (is_share and value > 1):
        raise invalid_argument(name, "a number from 0 to 1" if is_share else "a number of at least 0", value)


def request_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options of a run, or the fields of one of its requests, as the server gets them.

    If `extra_body` has a field that the run has to know, that field replaces the option of the same name.
    """
    fields = dict(options)
    if "extra_body" not in fields:
        return fields
    extra = dict(fields.pop("extra_body"))
    fields |= {name: extra.pop(name) for name in _KNOWN_FIELDS if name in extra}
    return {**fields, "extra_body": extra} if extra else fields


def sampling_params(sampling: Mapping[str, Any], *, has_tools: bool, is_first_round: bool) -> dict[str, Any]:
    """Returns the fields for one request of a run.

    Fields about calls are left out if the request has no tools. A `tool_choice` that forces a call is left out after
    the first round.
    """
    params = request_fields(sampling)
    choice = params.get("tool_choice")
    if not has_tools:
        params.pop("tool_choice", None)
        params.pop("parallel_tool_calls", None)
    elif choice not in (None, "none", "auto") and not is_first_round:
        del params["tool_choice"]
    return params


def forbids_calls(sampling: Mapping[str, Any]) -> bool:
    """Returns whether the options of a run say that the model must not call a tool."""
    return request_fields(sampling).get("tool_choice") == "none"


def allows_calls(params: Mapping[str, Any]) -> bool:
    """Returns whether a request with these fields offers tools, and does not forbid the model to call them."""
    return "tools" in params and not forbids_calls(params)
