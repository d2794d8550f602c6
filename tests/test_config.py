from __future__ import annotations

import logging
import math
import pickle
from typing import Any

import attrs
import pytest

from lmbridge.config import (
    DEFAULT_API_BASE,
    Limits,
    Timeouts,
    check_api_key,
    default_api_base,
    default_api_key,
    default_model,
    is_loopback,
    normalize_api_base,
)
from lmbridge.errors import LLMValidationError

DURATIONS = [
    *((Timeouts, name) for name in ("connect", "load", "first_byte", "idle", "total")),
    *((Limits, name) for name in ("max_wait", "max_queue")),
]


# Options


def test_the_defaults_are_those_of_the_design() -> None:
    assert attrs.asdict(Timeouts()) == {"connect": 5, "load": 300, "first_byte": 600, "idle": 300, "total": None}
    assert attrs.asdict(Limits()) == {
        "max_concurrency": 10,
        "max_loaded_models": None,
        "max_wait": 30.0,
        "max_queue": 600.0,
        "order": "run",
        "max_begun_runs": "auto",
    }
    assert DEFAULT_API_BASE == "http://127.0.0.1:1234/v1"


@pytest.mark.parametrize(("kind", "name"), DURATIONS)
@pytest.mark.parametrize("seconds", [1, 0.001, 1e9, None])
def test_a_duration_is_a_positive_number_of_seconds_or_none(kind: type[Any], name: str, seconds: float | None) -> None:
    assert getattr(kind(**{name: seconds}), name) == seconds


@pytest.mark.parametrize(("kind", "name"), DURATIONS)
@pytest.mark.parametrize("seconds", [0, -1, math.inf, math.nan, True, "5", [5]])
def test_an_invalid_duration_is_refused_with_the_name_of_the_option(
    kind: type[Any], name: str, seconds: object
) -> None:
    with pytest.raises(LLMValidationError) as caught:
        kind(**{name: seconds})
    expected = f"{kind.__name__}.{name} must be a positive number of seconds or None, not {seconds!r}"
    assert str(caught.value) == f"{expected}; use None to switch the limit off"


@pytest.mark.parametrize("count", [0, -1, 1.0, math.inf, True, None, "1"])
def test_max_concurrency_is_an_integer_of_at_least_one(count: Any) -> None:
    assert Limits(max_concurrency=1).max_concurrency == 1
    with pytest.raises(LLMValidationError) as caught:
        Limits(max_concurrency=count)
    expected = f"Limits.max_concurrency must be an integer of at least 1, not {count!r}"
    assert str(caught.value) == f"{expected}; leave Limits.max_concurrency out to use its default"


@pytest.mark.parametrize("kind", [Timeouts, Limits])
def test_options_are_keyword_only_and_immutable(kind: type[Any]) -> None:
    with pytest.raises(TypeError):
        kind(5)
    options = kind()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        options.max_queue = 1
    assert kind() == options
    assert pickle.loads(pickle.dumps(options)) == options


def test_changed_copies_of_options_are_checked() -> None:
    assert attrs.evolve(Timeouts(idle=1), total=9) == Timeouts(idle=1, total=9)
    with pytest.raises(LLMValidationError, match=r"Timeouts\.total must be .*, not 0"):
        attrs.evolve(Timeouts(), total=0)


# The environment


@pytest.mark.parametrize(
    ("settings", "api_base"),
    [
        ({}, "http://127.0.0.1:1234/v1"),
        ({"LMBRIDGE_API_BASE": "https://box/api/v1"}, "https://box/api/v1"),
        ({"LMBRIDGE_API_BASE": "http://a", "LMSTUDIO_HOST": "b", "LMSTUDIO_PORT": "9"}, "http://a/v1"),
        ({"LMBRIDGE_API_BASE": "", "LMSTUDIO_HOST": "b"}, "http://b:1234/v1"),
        ({"LMSTUDIO_HOST": "b", "LMSTUDIO_PORT": "9"}, "http://b:9/v1"),
        ({"LMSTUDIO_PORT": "9"}, "http://127.0.0.1:9/v1"),
        ({"LMSTUDIO_HOST": "", "LMSTUDIO_PORT": ""}, "http://127.0.0.1:1234/v1"),
        ({"LMSTUDIO_HOST": "b:7"}, "http://b:7/v1"),
        ({"LMSTUDIO_HOST": "b:7", "LMSTUDIO_PORT": "9"}, "http://b:7/v1"),
        ({"LMSTUDIO_HOST": "b:"}, "http://b:1234/v1"),
        ({"LMSTUDIO_HOST": "https://b"}, "https://b:1234/v1"),
        ({"LMSTUDIO_HOST": "https://b:443/"}, "https://b:443/v1"),
        ({"LMSTUDIO_HOST": "http://b/"}, "http://b:1234/v1"),
        ({"LMSTUDIO_HOST": "b/proxy", "LMSTUDIO_PORT": "9"}, "http://b:9/proxy/v1"),
        ({"LMSTUDIO_HOST": "192.168.0.7"}, "http://192.168.0.7:1234/v1"),
        ({"LMSTUDIO_HOST": "::1"}, "http://[::1]:1234/v1"),
        ({"LMSTUDIO_HOST": "[::1]", "LMSTUDIO_PORT": "9"}, "http://[::1]:9/v1"),
        ({"LMSTUDIO_HOST": "[::1]:7"}, "http://[::1]:7/v1"),
    ],
)
def test_the_server_comes_from_the_environment(
    settings: dict[str, str], api_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert normalize_api_base(default_api_base()) == api_base


@pytest.mark.parametrize(
    "settings",
    [
        {"LMBRIDGE_API_BASE": "box"},
        {"LMSTUDIO_PORT": "http"},
        {"LMSTUDIO_PORT": "99999"},
        {"LMSTUDIO_HOST": "b:http"},
        {"LMSTUDIO_HOST": "http://b:99999"},
        {"LMSTUDIO_HOST": "[::1"},
        {"LMSTUDIO_HOST": "me:secret@b"},
        {"LMSTUDIO_HOST": "http://me:secret@b:http"},
    ],
)
def test_an_invalid_server_in_the_environment_is_refused(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LLMValidationError, match=r"^api_base") as caught:
        normalize_api_base(default_api_base())
    assert "secret" not in repr(caught.value)


@pytest.mark.parametrize(
    ("name", "read"), [("LM_API_TOKEN", default_api_key), ("LMBRIDGE_MODEL", default_model)], ids=["key", "model"]
)
def test_key_and_model_come_from_the_environment_unless_they_are_empty(
    name: str, read: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read() is None
    monkeypatch.setenv(name, "")
    assert read() is None
    monkeypatch.setenv(name, "x")
    assert read() == "x"


@pytest.mark.parametrize(
    ("settings", "model", "logged"),
    [
        ({"DEFAULT_MODEL": "m"}, None, "DEFAULT_MODEL is ignored, because the environment names no server"),
        ({"DEFAULT_MODEL": "m", "LMBRIDGE_API_BASE": "http://box"}, "m", "comes from the environment variable DEFAULT"),
        ({"DEFAULT_MODEL": "m", "LMSTUDIO_PORT": "9"}, "m", "comes from the environment variable DEFAULT_MODEL"),
        ({"DEFAULT_MODEL": "m", "LMBRIDGE_MODEL": "n"}, "n", "comes from the environment variable LMBRIDGE_MODEL"),
    ],
)
def test_default_model_counts_only_if_the_environment_names_the_server(
    settings: dict[str, str],
    model: str | None,
    logged: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="lmbridge.client")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert default_model() == model
    assert logged in caplog.text


def test_the_log_says_where_the_server_and_the_key_come_from(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="lmbridge.client")
    monkeypatch.setenv("LMBRIDGE_API_BASE", "http://box")
    monkeypatch.setenv("LM_API_TOKEN", "secret-token")
    assert (default_api_base(), default_api_key()) == ("http://box", "secret-token")
    assert "LMBRIDGE_API_BASE" in caplog.text
    assert "LM_API_TOKEN" in caplog.text
    assert "secret-token" not in caplog.text


# The base URL


@pytest.mark.parametrize(
    ("given", "api_base"),
    [
        ("http://127.0.0.1:1234", "http://127.0.0.1:1234/v1"),
        ("http://127.0.0.1:1234/", "http://127.0.0.1:1234/v1"),
        ("http://127.0.0.1:1234/v1", "http://127.0.0.1:1234/v1"),
        ("http://127.0.0.1:1234/v1/", "http://127.0.0.1:1234/v1"),
        ("http://127.0.0.1:1234/v1//", "http://127.0.0.1:1234/v1"),
        ("http://box", "http://box/v1"),
        ("HTTPS://Box.Example:8443/", "https://Box.Example:8443/v1"),
        ("https://box/llm", "https://box/llm/v1"),
        ("https://box/llm/v1", "https://box/llm/v1"),
        ("https://box/v4", "https://box/v4"),
        ("https://box/v1beta", "https://box/v1beta/v1"),
        ("https://box/v1/llm", "https://box/v1/llm/v1"),
        ("https://box/@team", "https://box/@team/v1"),
        ("https://box/openai#", "https://box/openai#"),
        ("https://box/openai/#", "https://box/openai#"),
        ("https://box#", "https://box#"),
        ("unix:///run/llm.sock", "unix:///run/llm.sock"),
        ("http://[::1]:1234", "http://[::1]:1234/v1"),
        ("http://[fe80::1]/v1/", "http://[fe80::1]/v1"),
    ],
)
def test_a_base_url_is_normalized_to_end_with_its_version(given: str, api_base: str) -> None:
    assert normalize_api_base(given) == api_base
    assert normalize_api_base(api_base) == api_base


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "api_base must be a URL, not ''"),
        (" ", "api_base must be a URL, not ' '"),
        (None, "api_base must be a URL, not None"),
        (1234, "api_base must be a URL, not 1234"),
        (b"http://box", "api_base must be a URL, not b'http://box'"),
        ("http://two words", "api_base must be a URL, not 'http://two words'"),
        ("http://box\n", "api_base must be a URL, not 'http://box\\n'"),
        ("http://b\x7fox", "api_base must be a URL, not 'http://b\\x7fox'"),
        ("http://b\u2028ox", "api_base must be a URL, not 'http://b\\u2028ox'"),
        ("localhost", "api_base 'localhost' is not an http or https URL"),
        ("localhost:1234", "api_base 'localhost:1234' is not an http or https URL"),
        ("127.0.0.1:1234/v1", "api_base '127.0.0.1:1234/v1' is not an http or https URL"),
        ("//box", "api_base '//box' is not an http or https URL"),
        ("http://", "api_base 'http://' is not an http or https URL"),
        ("http:///v1", "api_base 'http:///v1' is not an http or https URL"),
        ("http://:1234", "api_base 'http://:1234' is not an http or https URL"),
        ("ftp://box", "api_base 'ftp://box' is not an http or https URL"),
        ("http://box:99999", "api_base 'http://box:99999' is not a valid URL: Port out of range 0-65535"),
        (
            "http://box:port",
            "api_base 'http://box:port' is not a valid URL: Port could not be cast to integer value as 'port'",
        ),
        ("http://[::1", "api_base 'http://[::1' is not a valid URL: Invalid IPv6 URL"),
        ("http://box/v1?x=1", "api_base has a query or a fragment"),
        ("http://box/v1?x=1#", "api_base has a query or a fragment"),
        ("http://box/v1#top", "api_base has a query or a fragment"),
    ],
)
def test_an_invalid_base_url_is_refused_with_an_example(given: Any, message: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        normalize_api_base(given)
    assert str(caught.value) == f"{message}; write it like 'http://127.0.0.1:1234/v1'"


@pytest.mark.parametrize(
    ("given", "endpoint"),
    [
        ("http://box/v1/chat/completions", "/chat/completions"),
        ("http://box/chat/completions", "/chat/completions"),
        ("http://box/v1/completions", "/completions"),
        ("http://box/v1/models", "/models"),
        ("http://box/v1/responses", "/responses"),
        ("http://box/v1/embeddings/", "/embeddings"),
        ("http://box/v1/messages", "/messages"),
    ],
)
def test_the_url_of_an_endpoint_is_refused(given: str, endpoint: str) -> None:
    with pytest.raises(LLMValidationError) as caught:
        normalize_api_base(given)
    assert str(caught.value) == f"api_base {given!r} is the URL of an endpoint; leave out '{endpoint}' at its end"


def test_an_endpoint_that_is_given_as_a_base_url_on_purpose_is_kept() -> None:
    assert normalize_api_base("http://box/models#") == "http://box/models#"


@pytest.mark.parametrize(
    "given",
    [
        "http://me:secret@box",
        "http://secret@box",
        "http://:secret@box:1234/v1",
        "http://me:secret@box:port",
        "http://me:secret@box:99999",
        "http://me:secret@[::1",
        "http://me:secret@box two",
        "http://me:secret@\u2100.com",  # becomes a slash in IDNA
        "me:secret@box:1234",
        "https:me:secret@box",
        "ftp://me:secret@box",
        b"http://me:secret@box",
        "http://box?key=secret",
        "http://box:99999?key=secret",
        "box:1234?key=secret",
        "http://box#secret",
        "http://box:99999#secret",
    ],
)
def test_a_secret_in_a_base_url_is_refused_and_never_repeated(given: Any) -> None:
    with pytest.raises(LLMValidationError) as caught:
        normalize_api_base(given)
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in f"{error!s} {error!r} {error.__dict__}"
        error = error.__cause__ or error.__context__


def test_the_error_for_credentials_in_the_url_says_where_to_put_them() -> None:
    with pytest.raises(LLMValidationError, match=r"^api_base contains credentials; pass the key as api_key="):
        normalize_api_base("http://me:secret@box")


@pytest.mark.parametrize("key", ["sk-1234", "x", "!~", None])
def test_a_key_is_printable_ascii_or_none(key: str | None) -> None:
    assert check_api_key(key) == key


@pytest.mark.parametrize("key", ["", " ", "a secret", "secret\n", "secret\r\nX-Evil: 1", "sécret", b"secret", 7])
def test_an_invalid_key_is_refused_and_never_repeated(key: Any) -> None:
    with pytest.raises(LLMValidationError) as caught:
        check_api_key(key)
    assert (
        str(caught.value)
        == "api_key must be printable ASCII without spaces; leave it out to send LM_API_TOKEN, or no key at all"
    )


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("http://127.0.0.1:1234/v1", True),
        ("http://127.8.9.10", True),
        ("http://[::1]:1234", True),
        ("http://localhost", True),
        ("http://LOCALHOST:1234", True),
        ("http://box.localhost", True),
        ("http://192.168.0.7", False),
        ("http://[fe80::1]", False),
        ("http://box", False),
        ("http://localhost.example", False),
        ("http://127.0.0.1.example", False),
        ("http://notlocalhost", False),
    ],
)
def test_loopback_urls_are_recognized(url: str, loopback: bool) -> None:
    assert is_loopback(url) is loopback


def test_a_unix_socket_on_a_system_without_them_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Python has none on Windows.
    monkeypatch.delattr("socket.AF_UNIX")
    with pytest.raises(LLMValidationError, match="is a Unix socket, which Python cannot use on this system"):
        normalize_api_base("unix:///run/llm.sock")
