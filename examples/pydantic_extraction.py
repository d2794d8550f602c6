"""Extracts pydantic models from texts, several at a time.

    python examples/pydantic_extraction.py
    python examples/pydantic_extraction.py "Great keyboard, but it arrived late. Three stars. -- Kim"
    python examples/pydantic_extraction.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

Each text becomes a `Review`, whose schema the server's grammar enforces and which pydantic validates. An answer that is
not valid is sent back to the model once. It needs pydantic (`pip install pydantic`), which lmbridge itself does not.

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts a server (`lmbridge[local]`). The
model of that server is so small that the form is right, but the content often is not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from pydantic import BaseModel, Field

from lmbridge import Limits, LLMClient, LLMError, LLMValidationError, LocalServer

TEXTS = (
    "The lamp is bright and the switch feels solid. Five stars from me. -- Ada",
    "Broke after two days, and nobody answers my mails. 1/5. -- Grace",
    "Does what it should. The box was damaged, though. I would say three stars. -- Edsger",
    "Lovely colour, but it hums all night, so two stars. -- Barbara",
)
TASK = "Write down as JSON what the review says: its author, the stars (1 to 5), the mood, and the complaints, if any."


class Complaint(BaseModel):
    """Something that the author did not like."""

    about: Literal["quality", "delivery", "service", "price"]
    words: str = Field(max_length=60, description="What the author wrote about it.")


class Review(BaseModel):
    """What a review says."""

    author: str = Field(min_length=1, max_length=30)
    stars: int = Field(ge=1, le=5)
    mood: Literal["glad", "neutral", "angry"]
    complaints: list[Complaint] = Field(max_length=2, description="Empty if there are none.")


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a server that is started for this program."""
    # Two at a time: most local servers have few slots, and more requests would only wait there.
    limits = Limits(max_concurrency=2)
    if api_base:
        async with LLMClient(api_base, model, limits=limits) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model, limits=limits) as client:
            yield client


async def extract(client: LLMClient, text: str) -> Review | LLMValidationError:
    """Returns the review in a text, or the error if the model could not give a valid one."""
    messages = [{"role": "system", "content": TASK}, {"role": "user", "content": text}]
    try:
        return await client.parse(messages, Review, temperature=0, max_tokens=300)
    except LLMValidationError as error:
        return error


async def main(texts: Sequence[str], api_base: str | None, model: str | None) -> None:
    """Extracts the reviews and prints them in the order of the texts."""
    async with connect(api_base, model) as client:
        for review in await asyncio.gather(*(extract(client, text) for text in texts)):
            if isinstance(review, LLMValidationError):
                print(f"not valid: {review}")
                continue
            print(f"{review.author}: {review.stars} of 5, {review.mood}")
            for complaint in review.complaints:
                print(f"- {complaint.about}: {complaint.words}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Extracts reviews from texts.")
    parser.add_argument("texts", nargs="*", default=TEXTS)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of your server")
    parser.add_argument("--model", default=os.environ.get("DEFAULT_MODEL"), help="a model of that server")
    args = parser.parse_args()
    try:
        asyncio.run(main(args.texts, args.api_base, args.model))
    except (LLMError, ImportError) as error:
        sys.exit(f"pydantic_extraction: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
