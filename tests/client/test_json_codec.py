from __future__ import annotations

import collections
import json
import math
import types
from collections.abc import Mapping
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge.client.json_codec import decode_json, decode_strictly, encode_body
from lmbridge.errors import LLMValidationError

USER = {"role": "user", "content": "Hello"}


# Encoding requests


@attrs.frozen
class Point:
    x: int


class Struct(msgspec.Struct):
    y: int


def test_a_body_is_encoded_in_its_own_order() -> None:
    body = {"messages": [USER], "b": 1, "a": [1.5, True, None, {"deep": {"er": "é\u2028"}}], "big": 2**70}
    assert encode_body(body) == json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def test_any_mapping_is_sent_as_an_object_and_any_sequence_as_an_array() -> None:
    body = {
        "proxy": types.MappingProxyType({"a": collections.UserDict(b=1)}),
        "chain": collections.ChainMap({"a": 1}, {"b": 2}),
        "deque": collections.deque([1, (2, range(3))]),
        "attrs": Point(1),
        "struct": Struct(2),
        "keys": {1: "a"},
    }
    assert decode_json(encode_body(types.MappingProxyType(body))) == {
        "proxy": {"a": {"b": 1}},
        "chain": {"a": 1, "b": 2},
        "deque": [1, [2, [0, 1, 2]]],
        "attrs": {"x": 1},
        "struct": {"y": 2},
        "keys": {"1": "a"},
    }


class Odd:
    pass


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({"tools": Odd()}, "tools is of type Odd"),
        ({"n": 1, "tools": [1, {"a b": [Odd()]}]}, "tools[1]['a b'][0] is of type Odd"),
        ({"tools": (1, types.MappingProxyType({"f": print}))}, "tools[1]['f'] is of type builtin_function_or_method"),
        ({"deque": collections.deque([Odd()])}, "deque[0] is of type Odd"),
        ({"user": "\ud800"}, "user is of type str"),
        ({"messages": [{"role": "user", "content": "half \udc00"}]}, "messages[0]['content'] is of type str"),
        ({"logit_bias": {(1, 2): 3}}, "logit_bias is of type dict"),
        ({"metadata": {None: 3}}, "metadata is of type dict"),
        ({"messages": [{"x": 1, frozenset(): 2}]}, "messages[0] is of type dict"),
        ({("a", "b"): 1}, "the request is of type dict"),
    ],
)
def test_a_value_that_json_does_not_have_is_refused_with_its_path(body: Mapping[Any, Any], path: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        encode_body(body)
    assert str(caught.value).startswith(f"{path}, which cannot be sent as JSON: ")
    assert str(caught.value).endswith("; give strings, numbers, booleans, None, lists and dicts with string keys")
    assert "Odd object" not in str(caught.value)
    assert "recursion" not in str(caught.value)


def test_a_body_that_contains_itself_is_refused() -> None:
    tools: list[Any] = []
    tools.append(tools)
    with pytest.raises(LLMValidationError, match=r"^tools\[0\].* is of type list, which cannot be sent as JSON"):
        encode_body({"tools": tools})


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -math.inf}, "temperature is -inf"),
        ({"seed": None, "logit_bias": {"1": 1.0, "2": math.inf}}, "logit_bias['2'] is inf"),
        ({"tools": [{"a": (0.5, math.nan)}]}, "tools[0]['a'][1] is nan"),
        ({"tools": types.MappingProxyType({"a": collections.deque([math.nan])})}, "tools['a'][0] is nan"),
    ],
)
def test_nan_and_infinity_are_refused_at_any_depth_and_never_sent_as_null(body: dict[str, Any], text: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        encode_body(body)
    assert str(caught.value) == f"{text}, which JSON does not have; give a finite number"


def test_none_is_sent_as_null() -> None:
    body = {"stop": None, "messages": [{"role": "assistant", "content": None}, {"role": "user", "content": "null"}]}
    assert json.loads(encode_body(body)) == body


def test_a_deeply_nested_body_is_sent_or_refused_but_never_a_recursion_error() -> None:
    for depth in range(0, 1200, 50):
        value: Any = None
        for _ in range(depth):
            value = [value]
        try:
            data = encode_body({"x": value})
        except LLMValidationError:
            assert depth > 100
        else:
            assert data.count(b"[") == depth


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(deadline=None)
@given(body=st.dictionaries(st.text(), _json, max_size=4))
def test_encoding_and_decoding_returns_the_same_body(body: dict[str, Any]) -> None:
    assert decode_json(encode_body(body)) == json.loads(encode_body(body)) == body


# Decoding replies


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": [1, 2.5, null, true, "x"]}', {"a": [1, 2.5, None, True, "x"]}),
        (b' "\xc3\xa9" \n', "é"),
        (b'{"logprob": -Infinity, "p": Infinity}', {"logprob": -math.inf, "p": math.inf}),
        (b'{"a": 1e999}', {"a": math.inf}),
        (rb'"\ud83d"', "\ud83d"),
        (rb'"\ud83d\ude42"', "🙂"),
        (b'"a\xffb"', "a\ufffdb"),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\xe6\x97"}', {"a": "\ufffd"}),
    ],
)
def test_replies_are_decoded_as_servers_send_them(data: bytes, value: object) -> None:
    assert decode_json(data) == value


def test_nan_is_decoded() -> None:
    assert math.isnan(decode_json(b"[NaN]")[0])


@pytest.mark.parametrize(
    "data", [b"", b" ", b"{", b"secret", b"{'a': 1}", b'{"a": 1}secret', b"\xff\xfe", b"[" * 100_000, b"1" * 5000]
)
def test_invalid_json_is_a_value_error_that_does_not_repeat_the_data(data: bytes) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        decode_json(data)
    assert "secret" not in f"{caught.value} {vars(caught.value)}"
    assert caught.value.__cause__ is None


def test_the_strict_decoder_raises_a_type_error_for_an_event_object() -> None:
    with pytest.raises(TypeError):
        decode_strictly(Odd())  # type: ignore[arg-type]  # what the test is about
