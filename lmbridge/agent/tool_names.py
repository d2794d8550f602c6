"""Names of tools: what they are called in a run, and what servers are sent for that."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from lmbridge.errors import LLMValidationError

if TYPE_CHECKING:
    from lmbridge.agent.tools import Tool

_LONGEST: Final = 64
_SENT: Final = re.compile(r"[a-z0-9_]{1,64}")


def called_names(tools: Sequence[Tool]) -> list[str]:
    """What the tools of a run are called: by their own name, or `server__tool` where several have it.

    Raises:
        LLMValidationError: two tools of the same server, or of none, have the same name.
    """
    counted = Counter(tool.name for tool in tools)
    names = [f"{tool.server}__{tool.name}" if tool.server and counted[tool.name] > 1 else tool.name for tool in tools]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise LLMValidationError(f"there are two tools {twice[0]!r}", hint="give one of them another name")
    return names


def sent_names(names: Iterable[str]) -> dict[str, str]:
    """The names that servers are sent: `[a-z0-9_]{1,64}`, another one for each, whatever their order.

    LM Studio rewrites other names before the model sees them; OpenAI's rules refuse longer ones. A name that is one
    already stays. Of others that would become the same, or are too long, each gets a piece of the hash of its own
    name behind it, so that it is called the same in every run that has the same tools.

    Args:
        names: What the tools are called, each once.
    """
    names = sorted(names)
    sent = {name: name for name in names if _SENT.fullmatch(name)}
    taken = set(sent.values())
    slugs = {name: _slug(name) for name in names if name not in sent}
    counted = Counter(slugs.values())
    fits = {slug for slug, count in counted.items() if count == 1 and 0 < len(slug) <= _LONGEST} - taken
    sent |= {name: slug for name, slug in slugs.items() if slug in fits}
    taken = set(sent.values())
    for name in (each for each in names if each not in sent):
        sent[name] = _hashed(name, slugs[name], taken)
        taken.add(sent[name])
    return sent


def _slug(name: str) -> str:
    """The name in snake case."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^a-z0-9_]+", "_", spaced.lower()).strip("_")


def _hashed(name: str, slug: str, taken: set[str]) -> str:
    """The name with as much of its hash behind it as it takes to be none of those."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    made = (f"{(slug or 'tool')[: _LONGEST - 1 - size]}_{digest[:size]}" for size in range(6, _LONGEST - 1))
    return next(each for each in made if each not in taken)
