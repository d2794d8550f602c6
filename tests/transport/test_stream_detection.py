"""Which responses count as event streams, and what happens if a stream was asked for and something else arrives."""

from __future__ import annotations

import pytest

from lmbridge import (
    LLMClient,
    LLMResponseError,
    ModelLoadError,
)
from lmbridge.testing import ScriptedServer, sse
from lmbridge.transport.sse import MAX_EVENT_SIZE
from tests.support import MESSAGES, read_text


async def test_an_error_status_with_an_event_stream_is_an_error_of_the_await(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse({"error": {"message": "no such thing"}}, status=400))
    with pytest.raises(LLMResponseError, match=r"the server answered 400: .*no such thing") as caught:
        await client.chat_completion(MESSAGES, stream=True)
    assert caught.value.status == 400


async def test_an_error_in_place_of_a_stream_is_read_completely(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(sse('{"error":', '"No models loaded."}', content_type="application/json"))
    with pytest.raises(ModelLoadError) as caught:
        await client.chat_completion(MESSAGES, stream=True)
    assert caught.value.body == '{"error":"No models loaded."}'


async def test_a_stream_with_another_content_type_may_begin_with_a_bom(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        sse("\ufeffdata: {", '"choices":[{"delta":{"content":"Hi"}}]}\n\n', done=True, content_type="text/plain")
    )
    assert await read_text(await client.chat_completion(MESSAGES, stream=True)) == "Hi"


def test_an_event_may_have_100_mib() -> None:
    assert MAX_EVENT_SIZE == 100 * 2**20


@pytest.mark.parametrize("cut", [1, 4, 5])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n", "\r\n"])
async def test_a_stream_with_another_content_type_may_be_split_anywhere(
    scripted_server: ScriptedServer, client: LLMClient, before: str, cut: int
) -> None:
    body = before.encode() + b'data: {"choices":[{"delta":{"content":"Hi"},"finish_reason":"stop"}]}\n\n'
    scripted_server.script(sse(body[:cut], body[cut:], done=True, content_type="text/plain"))
    assert await read_text(await client.chat_completion(MESSAGES, stream=True)) == "Hi"
