"""Finds the model servers on this machine, and asks each of them the same question.

    python examples/find_servers.py
    python examples/find_servers.py "Why is the sky blue?" --ports 1234 11434

It tries the ports of LM Studio, llama.cpp, Ollama and vLLM. Start one of these first.
"""

from __future__ import annotations

import argparse
import asyncio
import sys

from lmbridge import FoundServer, LLMClient, LLMError, discover


async def ask(server: FoundServer, question: str) -> str:
    """Returns the answer of a server, or why there is none."""
    if server.error is not None:
        return f"({server.error})"
    loaded = server.info.loaded_models or tuple(model.id for model in server.info.models)
    async with LLMClient(server.api_base, loaded[0] if loaded else None) as client:
        try:
            return await client.ask(question, max_tokens=100)
        except LLMError as error:
            return f"({error})"


async def main() -> None:
    """Finds the servers, and prints their answers."""
    parser = argparse.ArgumentParser(description="Asks all model servers on this machine.")
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--ports", nargs="+", type=int, help="the ports to try")
    parser.add_argument("--timeout", type=float, default=0.5, help="how many seconds a server may take to answer")
    args = parser.parse_args()
    chosen = {} if args.ports is None else {"ports": args.ports}
    servers = await discover(timeout=args.timeout, **chosen)
    if not servers:
        sys.exit("no model server was found; start LM Studio, llama-server, Ollama or vLLM")
    for server in servers:
        print(f"{server.info.kind} at {server.api_base}: {await ask(server, args.question)}")


if __name__ == "__main__":
    asyncio.run(main())
