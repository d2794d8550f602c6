"""How conversations are recognized by the bytes of their requests."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from lmbridge.transport.prefix import WarmPrefixes, conversation_in
from tests.support import assert_linear


def body(**fields: Any) -> bytes:
    return json.dumps({"model": "m", "stream": True, **fields}).encode()


def keys(**fields: Any) -> tuple[bytes, ...]:
    return conversation_in(body(**fields)).keys


def message(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@given(st.lists(st.text(), min_size=1), st.lists(st.text()))
@pytest.mark.parametrize("field", ["messages", "input"])
def test_a_longer_conversation_begins_with_the_keys_of_the_shorter_one(
    field: str, beginning: list[str], more: list[str]
) -> None:
    short = keys(**{field: [message(text) for text in beginning]})
    long = keys(**{field: [message(text) for text in beginning + more]}, temperature=0.5)
    assert len(short) == len(beginning)
    assert long[: len(short)] == short
    assert len(set(long)) == len(long)


@pytest.mark.parametrize("change", ["model", "tools", "system", "instructions"])
def test_what_the_prompt_begins_with_is_a_part_of_every_key(change: str) -> None:
    messages = [message("Hi")]
    assert keys(messages=messages) != keys(messages=messages, **{change: "other"})


def test_a_prompt_of_one_string_is_recognized_by_its_beginning() -> None:
    short, long = keys(prompt="word " * 1000), keys(prompt="word " * 1000 + "and more " * 1000)
    assert len(short) >= 4
    assert long[: len(short)] == short
    assert keys(prompt="too short") == ()


@pytest.mark.parametrize(
    "data",
    [None, b"", b"[]", b"1", b"not JSON", b'{"messages": 1}', b'{"messages": {"a": 1}}', b"{" * 100_000, b"\xff\xfe"],
)
def test_a_body_without_a_conversation_has_no_keys(data: bytes | None) -> None:
    assert conversation_in(data).keys == ()


def test_the_id_of_a_stored_response_is_found() -> None:
    assert conversation_in(body(input="Hi", previous_response_id="r-1")).previous_response_id == "r-1"
    assert conversation_in(body(input="Hi", previous_response_id=None)).previous_response_id is None


def test_the_longest_beginning_that_is_known_counts() -> None:
    warm: WarmPrefixes[str] = WarmPrefixes()
    texts = [message(str(number)) for number in range(4)]
    warm.remember(keys(messages=texts[:1])[-1], "first")
    warm.remember(keys(messages=texts[:3])[-1], "second")
    assert warm.find(keys(messages=texts)) == "second"
    assert warm.find(keys(messages=texts[:2])) == "first"
    assert warm.find(keys(messages=texts[1:])) is None


def test_the_conversation_that_was_not_used_for_longest_is_forgotten() -> None:
    warm: WarmPrefixes[int] = WarmPrefixes(most=2)
    for number in range(2):
        warm.remember(bytes([number]), number)
    assert warm.find((b"\x00",)) == 0
    warm.remember(b"\x02", 2)
    assert [warm.find((bytes([number]),)) for number in range(3)] == [0, None, 2]
    assert len(warm) == 2


def test_finding_the_keys_takes_linear_time() -> None:
    assert_linear(lambda size: conversation_in(body(messages=[message("word " * 20)] * size)), 2_000)
