from __future__ import annotations

import collections
import types
from typing import Any

import pytest

from lmbridge.client.inputs import check_messages
from lmbridge.errors import LLMValidationError

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
            f"messages[0]['content'] must be {CONTENT}, not int; for an image, see image_part()",
        ),
        (
            [USER, {"role": "user", "content": {"type": "text"}}],
            f"messages[1]['content'] must be {CONTENT}, not dict; for an image, see image_part()",
        ),
        (
            [{"role": "user", "content": b"Hello"}],
            f"messages[0]['content'] must be {CONTENT}, not bytes; for an image, see image_part()",
        ),
    ],
)
def test_other_messages_are_refused_with_their_place_and_the_right_form(messages: Any, text: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        check_messages(messages)
    assert str(caught.value) == text
