"""Extracts a pydantic model from each text in a folder, several at a time.

    python examples/pydantic_extraction.py reviews/

Each .txt file becomes a `Review`, whose schema the server's grammar enforces and which pydantic validates. An answer
that is not valid is sent back to the model once. It needs pydantic (`pip install pydantic`), which lmbridge itself does
not, and uses the server of LMBRIDGE_API_BASE, or LM Studio.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from lmbridge import Limits, LLMClient, LLMError, LLMValidationError

TASK = "Write down as JSON what the review says: its author, the stars (1 to 5), the mood, and the complaints, if any."


class Review(BaseModel):
    """What a review says."""

    author: str = Field(min_length=1, max_length=30)
    stars: int = Field(ge=1, le=5)
    mood: Literal["glad", "neutral", "angry"]
    complaints: list[Literal["quality", "delivery", "service", "price"]] = Field(max_length=2)


async def extract(client: LLMClient, name: str, text: str) -> str:
    """Returns the review in a text as a line of JSON, or says why there is none."""
    messages = [{"role": "system", "content": TASK}, {"role": "user", "content": text}]
    try:
        review = await client.parse(messages, Review, temperature=0, max_tokens=300)
    except LLMValidationError as error:
        return f"{name}: {error}"
    return f"{name}: {review.model_dump_json()}"


async def main(texts: dict[str, str]) -> None:
    """Extracts all reviews, and prints them in the order of their names."""
    # Two at a time. Without limits, a server nearby is asked how many it can answer.
    async with LLMClient(limits=Limits(max_concurrency=2)) as client:
        print(*await asyncio.gather(*(extract(client, *each) for each in texts.items())), sep="\n")


if __name__ == "__main__":
    files = sorted(Path(*sys.argv[1:2]).glob("*.txt"))
    if not files:
        sys.exit("pydantic_extraction: there are no .txt files; pass the folder that has them")
    try:
        asyncio.run(main({path.name: path.read_text() for path in files}))
    except LLMError as error:
        sys.exit(f"pydantic_extraction: {error}")
