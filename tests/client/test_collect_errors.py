"""Errors of `collect`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest

from lmbridge import (
    LLMStreamError,
    collect,
)
from tests.support import piece


async def test_an_error_of_collect_has_the_partial_reply() -> None:
    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        yield piece("a")
        yield piece(choices="none")

    with pytest.raises(LLMStreamError) as caught:
        await collect(chunks())
    assert caught.value.partial["choices"][0]["message"]["content"] == "a"


async def test_collect_closes_a_generator_that_it_gives_up() -> None:
    closed: list[bool] = []

    async def chunks() -> AsyncGenerator[dict[str, Any], None]:
        try:
            yield piece("a")
            yield piece(choices="none")
            yield piece("b")
        finally:
            closed.append(True)

    with pytest.raises(LLMStreamError, match="unknown shape"):
        await collect(chunks())
    assert closed == [True]
