"""`Toolset`: the tools of one run, with their definitions for requests. It checks requested calls and executes them.

A tool that a run has offered to its model stays in the set, under its name and with its definition, until the run ends.
Otherwise a model could call a tool that has just disappeared, and a provider could replace a definition that somebody
has approved. A provider may add tools at the end of the list. That alters the beginning of the prompt, so that the
server has to process the whole conversation again. But a run often cannot do without the new tools: some servers reveal
most of their tools only after the model has called one of the first ones.

The names of tools, such as `server__tool`, are decided in `tool_names`, and tools are collected from providers by
`collect_tools` below.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import attrs

from lmbridge._checks import invalid_argument
from lmbridge._tasks import ITEMS_PER_STEP
from lmbridge._text import shorten
from lmbridge.agent.argument_json import is_nested_deeper
from lmbridge.agent.call_arguments import (
    LONGEST_PROBLEM,
    arguments_of,
    asked_name,
    check_missing_arguments,
    decode_arguments,
    describe_parameters,
    read_encoded_twice,
    repaired_call,
)
from lmbridge.agent.schema_check_limit import STEPS_AT_ONCE, STEPS_IN_THREAD, StepLimit, StepLimitError
from lmbridge.agent.settings import ReadTextCalls
from lmbridge.agent.text_calls.finding import (
    LONGEST_TEXT_OF_CALLS,
    TextCalls,
    read_calls_in_reasoning,
    read_text_calls,
    to_wire_call,
)
from lmbridge.agent.tool_execution import ToolOutcome, call_tool
from lmbridge.agent.tool_names import name_of_added_tool, names_in_requests, names_in_run
from lmbridge.agent.tools import GrowingToolProvider, Tool, ToolCall, ToolContext, ToolProvider, as_tool
from lmbridge.agent.unknown_tools import describe_unknown, find_meant_name
from lmbridge.client.input_checks import CheckedList
from lmbridge.errors import LLMError, LLMValidationError, ToolError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

__all__ = ["InvalidCall", "ReadyCall", "ToolOutcome", "Toolset"]

_MOST_LEVELS: Final = 200
"""The levels of nesting in arguments beyond which a call is not made. Deeper arguments could not always be encoded."""
_LARGE_ARGUMENTS: Final = 50_000
"""The number of characters, keys or items in arguments beyond which a call is read in a thread."""


@attrs.define
class ReadyCall:
    """A requested call whose tool exists and whose arguments are valid."""

    call: ToolCall
    """The call as it was requested, except that values of the wrong type in its `arguments` have been coerced."""
    arguments: Mapping[str, Any] = attrs.field(repr=False)
    """The keyword arguments for the function of the tool, converted to the types that it expects."""
    written: str | None = attrs.field(default=None, repr=False)
    """The JSON of the arguments as the model should have written them; None if they need no repair."""


@attrs.frozen
class InvalidCall:
    """A requested call that cannot be made."""

    call_id: str
    """The id of the call; see `ToolCall.id`."""
    name: str
    """The name that the model used for the tool."""
    text: str
    """The text for the model, which says what is wrong and what would be right."""
    tool: str | None = None
    """The tool whose arguments are wrong, by its name in requests; None if something else is wrong."""


class Toolset:
    """The tools of one run.

    Args:
        tools: The tools, in the order in which requests list them.
        growing: Providers that may add tools during the run. Default: none.

    Raises:
        LLMValidationError: Two tools would have the same name.

    Attributes:
        definitions: The value of `tools` in requests.
        names: The names in requests of the tools that are offered, in the same order as `definitions`.
        finder: The tool with which the model can find further tools, or None.
    """

    finder: Tool | None = None

    def __init__(self, tools: Sequence[Tool], growing: Sequence[GrowingToolProvider] = ()) -> None:
        self.names: list[str] = []
        self.definitions: CheckedList = CheckedList()
        self._request_names: dict[str, str] = {}
        self._run_names: dict[str, str] = {}
        self._tools: dict[str, Tool] = {}
        self._unprepared: list[Tool] = []
        self._growing = growing
        self._seen = set(tools)
        self._has_grown = False
        self._add(dict(zip(names_in_run(tools), tools, strict=True)))
        self._has_grown = False

    @property
    def all_names(self) -> list[str]:
        """The names in requests of all tools of the run, except for the one that finds others."""
        return [name for name, tool in self._tools.items() if tool is not self.finder]

    @classmethod
    async def collect(cls, tools: Sequence[Tool | Callable[..., Any] | ToolProvider]) -> Toolset:
        """Builds the toolset of a run that is starting, including the current tools of its providers.

        Raises:
            LLMValidationError: An object is not a tool, or two tools would have the same name.
            LLMError: A provider raised this error.
            ToolError: A provider raised an exception of another class, which is the cause.
        """
        toolset = cls(*await collect_tools(tools))
        await toolset.prepare()
        return toolset

    async def add_new_tools(self) -> bool:
        """Adds the tools that providers have added since the last time.

        Returns:
            Whether more tools are offered than when this method was last called. A search by the model also adds tools.

        Raises:
            LLMError: A provider raised this error.
            ToolError: A provider raised an exception of another class, which is the cause.
        """
        added: dict[str, Tool] = {}
        for provider in self._growing:
            for tool in await _call_provider(provider, provider.new_tools):
                if tool in self._seen:
                    continue
                self._seen.add(tool)
                name = name_of_added_tool(tool, {*self._run_names.values(), *added})
                if name is None:
                    logger.warning("a new tool %r is left out, because the run has a tool of that name", tool.name)
                else:
                    added[name] = tool
        if added:
            self._add(added)
            await self.prepare()
        has_grown, self._has_grown = self._has_grown, False
        return has_grown

    def _add(self, added: Mapping[str, Tool]) -> None:
        """Adds tools, given by their names within the run, and offers them at the end of the list."""
        self._offer(self._register(added))

    def _register(self, added: Mapping[str, Tool]) -> list[str]:
        """Adds tools without offering them, and returns their names in requests."""
        request_names = names_in_requests(added, self._tools)
        self._request_names |= request_names
        for name, tool in added.items():
            self._run_names[request_names[name]], self._tools[request_names[name]] = name, tool
        return [request_names[name] for name in added]

    def _offer(self, names: Sequence[str]) -> None:
        """Offers tools of the run, given by their names in requests, at the end of the list."""
        # The lists are not changed in place, because they may be part of a request that is being retried.
        self.names = [*self.names, *names]
        self.definitions = CheckedList([*self.definitions, *(_definition(name, self._tools[name]) for name in names)])
        self._unprepared += (tool for tool in map(self._tools.__getitem__, names) if not tool.has_converter)
        self._has_grown = True

    async def prepare(self) -> None:
        """Builds the validators of the tools in a thread, because the import of jsonschema would block the event loop.

        If all of them have been built, this does nothing.
        """
        if self._unprepared:
            prepared = tuple(self._unprepared)
            await asyncio.to_thread(_build_validators, prepared)
            self._unprepared = [tool for tool in self._unprepared if tool not in prepared]

    async def read_all(
        self, calls: Sequence[Mapping[str, Any]], *, repairs: bool = False, may_be_cut: bool = True
    ) -> list[ReadyCall | InvalidCall]:
        """Checks the calls of a reply like `read`, without blocking the event loop.

        A call is read in a thread if its arguments are large, or take long to check against their schema.

        Args:
            calls: The entries of a message's `tool_calls`.
            repairs: As in `read`.
            may_be_cut: As in `read`.
        """
        options = {"repairs": repairs, "may_be_cut": may_be_cut}
        read: list[ReadyCall | InvalidCall] = []
        for number, call in enumerate(calls, 1):
            try:
                arguments = arguments_of(call)
                is_large = isinstance(arguments, (str, list, dict)) and len(arguments) > _LARGE_ARGUMENTS
                read.append(
                    await asyncio.to_thread(self.read, call, **options)
                    if is_large
                    else self._read(call, STEPS_AT_ONCE, **options)
                )
            except StepLimitError:
                read.append(await asyncio.to_thread(self.read, call, **options))
            if not number % ITEMS_PER_STEP:
                await asyncio.sleep(0)
        return read

    def read(
        self, call: Mapping[str, Any], *, repairs: bool = False, may_be_cut: bool = True
    ) -> ReadyCall | InvalidCall:
        """Checks a call that a model has requested. This method never raises, and never guesses a tool or a value.

        Args:
            call: An entry of a message's `tool_calls`. Its arguments may be an object or its JSON.
            repairs: Whether a name or arguments with small mistakes are read if there is only one way to do so, and the
                arguments are valid then. Default: False.
            may_be_cut: Whether the arguments may have been cut off, so that no missing bracket is added. Default: True.
        """
        return self._read(call, STEPS_IN_THREAD, repairs=repairs, may_be_cut=may_be_cut)

    def _read(self, call: Mapping[str, Any], steps: int, *, repairs: bool, may_be_cut: bool) -> ReadyCall | InvalidCall:
        """Checks a call.

        Raises:
            StepLimitError: The check takes more than these steps. It may be tried again with more, in a thread.
        """
        asked = asked_name(call)
        name = self.resolve_name(asked) if repairs else self.find_request_name(asked)
        read = self._read_arguments(call, name, steps)
        if repairs and name is not None and isinstance(read, InvalidCall):
            repaired = repaired_call(call, may_be_cut=may_be_cut, in_thread=steps >= STEPS_IN_THREAD)
            if repaired is not None and isinstance(again := self._read_arguments(repaired, name, steps), ReadyCall):
                again.written = repaired["function"]["arguments"]
                read = again
        is_repaired = call.get("repaired") or (name is not None and name != self.find_request_name(asked))
        if isinstance(read, ReadyCall) and (is_repaired or read.written is not None):
            read.call = attrs.evolve(read.call, repaired=True)
        return read

    def _read_arguments(self, call: Mapping[str, Any], name: str | None, steps: int) -> ReadyCall | InvalidCall:
        """Checks the arguments of a call.

        Args:
            call: The call.
            name: The name in requests of its tool; None if the tool does not exist.
            steps: The number of steps that the check may take.

        Raises:
            StepLimitError: The check takes more than these steps, and more of them are allowed in a thread.
        """
        call_id, asked = str(call.get("id") or ""), asked_name(call)
        decoded, problem, inexact = decode_arguments(arguments_of(call))
        if name is None:
            return InvalidCall(call_id, asked, self._describe_unknown(asked))
        tool = self._tools[name]
        if decoded is None and problem is None:
            decoded, problem = check_missing_arguments(tool)
        if problem is None:
            try:
                with StepLimit(steps):
                    values = tool.coercer.coerce(read_encoded_twice(decoded, inexact), inexact=inexact)
                    if values is not decoded and is_nested_deeper(values, _MOST_LEVELS):
                        raise RecursionError
                    return ReadyCall(ToolCall(call_id, self._run_names[name], values, tool), tool.convert(values))
            except StepLimitError:
                if steps < STEPS_IN_THREAD:
                    raise
                problem = "it would take too long to check them; send fewer and shorter ones"
            except RecursionError:
                problem = "they are nested too deeply"
            except Exception as exc:  # noqa: BLE001 - the constructor of a user's type may raise anything
                problem = str(exc) if isinstance(exc, ValueError) else f"{type(exc).__name__}: {exc}"
        problem = shorten(problem, LONGEST_PROBLEM)
        text = f"the arguments for {name!r} are wrong: {problem}; {describe_parameters(tool)}"
        return InvalidCall(call_id, asked, text, tool=name)

    def find_text_calls(
        self,
        text: str,
        *,
        reasoning: str = "",
        mode: ReadTextCalls = "always",
        repairs: bool = True,
        may_be_cut: bool = False,
    ) -> tuple[str, list[dict[str, Any]]] | None:
        """Finds the calls that a model wrote as text.

        Args:
            text: The whole reply. It may begin with the model's reasoning.
            reasoning: The reasoning, if it is known. Calls at its end count if the reply has no text.
            mode: Which calls are read, as in `Agent(read_text_calls=...)`.
            repairs: Whether names and JSON with small mistakes are read as well.
            may_be_cut: Whether the end of the reply may have been cut off.

        Returns:
            The text before the calls, and the calls in the form of `tool_calls`. None if the reply counts as an
            ordinary answer: because it has no calls in a known syntax, a call cannot be read or names no existing tool,
            a call without tags is surrounded by text and has wrong arguments, the calls are quoted, `mode` excludes
            them, or the reply has more than 500,000 characters.
        """
        if mode == "never" or len(text) + len(reasoning) > LONGEST_TEXT_OF_CALLS:
            return None
        if text.strip():
            found = read_text_calls(text, repairs=repairs, may_be_cut=may_be_cut)
        else:
            found = read_calls_in_reasoning(reasoning, repairs=repairs, may_be_cut=may_be_cut)
        if found is None or (mode == "whole" and found.has_prose):
            return None
        calls = self._wire_calls(found, repairs=repairs)
        if calls is None or (found.is_bare and found.has_prose and any(map(self._is_invalid, calls))):
            return None
        return found.text if text.strip() else "", calls

    def _wire_calls(self, found: TextCalls, *, repairs: bool) -> list[dict[str, Any]] | None:
        """Returns calls in the form of `tool_calls`, or None if one of them names no tool."""
        calls: list[dict[str, Any]] = []
        for each in found.calls:
            exact = self.find_request_name(each.name)
            name = self.resolve_name(each.name) if repairs else exact
            if name is None:
                return None
            is_repaired = each.is_repaired or exact is None
            calls.append(dict(to_wire_call(name, each.arguments, is_repaired=is_repaired)))
        return calls

    def _is_invalid(self, call: Mapping[str, Any]) -> bool:
        """Returns whether a call cannot be made. JSON or code with text around it then does not count as a call."""
        try:
            return isinstance(self._read(call, STEPS_AT_ONCE, repairs=False, may_be_cut=False), InvalidCall)
        except StepLimitError:
            return False

    def call(
        self, ready: ReadyCall, context: ToolContext, *, timeout: float | None, max_output: int
    ) -> Coroutine[Any, Any, ToolOutcome]:
        """Executes a call. If the tool fails, the outcome describes that to the model.

        Args:
            ready: The call, as `read` returned it.
            context: The information about the call that the function can ask for.
            timeout: The agent's time limit in seconds, or None. A `timeout` of the tool takes precedence over it.
            max_output: The number of characters to which the text of the outcome is truncated.

        Raises:
            LLMValidationError: The call does not come from `read`.
        """
        tool = ready.call.tool
        if tool is None:
            raise LLMValidationError(f"there is no tool {ready.call.name!r}", hint="pass a call that read() returned")
        return call_tool(tool, ready.arguments, context, timeout=timeout, max_output=max_output)

    def sent_parameters(self, name: str) -> Mapping[str, Any]:
        """Returns the JSON schema that servers receive for the arguments of a tool, given its name in requests."""
        return self._tools[name].sent_parameters

    def find_request_name(self, asked: str) -> str | None:
        """Returns the name of a tool in requests, given that name or its name in the run; None for an unknown name."""
        return asked if asked in self._tools else self._request_names.get(asked)

    def resolve_name(self, asked: str) -> str | None:
        """Returns the name in requests of the tool that a name is meant for, if it is exactly one; otherwise None."""
        exact = self.find_request_name(asked)
        if exact is not None or not asked:
            return exact
        meant = find_meant_name(asked, self._request_names)
        return None if meant is None else self._request_names[meant]

    def _describe_unknown(self, asked: str) -> str:
        """Returns what the model reads about a call of a tool that does not exist."""
        return describe_unknown(asked, self.names, self._tools)


async def collect_tools(
    tools: Sequence[Tool | Callable[..., Any] | ToolProvider],
) -> tuple[list[Tool], list[GrowingToolProvider]]:
    """Returns the given tools with those of the given providers, and the providers that may add tools during the run.

    Raises:
        LLMValidationError: An object is not a tool.
        LLMError: A provider raised this error.
        ToolError: A provider raised an exception of another class, which is the cause.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise invalid_argument("tools", "a list of functions, Tools or providers", tools)
    collected: list[Tool] = []
    growing: list[GrowingToolProvider] = []
    for each in tools:
        # A class with a method `list_tools` passes the check of the protocol, but only its instances are providers.
        if not isinstance(each, type) and isinstance(each, ToolProvider):
            collected += await _call_provider(each, each.list_tools)
            if isinstance(each, GrowingToolProvider):
                growing.append(each)
        else:
            collected.append(as_tool(each))
    return collected, growing


async def _call_provider(provider: ToolProvider, method: Callable[[], Awaitable[Sequence[Tool]]]) -> list[Tool]:
    """Returns the tools that a method of a provider returns."""
    try:
        return [as_tool(tool) for tool in await method()]
    except LLMError:
        raise
    # The provider is code of the user, which may raise anything.
    except Exception as exc:
        name = getattr(method, "__name__", "list_tools")
        raise ToolError(
            f"a provider of tools ({type(provider).__name__}) raised {type(exc).__name__}: {exc}",
            exc,
            hint=f"its {name}() has to return a list of Tools",
            context={"operation": "agent run"},
        ) from exc


def _build_validators(tools: Sequence[Tool]) -> None:
    for tool in tools:
        _ = tool.convert


def _definition(name: str, tool: Tool) -> dict[str, Any]:
    # An instance of a subclass of str would not be sent as a text.
    description = str.__str__(tool.description)
    function = {"name": str.__str__(name), "description": description, "parameters": tool.sent_parameters}
    return {"type": "function", "function": function}
