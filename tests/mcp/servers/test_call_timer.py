"""The time limits of a call, and the errors that say which of them was reached."""

from __future__ import annotations

from lmbridge.mcp.servers.call_timer import CallTimer


def test_a_request_without_a_limit_has_an_error_as_well() -> None:
    timer = CallTimer(None)
    assert "without an answer" in str(timer.error())
    timer.extend()
    assert "without an answer" in str(timer.error())
