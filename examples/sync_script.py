"""Summarizes text files without async: a blocking client, shared by a few threads.

    python examples/sync_script.py notes/*.txt
    python examples/sync_script.py --api-base http://127.0.0.1:9931/v1 notes/*.txt

Without --api-base it asks the server of the environment (LMBRIDGE_API_BASE), else LM Studio on this machine.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lmbridge import LLMError
from lmbridge.sync import LLMClient


def summarize(client: LLMClient, path: Path) -> str:
    """Asks for a sentence about a file."""
    messages = [{"role": "user", "content": f"Summarize this text in one sentence:\n\n{path.read_text()}"}]
    reply = client.chat_completion(messages, max_tokens=100)
    return reply["choices"][0]["message"]["content"] or ""


def main() -> int:
    """Prints a summary of each file, in the order in which they were given."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--api-base", help="the server's address")
    parser.add_argument("--model", help="the model to ask; default: LMBRIDGE_MODEL, or the server's choice")
    options = parser.parse_args()
    try:
        # The client's own limits decide how many requests are sent at a time, whatever the number of threads.
        with LLMClient(options.api_base, options.model) as client, ThreadPoolExecutor(4) as threads:
            for path, summary in zip(
                options.files, threads.map(lambda path: summarize(client, path), options.files), strict=True
            ):
                print(f"{path.name}: {summary}")
    except LLMError as error:
        print(f"sync_script: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
