"""The reasons that errors of the system give, in plain words, on each system."""

from __future__ import annotations

import errno
import os

import pytest

from lmbridge.transport.faults import describe_os_error

_REFUSED = "No connection could be made because the target machine actively refused it"


@pytest.mark.parametrize(
    ("platform", "error", "expected"),
    [
        ("linux", OSError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "Connection refused"),
        ("linux", ConnectionResetError(), "ConnectionResetError"),
        ("win32", OSError(10061, _REFUSED), _REFUSED),
        ("win32", OSError("the pipe is closed"), "the pipe is closed"),
    ],
)
def test_an_error_has_the_words_that_its_system_has_for_it(
    platform: str, error: OSError, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", platform)
    assert describe_os_error(error) == expected


def test_an_error_of_windows_without_words_has_those_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert describe_os_error(OSError(errno.ECONNREFUSED, "")) == os.strerror(errno.ECONNREFUSED)
