from __future__ import annotations

import collections
import datetime as dt
import decimal
import math
import pathlib
import types
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lmbridge import LLMClient, LLMError
from lmbridge.client.input_checks import check_messages
from lmbridge.errors import LLMValidationError
from lmbridge.testing import ScriptedServer, reply

USER = {"role": "user", "content": "Hello"}
CONTENT = "a string or a list of content parts"
EXAMPLE = "[{'role': 'user', 'content': 'Hello'}]"


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        (USER,),
        [types.MappingProxyType(USER)],
        collections.deque([USER]),
        [{"role": "assistant", "content": None, "tool_calls": []}],
        [{"role": "assistant"}],
        [{"role": "user", "content": ""}],
        [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
        [{"role": "user", "content": ({"type": "text", "text": "Hello"},)}],
        [{"role": "a role of the future", "content": "x", "name": "y"}],
    ],
)
def test_messages_are_a_sequence_of_mappings_with_a_role(messages: Any) -> None:
    check_messages(messages)


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (None, f"messages must be a list of messages, not None; for example {EXAMPLE}"),
        ("Hello", f"messages must be a list of messages, not str; for example {EXAMPLE}"),
        (b"Hello", f"messages must be a list of messages, not bytes; for example {EXAMPLE}"),
        (USER, f"messages must be a list of messages, not dict; for example {EXAMPLE}"),
        (iter([USER]), f"messages must be a list of messages, not list_iterator; for example {EXAMPLE}"),
        ({1}, f"messages must be a list of messages, not set; for example {EXAMPLE}"),
        ([], f"messages is empty; give at least one message, like {EXAMPLE}"),
        ((), f"messages is empty; give at least one message, like {EXAMPLE}"),
        ([USER, "Hello"], f"messages[1] must be a dict, not str; for example {EXAMPLE}"),
        ([None], f"messages[0] must be a dict, not None; for example {EXAMPLE}"),
        ([USER, USER, {}], "messages[2] has no role; add 'role': 'system', 'user', 'assistant' or 'tool'"),
        ([{"role": ""}], "messages[0] has no role; add 'role': 'system', 'user', 'assistant' or 'tool'"),
        ([{"role": 1}], "messages[0] has no role; add 'role': 'system', 'user', 'assistant' or 'tool'"),
        (
            [{"role": "user", "content": 7}],
            f"messages[0].content must be {CONTENT}, not int; for an image, see image_part()",
        ),
        (
            [USER, {"role": "user", "content": {"type": "text"}}],
            f"messages[1].content must be {CONTENT}, not dict; for an image, see image_part()",
        ),
        (
            [{"role": "user", "content": b"Hello"}],
            f"messages[0].content must be {CONTENT}, not bytes; for an image, see image_part()",
        ),
    ],
)
def test_other_messages_are_refused_with_their_place_and_the_right_form(messages: Any, text: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        check_messages(messages)
    assert str(caught.value) == text


# Values that JSON does not have


class Text(str):
    """Like `numpy.str_`."""

    __slots__ = ()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_value_that_json_does_not_have_is_refused_by_every_endpoint(
    scripted_server: ScriptedServer, client: LLMClient, stream: bool
) -> None:
    image = {"type": "image_url", "image_url": {"url": b"data"}}
    chat, text, respond = client.chat_completion, client.text_completion, client.create_response
    requests: list[tuple[Callable[[], Awaitable[Any]], str]] = [
        (lambda: chat([{**USER, "content": [image]}], stream=stream), r"messages\[0\]\.content\[0\]\.image_url\.url"),
        (lambda: chat([USER, {**USER, "name": uuid.UUID(int=1)}], stream=stream), r"messages\[1\]\.name"),
        (lambda: chat([USER], stream=stream, temperature=decimal.Decimal("0.5")), "temperature"),
        (lambda: chat([USER], stream=stream, stop={"a"}), "stop"),
        (lambda: chat([USER], stream=stream, tools=[{"type": "function", "x": {1.5: 1}}]), r"tools\[0\]\.x"),
        (lambda: chat([USER], stream=stream, extra_body={"now": dt.date(2026, 1, 1)}), "now"),
        (lambda: chat([USER], stream=stream, extra_body={"options": {"top_k": math.nan}}), r"options\.top_k"),
        (lambda: text("Say", stream=stream, suffix=pathlib.PurePath("/x")), "suffix"),
        (lambda: text("Say", stream=stream, extra_body={"a": [b""]}), r"a\[0\]"),
        (lambda: respond("Say", stream=stream, metadata={"a": decimal.Decimal(1)}), r"metadata\.a"),
        (lambda: respond([{"role": "user", "content": {"a"}}], stream=stream), r"input\[0\]\.content"),
        (lambda: client.embeddings("Say", dimensions=decimal.Decimal(1)), "dimensions"),
        (lambda: client.parse([USER], int, seed=1j), "seed"),
        (lambda: client.ask("Say", seed=1j), "seed"),
    ]  # fmt: skip
    for request, path in requests:
        with pytest.raises(LLMValidationError, match=f"^{path} (is|cannot be sent) ") as caught:
            await request()
        assert "JSON" in str(caught.value)
    assert scripted_server.requests == []


async def test_an_instance_of_a_subclass_of_str_is_sent_as_its_text_by_every_endpoint(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = reply(400, {})
    said, model = Text("Hello"), Text("other")
    message = {Text("role"): Text("user"), "content": said}
    requests: list[tuple[Awaitable[Any], str, Any]] = [
        (client.chat_completion([message], model=model), "messages", [USER]),
        (client.chat_completion([message], model=model, stream=True), "messages", [USER]),
        (client.ask(said, model=model), "messages", [USER]),
        (client.text_completion(said, model=model), "prompt", "Hello"),
        (client.text_completion([said, "x"], model=model), "prompt", ["Hello", "x"]),
        (client.embeddings(said, model=model), "input", "Hello"),
        (client.embeddings([said], model=model), "input", ["Hello"]),
        (client.create_response(said, model=model), "input", "Hello"),
        (client.create_response([message], model=model), "input", [USER]),
        (client.chat_completion([USER], model=model, extra_body={"x": said}), "x", "Hello"),
    ]
    for request, key, sent in requests:
        with pytest.raises(LLMError):
            await request
        body = scripted_server.requests[-1].json
        assert (body["model"], body[key]) == ("other", sent)
