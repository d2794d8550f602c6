"""A conversation in the terminal. Each answer appears as it is written, and Ctrl-C stops it, on the server as well.

    python examples/chat.py

It uses the server of LMBRIDGE_API_BASE, or LM Studio. An empty line or Ctrl-D ends the conversation.
"""

from __future__ import annotations

import sys

from lmbridge import LLMError
from lmbridge.sync import LLMClient
from lmbridge.types import Message


def answer(client: LLMClient, messages: list[Message]) -> str:
    """Prints the answer while it arrives, and returns as much of it as has arrived."""
    parts: list[str] = []
    try:
        # Leaving the block closes the connection, and that is what stops the server.
        with client.stream_chat(messages) as stream:
            for text in stream.text():
                print(text, end="", flush=True)
                parts.append(text)
    except KeyboardInterrupt:
        print(" [stopped]", end="")
    print()
    return "".join(parts)


def main() -> None:
    """Asks, answers, and remembers both."""
    messages: list[Message] = [{"role": "system", "content": "You answer briefly."}]
    with LLMClient() as client:
        while question := input("> "):
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer(client, messages)})


if __name__ == "__main__":
    try:
        main()
    except LLMError as error:
        sys.exit(f"chat: {error}")
    except (EOFError, KeyboardInterrupt):
        print()
