"""`ConstrainedRetry`: after an invalid call, the next reply is constrained to the schema of its tool.

A small model often repeats a mistake that it was told about, or gives up and makes up an answer. Most servers can
constrain a reply to a JSON schema, so that the form of the arguments cannot be wrong again. The schema is sent as the
`response_format` of the request, and the JSON that comes back becomes the arguments of the call.

`tool_choice` was the alternative. llama.cpp ignores a choice that names a tool, and with "required" it still accepts
any text before a call; LM Studio refuses an object. Offering only that one tool would change the beginning of the
prompt, so that the server would have to process the whole conversation again. A `response_format` does not change the
prompt: on the embedded server, all of it but one token came from the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

import msgspec

from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.text_calls.finding import to_wire_call
from lmbridge.agent.toolset import Toolset
from lmbridge.client.structured import answer_in_reasoning, without_fence
from lmbridge.errors import LLMError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

_REFUSALS: Final = (400, 422, 500, 501)
"""Statuses with which servers refuse a `response_format` or a schema: llama-cpp-python answers 500, others 400."""


class ConstrainedRetry:
    """Decides whether the next reply of a run is constrained, and reads the call in such a reply.

    Args:
        toolset: The tools of the run.
        source: Remembers for later runs that a server refuses such requests.
        is_enabled: The option `constrain_retries` of the run.
    """

    def __init__(self, toolset: Toolset, source: ClientSource, *, is_enabled: bool) -> None:
        self._toolset = toolset
        self._source = source
        self._is_enabled = is_enabled
        # The tool of the call to retry, and the one to whose schema the last request was constrained.
        self._tool: str | None = None
        self._requested: str | None = None
        self._refusal: LLMError | None = None

    def note_calls(self, wrong_tool: str | None, reply: ModelReply) -> None:
        """Records the calls of a reply.

        Args:
            wrong_tool: The tool, if all calls of the reply were invalid calls of this one tool; otherwise None.
            reply: The reply. If it was itself constrained, the next one is not, because its mistake is of another kind.
        """
        self._tool = wrong_tool if reply.constrained_to is None else None

    def next_tool(self, model: str | None, params: Mapping[str, Any]) -> str | None:
        """Returns the tool to whose schema the next reply is constrained, or None.

        Args:
            model: The model of the run.
            params: The fields of the request.
        """
        is_possible = self._is_enabled and model not in self._source.models_without_schemas
        is_free = "tools" in params and "response_format" not in params
        self._requested = self._tool if is_possible and is_free else None
        return self._requested

    def response_format(self, tool: str) -> Mapping[str, Any]:
        """Returns the `response_format` that constrains a reply to the schema of a tool."""
        schema = {"name": tool, "strict": True, "schema": self._schema(tool)}
        return {"type": "json_schema", "json_schema": schema}

    def read(self, reply: ModelReply) -> bool:
        """Turns the JSON in a constrained reply into a call. Returns True if the reply was constrained and has a call.

        A server that ignores the `response_format` gives a free reply, which is not changed.
        """
        tool = reply.constrained_to
        if tool is None or self.is_unusable(reply):
            return False
        if not reply.calls:
            text = without_fence(reply.text or answer_in_reasoning(reply.reasoning))
            if not _follows(self._schema(tool), text):
                reply.constrained_to = None
                return False
            reply.text, reply.calls = "", [to_wire_call(tool, text)]
        logger.info("the retry of an invalid call of %r was constrained to the schema of its arguments", tool)
        return True

    def is_unusable(self, reply: ModelReply) -> bool:
        """Returns whether a constrained reply is empty or was cut off, as when a model never closes a string."""
        is_empty = not (reply.calls or reply.text.strip() or reply.reasoning.strip())
        return reply.constrained_to is not None and (is_empty or reply.finish_reason == "length")

    def give_up(self, reply: ModelReply) -> None:
        """Lets the model reply without the constraint, after a constrained reply that is unusable."""
        tool = reply.constrained_to
        logger.info("a reply that was constrained to the schema of %r is empty or cut off; asking again", tool)
        self._tool = None

    def is_refused(self, error: LLMError) -> bool:
        """Returns whether a request may have failed because of its constraint. If so, the next request has none."""
        if self._requested is None or error.status not in _REFUSALS:
            return False
        self._tool, self._refusal = None, error
        return True

    def end_reply(self, model: str | None) -> None:
        """Records that there is a usable reply.

        If a constrained request was refused before, and succeeded without the constraint, the server does not support
        it, which the `ClientSource` remembers.
        """
        self._tool = None
        if self._refusal is not None:
            self._source.models_without_schemas.add(model)
            logger.info(
                "the server refuses to constrain the retry of a call, and is not asked for that again: %s",
                self._refusal,
            )
            self._refusal = None

    def _schema(self, tool: str) -> dict[str, Any]:
        # Without `additionalProperties`, a grammar would let the model add parameters that the tool does not know.
        return {"additionalProperties": False, **self._toolset.sent_parameters(tool)}


def _follows(schema: Mapping[str, Any], text: str) -> bool:
    """Returns whether a text can come from a server that has constrained it to the schema of an object."""
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return False
    if not isinstance(value, dict) or not all(name in value for name in schema.get("required", ())):
        return False
    return schema["additionalProperties"] is not False or all(name in schema["properties"] for name in value)
