"""`Toolset`: the tools of one run, from what the model is told of them to what came of a call."""

from __future__ import annotations

import asyncio
import difflib
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Final, TypeAlias

import attrs
import msgspec

from lmbridge._text import shorten
from lmbridge.agent.calling import ToolOutcome, call_tool
from lmbridge.agent.schemas import coerce_to_schema
from lmbridge.agent.text_calls import read_text_calls, to_wire_call
from lmbridge.agent.tool_names import names_in_requests, names_in_run
from lmbridge.agent.tools import Tool, ToolCall, ToolContext, ToolProvider, as_tool
from lmbridge.errors import LLMError, LLMValidationError, ToolError

__all__ = ["Equip", "Equipment", "Fault", "ToolOutcome", "Ready", "Toolset"]

_QUOTED: Final = 200
"""Characters of malformed arguments that the model is shown again."""
_LISTED: Final = 50
"""Names that the model is told when it calls a tool that is not there."""


@attrs.define
class Ready:
    """A call that can be made."""

    call: ToolCall
    """What was asked for; its `arguments` are JSON values, those of the wrong type set right."""
    arguments: Mapping[str, Any] = attrs.field(repr=False)
    """The keywords for the tool's function."""


@attrs.frozen
class Fault:
    """A call that cannot be made."""

    call_id: str
    name: str
    """What the model called the tool."""
    text: str
    """For the model: what is wrong, and what would be right."""
    bad_arguments: bool
    """Whether the arguments are no JSON object: sent to a server again, they make it fail."""


@attrs.frozen
class Equipment:
    """What a run has to work with, from when it has its model to its end."""

    tools: Toolset
    note: str = ""
    """For the leading system message."""
    errors: Mapping[str, Exception] = attrs.field(factory=dict)
    """Sources of tools that failed, by name."""


Equip: TypeAlias = Callable[[int | None], AbstractAsyncContextManager[Equipment]]
"""Called when a run begins, with the tokens of its model's context, if they are known; the block is the run."""


class Toolset:
    """The tools of one run; they do not change while it goes on.

    Args:
        tools: The tools.

    Raises:
        LLMValidationError: two of them cannot be told apart.

    Attributes:
        definitions: What a request's `tools` holds.
        names: The names that are sent, in the order of the tools.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        called = names_in_run(tools)
        sent = names_in_requests(called)
        self.names = [sent[name] for name in called]
        self.definitions = [_definition(name, tool) for name, tool in zip(self.names, tools, strict=True)]
        self._sent = sent
        self._called = dict(zip(self.names, called, strict=True))
        self._tools = dict(zip(self.names, tools, strict=True))

    @classmethod
    async def collect(cls, tools: Sequence[Tool | Callable[..., Any] | ToolProvider]) -> Toolset:
        """The tools that were given, and those that providers have now.

        Raises:
            LLMValidationError: something is no tool, or two cannot be told apart.
            ToolError: a provider raised something that is no `LLMError`, which goes on as it is.
        """
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            raise LLMValidationError(f"tools is {tools!r}", hint="give a list of functions, Tools or providers")
        found: list[Tool] = []
        for each in tools:
            if not isinstance(each, type) and isinstance(each, ToolProvider):
                found += await _provided(each)
            else:
                found.append(as_tool(each))
        if slow := [tool for tool in found if not tool.has_converter]:
            await asyncio.to_thread(_prepare, slow)
        return cls(found)

    def read(self, call: Mapping[str, Any]) -> Ready | Fault:
        """What a call asks for, or what is wrong with it; it never raises, and never guesses.

        Args:
            call: As in a message's `tool_calls`; the arguments may be an object as well as its JSON.
        """
        function = call.get("function")
        function = function if isinstance(function, Mapping) else {}
        call_id, asked = str(call.get("id") or ""), str(function.get("name") or "")
        given, wrong = _arguments(function.get("arguments"))
        bad = not isinstance(given, dict)
        name = self._find(asked)
        if name is None:
            return Fault(call_id, asked, self._unknown(asked), bad_arguments=bad)
        tool = self._tools[name]
        if wrong is None:
            try:
                values = coerce_to_schema(_object(given), tool.sent_parameters)
                return Ready(ToolCall(call_id, self._called[name], values, tool), tool.convert(values))
            except Exception as exc:  # noqa: BLE001 - types of the user have code of the user, which may raise anything
                wrong = str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"
        told = f"the arguments for {name!r} are wrong: {wrong}{_parameters(tool)}"
        return Fault(call_id, asked, told, bad_arguments=bad)

    def find_text_call(self, text: str) -> list[dict[str, Any]] | None:
        """The calls that an answer consists of, as a server would have sent them; None if it is an answer.

        Args:
            text: The whole answer. It has to be nothing but calls in one known syntax, of tools that there are; what
                the model thought may stand before.
        """
        calls = read_text_calls(text) or []
        found = [(self._find(name), arguments) for name, arguments in calls]
        wire = [dict(to_wire_call(name, arguments)) for name, arguments in found if name is not None]
        return wire if wire and len(wire) == len(found) else None

    def call(
        self,
        ready: Ready,
        context: ToolContext,
        *,
        timeout: float | None,
        max_output: int,
    ) -> Coroutine[Any, Any, ToolOutcome]:
        """Makes a call; what the tool raises is for the model to read.

        Args:
            ready: What `read` made of it.
            context: For functions that have a parameter for it.
            timeout: The agent's limit in seconds, or None; a `timeout` of the tool itself takes precedence.
            max_output: Characters of its output that are kept.
        """
        tool = ready.call.tool
        if tool is None:
            raise LLMValidationError(f"there is no tool {ready.call.name!r}", hint="give what read() returned")
        return call_tool(tool, ready.arguments, context, timeout=timeout, max_output=max_output)

    def _find(self, asked: str) -> str | None:
        """The sent name of the tool that is meant, by that name or by what the tool is called in this run."""
        return asked if asked in self._tools else self._sent.get(asked)

    def _unknown(self, asked: str) -> str:
        what = f"there is no tool {shorten(asked, _QUOTED)!r}" if asked else "the call names no tool"
        if not self.names:
            return f"{what}: there are none"
        close = difflib.get_close_matches(asked.lower(), self.names)
        listed = [*close, *(name for name in self.names if name not in close)]
        more = f", and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        return f"{what}; there are: {', '.join(listed[:_LISTED])}{more}"


async def _provided(provider: ToolProvider) -> list[Tool]:
    """The tools that a provider has now."""
    try:
        return [as_tool(tool) for tool in await provider.list_tools()]
    except LLMError:
        raise
    except Exception as exc:  # code of the user, which may raise anything
        raise ToolError(
            f"a provider of tools ({type(provider).__name__}) raised {type(exc).__name__}: {exc}",
            exc,
            hint="its list_tools() is to return a list of Tools",
            context={"operation": "agent run"},
        ) from exc


def _prepare(tools: Sequence[Tool]) -> None:
    """Makes now, and outside of the event loop, what would be made at the first call."""
    for tool in tools:
        _ = tool.convert


def _definition(name: str, tool: Tool) -> dict[str, Any]:
    function = {"name": name, "description": tool.description, "parameters": tool.sent_parameters}
    return {"type": "function", "function": function}


def _arguments(given: Any) -> tuple[Any, str | None]:
    """The JSON value of a call's arguments, or why there is none; nothing at all is no arguments."""
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}, None
    if not isinstance(given, str):
        return given, None
    try:
        values = msgspec.json.decode(given)
    except (ValueError, RecursionError) as exc:
        return None, f"not valid JSON: {_place(given, exc)}"
    return ({} if values is None else values), None


def _object(given: Any) -> dict[str, Any]:
    """The arguments, or what they spell: some models write their JSON twice over.

    Raises:
        ValueError: they are something else.
    """
    values = coerce_to_schema(given, {"type": "object"}) if isinstance(given, str) else given
    if not isinstance(values, dict):
        raise ValueError(f"they have to be a JSON object, not {shorten(json.dumps(values), _QUOTED)}")  # noqa: TRY004 - as any other
    return values


def _place(text: str, error: Exception) -> str:
    """What is wrong with a text that is no JSON, and where, with the text around it."""
    try:
        json.loads(text)
    except json.JSONDecodeError as exc:
        begin = max(0, exc.pos - _QUOTED // 2)
        where = f"line {exc.lineno} column {exc.colno} (character {exc.pos})"
        return f"{exc.msg} at {where}, near {text[begin : begin + _QUOTED]!r}"
    except (ValueError, RecursionError):
        pass  # too deep, or a number without end: the other decoder said so
    return f"{error}, in {shorten(text, _QUOTED)!r}"


def _parameters(tool: Tool) -> str:
    """What a tool takes, for who got it wrong."""
    required = tool.sent_parameters.get("required", ())
    known = [name if name in required else f"{name} (optional)" for name in tool.sent_parameters["properties"]]
    return f"; it takes: {', '.join(known[:_LISTED])}" if known else "; it takes none"
