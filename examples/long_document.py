"""Asks about a long document, and shows how far the server is with the prompt before the answer begins.

    python examples/long_document.py
    python examples/long_document.py report.txt "What are the risks?" --api-base http://127.0.0.1:9931/v1

On a CPU, a prompt of several thousand tokens takes minutes, in which a server sends nothing. llama.cpp reports its
progress if it is asked to (`return_progress`); other servers ignore the field. A second question about the same
document is answered sooner, because the document is in the server's prompt cache then.

Without a file, the program makes up a document. Without `--api-base`, and without LMBRIDGE_API_BASE in the environment,
it starts a server (`lmbridge[local]`) with a very small model.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmbridge import LLMClient, LLMError, LocalServer, PromptProgress, progress_of

DOCUMENT = "\n".join(f"Day {day}: the ship sailed {day % 7 + 3} miles, and the wind was fair." for day in range(1, 31))
QUESTION = "How was the wind?"
WIDTH = 30


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a server that is started for this program."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


def bar(progress: PromptProgress) -> str:
    """Returns a line that shows the progress."""
    done = round(WIDTH * progress.fraction)
    cached = f", {progress.cached} of them from the cache" if progress.cached else ""
    return f"[{'#' * done}{'.' * (WIDTH - done)}] {progress.processed} of {progress.total} tokens{cached}"


async def ask(client: LLMClient, document: str, question: str) -> None:
    """Prints the progress of the prompt, and then the answer as it arrives."""
    # The document stands before the question, so that the next question finds it in the prompt cache.
    messages = [{"role": "user", "content": f"{document}\n\n{question}"}]
    async with client.stream_chat(messages, max_tokens=200, extra_body={"return_progress": True}) as stream:
        async for chunk in stream:
            progress = progress_of(chunk)
            if isinstance(progress, PromptProgress):
                print(bar(progress), file=sys.stderr)
            for choice in chunk["choices"]:
                print(choice["delta"].get("content") or "", end="", flush=True)
    print()


async def main() -> None:
    """Parses the arguments and asks."""
    parser = argparse.ArgumentParser(description="Asks about a long document.")
    parser.add_argument("file", nargs="?", type=Path, help="a text file")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of your server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="a model of that server")
    args = parser.parse_args()
    document = args.file.read_text() if args.file else DOCUMENT
    async with connect(args.api_base, args.model) as client:
        count = await client.count_tokens([{"role": "user", "content": document}])
        print(f"the document has {'' if count.exact else 'about '}{count.tokens} tokens\n", file=sys.stderr)
        await ask(client, document, args.question)


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError, OSError) as error:
        sys.exit(f"long_document: {error}")
