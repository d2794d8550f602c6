"""JSON as people write it: with comments, and a comma too many."""

from __future__ import annotations

import json
import re
from typing import Any, Final

_STRING: Final = r'"(?:\\.|[^"\\\n])*"'
_COMMENT: Final = re.compile(rf"{_STRING}|//[^\n]*|/\*.*?\*/", re.DOTALL)
_LAST_COMMA: Final = re.compile(rf"{_STRING}|,(?=\s*[}}\]])")


def parse_json(text: str) -> Any:
    """The value of a text: JSON that may hold comments, and a comma before a closing bracket.

    Raises:
        ValueError: it is none, or a key is there twice. The text names line and column, or the key.
    """
    plain = _COMMENT.sub(_blank, text)
    plain = _LAST_COMMA.sub(_blank, plain)
    try:
        return json.loads(plain, object_pairs_hook=_unique)
    except json.JSONDecodeError as exc:
        raise ValueError(f"{exc.msg} at line {exc.lineno} column {exc.colno}") from exc
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc


def _blank(found: re.Match[str]) -> str:
    """A string as it is; anything else as blanks, so that lines and columns stay where they are."""
    text = found.group()
    return text if text.startswith('"') else re.sub(r"[^\n]", " ", text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} is there twice")
        result[key] = value
    return result
