"""Searches a folder of .md and .txt files by meaning, and prints the passages that are nearest to a question.

    python examples/embeddings_search.py "How do I stop a stream?" docs

It uses the server of LMBRIDGE_API_BASE, or LM Studio. A model that was made for embeddings, such as
nomic-embed-text-v1.5 in LMBRIDGE_MODEL, finds far better passages than a chat model.
"""

from __future__ import annotations

import asyncio
import math
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

from lmbridge import LLMClient, LLMError


def passages(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the place and the beginning of each section, or of each paragraph if a file has no headings."""
    for path in sorted(path for suffix in ("*.md", "*.txt") for path in folder.rglob(suffix)):
        text = path.read_text(encoding="utf-8", errors="replace")
        found = re.finditer(r"^#+ ", text, re.MULTILINE)
        starts = [each.start() for each in found] or [each.start() for each in re.finditer(r"\A\S|(?<=\n\n)\S", text)]
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            line = text.count("\n", 0, start) + 1
            # Small models accept only a few hundred tokens at a time.
            yield f"{path.relative_to(folder)}:{line}", textwrap.shorten(text[start:end], 300, placeholder=" ...")


def similarity(one: list[float], other: list[float]) -> float:
    """Returns the cosine of the angle between two vectors, which is 1 for the same direction."""
    return math.fsum(a * b for a, b in zip(one, other, strict=True)) / (math.hypot(*one) * math.hypot(*other))


async def main(question: str, folder: Path) -> None:
    """Prints the three passages that are nearest to the question."""
    found = list(passages(folder))
    if not found:
        sys.exit(f"embeddings_search: no .md or .txt files with text in {folder}")
    async with LLMClient() as client:
        reply = await client.embeddings([question, *(text for _, text in found)], batch_size=16)
    asked, *vectors = (entry["embedding"] for entry in reply["data"])
    ranked = sorted(zip((similarity(asked, vector) for vector in vectors), found, strict=True), reverse=True)
    for score, (place, text) in ranked[:3]:
        print(f"{score:.3f}  {place}\n{textwrap.indent(textwrap.fill(text, 100), '  ')}\n")


if __name__ == "__main__":
    try:
        asyncio.run(main(sys.argv[1], Path(sys.argv[2])))
    except LLMError as error:
        sys.exit(f"embeddings_search: {error}")
    except IndexError:
        sys.exit("embeddings_search: pass a question and a folder")
