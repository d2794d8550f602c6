"""Results of calls as text for the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lmbridge._tasks import run_at_once
from lmbridge.mcp.servers.results import McpText, read_result

PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNk+A8AAQUBAScY42YAAAAASUVORK5CYII="
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
        ({"content": [{"type": "resource", "resource": {"mimeType": "text/csv; charset=utf-8", "blob": "aGk"}}]}, "hi"),
        ({"content": [{"type": "resource", "resource": {"mimeType": "application/ld+json", "blob": "e30="}}]}, "{}"),
        (
            {"content": [{"type": "resource", "resource": {"mimeType": "text/plain", "blob": "/w=="}}]},
            "[resource text/plain, 1 bytes]",
        ),
        ({"content": [{"type": "image", "mimeType": "image/svg+xml", "data": "PHN2Zy8+"}]}, "<svg/>"),
        (
            {"content": [{"type": "resource", "resource": {"mimeType": "text/plain", "blob": "aGk=" * 400_000}}]},
            "[resource text/plain, 1,199,999 bytes]",
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
    assert run_at_once(read_result(result)) == text


def test_the_text_of_a_result_keeps_the_result() -> None:
    text = McpText("a", {"content": []})
    assert text == "a"
    assert text.result == {"content": []}
    assert str.__str__(text) == "a"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda text: pickle.loads(pickle.dumps(text))])
def test_the_text_of_a_result_can_be_copied_with_the_result(copied: Callable[[McpText], McpText]) -> None:
    text = copied(McpText("a", {"content": []}))
    assert (text, text.result) == ("a", {"content": []})


def image(data: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "image", "data": data, "mimeType": "image/png", **fields}


@pytest.mark.parametrize(
    ("content", "count"),
    [
        ([image(PNG)], 1),
        ([image(PNG, mimeType="image/jpeg")], 1),
        ([image(PNG.rstrip("="))], 1),
        ([image(PNG[:20] + "\n" + PNG[20:])], 1),
        ([image("data:image/png;base64," + PNG)], 1),
        ([{"type": "resource", "resource": {"mimeType": "image/png", "blob": PNG}}], 1),
        ([{"type": "text", "text": "a"}, image(PNG), image(PNG)], 2),
        ([image(PNG)] * 20, 8),
        ([IMAGE, image(None), image(5), image("?"), image(""), "no block", None], 0),
        ([image(PNG.rstrip("=") + "A" * 12_000_000)], 0),
        ([{"type": "audio", "data": PNG, "mimeType": "image/png"}], 0),
        ([{"type": "resource", "resource": {"mimeType": "application/pdf", "blob": PNG}}], 0),
        ([{"type": "resource", "resource": None}], 0),
        (None, 0),
    ],
)
def test_the_images_of_a_result_are_content_parts(content: Any, count: int) -> None:
    parts = McpText("a", {"content": content}).image_parts
    assert len(parts) == count
    for part in parts:
        assert part["image_url"]["url"] == f"data:image/png;base64,{PNG}"


def test_of_very_many_images_only_the_first_are_considered() -> None:
    for before, count in ((63, 1), (64, 0)):
        result = {"content": [*[IMAGE] * before, image(PNG)]}
        for text in (McpText("a", result), run_at_once(read_result(result))):
            assert len(text.image_parts) == count


def test_large_structured_content_is_json_without_spaces() -> None:
    structured = {"a": [1, {}], "b": "ä"}
    assert run_at_once(read_result({"structuredContent": structured})) == '{"a": [1, {}], "b": "ä"}'
    text = run_at_once(read_result({"structuredContent": {**structured, "c": ["x"] * 30_000}}))
    assert text.startswith('{"a":[1,{}],"b":"ä","c":["x","x"')
