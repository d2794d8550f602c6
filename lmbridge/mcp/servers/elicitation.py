"""Elicitation: a server asks the user a question while it works on a call.

A question is either a form, whose fields a schema describes, or a URL that the user should visit. The program's answer
is checked before it is sent, with the same validator as the arguments of tools. The specification requires that the
content of an accepted form fits the schema, and a server that gets anything else fails in a way that no user
understands.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import urlsplit

import attrs

from lmbridge.agent.argument_checks import build_validator
from lmbridge.client.sendable_schemas import simplify_parameters
from lmbridge.errors import LLMValidationError
from lmbridge.mcp.sdk import InvalidQuestionError
from lmbridge.mcp.servers.sanitize import sanitize_text
from lmbridge.mcp.servers.user_functions import call_function

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

ElicitationAction: TypeAlias = Literal["accept", "decline", "cancel"]
"""What the user did with a question."""

_Validate: TypeAlias = Callable[[Mapping[str, Any]], object]

_ACTIONS: Final = ("accept", "decline", "cancel")
_CANCELLED: Final = {"action": "cancel"}


@attrs.frozen
class ElicitationAnswer:
    """The answer to an `Elicitation`, as its methods `accept`, `decline` and `cancel` return it."""

    action: ElicitationAction
    """What the user did with the question: "accept", "decline", or "cancel" if the user has not decided."""
    content: Mapping[str, Any] | None = attrs.field(default=None, repr=False)
    """The values of the fields of a form, if it was accepted; otherwise None."""


@attrs.frozen
class Elicitation:
    """A question that an MCP server asks the user during a call.

    Show the user which server asks. If the question is a URL, show the whole of it and its `host`, and open it only
    after the user has agreed: it was chosen by the server. Never fetch it in the program.
    """

    server: str
    """The name of the server in the configuration."""
    message: str
    """The question, without control characters and invisible characters."""
    mode: Literal["form", "url"]
    """Whether the user should fill in a form, or visit a URL."""
    schema: Mapping[str, Any] = attrs.field(factory=dict, repr=False)
    """The JSON schema of a form, an object whose properties are the fields; empty if the question is a URL."""
    url: str = ""
    """The URL to visit, or an empty string if the question is a form."""
    elicitation_id: str | None = None
    """The id with which the server reports that the user has finished at the URL (`ElicitationCompleted`), or None."""
    _validate: _Validate | None = attrs.field(default=None, eq=False, repr=False)

    @property
    def host(self) -> str:
        """The host of the URL, which the user should check, or an empty string."""
        return urlsplit(self.url).hostname or ""

    @property
    def defaults(self) -> dict[str, Any]:
        """The default values of the fields of a form. Show the form with these values filled in."""
        properties = self.schema.get("properties")
        fields = properties if isinstance(properties, Mapping) else {}
        return {
            name: each["default"] for name, each in fields.items() if isinstance(each, Mapping) and "default" in each
        }

    def accept(self, content: Mapping[str, Any] | None = None) -> ElicitationAnswer:
        """Returns the answer for a user who has filled in the form, or agrees to visit the URL.

        Args:
            content: The values of the fields of a form. Default: None, for a URL or for a form without any values.

        Raises:
            LLMValidationError: The values do not fit the schema, or a URL was given values. Nothing has been sent, so
                the user can be asked again.
        """
        answer = ElicitationAnswer("accept", dict(content or {}) if self.mode == "form" else content)
        if problem := _problem_of(answer, self.mode, self._validate or _make_validator(self.schema)):
            hint = "ask the user again, or return decline()"
            raise LLMValidationError(f"the answer does not fit the question: {problem}", hint=hint)
        return answer

    def decline(self) -> ElicitationAnswer:
        """Returns the answer for a user who refuses to fill in the form or to visit the URL."""
        return ElicitationAnswer("decline")

    def cancel(self) -> ElicitationAnswer:
        """Returns the answer for a user who has not decided, for example because the form was closed."""
        return ElicitationAnswer("cancel")


OnElicitation: TypeAlias = Callable[[Elicitation], ElicitationAnswer | Awaitable[ElicitationAnswer]]
"""A function, async or plain, that asks the user the question of a server and returns the answer."""


class Elicitor:
    """Passes the questions of a server to the function of the program, and checks its answers.

    Args:
        server: The name of the server.
        callback: The function of the program.
    """

    def __init__(self, server: str, callback: OnElicitation) -> None:
        self._server, self._callback = server, callback

    async def ask(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Asks a question, and returns the result as the protocol specifies it.

        Args:
            params: The question as the server sent it.

        Raises:
            InvalidQuestionError: The question is not valid.
        """
        elicitation = read_elicitation(self._server, params)
        # The first import of jsonschema would block the event loop.
        validate = await asyncio.to_thread(_make_validator, elicitation.schema)
        elicitation = attrs.evolve(elicitation, validate=validate)
        try:
            answer = await call_function(self._callback, elicitation)
        except Exception:
            # The question belongs to a tool call, which can go on without an answer.
            logger.exception(
                "MCP server %r: on_elicitation raised an exception, so the question is cancelled", self._server
            )
            return dict(_CANCELLED)
        if _problem_of(answer, elicitation.mode, validate):
            # The problem is not logged, because it quotes what the user has entered.
            logger.error(
                "MCP server %r: on_elicitation returned an answer that does not fit the question, which is therefore"
                " cancelled; return what the accept(), decline() or cancel() of the question returns",
                self._server,
            )
            return dict(_CANCELLED)
        content = {} if answer.content is None else {"content": dict(answer.content)}
        return {"action": answer.action, **content}


def read_elicitation(server: str, params: Mapping[str, Any]) -> Elicitation:
    """Returns the question that a server has sent.

    Raises:
        InvalidQuestionError: The question is not valid.
    """
    mode, message = params.get("mode", "form"), params.get("message")
    message = sanitize_text(message) if isinstance(message, str) else ""
    if mode == "form":
        schema = params.get("requestedSchema")
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            raise InvalidQuestionError("requestedSchema must be a schema of the type object")
        return Elicitation(server, message, "form", schema)
    if mode != "url":
        raise InvalidQuestionError("mode must be form or url")
    url, elicitation_id = params.get("url"), params.get("elicitationId")
    # A link with another scheme could run a script or open a file when the user follows it.
    if not isinstance(url, str) or not _is_web_url(url):
        raise InvalidQuestionError("url must be a valid http or https URL")
    named = elicitation_id if isinstance(elicitation_id, str) else None
    return Elicitation(server, message, "url", url=url, elicitation_id=named)


def _make_validator(schema: Mapping[str, Any]) -> _Validate:
    """Returns a function that checks the values of a form.

    Raises:
        InvalidQuestionError: The schema cannot be used.
    """
    try:
        simplified = simplify_parameters(schema)
    except (ValueError, RecursionError) as exc:
        raise InvalidQuestionError(f"requestedSchema cannot be used: {exc}") from exc
    return build_validator(schema, simplified, owner="a question to the user")


def _is_web_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        # Reading the property raises ValueError if the port is not valid.
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and url == sanitize_text(url) and " " not in url


def _problem_of(answer: Any, mode: str, validate: _Validate) -> str:
    """Returns why an answer cannot be sent, or an empty string."""
    if not isinstance(answer, ElicitationAnswer) or answer.action not in _ACTIONS:
        return f"it is not an ElicitationAnswer, but of the type {type(answer).__name__}"
    if answer.action != "accept" or mode == "url":
        return "" if answer.content is None else "only an accepted form has content"
    try:
        validate(answer.content or {})
    except ValueError as exc:
        return str(exc)
    return ""
