"""Characters whose two surrogates arrive in two events of a stream: the reply has the character, everywhere."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge import Agent, LLMClient, LLMError, LLMStreamError, TaskCancelledError, TextDelta, collect, text_of
from lmbridge.client.surrogates import Halves, join_halves
from lmbridge.testing import Behaviour, ScriptedServer, answer, reply, sse
from tests.support import MESSAGES, opened, read_text

SMILE = "\N{SLIGHTLY SMILING FACE}"
CUT = ("Hi \ud83d", "\ude42!")
"""A text with the smile, cut in two."""
HALF = "a\ud83d"


def chat_event(delta: Any, finish_reason: str | None = None, index: int = 0) -> str:
    """Returns an event with a chunk, in ASCII, so that surrogates are escaped."""
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
    return f"data: {json.dumps({'model': 'test-model', 'choices': [choice]})}\n\n"


def chat(*deltas: Any, finish_reason: str = "stop") -> Behaviour:
    events = [chat_event({"content": each} if isinstance(each, str) else each) for each in deltas]
    return sse(*events, chat_event({}, finish_reason), done=True)


@pytest.mark.parametrize(
    "pieces",
    [
        CUT,
        ("Hi ", "\ud83d", "\ude42", "!"),
        ("Hi \ud83d", "", "\ude42!"),
        ("Hi ", {"content": None}, "\ud83d", {"role": "assistant"}, "\ude42!"),
    ],
)
async def test_a_character_in_two_chunks_is_joined_everywhere(
    scripted_server: ScriptedServer, client: LLMClient, pieces: tuple[Any, ...]
) -> None:
    scripted_server.default = chat(*pieces)
    whole = f"Hi {SMILE}!"
    async for chunk in await opened(client):
        json.dumps(chunk, ensure_ascii=False).encode()
    assert await read_text(await opened(client)) == whole
    async with client.stream_chat(MESSAGES) as stream:
        assert "".join([text async for text in stream.text()]) == whole
    collected = await collect(await opened(client))
    assert text_of(collected) == whole
    agent = Agent(client)
    events = [event async for event in agent.stream("Go.")]
    assert "".join(event.text for event in events if isinstance(event, TextDelta)) == whole
    result = await agent.run("Go.")
    assert (result.text, result.messages[-1]["content"]) == (whole, whole)
    # The reply can be sent back.
    await collect(await client.chat_completion([*MESSAGES, collected["choices"][0]["message"]], stream=True))
    assert scripted_server.requests[-1].json["messages"][-1]["content"] == whole


async def test_the_partial_reply_has_whole_characters(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(*map(chat_event, [{"content": CUT[0]}, {"content": CUT[1]}])))
    stream = await opened(client)
    await anext(stream)
    partial: Any = stream.partial
    assert partial["choices"][0]["message"]["content"] == "Hi ?"
    with pytest.raises(LLMStreamError) as caught:
        await read_text(stream)
    assert caught.value.partial["choices"][0]["message"]["content"] == f"Hi {SMILE}!"


async def test_a_parsed_answer_has_whole_characters(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(chat('{"answer": ["\ud83d', '\ude42"]}'))
    assert await client.parse(MESSAGES, list[str]) == [SMILE]


async def test_half_a_character_without_the_other_is_a_question_mark(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    for pieces, whole in (
        (("a\ud83d", "b"), "a?b"),
        (("a\ud83d",), "a?"),
        (("\ude42b",), "?b"),
        (("\ud83d", "\ud83d", "\ude42"), f"?{SMILE}"),
        (("\ud83d", "\ude42\ude42"), f"{SMILE}?"),
    ):
        scripted_server.default = chat(*pieces)
        assert await read_text(await opened(client)) == whole
        assert text_of(await collect(await opened(client))) == whole
        async with client.stream_chat(MESSAGES) as stream:
            assert "".join([text async for text in stream.text()]) == whole


@pytest.mark.parametrize("ending", ["[DONE]", "cut off", "error", "error in a choice"])
async def test_half_a_character_at_the_end_of_a_stream_without_a_finish_reason_is_handed_out(
    scripted_server: ScriptedServer, client: LLMClient, ending: str
) -> None:
    endings: dict[str, list[Any]] = {
        "[DONE]": ["data: [DONE]\n\n"],
        "cut off": [],
        "error": [{"error": {"message": "gone"}}],
        "error in a choice": [{"choices": [{"index": 0, "delta": {}, "error": {"message": "gone"}}]}],
    }
    piece = {"model": "test-model", "id": "a", "choices": [{"index": 1, "delta": {"reasoning_content": "b\ud83d"}}]}
    events = [chat_event({"content": "a\ud83d"}), f"data: {json.dumps(piece)}\n\n", *endings[ending]]
    scripted_server.default = sse(*events, done=False)
    stream = await opened(client)
    chunks: list[Any] = [await anext(stream), await anext(stream), await anext(stream)]
    if ending == "[DONE]":
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert await collect(stream)
    else:
        with pytest.raises(LLMError) as caught:
            await anext(stream)
        assert caught.value.partial["choices"][0]["message"]["content"] == "a?"
        # The stream ends again as it has ended.
        with pytest.raises(LLMError):
            await anext(stream)
    last = chunks[-1]
    assert [(each["index"], each["delta"]) for each in last["choices"]] == [
        (0, {"content": "?"}),
        (1, {"reasoning_content": "?"}),
    ]
    assert last["model"] == "test-model"
    async with client.stream_chat(MESSAGES) as stream:
        texts = stream.text()
        assert [await anext(texts), await anext(texts)] == ["a", "?"]


async def test_half_a_character_at_the_end_of_other_streams_is_handed_out(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    chunk = {"choices": [{"index": 0, "text": "a\ud83d"}]}
    scripted_server.script(sse(f"data: {json.dumps(chunk)}\n\n", done=True))
    text = await client.text_completion("Say", stream=True)
    assert [chunk["choices"][0]["text"] async for chunk in text] == ["a", "?"]
    delta = {"type": "response.output_text.delta", "item_id": "a", "output_index": 0, "delta": "a\ud83d"}
    item = {"id": "a", "type": "message", "content": [{"type": "output_text", "text": "a\ud83d"}]}
    done = {"type": "response.completed", "response": {"status": "completed", "output": [item]}}
    first, last = (f"data: {json.dumps(each)}\n\n" for each in (delta, done))
    scripted_server.script(sse(first, last, done=False), sse(first, done=False))
    events = [event async for event in await client.create_response("Say", stream=True)]
    assert events[-1].data == {**delta, "delta": "?"}
    stream = await client.create_response("Say", stream=True)
    assert (await anext(stream)).data["delta"] == "a"
    assert (await anext(stream)).data["delta"] == "?"
    with pytest.raises(LLMStreamError):
        await anext(stream)
    del delta["type"]
    scripted_server.script(sse(f"event: response.output_text.delta\ndata: {json.dumps(delta)}\n\n", last, done=False))
    stream = await client.create_response("Say", stream=True)
    assert [text async for text in stream.text()] == ["a", "?"]


@pytest.mark.parametrize("field", ["id", "system_fingerprint", "logprobs", "role", "finish_reason", "usage", "text"])
async def test_no_field_of_a_collected_reply_has_half_a_character(
    scripted_server: ScriptedServer, client: LLMClient, field: str
) -> None:
    half = "a\ud83d"
    choice: dict[str, Any] = {"index": 0, "delta": {"role": "assistant", "content": "b"}, "finish_reason": "stop"}
    chunk: dict[str, Any] = {"id": "i", "model": "test-model", "choices": [choice]}
    if field == "role":
        choice["delta"]["role"] = half
    elif field in ("logprobs", "finish_reason"):
        choice[field] = {"content": [{"token": half, "logprob": -1}]} if field == "logprobs" else half
    elif field == "text":
        choice |= {"text": "b", "logprobs": {"tokens": [half]}}
    else:
        chunk[field] = {"total_tokens": 1, "note": half} if field == "usage" else half
    scripted_server.default = sse(f"data: {json.dumps(chunk)}\n\n", done=True)
    stream = client.text_completion("Say", stream=True) if field == "text" else opened(client)
    reply_: Any = await collect(await stream)
    assert "a?" in json.dumps(reply_, ensure_ascii=False).encode().decode()

    async def chunks() -> AsyncIterator[Any]:
        yield json.loads(json.dumps(chunk))

    json.dumps(await collect(chunks()), ensure_ascii=False).encode()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("body", [{"error": {"message": HALF, "type": HALF}}, {"error": HALF}, {"detail": HALF}, HALF])
async def test_an_error_has_whole_characters_so_that_it_can_be_printed(
    scripted_server: ScriptedServer, client: LLMClient, body: Any, stream: bool
) -> None:
    text = json.dumps(body)
    scripted_server.default = reply(400, text, content_type="application/json")
    if stream:
        scripted_server.default = sse(chat_event({"content": "b"}), f"event: error\ndata: {text}\n\n", done=False)
    with pytest.raises(LLMError) as caught:
        await collect(await opened(client))
    str(caught.value).encode()
    assert "a?" in str(caught.value)


async def test_a_closed_stream_hands_out_nothing_more(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(chat_event({"content": "a\ud83d"}), done=False))
    stream = await opened(client)
    await anext(stream)
    await stream.aclose()
    with pytest.raises(TaskCancelledError):
        await anext(stream)


async def test_half_a_call_at_the_end_of_a_stream_is_not_handed_out(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "a\ud83d"}}
    scripted_server.script(sse(chat_event({"tool_calls": [call]}), done=True))
    assert len([chunk async for chunk in await opened(client)]) == 1


async def test_characters_of_other_texts_are_joined_as_well(scripted_server: ScriptedServer, client: LLMClient) -> None:
    def call(arguments: str) -> dict[str, Any]:
        return {"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": arguments}}]}

    deltas = [
        {"reasoning_content": CUT[0], "thinking": CUT[0], "audio": {"transcript": CUT[0]}},
        {"reasoning_content": CUT[1], "thinking": CUT[1], "audio": {"transcript": CUT[1]}},
        {"content": [{"type": "text", "text": CUT[0]}]},
        {"content": [{"type": "text", "text": CUT[1]}]},
        call('{"a": "\ud83d'),
        call('\ude42"}'),
    ]
    scripted_server.default = chat(*deltas)
    whole = f"Hi {SMILE}!"
    handed_out: dict[str, str] = {"arguments": ""}
    async for chunk in await opened(client):
        delta = chunk["choices"][0]["delta"]
        for key in ("content", "reasoning_content", "thinking"):
            handed_out[key] = handed_out.get(key, "") + str(delta.get(key) or "")
        for piece in delta.get("tool_calls") or ():
            handed_out["arguments"] += piece["function"]["arguments"]
    arguments = json.dumps({"a": SMILE}, ensure_ascii=False)
    assert handed_out == {"content": whole, "reasoning_content": whole, "thinking": whole, "arguments": arguments}
    message: Any = (await collect(await opened(client)))["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"], message["thinking"]) == (whole, whole, whole)
    assert message["audio"] == {"transcript": whole}
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


async def test_half_a_character_at_the_end_of_a_call_does_not_change_the_shape_of_a_chunk(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": "\ud83d'}}
    scripted_server.script(chat({"tool_calls": [call]}, finish_reason="tool_calls"))
    chunks = [chunk async for chunk in await opened(client)]
    assert chunks[-1]["choices"][0]["delta"] == {}


async def test_other_fields_of_a_chunk_have_whole_characters(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    logprobs = [{"content": [{"token": text, "logprob": -0.1, "bytes": None}]} for text in CUT]
    choices: list[dict[str, Any]] = [
        {"index": 0, "delta": {"content": text}, "logprobs": each, "finish_reason": None}
        for text, each in zip(CUT, logprobs, strict=True)
    ]
    choices[1]["finish_reason"] = "stop"
    events = [json.dumps({"model": "test-model", "note": CUT[0], "choices": [choice]}) for choice in choices]
    scripted_server.script(sse(*(f"data: {event}\n\n" for event in events), done=True))
    chunks = [chunk async for chunk in await opened(client)]
    assert json.dumps(chunks, ensure_ascii=False).encode()
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["Hi ", f"{SMILE}!"]


async def test_each_item_of_a_response_gets_the_end_of_its_text(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    deltas = [
        {"type": f"response.{kind}.delta", "item_id": item, "output_index": number, "delta": "a\ud83d"}
        for number, (kind, item) in enumerate((("reasoning_text", "r"), ("output_text", "m")))
    ]
    done = {"type": "response.completed", "response": {"status": "completed", "output": []}}
    scripted_server.default = sse(*[f"data: {json.dumps(each)}\n\n" for each in (*deltas, done)], done=False)
    events = [event.data async for event in await client.create_response("Say", stream=True)]
    assert events[-2:] == [{**each, "delta": "?"} for each in deltas]
    stream = await client.create_response("Say", stream=True)
    assert [text async for text in stream.text()] == ["a", "?"]


async def test_the_halves_of_two_answers_are_not_mixed(scripted_server: ScriptedServer, client: LLMClient) -> None:
    pieces = [(0, "a\ud83d"), (1, "b\ud83d"), (1, "\ude43"), (0, "\ude42")]
    events = [chat_event({"content": text}, index=index) for index, text in pieces]
    ends = [chat_event({}, "stop", index=index) for index in (0, 1)]
    scripted_server.default = sse(*events, *ends, done=True)
    texts = ["", ""]
    async for chunk in await client.chat_completion(MESSAGES, stream=True, n=2):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    assert texts == [f"a{SMILE}", "b\N{UPSIDE-DOWN FACE}"]


async def test_a_character_in_two_chunks_of_a_text_completion_is_joined(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    choices = [{"index": 0, "text": text, "finish_reason": None} for text in CUT]
    choices.append({"index": 0, "text": "", "finish_reason": "stop"})
    scripted_server.default = sse(*(f"data: {json.dumps({'choices': [each]})}\n\n" for each in choices), done=True)
    stream = await client.text_completion("Say", stream=True)
    assert "".join([text async for text in stream.text()]) == f"Hi {SMILE}!"
    assert text_of(await collect(await client.text_completion("Say", stream=True))) == f"Hi {SMILE}!"


async def test_a_character_in_two_events_of_a_response_is_joined(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    deltas = [{"type": "response.output_text.delta", "item_id": "a", "delta": text} for text in CUT]
    other = {"type": "response.output_text.delta", "item_id": "b", "delta": "x"}
    item = {"id": "a", "type": "message", "content": [{"type": "output_text", "text": "Hi \ud83d\ude42!"}]}
    done = {"type": "response.completed", "response": {"status": "completed", "output": [item]}}
    events = [f"data: {json.dumps(event)}\n\n" for event in (deltas[0], other, deltas[1], done)]
    scripted_server.script(sse(*events), sse(*events), sse(*events[:-1]))
    texts = [
        event.data["delta"] async for event in await client.create_response("Say", stream=True) if "delta" in event.data
    ]
    assert texts == ["Hi ", "x", f"{SMILE}!"]
    assert text_of(await collect(await client.create_response("Say", stream=True))) == f"Hi {SMILE}!"
    with pytest.raises(LLMStreamError) as caught:
        await collect(await client.create_response("Say", stream=True))
    assert caught.value.partial["output"][0]["content"][0]["text"] == f"Hi {SMILE}!"


async def test_half_a_character_in_a_plain_reply_is_a_question_mark(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    message = {"role": "assistant", "content": "a\ud83d"}
    output = [{"type": "message", "content": [{"type": "output_text", "text": "a\ud83d"}]}]
    bodies: list[Any] = [
        {"choices": [{"index": 0, "message": message, "finish_reason": "length"}]},
        {"choices": [{"index": 0, "text": "a\ud83d", "finish_reason": "length"}]},
        {"output": output, "status": "incomplete"},
    ]
    scripted_server.script(*(reply(200, json.dumps(body), content_type="application/json") for body in bodies))
    read = await client.chat_completion(MESSAGES)
    assert text_of(read) == "a?"
    assert text_of(await client.text_completion("Say")) == "a?"
    assert text_of(await client.create_response("Say")) == "a?"
    scripted_server.script(answer("Fine."))
    await client.chat_completion([*MESSAGES, read["choices"][0]["message"]])


async def test_a_stream_of_another_client_is_joined_when_it_is_collected_or_run() -> None:
    async def chunks() -> AsyncIterator[Any]:
        for text in CUT:
            yield {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
        yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}

    class OtherClient:
        model: str | None = "test-model"

        async def chat_completion(self, *_: Any, **__: Any) -> Any:
            return chunks()

    assert text_of(await collect(chunks())) == f"Hi {SMILE}!"
    agent: Any = Agent(OtherClient())
    events = [event async for event in agent.stream("Go.")]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["Hi ", f"{SMILE}!"]
    assert events[-1].result.text == f"Hi {SMILE}!"


async def test_half_a_character_at_the_end_of_a_stream_of_another_client_is_an_event() -> None:
    async def chunks() -> AsyncIterator[Any]:
        yield {"choices": [{"index": 0, "delta": {"content": "a\ud83d"}, "finish_reason": None}]}

    class OtherClient:
        model: str | None = "test-model"

        async def chat_completion(self, *_: Any, **__: Any) -> Any:
            return chunks()

    agent: Any = Agent(OtherClient())
    events = [event async for event in agent.stream("Go.")]
    assert [event.text for event in events if isinstance(event, TextDelta)] == ["a", "?"]
    assert events[-1].result.text == "a?"


@settings(deadline=None)
@given(text=st.text(max_size=12), cuts=st.lists(st.integers(0, 24), max_size=6))
def test_any_text_that_is_cut_between_its_utf_16_units_is_joined(text: str, cuts: list[int]) -> None:
    units = text.encode("utf-16-le")
    edges = [0, *sorted(2 * cut for cut in cuts if 2 * cut <= len(units)), len(units)]
    pieces = [units[start:end].decode("utf-16-le", "surrogatepass") for start, end in itertools.pairwise(edges)]
    halves: Halves = {}
    joined = ""
    for piece in pieces:
        chunk = {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
        joined += join_halves(chunk, halves)["choices"][0]["delta"]["content"]
    assert (joined, halves) == (text, {})
