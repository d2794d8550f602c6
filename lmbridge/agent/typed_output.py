"""`OutputReader`: reads the typed output of a run from the model's answers, and requests it if necessary.

Servers differ in what they do with a request that has both tools and a `response_format`: llama.cpp lets the model
write nothing but JSON, so that it can no longer call a tool, and others ignore one of the two. So a request has only
one of them. If the run has tools, the model first answers freely. If its answer is not yet a valid output, the model is
asked to repeat it as JSON, in a request with the schema and without tools. Other frameworks offer a tool that the model
calls with its output. That fails with small models: they call it too early, or never.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from lmbridge.client.structured import AnswerFormat, InvalidAnswerError, answer_format_of
from lmbridge.errors import LLMValidationError

_MOST_REQUESTS: Final = 3
"""How many times a run asks for its output as JSON."""


class OutputReader:
    """Reads the output of one run.

    Args:
        output_type: The type of the output.
        has_tools: Whether the run has tools. If it has none, each request of the run asks for the output.
    """

    def __init__(self, output_type: Any, *, has_tools: bool) -> None:
        self._format: AnswerFormat[Any] = answer_format_of(output_type)
        self._has_tools = has_tools
        self._requests = 0
        self._is_requested = not has_tools

    @property
    def response_format(self) -> Mapping[str, Any] | None:
        """The `response_format` of the next request; None if the model may answer freely."""
        return self._format.response_format if self._is_requested else None

    def read(self, text: str) -> Any:
        """Returns the output in the text of an answer.

        Raises:
            InvalidAnswerError: The text is not valid JSON, or does not fit the type.
        """
        return self._format.decode(text)

    def next_request(self, error: InvalidAnswerError) -> str | None:
        """Returns the message that asks for the output after an invalid answer; None if it was requested too often.

        Args:
            error: What is wrong with the answer.
        """
        if self._requests == _MOST_REQUESTS:
            return None
        sentences = [f"That is not a valid {self._format.name}: {error}."] if self._is_requested else []
        sentences.append("Give your answer as JSON, and nothing else.")
        if not self._requests:
            schema = msgspec.json.encode(self._format.schema).decode()
            sentences.append(f"It has to follow this JSON schema: {schema}")
        self._requests += 1
        self._is_requested = True
        return " ".join(sentences)

    def add_tools(self) -> None:
        """Records that the run has new tools, so that the model may answer freely again, and call them."""
        self._has_tools, self._is_requested = True, False

    def allow_tools(self) -> None:
        """Records that the model has called a tool instead of answering, so that it may answer freely again."""
        self._is_requested = not self._has_tools

    def forbid_tools(self) -> None:
        """Records that the run has used up a limit, so that its next request asks for the output."""
        self._is_requested = True

    def failed(self, error: InvalidAnswerError, text: str, model: str | None) -> LLMValidationError:
        """Returns the error of a run whose model did not give a valid output."""
        return LLMValidationError(
            f"the run's output is not a valid {self._format.name}: {error}",
            error,
            hint="its text is in .body and the run in .partial; describe the fields, or use a larger model",
            context={"operation": "agent run", "model": model, "path": error.path},
            body=text,
        )
