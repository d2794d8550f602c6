"""A program that uses what models can do besides text: images, reasoning, log probabilities, several answers, tools.

python model_features.py picture.png
"""

import asyncio
import json
import math
import sys
from pathlib import Path

from lmbridge import LLMClient, LLMError, ReasoningSplitter, image_part, split_reasoning
from lmbridge.types import ToolDefinition

ADD: ToolDefinition = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


async def look_at(client: LLMClient, path: Path) -> None:
    part = await asyncio.to_thread(image_part, path)
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is in this picture?"}, part]}]
    try:
        reply = await client.chat_completion(messages, max_tokens=40)
    except LLMError as error:
        # A model without vision: the error says what the server answered.
        print(f"picture: {error.message}")
    else:
        print(f"picture: {reply['choices'][0]['message']['content']}")


async def think(client: LLMClient) -> None:
    messages = [{"role": "user", "content": "What is 17 times 3?"}]
    whole = split_reasoning(await client.chat_completion(messages, max_tokens=60, reasoning_effort="low"))
    print(f"thought {len(whole.reasoning)} characters, said {whole.text!r}")
    splitter = ReasoningSplitter()
    pieces = {"reasoning": 0, "text": 0}
    async with client.stream_chat(messages, max_tokens=60) as stream:
        async for chunk in stream:
            for piece in splitter.feed(chunk):
                pieces[piece.kind] += len(piece.text)
    for piece in splitter.close():
        pieces[piece.kind] += len(piece.text)
    print(f"streamed {pieces}")


async def weigh(client: LLMClient) -> None:
    messages = [{"role": "user", "content": "Is the sea wet? Answer yes or no."}]
    reply = await client.chat_completion(messages, logprobs=True, top_logprobs=2, max_tokens=2, temperature=0)
    logprobs = reply["choices"][0].get("logprobs") or {}
    for token in (logprobs.get("content") or [])[:1]:
        chances = {each["token"]: round(math.exp(each["logprob"]), 2) for each in token["top_logprobs"]}
        print(f"chances: {sorted(chances.values(), reverse=True)}")


async def choose(client: LLMClient) -> None:
    messages = [{"role": "user", "content": "Give me a name for a ship."}]
    reply = await client.chat_completion(messages, n=3, temperature=1, max_tokens=8)
    print(f"answers: {len(reply['choices'])}")
    async with client.stream_chat(messages, n=3, max_tokens=8) as stream:
        print(f"streamed answers: {len((await stream.collect())['choices'])}")


async def call(client: LLMClient) -> None:
    messages = [{"role": "user", "content": "What is 2 + 3?"}]
    chosen = {"type": "function", "function": {"name": "add"}}
    for tool_choice in ("none", "required", chosen):
        try:
            reply = await client.chat_completion(messages, tools=[ADD], tool_choice=tool_choice, max_tokens=60)
        except LLMError as error:
            # LM Studio, for example, does not take an object here.
            print(f"refused: {error.status}")
            continue
        for each in reply["choices"][0]["message"].get("tool_calls") or []:
            print(f"call: {each['function']['name']} with {sorted(json.loads(each['function']['arguments']))}")


async def main() -> None:
    async with LLMClient() as client:
        await look_at(client, Path(sys.argv[1]))
        await think(client)
        await weigh(client)
        await choose(client)
        await call(client)


asyncio.run(main())
