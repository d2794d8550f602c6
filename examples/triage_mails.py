"""Sorts a folder of mails by decisions: which team, how urgent, and whether a person has to look at it.

    python examples/triage_mails.py
    python examples/triage_mails.py --api-base http://127.0.0.1:9931/v1 --model openjev mails/

A mail is a file whose name ends with .eml or .txt. Without a folder, three mails of this program are sorted.

A decision model answers all questions about a mail in one pass, with calibrated probabilities. An ordinary chat model
can answer them too, one by one, but its probabilities are only a ranking; the last line says which of the two has
answered. Without `--api-base`, and without LMBRIDGE_API_BASE in the environment, the program starts a server
(`lmbridge[local]`), whose chat model is so small that it mostly guesses.
"""

from __future__ import annotations

import argparse
import asyncio
import email
import email.policy
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from lmbridge import Choice, Decisions, LLMClient, LLMError, LocalServer, Score, TrueFalse

QUESTIONS = {
    "team": Choice(
        "Which team should handle this mail?",
        {"billing": "invoices and refunds", "shipping": "parcels and delivery", "technical": "errors and crashes"},
    ),
    "urgency": Score("How urgent is this mail?", ["can wait", "this week", "today"]),
    "angry": TrueFalse("Is the writer angry?"),
}
MAILS = {
    "invoice.txt": "Subject: Charged twice\n\nYou have charged my card twice. Refund it today, I have had enough!",
    "parcel.txt": "Subject: Where is it?\n\nMy parcel was due last week. Could you check where it is?",
    "crash.txt": "Subject: Crash on save\n\nThe app closes when I save a file. It is version 3.2 on Linux.",
}
UNSURE = 0.5
"""The confidence below which a person should look at the mail."""


@asynccontextmanager
async def connect(api_base: str | None, model: str | None) -> AsyncIterator[LLMClient]:
    """Yields a client of the server at `api_base`, or of a server that is started for this program."""
    if api_base:
        async with LLMClient(api_base, model) as client:
            yield client
    else:
        async with LocalServer() as server, LLMClient(server.api_base, server.model) as client:
            yield client


def read_mails(folder: Path) -> Iterator[tuple[str, str]]:
    """Yields the names and texts of the mails in a folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in (".eml", ".txt") and path.is_file():
            message = email.message_from_bytes(path.read_bytes(), policy=email.policy.default)
            body = message.get_body(("plain",))
            yield path.name, f"{message['subject'] or ''}\n\n{body.get_content() if body else ''}"


def describe(name: str, decisions: Decisions) -> str:
    """Returns one line about a mail."""
    team, urgency, angry = (decisions.answers[each] for each in QUESTIONS)
    note = "  <- please look" if min(team.confidence, urgency.confidence) < UNSURE else ""
    mood = f"angry {angry.expected:.0%}"
    return f"{name:14} {team.winner!s:10} {urgency.winner!s:10} {mood:11}{note}"


async def main() -> None:
    """Parses the arguments, and prints one line for each mail."""
    parser = argparse.ArgumentParser(description="Sorts a folder of mails.")
    parser.add_argument("folder", nargs="?", type=Path, help="a folder with .eml or .txt files")
    parser.add_argument("--api-base", default=os.environ.get("LMBRIDGE_API_BASE"), help="the URL of your server")
    parser.add_argument("--model", default=os.environ.get("LMBRIDGE_MODEL"), help="a model of that server")
    args = parser.parse_args()
    mails = dict(read_mails(args.folder)) if args.folder else MAILS
    calibrated = False
    async with connect(args.api_base, args.model) as client:
        for name, text in mails.items():
            decisions = await client.decide(text, QUESTIONS)
            calibrated = decisions.calibrated
            print(describe(name, decisions), flush=True)
    print(f"mails: {len(mails)}, sorted by {'a decision model' if calibrated else 'a chat model: a ranking, no odds'}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except (LLMError, ImportError, OSError) as error:
        sys.exit(f"triage_mails: {error}")
