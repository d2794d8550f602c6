"""The program of a user: summarizes texts with a local model, and asks again if a summary is too long."""

from collections.abc import Sequence

from lmbridge import LLMClient, LLMConnectionError

TASK = "Summarize the text in at most ten words."


class ModelIsOffError(Exception):
    """The model server does not run."""


async def summarize(client: LLMClient, text: str) -> str:
    messages = [{"role": "system", "content": TASK}, {"role": "user", "content": text}]
    try:
        summary = await client.ask(f"{TASK}\n\n{text}", temperature=0)
        if len(summary.split()) > 10:
            messages += [{"role": "assistant", "content": summary}, {"role": "user", "content": "Shorter, please."}]
            reply = await client.chat_completion(messages, temperature=0)
            summary = reply["choices"][0]["message"]["content"] or ""
    except LLMConnectionError as error:
        raise ModelIsOffError("start the model server first") from error
    return summary


async def first_words(client: LLMClient, texts: Sequence[str]) -> list[str]:
    """Returns the first word of a story about each text, and stops the server after it."""
    words = []
    for text in texts:
        async with client.stream_chat([{"role": "user", "content": text}]) as stream:
            async for piece in stream.text():
                words.append(piece.strip())
                break
    return words
