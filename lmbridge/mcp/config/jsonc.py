"""A parser for JSON as people write it in configuration files: with comments, and with a comma after the last item.

Comments and surplus commas are replaced by spaces, and the rest is left to the standard library, so that the line and
the column of a syntax error are those of the file. The alternative, a library for JSON with comments, would save two
regular expressions but add a dependency.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

# A string that is never closed is matched up to the end of its line, and a comment that is never closed up to the end
# of the file. Both are left as they are. If they were not matched, the search would begin again at each of their
# characters, and the time would grow with the square of their length.
_STRING: Final = r'(?P<kept>"(?:\\.|[^"\\\n])*+"?)'
_COMMENT: Final = re.compile(rf"{_STRING}|//[^\n]*|/\*.*?\*/|(?P<unclosed>/\*.*)", re.DOTALL)
_TRAILING_COMMA: Final = re.compile(rf"{_STRING}|,(?=\s*[}}\]])")


def parse_jsonc(text: str) -> Any:
    """Parses JSON that may have comments, and a comma before a closing bracket.

    Raises:
        ValueError: The text is not valid, is nested too deeply, or has an object with the same key twice. The message
            names the line and the column of a syntax error, and a key that occurs twice.
    """
    plain = _COMMENT.sub(_blank_out, text)
    plain = _TRAILING_COMMA.sub(_blank_out, plain)
    try:
        return json.loads(plain, object_pairs_hook=_refuse_duplicate_keys)
    except json.JSONDecodeError as exc:
        raise ValueError(f"{exc.msg} at line {exc.lineno} column {exc.colno}") from exc
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc


def _blank_out(found: re.Match[str]) -> str:
    """Replaces comments and commas with spaces, so that lines and columns stay the same. Named groups are kept."""
    return found.group() if found.lastgroup else re.sub(r"[^\n]", " ", found.group())


def _refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the key {key!r} occurs twice")
        result[key] = value
    return result
