"""What happens to a call of a tool that does not exist: the tool that was meant is found, or the error is described.

Small models write names as other programs do (`getWeather`, `get-weather`), with the prefix of a template
(`functions.get_weather`) or the rest of a token (`get_weather<|channel|>commentary`), or with a slip. A name is taken
for that of a tool only if it cannot be meant for another tool.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Container, Iterable, Sequence
from typing import Final

from lmbridge._text import shorten
from lmbridge.agent.tool_names import LONGEST_NAME

_PREFIXES: Final = re.compile(r"\A(?:functions?|tools?|default_api|api|mcp)[.:/]+", re.IGNORECASE)
"""The names of the namespaces in which templates list the tools: gpt-oss, Kimi, Gemini, and others."""
_SUFFIXES: Final = re.compile(r"(?:<\|.*|:\d{1,5}|\(\s*\))\s*\Z", re.DOTALL)
"""The tokens that gpt-oss leaves in a name, the number of a call of Kimi, and empty parentheses."""
_LONGEST_NAME: Final = 200
_SHORTEST_FOR_EDITS: Final = 4
"""The number of letters that a name must have so that a missing letter, or two swapped ones, count as a slip."""
_SHORTEST_FOR_SUBSTITUTIONS: Final = 6
"""The number of letters that a name must have so that a wrong letter counts as a slip."""

_QUOTED_CHARACTERS: Final = 200
"""How many characters of an unknown name an error text quotes."""
_LISTED_NAMES: Final = 50
"""How many tools an error text lists."""


def describe_unknown(asked: str, names: Sequence[str], request_names: Iterable[str]) -> str:
    """Says that a tool does not exist, and lists those that do, with the most similar names first.

    Args:
        asked: The name that the model wrote, or an empty text.
        names: The names of the tools that are offered, as they are listed.
        request_names: The names that the asked one is compared with.
    """
    problem = f"there is no tool {shorten(asked, _QUOTED_CHARACTERS)!r}" if asked else "the call names no tool"
    if not names:
        return f"{problem}: there are no tools"
    similar = difflib.get_close_matches(asked[:LONGEST_NAME].lower(), request_names)
    listed = [*similar, *(name for name in names if name not in similar)]
    more = f", and {len(listed) - _LISTED_NAMES} more" if len(listed) > _LISTED_NAMES else ""
    return f"{problem}; there are: {', '.join(listed[:_LISTED_NAMES])}{more}"


def find_meant_name(asked: str, names: Iterable[str]) -> str | None:
    """Returns the only name that a model can have meant, or None if none or several are possible.

    Upper and lower case, the characters between words, a prefix such as `functions.` and a suffix such as
    `<|channel|>commentary` are disregarded. If no name matches in this way, one letter may also be missing, doubled,
    wrong, or swapped with its neighbour, if the name is so long that this is a slip and not another word.

    Args:
        asked: The name that the model wrote.
        names: The names of the tools.
    """
    asked = asked.strip()[:_LONGEST_NAME].strip("`'\"* ")
    bare = _key_of(_PREFIXES.sub("", _SUFFIXES.sub("", asked)))
    if not bare:
        return None
    keys = [(name, _key_of(name)) for name in names]
    # The name of a tool may itself begin with a prefix.
    for wanted in (_key_of(asked), bare):
        if found := [name for name, key in keys if key == wanted]:
            return found[0] if len(found) == 1 else None
    found = [name for name, key in keys if _is_slip(bare, key, _word_starts(name))]
    return found[0] if len(found) == 1 else None


def _key_of(name: str) -> str:
    """Returns a name in lower case, without the characters between its words."""
    return re.sub(r"[\W_]+", "", name).lower()


def _word_starts(name: str) -> set[int]:
    """Returns the positions in the key of a name at which a word begins."""
    words = re.findall(r"[A-Z]?[^\W_A-Z]+|[A-Z]+", name)
    return {sum(map(len, words[:place])) for place in range(len(words))}


def _is_slip(one: str, other: str, word_starts: Container[int]) -> bool:
    """Returns whether two names differ by one edit that can be a slip.

    The first letter of a word is never taken for a slip, so that `get` does not become `set`.
    """
    if abs(len(one) - len(other)) > 1:
        return False
    shorter, longer = sorted((one, other), key=len)
    begin = 0
    while begin < len(shorter) and shorter[begin] == longer[begin]:
        begin += 1
    end = 0
    while end < len(shorter) - begin and shorter[-1 - end] == longer[-1 - end]:
        end += 1
    differing = one[begin : len(one) - end] + other[begin : len(other) - end]
    if any(character.isdigit() for character in differing) or begin in word_starts:
        # `read_1` and `read_2` are two tools.
        return False
    if len(longer) > len(shorter):
        is_doubled = begin > 0 and longer[begin] == longer[begin - 1]
        return len(shorter) - begin == end and (is_doubled or len(shorter) >= _SHORTEST_FOR_EDITS)
    places = len(shorter) - begin - end
    if places == 1:
        return len(shorter) >= _SHORTEST_FOR_SUBSTITUTIONS
    is_swapped = places == 2 and shorter[begin] == longer[begin + 1] and shorter[begin + 1] == longer[begin]
    return is_swapped and len(shorter) >= _SHORTEST_FOR_EDITS
