"""The text of replies and streams: `text_of`, `ask`, `stream_chat`, `stream.text()` and `stream.collect()`."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from lmbridge import LLMClient, LLMStreamError, LLMValidationError, text_of
from lmbridge.testing import MockRequest, MockTransport, ScriptedServer, answer, sse, stall
from tests.support import HALF, MESSAGES, piece


def reply(content: str | None, *, finish_reason: str = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"content": content, **message}, "finish_reason": finish_reason}]}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (reply("Hello"), "Hello"),
        (reply("<think>hm</think>\n\nHello"), "Hello"),
        (reply("Hello", reasoning_content="hm"), "Hello"),
        (reply(None, tool_calls=[{"id": "1"}]), ""),
        ({"choices": [{"text": " Paris"}]}, " Paris"),
        (
            {
                "output": [
                    {"type": "reasoning", "content": []},
                    {"type": "message", "content": [{"type": "output_text", "text": "Hi"}, {"type": "refusal"}]},
                ]
            },
            "Hi",
        ),
    ],
)
def test_text_of_returns_the_text_of_a_reply(given: dict[str, Any], text: str) -> None:
    assert text_of(given) == text


@pytest.mark.parametrize("given", [None, "Hello", {}, {"choices": []}, {"choices": ["x"]}])
def test_text_of_refuses_what_is_not_a_reply(given: Any) -> None:
    with pytest.raises(LLMValidationError, match=r"^reply must be "):
        text_of(given)


# ask


async def test_ask_returns_the_text_of_the_answer() -> None:
    transport = MockTransport(lambda request: reply("<think>hm</think>Paris"))
    client = LLMClient(transport=transport)
    assert await client.ask("What is the capital of France?", temperature=0, timeout=9, model="m") == "Paris"
    sent = {"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0, "model": "m"}
    assert transport.requests[0].json == sent


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (reply("Once upon", finish_reason="length"), "the answer was cut off"),
        (
            reply(None, tool_calls=[{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]),
            "the answer has no text",
        ),
        (reply("<think>hm"), "the answer has no text"),
    ],
)
async def test_an_answer_without_a_whole_text_is_an_error(given: dict[str, Any], message: str) -> None:
    with pytest.raises(LLMValidationError, match=message) as caught:
        await LLMClient(transport=MockTransport(lambda request: given)).ask("Hello?")
    assert caught.value.partial == given


async def test_an_answer_may_end_at_the_limit_that_the_caller_gave() -> None:
    client = LLMClient(transport=MockTransport(lambda request: reply("Once", finish_reason="length")))
    assert await client.ask("Hello?", max_tokens=1) == "Once"


@pytest.mark.parametrize(
    ("question", "params", "message"),
    [
        ("", {}, "question must be a string that is not blank"),
        (MESSAGES, {}, "question must be a string that is not blank"),
        ("Hello?", {"stream": True}, r"ask\(\) does not accept stream"),
        ("Hello?", {"n": 2}, r"ask\(\) does not accept n"),
    ],
)
async def test_ask_refuses_what_is_not_a_question(question: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(LLMValidationError, match=message):
        await LLMClient(transport=MockTransport(lambda request: {})).ask(question, **params)


# Streams


async def test_the_text_of_a_chat_stream_has_no_reasoning(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("", chunks=["<thi", "nk>hm</think>", "Hel", "lo"], model="test-model"))
    async with client.stream_chat(MESSAGES, temperature=0) as stream:
        assert [text async for text in stream.text()] == ["Hel", "lo"]
    assert scripted_server.requests[0].json == {
        "messages": MESSAGES,
        "temperature": 0,
        "model": "test-model",
        "stream": True,
    }


async def test_the_text_of_a_text_completion_is_that_of_its_first_answer() -> None:
    def handler(request: MockRequest) -> Any:
        for index, text, reason in ((0, "a", None), (1, "x", "stop"), (0, "b", "stop")):
            yield {"choices": [{"index": index, "text": text, "finish_reason": reason}]}

    client = LLMClient(transport=MockTransport(handler))
    stream = await client.text_completion("Hello", stream=True, n=2)
    assert [text async for text in stream.text()] == ["a", "b"]


async def test_the_text_of_a_response(scripted_server: ScriptedServer, client: LLMClient) -> None:
    events = (
        ("response.output_text.delta", '"delta": "Hel"'),
        ("response.reasoning_text.delta", '"delta": "hm"'),
        ("response.output_text.delta", '"delta": "lo"'),
        ("response.completed", '"response": {"status": "completed", "output": []}'),
    )
    scripted_server.script(sse(*[f'event: {name}\ndata: {{"type": "{name}", {rest}}}\n\n' for name, rest in events]))
    stream = await client.create_response("Hello", stream=True)
    assert [text async for text in stream.text()] == ["Hel", "lo"]


async def test_a_stream_that_breaks_raises_in_its_text(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(*HALF, end=False))
    texts = []

    async def read() -> None:
        async with client.stream_chat(MESSAGES) as stream:
            async for text in stream.text():
                texts.append(text)  # noqa: PERF401 - what arrives before the error counts

    with pytest.raises(LLMStreamError) as caught:
        await read()
    assert texts == ["Hel", "lo"]
    assert text_of(caught.value.partial or {}) == "Hello"


async def test_leaving_the_block_or_the_iterator_stops_the_server(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(stall(HALF), stall(HALF))
    async with client.stream_chat(MESSAGES) as stream:
        async for _ in stream.text():
            break
    texts = (await client.chat_completion(MESSAGES, stream=True)).text()
    await anext(texts)
    await texts.aclose()
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_dropping_the_text_drops_the_stream(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(stall(HALF))
    texts = (await client.chat_completion(MESSAGES, stream=True)).text()
    await anext(texts)
    with pytest.warns(ResourceWarning):  # noqa: PT031 - the last reference is dropped in it
        del texts
        gc.collect()
    await scripted_server.wait_until(lambda: not scripted_server.open_connections)


async def test_stream_collect_returns_the_whole_reply() -> None:
    client = LLMClient(transport=MockTransport(lambda request: [*HALF, piece(finish_reason="stop")]))
    async with client.stream_chat(MESSAGES) as stream:
        await anext(stream)
        assert text_of(await stream.collect()) == "Hello"
