"""The shape of replies and chunks: it is that of the API's documentation, whatever a server sends."""

# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import copy
import json
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lmbridge import (
    Agent,
    LLMClient,
    LLMError,
    LLMResponseError,
    LLMStreamError,
    LLMValidationError,
    ModelLoadError,
    collect,
    split_reasoning,
    text_of,
)
from lmbridge.client.chat_accumulator import ChatAccumulator, TextAccumulator
from lmbridge.client.completion_shape import complete_chat_reply, complete_text_reply
from lmbridge.client.reasoning import ReasoningSplitter
from lmbridge.testing import Behaviour, ScriptedServer, reply, sse
from tests.agent.support import read_reply
from tests.support import HALF, MESSAGES, opened, piece


def whole_reply(value: Mapping[str, Any]) -> Behaviour:
    """Answers a plain request with a JSON object."""
    return reply(200, value)


END = piece(finish_reason="stop")
TEXT_HALF = ({"choices": [{"index": 0, "text": "Hel"}]}, {"choices": [{"index": 0, "text": "lo"}]})
TEXT_END = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}


async def text_by_the_loop_of_the_readme(stream: AsyncIterator[Any]) -> str:
    """Reads a chat stream in the way that the documentation shows, which trusts the shape of a chunk."""
    text = ""
    async for chunk in stream:
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
    return text


# Events that are not chunks

NO_CHUNKS: dict[str, Any] = {
    "null": None,
    "empty string": "",
    "empty list": [],
    "empty object": {},
    "ping": {"type": "ping"},
    "no choices": {"model": "test-model", "usage": None},
    "choices null": {"choices": None},
    "choices null, with the model": {"model": "test-model", "choices": None},
    "choices false": {"choices": False},
    "choices 0": {"choices": 0},
    "choices empty string": {"choices": ""},
    "choices an empty object": {"choices": {}},
    "choices empty": {"choices": []},
    "choice null": {"choices": [None]},
    "choice null, with the model": {"model": "test-model", "choices": [None]},
    "choice a string": {"choices": ["Hello"]},
    "choice a number": {"choices": [7]},
    "choice a list": {"choices": [[]]},
    "choice a list with a choice": {"choices": [[{"delta": {"content": "x"}}]]},
    "choice empty": {"choices": [{}]},
    "choice without a delta": {"choices": [{"index": 0, "finish_reason": None}]},
    "delta null": {"choices": [{"index": 0, "delta": None}]},
    "delta null, with the model": {"model": "test-model", "choices": [{"index": 0, "delta": None}]},
    "delta false": {"choices": [{"index": 0, "delta": False}]},
    "delta empty string": {"choices": [{"index": 0, "delta": ""}]},
    "delta empty list": {"choices": [{"index": 0, "delta": []}]},
    "content null": {"choices": [{"index": 0, "delta": {"content": None}}]},
    "content an empty list": {"choices": [{"index": 0, "delta": {"content": []}}]},
    "content a list of null": {"choices": [{"index": 0, "delta": {"content": [None]}}]},
    "text null": {"choices": [{"index": 0, "text": None}]},
    "text empty list": {"choices": [{"index": 0, "text": []}]},
    "fields null": {"choices": [{"index": None, "delta": {"role": None, "tool_calls": None}, "finish_reason": None}]},
    "message null": {"choices": [{"index": 0, "message": None}]},
    "message a list": {"choices": [{"index": 0, "message": [{}]}]},
    "usage a number": {"choices": [], "usage": 7},
    "usage a list": {"choices": [], "usage": [7]},
    "model a list": {"model": ["test-model"], "choices": []},
}


@pytest.mark.parametrize("name", NO_CHUNKS)
async def test_an_event_that_is_not_a_chunk_adds_nothing(
    scripted_server: ScriptedServer, client: LLMClient, name: str
) -> None:
    odd = f"data: {json.dumps(NO_CHUNKS[name])}\n\n"
    scripted_server.default = sse(odd, HALF[0], odd, HALF[1], odd, END, odd, done=True)
    assert await text_by_the_loop_of_the_readme(await opened(client)) == "Hello"
    whole = await collect(await opened(client))
    assert (whole["choices"][0]["message"]["content"], len(whole["choices"])) == ("Hello", 1)
    async with client.stream_chat(MESSAGES) as stream:
        assert [text async for text in stream.text()] == ["Hel", "lo"]
    assert (await Agent(client).run("Go.")).text == "Hello"


@pytest.mark.parametrize("name", NO_CHUNKS)
async def test_an_event_that_is_not_a_chunk_adds_nothing_to_a_text_completion(
    scripted_server: ScriptedServer, client: LLMClient, name: str
) -> None:
    odd = f"data: {json.dumps(NO_CHUNKS[name])}\n\n"
    scripted_server.default = sse(odd, TEXT_HALF[0], odd, TEXT_HALF[1], odd, TEXT_END, odd, done=True)
    text = ""
    async for chunk in await client.text_completion("Say", stream=True):
        for choice in chunk["choices"]:
            text += choice["text"]
    assert text == "Hello"
    whole = await collect(await client.text_completion("Say", stream=True))
    assert [choice["text"] for choice in whole["choices"]] == ["Hello"]
    assert "".join([text async for text in (await client.text_completion("Say", stream=True)).text()]) == "Hello"


async def test_a_null_between_the_events_of_a_response_is_skipped(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    done = {"type": "response.completed", "response": {"status": "completed", "output": []}}
    delta = {"type": "response.output_text.delta", "item_id": "a", "delta": "Hello"}
    scripted_server.script(sse("data: null\n\n", delta, {**delta, "delta": None}, "data: null\n\n", done))
    response = await collect(await client.create_response("Say", stream=True))
    assert text_of(response) == "Hello"


async def test_a_stream_of_nothing_but_such_events_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    values: list[Any] = [None, {}, [], {"choices": None}, {"choices": [None]}]
    events = [f"data: {json.dumps(value)}\n\n" for value in values]
    scripted_server.default = sse(*events, done=True)
    with pytest.raises(LLMStreamError, match="without any part of an answer"):
        await text_by_the_loop_of_the_readme(await opened(client))
    with pytest.raises(LLMStreamError, match="without any part of an answer"):
        await collect(await client.text_completion("Say", stream=True))


async def test_done_may_be_quoted(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(*HALF, 'data: "[DONE]"\n\n'))
    assert await text_by_the_loop_of_the_readme(await opened(client)) == "Hello"


@pytest.mark.parametrize("index", ["0", 0.0, "00", None])
async def test_the_index_of_a_choice_may_be_a_string_or_a_float(
    scripted_server: ScriptedServer, client: LLMClient, index: Any
) -> None:
    choice = {"index": index, "delta": {"content": "Hello"}, "finish_reason": "stop"}
    scripted_server.default = sse(piece(choices=[choice]), done=True)
    async with client.stream_chat(MESSAGES) as stream:
        assert [text async for text in stream.text()] == ["Hello"]
    whole = await collect(await opened(client))
    assert [(each["index"], each["message"]["content"]) for each in whole["choices"]] == [(0, "Hello")]


async def test_a_server_may_answer_a_stream_with_a_whole_reply_in_one_event(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    message = {"role": "assistant", "content": [{"type": "text", "text": "Hello"}], "tool_calls": None}
    whole = {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
    scripted_server.default = sse(whole, done=True)
    collected = await collect(await opened(client))
    assert collected["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    async with client.stream_chat(MESSAGES) as stream:
        assert [text async for text in stream.text()] == ["Hello"]


# Structures that are no chunks at depth

_names = st.sampled_from(
    [
        *("choices", "delta", "message", "text", "index", "finish_reason", "content", "reasoning_content", "reasoning"),
        *("tool_calls", "function", "arguments", "name", "id", "type", "function_call", "usage", "error", "model"),
        *("logprobs", "role", "thinking", "audio", "data", "prompt_tokens", "object"),
    ]
)
_scalars = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | st.sampled_from([10**30, -(10**30), 0.5, float("inf"), float("nan"), "", "text", "function", "\ud83d", "\ude42"])
)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=4), max_leaves=12
)
_choices = st.fixed_dictionaries({}, optional=dict.fromkeys(("index", "delta", "message", "text", "error"), _values))
_chunks = st.fixed_dictionaries({}, optional={"choices": st.lists(_choices | _values, max_size=3) | _values}) | _values


def check_shape(chunk: Mapping[str, Any], field: str, kind: type) -> None:
    assert isinstance(chunk["choices"], list)
    for choice in chunk["choices"]:
        assert isinstance(choice, dict)
        assert isinstance(choice[field], kind)
        assert isinstance(choice.get("index"), int | None)
        if kind is dict:
            assert isinstance(choice[field].get("content"), str | None)


@settings(deadline=None, max_examples=300)
@given(chunks=st.lists(_chunks, min_size=1, max_size=3))
def test_any_chunk_has_the_right_shape_afterwards_or_is_a_named_error(chunks: list[Any]) -> None:
    sent = copy.deepcopy(chunks)
    for accumulator, field, kind in ((ChatAccumulator(), "delta", dict), (TextAccumulator(), "text", str)):
        splitter = ReasoningSplitter()
        for chunk in chunks:
            try:
                completed = accumulator.add(chunk)
            except LLMError:
                continue
            check_shape(completed, field, kind)
            splitter.feed(completed)
            reply_so_far: Any = accumulator.reply()
            assert not reply_so_far["choices"] or isinstance(text_of(reply_so_far), str)
            split_reasoning(reply_so_far)
            read_reply(reply_so_far)
            for choice in reply_so_far["choices"]:
                assert isinstance(choice["text"] if kind is str else choice["message"]["content"], str)
    # "nan" is not equal to itself, so the texts are compared.
    assert repr(chunks) == repr(sent)


@settings(deadline=None, max_examples=300)
@given(value=_chunks)
@example(value={"choices": [{"message": {"tool_calls": [{"id": math.nan, "function": {"name": "f"}}]}}]})
def test_any_plain_reply_has_the_right_shape_or_is_refused(value: Any) -> None:
    if not isinstance(value, dict):
        return
    for text in split_reasoning(value):
        assert isinstance(text, str)
    read_reply(value)
    if complete_chat_reply(copied := copy.deepcopy(value)):
        for choice in copied["choices"]:
            assert isinstance(choice["message"]["content"], str | None)
            for call in choice["message"].get("tool_calls") or ():
                assert isinstance(call["id"], str | int)
        assert isinstance(text_of(copied), str)
    if complete_text_reply(value):
        assert all(isinstance(choice["text"], str) for choice in value["choices"])


@pytest.mark.parametrize("value", [None, "text", [], 7])
def test_splitting_anything_but_a_reply_is_refused(value: Any) -> None:
    with pytest.raises(LLMValidationError, match="reply must be the dict of a chat completion"):
        split_reasoning(value)


@pytest.mark.parametrize(
    "value",
    [
        {"choices": 7},
        {"choices": [[{"message": {"content": "x"}}]]},
        {"choices": [None]},
        {"choices": [{"message": [{}]}]},
        {"choices": [{"message": "x"}]},
        {"choices": [{"message": {"content": {"x": 1}}}]},
        {"choices": [{"message": {"content": 7, "reasoning": 7}}]},
    ],
)
def test_splitting_a_reply_without_texts_gives_empty_texts(value: Any) -> None:
    assert split_reasoning(value) == ("", "")
    assert ReasoningSplitter().feed(value) == []


@pytest.mark.parametrize(
    "choices",
    [
        None,
        [],
        [None],
        [[]],
        [{}],
        [{"message": None}],
        [{"message": [{}]}],
        [{"message": "text"}],
        [{"message": {"content": 7}}],
        [{"message": {"content": "x", "tool_calls": 7}}],
        [{"message": {"content": "x", "tool_calls": ["f"]}}],
        [{"message": {"content": "x", "tool_calls": [None]}}],
        [{"message": {"content": "x", "tool_calls": [{"function": "f"}]}}],
    ],
)
async def test_a_plain_reply_of_another_shape_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient, choices: Any
) -> None:
    scripted_server.script(whole_reply({"choices": choices}))
    with pytest.raises(LLMResponseError, match="something that is not a chat completion"):
        await client.chat_completion(MESSAGES)


async def test_the_calls_of_a_plain_reply_have_all_their_fields(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    calls = [
        {"id": "a", "type": None, "function": None},
        {"id": None, "function": {"name": None, "arguments": None}},
        {"id": "c", "function": {"name": "f", "arguments": {"x": [1]}}},
        {"id": "d", "type": "custom"},
    ]
    scripted_server.script(whole_reply({"choices": [{"message": {"tool_calls": calls}}]}))
    message = (await client.chat_completion(MESSAGES))["choices"][0]["message"]
    read = message["tool_calls"]
    assert message["content"] is None
    assert [call.get("function") for call in read] == [
        {"name": "", "arguments": ""},
        {"name": "", "arguments": ""},
        {"name": "f", "arguments": '{"x":[1]}'},
        None,
    ]
    assert [call["type"] for call in read] == ["function", "function", "function", "custom"]
    assert read[1]["id"].startswith("call_")


async def test_the_agent_reads_usage_only_as_numbers(scripted_server: ScriptedServer, client: LLMClient) -> None:
    usages: list[Any] = ["many", [1], {"prompt_tokens": "3"}, {"prompt_tokens": [3], "total_tokens": None}]
    for usage in usages:
        scripted_server.script(sse(*HALF, END, {"choices": [], "usage": usage}, done=True))
        result = await Agent(client).run("Go.")
        assert (result.text, result.usage["prompt_tokens"]) == ("Hello", 0)


# Answers that the server has not finished

BROKEN = ["abort", "error", "aborted", "cancelled", "canceled", "failed", "ABORT", "Error"]


@pytest.mark.parametrize("reason", BROKEN)
async def test_a_finish_reason_that_means_an_aborted_answer_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient, reason: str
) -> None:
    scripted_server.default = sse(*HALF, piece("!", finish_reason=reason), done=True)
    with pytest.raises(LLMResponseError, match=f"aborted the answer, with the finish reason '{reason}'") as caught:
        await collect(await opened(client))
    assert caught.value.partial["choices"][0]["message"]["content"] == "Hello!"
    assert (caught.value.status, caught.value.context["operation"]) == (200, "chat completion")
    with pytest.raises(LLMResponseError, match=f"with the finish reason '{reason}'") as run_error:
        await Agent(client).run("Go.")
    assert run_error.value.partial.text == "Hello!"

    scripted_server.default = sse(*TEXT_HALF, {"choices": [{"index": 0, "text": "!", "finish_reason": reason}]})
    with pytest.raises(LLMResponseError, match=f"with the finish reason '{reason}'") as caught:
        await collect(await client.text_completion("Say", stream=True))
    assert caught.value.partial["choices"][0]["text"] == "Hello!"


@pytest.mark.parametrize("reason", BROKEN)
async def test_a_finish_reason_that_means_an_aborted_answer_is_an_error_of_a_plain_reply(
    scripted_server: ScriptedServer, client: LLMClient, reason: str
) -> None:
    whole: dict[str, Any] = {"choices": [{"index": 0, "message": {"content": "Hel"}, "finish_reason": reason}]}
    scripted_server.script(whole_reply(whole))
    with pytest.raises(LLMResponseError, match=f"with the finish reason '{reason}'") as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.partial["choices"][0]["message"]["content"] == "Hel"
    assert (caught.value.status, json.loads(caught.value.body or "")) == (200, whole)

    whole = {"choices": [{"index": 0, "text": "Hel", "finish_reason": reason}]}
    scripted_server.script(whole_reply(whole))
    with pytest.raises(LLMResponseError, match=f"with the finish reason '{reason}'") as caught:
        await client.text_completion("Say")
    assert caught.value.partial["choices"][0]["text"] == "Hel"


@pytest.mark.parametrize(
    "reason",
    ["stop", "length", "tool_calls", "content_filter", "eos_token", "repetition", "a reason of the future", ""],
)
async def test_other_finish_reasons_are_accepted(
    scripted_server: ScriptedServer, client: LLMClient, reason: str
) -> None:
    scripted_server.script(
        sse(*HALF, piece(finish_reason=reason), done=True),
        whole_reply({"choices": [{"index": 0, "message": {"content": "Hello"}, "finish_reason": reason}]}),
        whole_reply({"choices": [{"index": 0, "text": "Hello", "finish_reason": reason}]}),
    )
    assert text_of(await collect(await opened(client))) == "Hello"
    assert text_of(await client.chat_completion(MESSAGES)) == "Hello"
    assert text_of(await client.text_completion("Say")) == "Hello"


async def test_the_second_of_two_answers_may_be_the_aborted_one(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    choices = [
        {"index": 0, "message": {"content": "Hello"}, "finish_reason": "stop"},
        {"index": 1, "message": {"content": "Hel"}, "finish_reason": "abort"},
    ]
    other = {"index": 1, "delta": {"content": "Hel"}, "finish_reason": "abort"}
    scripted_server.script(whole_reply({"choices": choices}), sse(*HALF, END, piece(choices=[other]), done=True))
    with pytest.raises(LLMResponseError, match="finish reason 'abort'"):
        await client.chat_completion(MESSAGES, n=2)
    with pytest.raises(LLMResponseError, match="finish reason 'abort'") as caught:
        await collect(await client.chat_completion(MESSAGES, n=2, stream=True))
    texts = [choice["message"]["content"] for choice in caught.value.partial["choices"]]
    assert texts == ["Hello", "Hel"]


CRASH = "The model has crashed without additional information."


@pytest.mark.parametrize("error", [{"message": CRASH, "code": 502}, CRASH, {"error": {"message": CRASH}}])
@pytest.mark.parametrize("reason", ["error", "stop", None])
async def test_an_error_in_a_choice_is_an_error_of_its_class(
    scripted_server: ScriptedServer, client: LLMClient, error: Any, reason: str | None
) -> None:
    ends: list[dict[str, Any]] = [
        {"index": 0, "delta": {"content": "!"}, "finish_reason": reason, "error": error},
        {"index": 0, "delta": {"content": "!", "error": error}, "finish_reason": reason},
        {"index": 0, "error": error},
    ]
    for end in ends:
        scripted_server.script(sse(*HALF, piece(choices=[end]), done=True))
        with pytest.raises(ModelLoadError, match="The model has crashed") as caught:
            await text_by_the_loop_of_the_readme(await opened(client))
        assert caught.value.partial["choices"][0]["message"]["content"].startswith("Hello")
        assert (caught.value.status, caught.value.context["model"]) == (200, "test-model")

    plain: list[dict[str, Any]] = [
        {"index": 0, "message": {"content": "Hel"}, "finish_reason": reason, "error": error},
        {"index": 0, "message": {"content": "Hel", "error": error}, "finish_reason": reason},
        {"index": 0, "finish_reason": reason, "error": error},
    ]
    for choice in plain:
        scripted_server.script(whole_reply({"choices": [choice]}))
        with pytest.raises(ModelLoadError, match="The model has crashed") as caught:
            await client.chat_completion(MESSAGES)
        assert caught.value.partial["choices"][0]["message"]["content"] in ("Hel", None)
        assert json.loads(caught.value.body or "")["choices"][0]["finish_reason"] == reason


async def test_an_error_in_a_choice_of_a_text_completion_is_an_error(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    end = {"index": 0, "text": "", "error": {"message": "No."}}
    scripted_server.script(sse(*TEXT_HALF, {"choices": [end]}), whole_reply({"choices": [end]}))
    with pytest.raises(LLMStreamError, match=r"the server ended the stream: No\.") as caught:
        await collect(await client.text_completion("Say", stream=True))
    assert caught.value.partial["choices"][0]["text"] == "Hello"
    with pytest.raises(LLMResponseError, match=r"but with an error: No\."):
        await client.text_completion("Say")


async def test_the_error_for_a_plain_reply_has_the_answer_beside_it(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    chat = {"choices": [{"index": 0, "message": {"content": [{"type": "text", "text": "Hel"}]}}]}
    text = {"choices": [{"index": 0, "text": "Hel"}]}
    scripted_server.script(*(whole_reply({**each, "error": {"message": CRASH}}) for each in (chat, text)))
    with pytest.raises(ModelLoadError, match="The model has crashed") as caught:
        await client.chat_completion(MESSAGES)
    assert text_of(caught.value.partial) == "Hel"
    with pytest.raises(ModelLoadError, match="The model has crashed") as caught:
        await client.text_completion("Say")
    assert caught.value.partial["choices"][0]["text"] == "Hel"

    others: list[dict[str, Any]] = [{}, {"choices": []}, {"choices": None}, {"choices": [{"text": 1}]}]
    for other in others:
        scripted_server.default = whole_reply({**other, "error": {"message": CRASH}})
        for call in (client.chat_completion(MESSAGES), client.text_completion("Say")):
            with pytest.raises(ModelLoadError, match="The model has crashed") as caught:
                await call
            assert caught.value.partial is None


async def test_an_empty_error_in_a_choice_is_no_error(scripted_server: ScriptedServer, client: LLMClient) -> None:
    errors: list[Any] = [None, {}, "", False]
    for error in errors:
        end = {"index": 0, "delta": {}, "finish_reason": "stop", "error": error}
        scripted_server.script(sse(*HALF, piece(choices=[end]), done=True))
        assert text_of(await collect(await opened(client))) == "Hello"


async def test_the_key_in_an_error_of_a_choice_is_not_repeated(scripted_server: ScriptedServer) -> None:
    end = {"index": 0, "delta": {}, "error": {"message": "the key sk-secret is wrong"}}
    plain = {"index": 0, "message": {"content": ""}, "error": end["error"]}
    async with LLMClient(scripted_server.api_base, api_key="sk-secret") as client:
        scripted_server.script(sse(*HALF, piece(choices=[end])), whole_reply({"choices": [plain]}))
        with pytest.raises(LLMStreamError) as caught:
            await collect(await opened(client))
        assert "sk-secret" not in f"{caught.value} {caught.value.body}"
        with pytest.raises(LLMResponseError) as refused:
            await client.chat_completion(MESSAGES)
        assert "sk-secret" not in f"{refused.value} {refused.value.body}"


async def test_a_finish_reason_may_be_an_object(scripted_server: ScriptedServer, client: LLMClient) -> None:
    aborted = {"type": "abort", "message": CRASH, "status_code": 500}
    for reason, match in ((aborted, "The model has crashed"), ({"type": "abort"}, "finish reason 'abort'")):
        scripted_server.script(sse(*HALF, piece(finish_reason=None, choices=[choice_with(reason)]), done=True))
        with pytest.raises(LLMError, match=match) as caught:
            await collect(await opened(client))
        assert caught.value.partial["choices"][0]["message"]["content"] == "Hello"
    scripted_server.script(sse(*HALF, piece(choices=[choice_with({"type": "stop", "matched": 2})]), done=True))
    assert (await collect(await opened(client)))["choices"][0]["finish_reason"] == "stop"


def choice_with(finish_reason: Any) -> dict[str, Any]:
    return {"index": 0, "delta": {}, "finish_reason": finish_reason}


async def test_a_stream_of_another_client_is_checked_in_the_same_way() -> None:
    async def chunks(*sent: Any) -> AsyncIterator[Any]:
        for chunk in sent:
            yield chunk

    with pytest.raises(LLMResponseError, match="finish reason 'abort'") as caught:
        await collect(chunks(*HALF, piece(finish_reason="abort")))
    assert caught.value.partial["choices"][0]["message"]["content"] == "Hello"
    with pytest.raises(ModelLoadError):
        await collect(chunks(*HALF, piece(choices=[{"error": {"message": CRASH}}])))
    assert text_of(await collect(chunks({"choices": None}, *HALF, {"choices": [None]}, END))) == "Hello"


# Content in parts

PARTS: list[Any] = [
    [{"type": "text", "text": "Hel"}],
    [{"type": "text", "text": "l"}, {"type": "text", "text": "o"}],
    [{"type": "output_text", "text": " you"}, " the", None, {"text": "re"}],
]


@pytest.mark.parametrize("as_object", [False, True])
async def test_the_parts_of_a_streamed_content_are_joined_to_a_text(
    scripted_server: ScriptedServer, client: LLMClient, as_object: bool
) -> None:
    contents = [*PARTS, "!"] if not as_object else [{"type": "text", "text": "Hello you there!"}]
    choices = [{"index": 0, "delta": {"role": "assistant", "content": content}} for content in contents]
    scripted_server.default = sse(*(piece(choices=[choice]) for choice in choices), END, done=True)
    assert await text_by_the_loop_of_the_readme(await opened(client)) == "Hello you there!"
    whole = await collect(await opened(client))
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Hello you there!"}
    async with client.stream_chat(MESSAGES) as stream:
        assert "".join([text async for text in stream.text()]) == "Hello you there!"
    assert (await Agent(client).run("Go.")).text == "Hello you there!"


async def test_the_parts_of_a_plain_content_are_joined_to_a_text(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    scripted_server.script(
        whole_reply({"choices": [{"message": {"content": parts}}]}),
        whole_reply({"choices": [{"index": 0, "text": parts}]}),
    )
    assert (await client.chat_completion(MESSAGES))["choices"][0]["message"] == {"content": "Hello"}
    assert (await client.text_completion("Say"))["choices"][0]["text"] == "Hello"


MISTRAL = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}, {"type": "text", "text": "m."}]},
    {"type": "text", "text": "Hello"},
]


async def test_the_thinking_among_the_parts_is_reasoning(scripted_server: ScriptedServer, client: LLMClient) -> None:
    choices = [{"index": 0, "delta": {"content": [part]}} for part in MISTRAL]
    streamed = sse(*(piece(choices=[choice]) for choice in choices), END, done=True)
    scripted_server.script(streamed, streamed, whole_reply({"choices": [{"message": {"content": MISTRAL}}]}))
    whole = await collect(await opened(client))
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "reasoning_content": "Hmm."}
    result = await Agent(client).run("Go.")
    assert (result.text, result.reasoning) == ("Hello", "Hmm.")
    plain = await client.chat_completion(MESSAGES)
    assert plain["choices"][0]["message"] == {"content": "Hello", "reasoning_content": "Hmm."}
    assert split_reasoning(plain) == ("Hmm.", "Hello")


@pytest.mark.parametrize(
    "thinking",
    [
        {"type": "thinking", "thinking": "Hmm."},
        {"type": "reasoning", "text": "Hmm."},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hmm."}]},
        {"type": "reasoning_text", "text": "Hmm."},
        {"type": "thinking", "content": ["Hm", "m."]},
    ],
)
def test_a_reply_in_parts_can_be_split(thinking: Any) -> None:
    whole = {"choices": [{"index": 0, "message": {"content": [thinking, {"type": "text", "text": "Hello"}]}}]}
    before = copy.deepcopy(whole)
    assert split_reasoning(whole) == ("Hmm.", "Hello")
    assert text_of(whole) == "Hello"
    pieces = ReasoningSplitter().feed({"choices": [{"index": 0, "delta": whole["choices"][0]["message"]}]})
    assert pieces == [("reasoning", "Hmm."), ("text", "Hello")]
    assert whole == before


def test_parts_that_hold_no_text_are_kept() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    accumulator = ChatAccumulator()
    for content in ([{"type": "text", "text": "See"}, image], [image, {"type": "refusal", "refusal": "No."}]):
        accumulator.add({"choices": [{"index": 0, "delta": {"content": content}}]})
    message: Any = accumulator.reply()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "See", "refusal": "No.", "content_parts": [image, image]}


def test_a_tag_in_a_text_in_parts_is_reasoning() -> None:
    parts = [{"type": "text", "text": "<thi"}, {"type": "text", "text": "nk>Hm.</think>Hello"}]
    assert split_reasoning({"choices": [{"message": {"content": parts}}]}) == ("Hm.", "Hello")
