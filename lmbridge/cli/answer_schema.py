"""`--schema FILE`: the JSON schema that an answer has to follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from lmbridge.cli.command_runner import CommandError, UsageError
from lmbridge.client.sendable_schemas import simplify_parameters
from lmbridge.client.structured import without_fence


@attrs.frozen
class AnswerSchema:
    """A JSON schema, and the form in which it is sent."""

    response_format: Mapping[str, Any]
    """The parameter `response_format` of the request, which contains the schema."""
    _validate: Callable[[Mapping[str, Any]], object]

    @classmethod
    def from_file(cls, path: Path) -> AnswerSchema:
        """Reads a schema.

        Raises:
            UsageError: The file cannot be read, or it is not the JSON schema of an object.
        """
        # It imports jsonschema, which takes as long as everything else together.
        from lmbridge.agent.argument_checks import build_validator  # noqa: PLC0415 - see above

        try:
            schema = json.loads(path.read_text("utf-8"))
        except OSError as exc:
            raise UsageError(f"cannot read the schema: {exc}") from exc
        except RecursionError as exc:
            raise UsageError(f"the schema in {path} is nested too deeply", "simplify it") from exc
        except ValueError as exc:
            raise UsageError(f"{path} is not JSON: {exc}", "--schema takes a file with a JSON schema") from exc
        if not isinstance(schema, dict) or schema.get("type") != "object":
            raise UsageError(
                f"{path} is not the JSON schema of an object",
                'it looks like {"type": "object", "properties": {...}, "required": [...]}',
            )
        name = "".join(each if each.isascii() and each.isalnum() else "_" for each in path.stem)[:64] or "answer"
        wire = {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}
        try:
            simplified = simplify_parameters(schema)
        except ValueError as exc:
            raise UsageError(f"{path} has a schema that cannot be used: {exc}", "simplify it") from exc
        return cls(wire, build_validator(schema, simplified, owner=str(path)))

    def read(self, text: str) -> dict[str, Any]:
        """Returns the object in an answer.

        Raises:
            CommandError: The answer is not JSON, or does not follow the schema.
        """
        try:
            value = json.loads(without_fence(text))
            if not isinstance(value, dict):
                raise ValueError("it is not an object")  # noqa: TRY004 - the value comes from the model
            self._validate(value)
        except ValueError as exc:
            raise CommandError(
                f"the answer does not follow the schema: {exc}; the answer was {text!r}",
                "say in the prompt what the fields mean, or use a larger model",
            ) from exc
        return value
