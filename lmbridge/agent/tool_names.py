"""Chooses the names of tools: the name within a run, and the name that stands for it in requests.

The two may differ, because servers do not accept every name that a tool may have. LM Studio rewrites names that are not
in snake case before the model sees them, and OpenAI's rules refuse names of more than 64 characters. The choice depends
on nothing but the set of names, so that a tool has the same name in every request, and the server's prompt cache stays
valid.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from lmbridge.errors import LLMValidationError

if TYPE_CHECKING:
    from lmbridge.agent.tools import Tool

LONGEST_NAME: Final = 64
"""The number of characters that the name of a tool in requests may have."""
_SENDABLE_NAME: Final = re.compile(r"[a-z0-9_]{1,64}")
_SHORTEST_HASH: Final = 6
"""The number of hexadecimal digits that are tried first to make a name unique."""


def names_in_run(tools: Sequence[Tool]) -> list[str]:
    """Returns the names of the tools within a run: their own, or `server__tool` where several tools share a name.

    Raises:
        LLMValidationError: Two tools of the same server, or two without a server, have the same name.
    """
    counts = Counter(tool.name for tool in tools)
    names = [f"{tool.server}__{tool.name}" if tool.server and counts[tool.name] > 1 else tool.name for tool in tools]
    if duplicates := [name for name, count in Counter(names).items() if count > 1]:
        raise LLMValidationError(f"there are two tools {duplicates[0]!r}", hint="give one of them another name")
    return names


def name_of_added_tool(tool: Tool, taken: Collection[str]) -> str | None:
    """Returns the name within the run of a tool that is added to others. The names of the others do not change.

    Args:
        tool: The tool.
        taken: The names of the other tools.

    Returns:
        The tool's own name, or else `server__tool`; None if both are taken.
    """
    names = (tool.name, f"{tool.server}__{tool.name}" if tool.server else tool.name)
    return next((name for name in names if name not in taken), None)


def names_in_requests(names: Iterable[str], taken: Iterable[str] = ()) -> dict[str, str]:
    """Maps the name of each tool to the name in requests: a unique one of the form `[a-z0-9_]{1,64}`.

    A name that already has this form stays. Any other is converted to snake case; if the result is too long or not
    unique, a part of the hash of the original name is appended. The order of the names does not matter.

    Args:
        names: The names of the tools within the run, without duplicates.
        taken: Names in requests that other tools of the run already have. Default: none.
    """
    names, taken = sorted(names), set(taken)
    sent = {name: name for name in names if _SENDABLE_NAME.fullmatch(name) and name not in taken}
    taken |= set(sent.values())
    slugs = {name: _snake_case(name) for name in names if name not in sent}
    counts = Counter(slugs.values())
    unique = {slug for slug, count in counts.items() if count == 1 and 0 < len(slug) <= LONGEST_NAME} - taken
    sent |= {name: slug for name, slug in slugs.items() if slug in unique}
    taken |= set(sent.values())
    for name in (each for each in names if each not in sent):
        sent[name] = _with_hash(name, slugs[name], taken)
        taken.add(sent[name])
    return sent


def _snake_case(name: str) -> str:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9_]+", "_", spaced.lower()).strip("_")


def _with_hash(name: str, slug: str, taken: set[str]) -> str:
    """Appends as many digits of the name's hash as it takes to get a name that is not taken."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    candidates = (
        f"{(slug or 'tool')[: LONGEST_NAME - 1 - digits]}_{digest[:digits]}"
        for digits in range(_SHORTEST_HASH, LONGEST_NAME - 1)
    )
    return next(each for each in candidates if each not in taken)
