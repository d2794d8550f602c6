"""Helpers of the tests of the transport."""

from __future__ import annotations

import socket

from lmbridge import (
    LLMClient,
)
from tests.support import MESSAGES, read_text


async def no_such_host(*_: object, **__: object) -> object:
    raise socket.gaierror(-2, "Name or service not known")


async def ask(client: LLMClient, stream: bool) -> str:
    if stream:
        return await read_text(await client.chat_completion(MESSAGES, stream=True))
    message = (await client.chat_completion(MESSAGES))["choices"][0]["message"]
    return message["content"] or ""
