"""Results of calls as text for the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lmbridge.mcp.servers.results import McpText, result_text

IMAGE = {"type": "image", "data": "aGVsbG8=", "mimeType": "image/png"}


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, ""),
        ({"content": []}, ""),
        # Text parts are passed on verbatim.
        ({"content": [{"type": "text", "text": "a\x1b[0m"}]}, "a\x1b[0m"),
        (
            {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}, IMAGE]},
            "a\n\n[image image/png, 5 bytes]",
        ),
        ({"content": [{"type": "audio", "data": "aGk=", "mimeType": "audio/wav"}]}, "[audio audio/wav, 2 bytes]"),
        ({"content": [{"type": "resource", "resource": {"uri": "file:///a", "text": "of the file"}}]}, "of the file"),
        (
            {"content": [{"type": "resource", "resource": {"uri": "file:///a", "blob": "aGk=", "mimeType": "x/y"}}]},
            "[resource file:///a, x/y, 2 bytes]",
        ),
        (
            {"content": [{"type": "resource_link", "uri": "file:///a", "name": "A", "description": "of \u202eall"}]},
            "[link to resource file:///a, A, of all]",
        ),
        ({"content": [{"type": "new", "x": 1}]}, '{"type": "new", "x": 1}'),
        ({"content": "no list"}, ""),
        ({"content": [], "structuredContent": {"ä": 1}}, '{"ä": 1}'),
        ({"content": [{"type": "text", "text": "t"}], "structuredContent": {"a": 1}}, "t"),
    ],
)
def test_each_kind_of_content_is_described_as_text(result: dict[str, Any], text: str) -> None:
    assert result_text(result) == text


def test_the_text_of_a_result_keeps_the_result() -> None:
    text = McpText("a", {"content": []})
    assert text == "a"
    assert text.result == {"content": []}
    assert str.__str__(text) == "a"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda text: pickle.loads(pickle.dumps(text))])
def test_the_text_of_a_result_can_be_copied_with_the_result(copied: Callable[[McpText], McpText]) -> None:
    text = copied(McpText("a", {"content": []}))
    assert (text, text.result) == ("a", {"content": []})
