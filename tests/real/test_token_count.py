"""`count_tokens()` on a real llama.cpp server: the count is that of the generation that follows."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import LLMClient
from tests.real.support import GREETING

pytestmark = pytest.mark.real

TOOLS = [
    {
        "type": "function",
        "function": {"name": "now", "description": "The time.", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.mark.slow
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["without tools", "with tools"])
async def test_the_count_is_what_a_generation_reports(client: LLMClient, tools: Any) -> None:
    count = await client.count_tokens(GREETING, tools=tools)
    params: dict[str, Any] = {} if tools is None else {"tools": tools}
    reply = await client.chat_completion(GREETING, max_tokens=1, **params)
    assert count.exact
    assert count.tokens == reply["usage"]["prompt_tokens"]
