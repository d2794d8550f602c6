"""Reads the arguments of tool calls: their JSON, what is wrong with it, and what can be repaired in it.

A call whose arguments were cut off is never made; `ModelReply.has_cut_call` recognizes it, and `loop` asks the model
again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from lmbridge._checks import MAPPING_TYPES
from lmbridge._text import shorten
from lmbridge.agent.almost_json import repair_arguments
from lmbridge.agent.argument_json import DuplicateKeyError, decode_argument_json
from lmbridge.agent.schema_check_limit import StepLimitError
from lmbridge.agent.tools import Tool

_QUOTED_CHARACTERS: Final = 200
"""How many characters of malformed arguments an error text quotes."""
_LISTED_NAMES: Final = 50
"""How many parameters an error text lists."""
LONGEST_PROBLEM: Final = 2_000
"""The number of characters after which a description of wrong arguments, which may quote their values, is cut off."""
_LARGE_REPAIR: Final = 10_000
"""The number of characters of malformed arguments beyond which they are repaired in a thread."""
_MOST_ENCODINGS: Final = 3
"""How many times arguments may be encoded as JSON, one encoding within the other."""


def asked_name(call: Mapping[str, Any]) -> str:
    """Returns the name of the tool in a call, or an empty string if it has none."""
    function = call.get("function")
    return str(function.get("name") or "") if isinstance(function, MAPPING_TYPES) else ""


def arguments_of(call: Mapping[str, Any]) -> Any:
    """Returns the arguments in a call, which may be anything."""
    function = call.get("function")
    return function.get("arguments") if isinstance(function, MAPPING_TYPES) else None


def decode_arguments(arguments: Any) -> tuple[Any, str | None, set[float]]:
    """Decodes the arguments of a call.

    Returns:
        The JSON value, or None if there are no arguments or they cannot be decoded; what is wrong with them, or None;
        and the numbers whose text differs from their `repr` in Python, such as 3.10.
    """
    if not isinstance(arguments, str):
        return arguments, None, set()
    if not arguments.strip():
        return None, None, set()
    inexact: set[float] = set()
    try:
        return decode_argument_json(arguments, inexact), None, inexact
    except DuplicateKeyError as exc:
        return None, str(exc), set()
    except (ValueError, RecursionError) as exc:
        return None, f"not valid JSON: {_locate_json_error(arguments, exc)}", set()


def check_missing_arguments(tool: Tool) -> tuple[dict[str, Any] | None, str | None]:
    """Decides whether a call without arguments can be made.

    It can be made only if its tool has no parameters. Otherwise the arguments may have been lost on the way, and the
    tool would do something other than what the model wanted.

    Returns:
        Empty arguments and None; or None, and what is wrong with the call.
    """
    if not (tool.sent_parameters["properties"] or tool.sent_parameters.get("additionalProperties")):
        return {}, None
    is_optional = not tool.sent_parameters.get("required")
    return None, "the call has none" + ("; send {} to use the default of each of them" if is_optional else "")


def repaired_call(call: Mapping[str, Any], *, may_be_cut: bool, in_thread: bool) -> dict[str, Any] | None:
    """Returns a call with its arguments as valid JSON, or None if they cannot be repaired or are valid already.

    Raises:
        StepLimitError: The arguments are so long that they have to be repaired in a thread, and `in_thread` is False.
    """
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return None
    if len(arguments) > _LARGE_REPAIR and not in_thread:
        raise StepLimitError
    text = arguments
    for _ in range(_MOST_ENCODINGS):
        try:
            value = decode_argument_json(text, set())
        except DuplicateKeyError:
            return None
        except (ValueError, RecursionError):
            try:
                text = repair_arguments(text, may_be_cut=may_be_cut)
                value = decode_argument_json(text, set())
            except (ValueError, RecursionError):
                return None
        if not isinstance(value, str):
            break
        text = value
    return None if text == arguments else {**call, "function": {**function, "arguments": text}}


def read_encoded_twice(decoded: Any, inexact: set[float]) -> dict[str, Any]:
    """Returns the arguments as a dict. A string is decoded again, because some models encode their JSON twice.

    Args:
        decoded: The value of the arguments.
        inexact: Receives the numbers in a string whose text differs from their `repr` in Python.

    Raises:
        ValueError: The arguments are not an object, or an object has a key twice.
    """
    values = decoded
    if isinstance(decoded, str):
        try:
            values = decode_argument_json(decoded, inexact)
        except DuplicateKeyError:
            raise
        except (ValueError, RecursionError):
            # The string is not JSON, so the error below quotes it unchanged.
            pass
    if not isinstance(values, dict):
        shown = shorten(json.dumps(decoded), _QUOTED_CHARACTERS)
        raise ValueError(f"they have to be a JSON object, not {shown}")  # noqa: TRY004 - callers expect a ValueError
    return values


def _locate_json_error(text: str, error: Exception) -> str:
    """Describes why a text is not valid JSON, where the error is, and what the text says there.

    If the `json` module refuses the text as well, the message is that of `json`, because msgspec reports only a byte
    offset.
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as exc:
        begin = max(0, exc.pos - _QUOTED_CHARACTERS // 2)
        position = f"line {exc.lineno} column {exc.colno} (character {exc.pos})"
        return f"{exc.msg} at {position}, near {text[begin : begin + _QUOTED_CHARACTERS]!r}"
    except (ValueError, RecursionError):
        # The text is nested too deeply or contains a huge number; msgspec has described that already.
        pass
    return f"{error}, in {shorten(text, _QUOTED_CHARACTERS)!r}"


def describe_parameters(tool: Tool) -> str:
    """Lists the parameters of a tool for a model that got its arguments wrong."""
    required = tool.sent_parameters.get("required", ())
    names = [name if name in required else f"{name} (optional)" for name in tool.sent_parameters["properties"]]
    listed = shorten(", ".join(names[:_LISTED_NAMES]), LONGEST_PROBLEM)
    return f"it takes: {listed}" if names else "it takes no arguments"
