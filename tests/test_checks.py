"""The checks of arguments: what they accept, what they refuse, and what the errors say."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import pytest

from lmbridge._checks import (
    as_validator,
    check_bool,
    check_callable,
    check_choice,
    check_instance,
    check_integer,
    check_model_name,
    check_path,
    check_seconds,
    check_text,
)
from lmbridge.config import Timeouts
from lmbridge.errors import LLMValidationError

Check = Callable[[str, Any], Any]


async def async_function() -> None: ...


ACCEPTED: list[tuple[Check, list[Any]]] = [
    (check_integer, [1, 10**30]),
    (partial(check_integer, minimum=0, maximum=9), [0, 9]),
    (partial(check_integer, optional=True), [1, None]),
    (partial(check_integer, keyword="auto"), [1, "auto"]),
    (check_seconds, [1, 0.001, 1e9, None]),
    (partial(check_seconds, optional=False), [1]),
    (check_text, ["x", " x "]),
    (partial(check_text, optional=True), ["x", None]),
    (partial(check_choice, choices=("warn", "raise")), ["warn", "raise"]),
    (check_bool, [True, False]),
    (check_callable, [len, async_function]),
    (partial(check_callable, sync=True, optional=True), [len, None]),
    (partial(check_instance, kind=Timeouts), [Timeouts()]),
    (partial(check_instance, kind=Timeouts, optional=True), [Timeouts(), None]),
    (check_path, ["mcp.json", Path("mcp.json")]),
    (partial(check_path, optional=True), ["mcp.json", None]),
    (lambda name, value: check_model_name(value, name=name), ["qwen", None]),
]

REFUSED: list[tuple[Check, list[Any], str]] = [
    (check_integer, [0, -1, 1.0, math.inf, True, None, "1"], "an integer of at least 1"),
    (partial(check_integer, minimum=0), [-1], "an integer of at least 0"),
    (partial(check_integer, minimum=0, maximum=65_535), [-1, 65_536], "an integer from 0 to 65535"),
    (partial(check_integer, optional=True), [0], "an integer of at least 1 or None"),
    (partial(check_integer, keyword="auto"), [0, "none"], "an integer of at least 1 or 'auto'"),
    (check_seconds, [0, -1, math.inf, math.nan, True, "5", [5]], "a positive number of seconds or None"),
    (partial(check_seconds, optional=False), [0, None], "a positive number of seconds"),
    (check_text, ["", " ", None, 1, b"x"], "a string that is not blank"),
    (partial(check_text, optional=True), ["", 1], "a string that is not blank or None"),
    (partial(check_choice, choices=("warn", "raise", "ignore")), ["no", None, ["warn"]], "'warn', 'raise' or 'ignore'"),
    (check_bool, [0, 1, "no", None], "True or False"),
    (check_callable, [1, None], "a function"),
    (partial(check_callable, optional=True), [1], "a function or None"),
    (partial(check_callable, sync=True), [1, async_function], "a plain (not async) function"),
    (partial(check_instance, kind=Timeouts), [5, None, Timeouts], "an instance of Timeouts"),
    (partial(check_instance, kind=Timeouts, optional=True), [5], "an instance of Timeouts or None"),
    (check_path, ["", None, 1], "the path of a file"),
    (partial(check_path, optional=True), ["", 1], "the path of a file or None"),
]


@pytest.mark.parametrize(("check", "value"), [(check, value) for check, values in ACCEPTED for value in values])
def test_a_value_that_can_be_used_is_returned(check: Check, value: Any) -> None:
    assert check("option", value) is value


@pytest.mark.parametrize(
    ("check", "value", "expected"),
    [(check, value, expected) for check, values, expected in REFUSED for value in values],
)
def test_the_error_says_what_the_argument_must_be_and_what_it_is(check: Check, value: Any, expected: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        check("option", value)
    assert str(caught.value) == f"option must be {expected}, not {value!r}; leave option out to use its default"


@pytest.mark.parametrize(
    ("model", "hint"),
    [
        ("", r"list_models\(\) returns the names"),
        (" ", r"list_models\(\) returns the names"),
        ({"name": "qwen"}, r"list_models\(\) returns the names"),
        (5, "pass a number of seconds as timeout="),
        (["qwen"], "pass one name"),
    ],
)
def test_a_model_name_that_is_not_one_is_refused_with_what_to_pass(model: Any, hint: str) -> None:
    with pytest.raises(LLMValidationError, match=f"^model must be the name of a model or None, not .*; {hint}"):
        check_model_name(model)


def test_a_hint_says_what_else_to_do() -> None:
    with pytest.raises(LLMValidationError) as caught:
        check_integer("max_retries", -1, minimum=0, hint="use 0 to switch retries off")
    assert str(caught.value) == "max_retries must be an integer of at least 0, not -1; use 0 to switch retries off"


def test_a_long_value_is_not_repeated_as_a_whole() -> None:
    with pytest.raises(LLMValidationError) as caught:
        check_integer("size", "x" * 10_000)
    assert len(str(caught.value)) < 200


def test_a_secret_is_never_repeated() -> None:
    with pytest.raises(LLMValidationError) as caught:
        check_text("api_key", b"hunter2", secret=True)
    assert str(caught.value) == "api_key must be a string that is not blank; leave api_key out to use its default"


def test_a_check_validates_a_field_of_an_attrs_class() -> None:
    @attrs.frozen
    class Options:
        count: int = attrs.field(default=1, validator=as_validator(check_integer, minimum=0))
        idle: float | None = attrs.field(default=None, validator=as_validator(check_seconds, owner="Options"))

    assert Options(0, 5) == attrs.evolve(Options(), count=0, idle=5)
    with pytest.raises(LLMValidationError, match=r"^count must be an integer of at least 0, not -1;"):
        Options(-1)
    with pytest.raises(LLMValidationError, match=r"^Options\.idle must be a positive number"):
        attrs.evolve(Options(), idle=0)
