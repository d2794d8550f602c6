from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import json
import math
import pathlib
import types
import uuid
from typing import Any, NamedTuple

import attrs
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge.client.json_codec import decode_json, decode_strictly, decode_whole_characters, encode_body
from lmbridge.errors import LLMValidationError

USER = {"role": "user", "content": "Hello"}
HINT = "give strings, numbers, booleans, None, lists and dicts with string keys"


class Pair(NamedTuple):
    first: int
    second: int


class Number(enum.IntEnum):
    ONE = 1


class Flag(enum.IntFlag):
    A = 1
    B = 2


class Color(enum.Enum):
    RED = 1


# Encoding requests


def test_a_body_is_encoded_in_its_own_order() -> None:
    body = {"messages": [USER], "b": 1, "a": [1.5, True, None, {"deep": {"er": "é\u2028"}}], "big": 2**70}
    assert encode_body(body) == json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def test_any_mapping_is_sent_as_an_object_and_any_sequence_as_an_array() -> None:
    body = {
        "proxy": types.MappingProxyType({"a": collections.UserDict(b=1)}),
        "chain": collections.ChainMap({"a": 1}, {"b": 2}),
        "deque": collections.deque([1, (2, range(3))]),
        "list": collections.UserList([1]),
        "named tuple": Pair(1, 2),
        "ordered": collections.OrderedDict(b=1, a=2),
        "keys": {1: "a", Number.ONE: "b", -2: "c"} | {10**30: "d"},
    }
    assert decode_json(encode_body(types.MappingProxyType(body))) == {
        "proxy": {"a": {"b": 1}},
        "chain": {"a": 1, "b": 2},
        "deque": [1, [2, [0, 1, 2]]],
        "list": [1],
        "named tuple": [1, 2],
        "ordered": {"b": 1, "a": 2},
        "keys": {"1": "b", "-2": "c", str(10**30): "d"},
    }


class Text(str):
    """Like `numpy.str_` and `markupsafe.Markup`."""

    __slots__ = ()

    def __str__(self) -> str:
        return "another text"

    def __iter__(self) -> Any:
        raise AssertionError("a text was taken for a sequence")


class Integer(int):
    def __repr__(self) -> str:
        return "another number"


class Float(float):
    """Like `numpy.float64`."""

    def __repr__(self) -> str:
        return "another number"


class Role(str, enum.Enum):  # noqa: UP042 - the older form is what the test is about
    USER = "user"


class PlainRole(enum.StrEnum):
    USER = "user"


SUBCLASSES: list[tuple[Any, Any]] = [
    (Text("Hello"), "Hello"),
    (collections.UserString("Hello"), "Hello"),
    (Role.USER, "user"),
    (PlainRole.USER, "user"),
    (Integer(7), 7),
    (Number.ONE, 1),
    (Flag.A | Flag.B, 3),
    (Float(0.5), 0.5),
]


@pytest.mark.parametrize(("value", "plain"), SUBCLASSES)
def test_an_instance_of_a_subclass_is_sent_as_the_text_or_number_that_it_is(value: Any, plain: Any) -> None:
    body = {"a": value, "b": [value, {"c": (value,)}]}
    assert json.loads(encode_body(body)) == {"a": plain, "b": [plain, {"c": [plain]}]}


def test_a_key_may_be_an_instance_of_a_subclass() -> None:
    body: dict[Any, Any] = {Text("a"): {Role.USER: 1, Integer(7): 2, "x": 3}}
    assert json.loads(encode_body(body)) == {"a": {"user": 1, "7": 2, "x": 3}}


def test_a_pair_of_surrogates_is_sent_as_its_character() -> None:
    body = {"text": "\ud83d" + "\ude42", "\ud83d" + "\ude42": [Text("a\ud83d" + "\ude42")]}
    assert json.loads(encode_body(body)) == {"text": "🙂", "🙂": ["a🙂"]}


class Odd:
    pass


class Raising:
    """An object whose attributes cannot be looked at."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


@attrs.frozen
class Point:
    x: int


@dataclasses.dataclass
class Data:
    x: int


class Struct(msgspec.Struct):
    y: int


class Array:
    """Like an array, or a number of numpy that is not a Python number."""

    def tolist(self) -> list[int]:
        return [1]


class Model:
    """Like a model of pydantic."""

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {}


FOREIGN: list[tuple[Any, str]] = [
    (decimal.Decimal("1.5"), "convert it with float() or str()"),
    (fractions.Fraction(1, 2), "convert it with float() or str()"),
    (b"bytes", "decode it to a string, or encode it as base64"),
    (bytearray(b"bytes"), "decode it to a string, or encode it as base64"),
    (memoryview(b"bytes"), "call its tolist()"),
    ({1, 2}, "convert it with list()"),
    (frozenset({1}), "convert it with list()"),
    ({"a": 1}.keys(), "convert it with list()"),
    (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), "call its isoformat()"),
    (dt.date(2026, 1, 1), "call its isoformat()"),
    (dt.time(1), "call its isoformat()"),
    (dt.timedelta(1), HINT),
    (uuid.UUID(int=1), "convert it with str()"),
    (Color.RED, "give its .value"),
    (pathlib.PurePosixPath("/x"), "convert it with str()"),
    (Point(1), "convert it with attrs.asdict()"),
    (Data(1), "convert it with dataclasses.asdict()"),
    (Struct(1), HINT),
    (msgspec.Raw(b"1"), HINT),
    (msgspec.UNSET, HINT),
    (Array(), "call its tolist()"),
    (Model(), "call its model_dump(mode='json')"),
    (1j, HINT),
    (iter([1]), HINT),
    (print, HINT),
    (int, HINT),
    (..., HINT),
    (Odd(), HINT),
    (Raising(), HINT),
]


@pytest.mark.parametrize(("value", "hint"), FOREIGN, ids=lambda value: type(value).__name__)
def test_a_value_that_json_does_not_have_is_refused_with_its_path_and_never_changed(value: Any, hint: str) -> None:
    for body, path in (
        ({"seed": value}, "seed"),
        ({"messages": [{"role": "user", "content": value}]}, "messages[0].content"),
        ({"tools": (1, [{"a b": value}])}, "tools[1][0]['a b']"),
        ({"metadata": types.MappingProxyType({"a": collections.deque([0, value])})}, "metadata.a[1]"),
        ({"x": {1: value}}, "x['1']"),
    ):
        with pytest.raises(LLMValidationError) as caught:
            encode_body(body)
        kind = type(value).__name__
        assert str(caught.value) == f"{path} is of type {kind}, which cannot be sent as JSON; {hint}"


@pytest.mark.parametrize(
    ("body", "path", "reason"),
    [
        ({"user": "\ud800"}, "user", r"it has half of a surrogate pair, '\ud800', at index 0"),
        ({"x": [{"content": "a \udc00"}]}, "x[0].content", r"it has half of a surrogate pair, '\udc00', at index 2"),
        ({"logit_bias": {(1, 2): 3}}, "logit_bias", "its key (1, 2) is not a string"),
        ({"metadata": {None: 3}}, "metadata", "its key None is not a string"),
        ({"a": {True: 1}}, "a", "its key True is not a string"),
        ({"a": {1.5: 1}}, "a", "its key 1.5 is not a string"),
        ({"a": {b"x": 1}}, "a", "its key b'x' is not a string"),
        ({"a": {Color.RED: 1}}, "a", "its key <Color.RED: 1> is not a string"),
        ({"a": [{decimal.Decimal(1): 1}]}, "a[0]", "its key Decimal('1') is not a string"),
        ({"a": {1: "x", "1": "y"}}, "a", "it has the key '1' twice, as a string and as a number"),
        ({("a", "b"): 1}, "the request", "its key ('a', 'b') is not a string"),
    ],
)
def test_a_text_or_a_key_that_json_does_not_have_is_refused_with_its_path(body: Any, path: str, reason: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        encode_body(body)
    assert str(caught.value) == f"{path} cannot be sent as JSON: {reason}; {HINT}"


def test_a_body_that_contains_itself_is_refused() -> None:
    tools: list[Any] = []
    tools.append(tools)
    with pytest.raises(LLMValidationError, match=r"^tools\[0\].*\.\.\. cannot be sent as JSON: it is nested") as caught:
        encode_body({"tools": tools})
    assert len(caught.value.message) < 250


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": -math.inf}, "temperature is -inf"),
        ({"seed": None, "logit_bias": {"1": 1.0, "2": math.inf}}, "logit_bias['2'] is inf"),
        ({"tools": [{"a": (0.5, math.nan)}]}, "tools[0].a[1] is nan"),
        ({"tools": types.MappingProxyType({"a": collections.deque([math.nan])})}, "tools.a[0] is nan"),
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


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (rb'"a\ud83d"', "a?"),
        (rb'"\uDE42b"', "?b"),
        (rb'"\ud83d\ude42"', "\U0001f642"),
        (b'"\xed\xa0\xbd"', "\ufffd" * 3),
    ],
)
def test_a_half_of_a_surrogate_pair_can_be_replaced(data: bytes, text: str) -> None:
    assert decode_whole_characters(data) == text


def test_nan_is_accepted_whether_halves_are_replaced_or_not() -> None:
    assert math.isnan(decode_whole_characters(b"NaN"))
    with pytest.raises(ValueError, match="Expecting value"):
        decode_whole_characters(b"no JSON")
