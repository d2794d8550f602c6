"""Results as text, and what a model is told of tools."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lmbridge.mcp.servers.results import McpText, clean, clean_schema, description_of, text_of

IMAGE = {"type": "image", "data": "aGVsbG8=", "mimeType": "image/png"}


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, ""),
        ({"content": []}, ""),
        ({"content": [{"type": "text", "text": "a\x1b[0m"}]}, "a\x1b[0m"),  # verbatim
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
def test_each_kind_of_content_has_a_text(result: dict[str, Any], text: str) -> None:
    assert text_of(result) == text


def test_a_text_keeps_the_result() -> None:
    text = McpText("a", {"content": []})
    assert text == "a"
    assert text.result == {"content": []}
    assert str.__str__(text) == "a"


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda text: pickle.loads(pickle.dumps(text))])
def test_a_text_can_be_copied_with_its_result(copied: Callable[[McpText], McpText]) -> None:
    text = copied(McpText("a", {"content": []}))
    assert (text, text.result) == ("a", {"content": []})


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("plain\n\ttext ä 漢 🙂", "plain\n\ttext ä 漢 🙂"),
        ("\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07", "red link"),
        ("a\x00b\x07c\x9bd\x7f", "abcd"),
        ("zero\u200bwidth \u202eback\u2066wards\ufeff", "zerowidth backwards"),
        ("tags\U000e0041\U000e0042", "tags"),
        ("a\r\nb\rc", "a\nbc"),
    ],
)
def test_what_people_do_not_see_is_taken_out_of_descriptions(given: str, cleaned: str) -> None:
    assert clean(given) == cleaned


def test_a_description_has_an_end() -> None:
    assert len(description_of({"description": "x" * 10_000})) == 4_003
    assert description_of({"description": " ", "title": "T"}) == "T"
    assert description_of({"description": 5}) == ""


def test_of_a_schema_only_the_descriptions_are_cleaned() -> None:
    hidden = "\u200b"
    schema = {
        "title": f"a{hidden}",
        "properties": {"description": {"type": "string", "description": f"b{hidden}", "enum": [hidden]}},
        "default": {"description": hidden},
        "anyOf": [{"description": hidden}],
    }
    assert clean_schema(schema) == {
        "title": "a",
        "properties": {"description": {"type": "string", "description": "b", "enum": [hidden]}},
        "default": {"description": hidden},
        "anyOf": [{"description": ""}],
    }
