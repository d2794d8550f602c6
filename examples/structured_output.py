"""Turns a sentence into an instance of a dataclass.

    python examples/structured_output.py
    python examples/structured_output.py "Two tickets to Oslo for Ada, please."
    python examples/structured_output.py --api-base http://127.0.0.1:1234/v1 --model qwen3-4b

The form of the answer is enforced by the server's grammar, and checked again by lmbridge.

Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, it starts a server (`lmbridge[local]`). The
model of that server is so small that the form is right, but the content often is not.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from lmbridge import LLMClient, LLMError, LLMValidationError, LocalServer

SENTENCE = "Two tickets to Oslo for Ada, please, and one to Bergen for Grace. We take the train."
TASK = (
    "Write down what is booked as JSON: the means of transport, and for each trip the passenger, the city, the seats."
)

Name = Annotated[str, Meta(min_length=1, max_length=30)]


@dataclass
class Trip:
    """The trip of one passenger."""

    passenger: Name
    city: Name
    seats: Annotated[int, Meta(ge=1, le=9)]


@dataclass
class Booking:
    """Everything that a sentence books."""

    transport: Literal["train", "bus", "plane"]
    trips: Annotated[list[Trip], Meta(min_length=1, max_length=3)]


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a server that is started for this program."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


async def book(client: LLMClient, sentence: str) -> Booking:
    """Asks the model for the booking in a sentence. Type checkers know that the result is a `Booking`."""
    messages = [{"role": "system", "content": TASK}, {"role": "user", "content": sentence}]
    return await client.parse(messages, Booking, temperature=0, max_tokens=400)


async def main() -> None:
    """Parses the arguments and prints the booking."""
    parser = argparse.ArgumentParser(description="Turns a sentence into a booking.")
    parser.add_argument("sentence", nargs="?", default=SENTENCE)
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of your server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="a model of that server")
    args = parser.parse_args()
    async with connect(args.api_base, args.model) as client:
        print(f"> {args.sentence}\n")
        booking = await book(client, args.sentence)
        print(f"by {booking.transport}")
        for trip in booking.trips:
            print(f"- {trip.passenger} to {trip.city}, seats: {trip.seats}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except LLMValidationError as error:
        sys.exit(f"structured_output: {error}" + (f"\nthe answer was: {error.body}" if error.body else ""))
    except (LLMError, ImportError) as error:
        sys.exit(f"structured_output: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
