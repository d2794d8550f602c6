"""A chat in the terminal: reads a line, streams the answer, and keeps the conversation.

It asks the server and the model of the environment (LMBRIDGE_API_BASE, LMBRIDGE_MODEL).
"""

import asyncio
import sys
from typing import Any

from lmbridge import LLMClient, LLMError


async def main() -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Answer in one short sentence."}]
    async with LLMClient() as client:
        while line := (await asyncio.to_thread(sys.stdin.readline)).strip():
            messages.append({"role": "user", "content": line})
            try:
                async with client.stream_chat(messages, max_tokens=60, temperature=0) as stream:
                    async for text in stream.text():
                        print(text, end="", flush=True)
                    reply = await stream.collect()
            except LLMError as error:
                print(f"! {error.message}")
                messages.pop()
                continue
            print()
            messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
    print(f"({len(messages)} messages)")


asyncio.run(main())
