"""The interface of the ways to ask for JSON that follows a schema."""

from __future__ import annotations

from typing import Any, Final

MODEL: Final = "real"
MAX_TOKENS: Final = 400


class Asker:
    """Asks a model for JSON that is valid against a schema."""

    def __init__(self, base: str) -> None:
        raise NotImplementedError

    async def ask(self, prompt: str, schema: dict[str, Any]) -> Any:
        """Returns the JSON value. Any exception counts as a failure."""
        raise NotImplementedError
