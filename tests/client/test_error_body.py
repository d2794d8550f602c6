"""The bodies of errors are read whatever they contain, and however large they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge import ContextLengthExceededError, LLMError, LLMStreamError, ModelLoadError, ModelNotFoundError
from lmbridge.client import failures
from lmbridge.client.error_body import is_error_object, parse_error_body
from lmbridge.transport import Transport, Verdict
from tests.client.error_texts import ALARMING_TEXTS, Body, openai_error
from tests.support import assert_linear


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"error": "x"}, True),
        ({"error": {"message": "x"}}, True),
        ({"error": {"message": "x"}, "choices": []}, True),
        ({"error": {}}, True),
        ({"error": ""}, True),
        ({"error": None}, False),
        ({"error": False}, False),
        ({"error": {}, "choices": []}, False),
        ({"object": "error", "message": "x"}, True),
        ({"object": "error"}, True),
        ({"message": "x"}, True),
        ({"detail": "x"}, True),
        ({"detail": [{"msg": "x"}]}, True),
        ({"code": 400, "details": "x"}, True),
        ({"message": ""}, False),
        ({"message": {"role": "assistant", "content": "x"}}, False),
        ({"message": "x", "choices": []}, False),
        ({"message": "x", "data": []}, False),
        ({"message": "x", "output": []}, False),
        ({"message": "x", "models": []}, False),
        ({"details": {"family": "llama"}, "model_info": {}}, False),
        ({}, False),
        ({"status": "ok"}, False),
    ],
)
def test_errors_are_distinguished_from_replies(value: dict[str, Any], expected: bool) -> None:
    assert is_error_object(value) is expected


JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ALARMING_TEXTS),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["error", "message", "detail", "type", "code", "choices", "n_ctx", "object"]), inner
        )
    ),
    max_leaves=10,
)


@given(JSON, st.sampled_from([200, 400, 401, 429, 500, 503]))
def test_any_json_can_be_parsed(value: Any, status: int) -> None:
    error_body = parse_error_body(json.dumps(value))
    assert isinstance(error_body.message, str)
    assert isinstance(failures.classify(status, {}, json.dumps(value).encode()), Verdict)
    kind = failures.error_class(error_body, status)
    assert kind is None or issubclass(kind, LLMError)
    assert isinstance(failures.error_from_event(error_body, {}), kind if status == 200 and kind else LLMError)
    if isinstance(value, dict):
        assert is_error_object(value) in (True, False)


@given(st.binary())
def test_any_bytes_can_be_parsed(body: bytes) -> None:
    assert isinstance(failures.classify(500, {}, body), Verdict)
    assert parse_error_body(body.decode("utf-8", "replace")).text == body.decode("utf-8", "replace")


def as_message(text: str) -> str:
    return json.dumps({"error": {"message": text}})


HOSTILE: Final[Mapping[str, Callable[[int], str]]] = {
    "brackets": lambda size: "[" * size,
    "nested errors": lambda size: '{"error":' * (size // 9),
    "an error at the bottom": lambda size: '{"error":' * 900 + json.dumps("a" * size) + "}" * 900,
    "digits": lambda size: as_message("exceed_context_size_error " + "1" * size),
    "digits as text": lambda size: "exceed_context_size_error " + "1" * size,
    "numbers": lambda size: as_message("exceed_context_size_error n_ctx: " + "9 " * (size // 2)),
    "examples": lambda size: as_message("model_not_found " + "(e.g. " * (size // 6)),
    "lists of models": lambda size: as_message("model_not_found " + "your models:" * (size // 12)),
    "models": lambda size: as_message(f"model 'x' not found (e.g., {', '.join(map(str, range(size // 7)))})"),
    "similar models": lambda size: as_message(
        f"model 'x{'a' * 80}' not found (e.g. {','.join('a' * 70 + str(i) for i in range(size // 75))})"
    ),
    "models on lines": lambda size: "Your models:" + "\n-" * (size // 2) + " model 'x' not found",
    "a name": lambda size: as_message("model " + "1" * size),
    "names": lambda size: as_message("model 1" * (size // 7)),
    "quotes": lambda size: as_message("model '" * (size // 7)),
    "words": lambda size: as_message("exceeds " + "a " * (size // 2)),
    "context of": lambda size: as_message("context length exceeded: context length" + " of" * (size // 3)),
    "expected": lambda size: as_message("expected " * (size // 9)),
    "spaces": lambda size: as_message("a" + " " * size),
    "spaces as text": lambda size: " " * size,
    "escapes": lambda size: '{"error": {"message": "' + "\\u00e9" * (size // 6) + '"}}',
    "backslashes": lambda size: '{"error": {"message": "' + "\\\\" * (size // 2) + '"}}',
    "keys": lambda size: json.dumps({"error": {f"key{i}": i for i in range(size // 14)}}),
    "numbers in a list": lambda size: json.dumps({"error": [1] * (size // 3)}),
    "validation errors": lambda size: json.dumps({"detail": [{"loc": [], "msg": ""}] * (size // 22)}),
    "validation error": lambda size: "1" * size + " validation errors",
    "an HTML page": lambda size: "<html>" + "<p>model not found" * (size // 18),
    "secrets": lambda size: "sk-secre" * (size // 8),
}
"""Bodies of errors on which a careless reader would spend time that grows faster than their size."""


@pytest.mark.slow
@pytest.mark.timeout(10)
@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_the_time_for_a_hostile_body_does_not_grow_faster_than_its_size(hostile: Callable[[int], str]) -> None:
    redact = Transport("http://127.0.0.1:1", api_key="sk-secret").redact

    def read(size: int) -> None:
        body = hostile(size)
        for status in (400, 500, 503):
            failures.classify(status, {}, body.encode())
        str(failures.error_from_event(parse_error_body(body, redact), {"model": "qwen"}))

    assert_linear(read, 10_000)


def test_an_error_that_names_a_hundred_thousand_models_is_a_missing_model() -> None:
    names = [f"qwen3-{number}b" for number in range(100_000)]
    body = as_message(f'Invalid model identifier "qwen". Please specify a downloaded model (e.g., {", ".join(names)}).')
    error = failures.error_from_event(parse_error_body(body), {"model": "QWEN3-1B"})
    assert isinstance(error, ModelNotFoundError)
    assert error.available_models == names[: len(error.available_models)]
    assert len(error.available_models) > 1000
    assert "did you mean 'qwen3-1b'" in str(error)


LARGE: Final = 2_000_000


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (openai_error("x" * LARGE), LLMStreamError, "x" * 500),
        ({"error": "x" * LARGE}, LLMStreamError, "x" * 500),
        ({"detail": "x" * LARGE}, LLMStreamError, "x" * 500),
        ("x" * LARGE, LLMStreamError, "x" * 500),
        (openai_error("The model has crashed.", data="x" * LARGE), ModelLoadError, "The model has crashed."),
        ({"data": ["x"] * 500_000, "error": "model crashed"}, ModelLoadError, "model crashed"),
        ({"message": {"details": {"message": "model crashed"}}, "z": "x" * LARGE}, ModelLoadError, "model crashed"),
        (openai_error("\u00e9 \U0001f600" * (LARGE // 20)), LLMStreamError, "stream: \u00e9 \U0001f600"),
        (
            {"detail": [{"loc": ["body", "model"], "msg": "Field required", "input": "model crashed " * 400_000}]},
            LLMStreamError,
            '[{"loc": ["body", "model"], "msg": "Field required"}]',
        ),
        ({"error": {"message": ["model crashed"] * 100_000}}, LLMStreamError, " bytes of JSON"),
        ({"detail": [{"loc": ["body"], "msg": "model crashed"}] * 20_000}, LLMStreamError, " bytes of JSON"),
        ({"error": {"type": "exceed_context_size_error", "n_ctx": 8, "n_prompt_tokens": 9, "message": "x" * LARGE}},
         ContextLengthExceededError, "x" * 500),
    ],
    ids=["object", "string", "detail", "text", "field", "list", "nested", "escapes", "input", "array", "items", "code"],
)  # fmt: skip
def test_a_large_body_becomes_the_error_that_its_message_names(body: Body, kind: type[LLMError], message: str) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    error = failures.error_from_event(parse_error_body(text), {})
    assert type(error) is kind
    assert message in error.message
    assert len(str(error)) < 1000
    assert error.body is not None
    assert text.startswith(error.body)
    assert len(error.body) < 250_000


def test_a_large_error_says_how_large_it_was() -> None:
    body = json.dumps({"error": "no " * 100_000})
    error = failures.error_from_event(parse_error_body(body), {})
    assert error.message.endswith(f"... (from a body of {len(body)} bytes)")


def test_the_numbers_of_a_large_error_are_found() -> None:
    fields = {"type": "exceed_context_size_error", "message": "x" * LARGE, "n_ctx": 8, "n_prompt_tokens": 9}
    error = failures.error_from_event(parse_error_body(json.dumps({"error": fields})), {})
    assert isinstance(error, ContextLengthExceededError)
    assert (error.prompt_tokens, error.context_length) == (9, 8)


@pytest.mark.parametrize("position", [0, 249_995, 249_999, 400_000])
@pytest.mark.parametrize("make", [str, as_message], ids=["text", "json"])
def test_a_key_in_a_large_body_is_redacted(position: int, make: Callable[[str], str]) -> None:
    redact = Transport("http://127.0.0.1:1", api_key="sk-secret").redact
    body = make("." * position + "sk-secret" + "." * LARGE)
    error = failures.error_from_event(parse_error_body(body, redact), {})
    assert "sk-" not in f"{error}{error.body}"
