"""Removing invisible characters from the texts of servers."""

from __future__ import annotations

import pytest

from lmbridge.mcp.servers.sanitize import sanitize_text


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
def test_characters_that_people_do_not_see_are_removed(given: str, cleaned: str) -> None:
    assert sanitize_text(given) == cleaned
