from __future__ import annotations

import logging
from typing import Any

import pytest

from lmbridge.client.served_model import MismatchPolicy, is_same_model
from lmbridge.errors import ModelMismatchError


@pytest.mark.parametrize(
    "served", ["qwen3-8b", "qwen3-8b:2", "qwen3-8b:15", "qwen3-8b@q4_k_m", "qwen3-8b@8bit", "qwen3-8b@q4_k_m:2"]
)
def test_a_quantization_or_an_instance_is_the_same_model(served: str) -> None:
    assert is_same_model("qwen3-8b", served)


@pytest.mark.parametrize(
    ("asked", "served"),
    [
        ("qwen3-8b", "qwen3-80b"),
        ("qwen3-8b", "qwen3-8b-instruct"),
        ("qwen3-8b", "qwen3-8"),
        ("qwen3-8b", "Qwen3-8B"),
        ("qwen3-8b", "org/qwen3-8b"),
        ("qwen3-8b", "qwen3-8b:latest"),
        ("qwen3-8b", "qwen3-8b:"),
        ("qwen3-8b", "qwen3-8b@"),
        ("qwen3-8b", "qwen3-8b:2:3"),
        ("qwen3-8b", "qwen3-8b:2@q4"),
        ("qwen3-8b", "qwen3-8b@q4@q8"),
        ("qwen3-8b", "qwen3-8b 2"),
        ("qwen3-8b@q4", "qwen3-8b"),
        ("qwen3-8b@q4", "qwen3-8b@q8"),
        ("qwen3-8b:2", "qwen3-8b"),
        ("a.c", "abc"),
    ],
)
def test_any_other_name_is_another_model(asked: str, served: str) -> None:
    assert not is_same_model(asked, served)


def test_a_name_with_a_quantization_is_the_same_as_itself() -> None:
    assert is_same_model("qwen3-8b@q4", "qwen3-8b@q4")
    assert is_same_model("qwen3-8b@q4", "qwen3-8b@q4:2")
    assert is_same_model("llama3:8", "llama3:8")


def test_raise_raises_an_error_with_both_names_and_a_hint() -> None:
    policy = MismatchPolicy("raise")
    for _ in range(2):
        with pytest.raises(ModelMismatchError, match=r"but 'b' answered; .*load the right model") as e:
            policy.check("a", "b")
        assert (e.value.asked, e.value.served) == ("a", "b")
    policy.check("a", "a@q4:2")


def test_warn_logs_each_pair_of_names_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = MismatchPolicy("warn")
    for _ in range(3):
        policy.check("a", "b")
        policy.check("a", "c")
        policy.check("a", "a:2")
    assert [(record.name, record.levelno) for record in caplog.records] == [("lmbridge.client", logging.WARNING)] * 2
    assert [message.split(";")[0] for message in caplog.messages] == [
        "asked for model 'a', but 'b' answered",
        "asked for model 'a', but 'c' answered",
    ]
    # A policy of another client logs the pair again.
    MismatchPolicy("warn").check("a", "b")
    assert len(caplog.records) == 3


def test_ignore_does_nothing(caplog: pytest.LogCaptureFixture) -> None:
    MismatchPolicy("ignore").check("a", "b")
    assert not caplog.records


@pytest.mark.parametrize("asked", [None, ""])
def test_a_request_without_a_model_fits_every_reply(asked: str | None) -> None:
    MismatchPolicy("raise").check(asked, "b")


@pytest.mark.parametrize("served", [None, "", 7, ["b"], {"id": "b"}])
def test_a_reply_without_a_model_fits_every_request(served: Any) -> None:
    MismatchPolicy("raise").check("a", served)


@pytest.mark.parametrize("mode", ["error", "", None, True, ["warn"]])
def test_an_unknown_mode_is_refused(mode: Any) -> None:
    with pytest.raises(ValueError, match=r"^model_mismatch must be 'warn', 'raise' or 'ignore', not "):
        MismatchPolicy(mode)
