"""The HTTP client of the installed SDK."""

from __future__ import annotations

import pytest

from lmbridge.mcp.sdk.http_client import is_valid_url


@pytest.mark.parametrize(
    ("url", "is_valid"),
    [
        ("http://127.0.0.1:1/mcp", True),
        ("https://mcp.example/mcp?a=b", True),
        ("http://", False),
        ("/mcp", False),
        ("http://[::1/mcp", False),
        ("http://a:port/mcp", False),
        ("http://a\n/mcp", False),
        ("http://" + "a" * 70_000, False),
        ("", False),
    ],
)
def test_a_url_that_the_client_cannot_use_is_recognised(url: str, is_valid: bool) -> None:
    assert is_valid_url(url) is is_valid
