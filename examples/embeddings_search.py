"""Searches a folder of text files by meaning, and prints the passages that are nearest to a question.

    python examples/embeddings_search.py "How do I stop a stream?"
    python examples/embeddings_search.py "How do I stop a stream?" docs --top 5
    python examples/embeddings_search.py --api-base http://127.0.0.1:1234/v1 --model nomic-embed-text-v1.5 "..." notes

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts a server (`lmbridge[local]`) with a
small chat model. That finds something, but a model that was made for embeddings finds far better passages.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import math
import os
import re
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from lmbridge import LLMClient, LLMError, LocalServer

DOCS = Path(__file__).parent.parent / "docs"
PASSAGE_CHARACTERS = 300
"""Characters of a passage that are embedded, because small models accept only a few hundred tokens at a time."""


class Passage(NamedTuple):
    """A section or paragraph of a file."""

    place: str
    text: str


def passages(folder: Path) -> Iterator[Passage]:
    """Yields the beginning of each section, or of each paragraph if a file has no headings."""
    for path in sorted(path for suffix in ("*.md", "*.txt") for path in folder.rglob(suffix)):
        text = path.read_text(encoding="utf-8", errors="replace")
        starts = [found.start() for found in re.finditer(r"^#+ ", text, re.MULTILINE)]
        starts = starts or [found.start() for found in re.finditer(r"\A\S|(?<=\n\n)\S", text)]
        for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
            line = text.count("\n", 0, start) + 1
            beginning = textwrap.shorten(text[start:end], PASSAGE_CHARACTERS, placeholder=" ...")
            yield Passage(f"{path.relative_to(folder)}:{line}", beginning)


def similarity(one: list[float], other: list[float]) -> float:
    """Returns the cosine of the angle between two vectors, which is 1 for the same direction."""
    dot = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return dot / (math.hypot(*one) * math.hypot(*other))


async def search(client: LLMClient, question: str, found: list[Passage], top: int) -> None:
    """Prints the passages that are nearest to the question."""
    reply = await client.embeddings([question, *(passage.text for passage in found)], batch_size=16)
    asked, *vectors = (entry["embedding"] for entry in reply["data"])
    ranked = sorted(
        ((similarity(asked, vector), passage) for vector, passage in zip(vectors, found, strict=True)), reverse=True
    )
    print(f"> {question}  ({len(found)} passages)")
    for score, passage in ranked[:top]:
        print(f"\n{score:.3f}  {passage.place}\n{textwrap.indent(textwrap.fill(passage.text, 100), '  ')}")


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a server that is started for this program."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer(embeddings=True) as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def main(question: str, found: list[Passage], args: argparse.Namespace) -> None:
    """Connects to a server and searches."""
    async with connect(args.api_base, args.model) as client:
        await search(client, question, found, args.top)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Searches a folder of text by meaning.")
    parser.add_argument("question")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=DOCS, help="where .md and .txt files are; default: docs"
    )
    parser.add_argument("--top", type=int, default=3, help="how many passages to print")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of your server")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="a model of that server")
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    # The server that is started logs at this level that it downloads its model.
    logging.getLogger("lmbridge.local").setLevel(logging.INFO)
    if not (texts := list(passages(arguments.folder))):
        sys.exit(f"embeddings_search: no .md or .txt files with text in {arguments.folder}")
    try:
        asyncio.run(main(arguments.question, texts, arguments))
    except (LLMError, ImportError) as error:
        sys.exit(f"embeddings_search: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
