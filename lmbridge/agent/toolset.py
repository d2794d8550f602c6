"""`Toolset`: the tools of one run, with their definitions for requests. It checks requested calls and executes them.

A tool that a run has been offered stays in the set, under its name and with its definition, until the run ends.
Otherwise a model could call a tool that has just disappeared, and a provider could replace a definition that somebody
has approved. A provider may add tools, at the end of the list. That alters the beginning of the prompt, so that the
server has to process the whole conversation again, but a run often cannot go on without them: some servers reveal most
of their tools only after a call of the first ones.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import attrs

from lmbridge._checks import MAPPING_TYPES, invalid_argument
from lmbridge._tasks import MANY
from lmbridge._text import shorten
from lmbridge.agent.almost_json import repair_arguments
from lmbridge.agent.argument_json import DuplicateKeyError, decode_json, is_nested_deeper
from lmbridge.agent.calling import ToolOutcome, call_tool
from lmbridge.agent.name_repair import find_meant_name
from lmbridge.agent.settings import ReadTextCalls
from lmbridge.agent.step_limit import STEPS_AT_ONCE, STEPS_IN_THREAD, StepLimit, StepLimitError
from lmbridge.agent.text_calls import (
    LONGEST_TEXT_OF_CALLS,
    TextCalls,
    read_calls_in_reasoning,
    read_text_calls,
    to_wire_call,
)
from lmbridge.agent.tool_names import LONGEST_NAME, name_of_added_tool, names_in_requests, names_in_run
from lmbridge.agent.tools import GrowingToolProvider, Tool, ToolCall, ToolContext, ToolProvider, as_tool
from lmbridge.client.inputs import CheckedList
from lmbridge.errors import LLMError, LLMValidationError, ToolError

logger: logging.Logger = logging.getLogger("lmbridge.agent")

__all__ = ["InvalidCall", "ReadyCall", "ToolOutcome", "Toolset"]

_MOST_LEVELS: Final = 200
"""The number of levels of nested arguments beyond which a call is not made. Deeper ones could not always be encoded."""
_QUOTED_CHARACTERS: Final = 200
"""The number of characters that an error text quotes of malformed arguments or of an unknown name."""
_LISTED_NAMES: Final = 50
"""The number of tools or parameters that an error text lists."""
_LONGEST_PROBLEM: Final = 2_000
"""The number of characters of a description of wrong arguments that the model receives; it may quote their values."""
_LARGE_ARGUMENTS: Final = 50_000
"""The number of characters of arguments, or of their keys, beyond which a call is read in a thread."""
_LARGE_REPAIR: Final = 10_000
"""The number of characters of malformed arguments beyond which they are repaired in a thread."""
_MOST_ENCODINGS: Final = 3
"""How often arguments may be encoded as JSON, one encoding within the other."""


@attrs.define
class ReadyCall:
    """A requested call whose tool exists and whose arguments are valid."""

    call: ToolCall
    """The call as it was requested. Its `arguments` are JSON values, with values of the wrong type coerced."""
    arguments: Mapping[str, Any] = attrs.field(repr=False)
    """The keyword arguments for the function of the tool, converted to the types that it expects."""
    written: str | None = attrs.field(default=None, repr=False)
    """The JSON of the arguments as the model should have written them; None if it has."""


@attrs.frozen
class InvalidCall:
    """A requested call that cannot be made."""

    call_id: str
    """The id of the call, as the model or the server gave it."""
    name: str
    """The name of the tool that the model used."""
    text: str
    """The text for the model, which says what is wrong and what would be right."""
    bad_arguments: bool
    """True if the arguments are not a JSON object. They must not be sent again: llama.cpp answers 500 to them."""


class Toolset:
    """The tools of one run.

    Args:
        tools: The tools, in the order in which requests list them.

    Raises:
        LLMValidationError: Two tools would have the same name.

    Attributes:
        definitions: The value of `tools` in requests.
        names: The names of the tools in requests, in the same order.
    """

    def __init__(self, tools: Sequence[Tool]) -> None:
        run_names = names_in_run(tools)
        self._request_names = names_in_requests(run_names)
        self.names: list[str] = [self._request_names[name] for name in run_names]
        self.definitions: CheckedList = CheckedList(
            _definition(name, tool) for name, tool in zip(self.names, tools, strict=True)
        )
        self._run_names = dict(zip(self.names, run_names, strict=True))
        self._tools = dict(zip(self.names, tools, strict=True))
        self._unprepared = [tool for tool in tools if not tool.has_converter]
        self._growing: list[GrowingToolProvider] = []
        self._seen = set(tools)

    @classmethod
    async def collect(cls, tools: Sequence[Tool | Callable[..., Any] | ToolProvider]) -> Toolset:
        """Builds the toolset of a run that is starting, including the current tools of its providers.

        Raises:
            LLMValidationError: An object is not a tool, or two tools would have the same name.
            LLMError: A provider raised this error.
            ToolError: A provider raised an exception of another class, which is the cause.
        """
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            raise invalid_argument("tools", "a list of functions, Tools or providers", tools)
        collected: list[Tool] = []
        for each in tools:
            # A class with a method `list_tools` passes the check of the protocol, but only its instances are providers.
            if not isinstance(each, type) and isinstance(each, ToolProvider):
                collected += await _call_provider(each, each.list_tools)
            else:
                collected.append(as_tool(each))
        toolset = cls(collected)
        toolset._growing = [
            each for each in tools if not isinstance(each, type) and isinstance(each, GrowingToolProvider)
        ]
        await toolset.prepare()
        return toolset

    async def add_new_tools(self) -> bool:
        """Adds the tools that providers have added since the last time, and returns whether there were any.

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
        return bool(added)

    def _add(self, added: Mapping[str, Tool]) -> None:
        """Adds tools, given by their names within the run, at the end of the list."""
        request_names = names_in_requests(added, self.names)
        self._request_names |= request_names
        for name, tool in added.items():
            sent_name = request_names[name]
            self._run_names[sent_name], self._tools[sent_name] = name, tool
            self.names = [*self.names, sent_name]
            # Not changed in place, because the list may be part of a request that is being retried.
            self.definitions = CheckedList([*self.definitions, _definition(sent_name, tool)])
        self._unprepared = [*self._unprepared, *(tool for tool in added.values() if not tool.has_converter)]

    async def prepare(self) -> None:
        """Builds the validators of the tools in a thread, because the import of jsonschema would block the event loop.

        Once they are there, this does nothing.
        """
        if self._unprepared:
            await asyncio.to_thread(_build_validators, self._unprepared)
            self._unprepared = []

    async def read_all(
        self, calls: Sequence[Mapping[str, Any]], *, repairs: bool = False, may_be_cut: bool = True
    ) -> list[ReadyCall | InvalidCall]:
        """Checks the calls of a reply like `read`, without making the event loop stand still.

        A call whose arguments are large, or hard to check against their schema, is read in a thread.

        Args:
            calls: The entries of a message's `tool_calls`.
            repairs: As in `read`.
            may_be_cut: As in `read`.
        """
        options = {"repairs": repairs, "may_be_cut": may_be_cut}
        read: list[ReadyCall | InvalidCall] = []
        for number, call in enumerate(calls, 1):
            try:
                arguments = _arguments_of(call)
                is_large = isinstance(arguments, (str, list, dict)) and len(arguments) > _LARGE_ARGUMENTS
                read.append(
                    await asyncio.to_thread(self.read, call, **options)
                    if is_large
                    else self._read(call, STEPS_AT_ONCE, **options)
                )
            except StepLimitError:
                read.append(await asyncio.to_thread(self.read, call, **options))
            if not number % MANY:
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
            StepLimitError: It takes more steps than are allowed, and may be tried again with more of them.
        """
        asked = _asked_name(call)
        name = self.resolve_name(asked) if repairs else self.find_request_name(asked)
        read = self._read_arguments(call, name, steps)
        if repairs and name is not None and isinstance(read, InvalidCall):
            repaired = _repaired_call(call, may_be_cut=may_be_cut, in_thread=steps >= STEPS_IN_THREAD)
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
            name: The name in requests of its tool; None if there is no such tool.
            steps: The number of steps that this may take.

        Raises:
            StepLimitError: It takes more steps.
        """
        call_id, asked = str(call.get("id") or ""), _asked_name(call)
        decoded, problem, inexact = _decode_arguments(_arguments_of(call))
        bad_arguments = not isinstance(decoded, dict) or is_nested_deeper(decoded, _MOST_LEVELS)
        if name is None:
            return InvalidCall(call_id, asked, self._describe_unknown(asked), bad_arguments=bad_arguments)
        tool = self._tools[name]
        if decoded is None and problem is None:
            decoded, problem = _without_arguments(tool)
        if problem is None:
            try:
                with StepLimit(steps):
                    values = tool.coercer.coerce(_read_encoded_twice(decoded, inexact), inexact=inexact)
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
        problem = shorten(problem, _LONGEST_PROBLEM)
        text = f"the arguments for {name!r} are wrong: {problem}; {_describe_parameters(tool)}"
        return InvalidCall(call_id, asked, text, bad_arguments=bad_arguments)

    def find_text_calls(
        self,
        text: str,
        *,
        reasoning: str = "",
        mode: ReadTextCalls = "always",
        repairs: bool = True,
        may_be_cut: bool = False,
    ) -> tuple[str, list[dict[str, Any]]] | None:
        """Returns the calls that a model wrote into its reply, in the form of `tool_calls`, and the text before them.

        Args:
            text: The whole reply. It may begin with the model's reasoning.
            reasoning: The reasoning, if it is known. Calls at its end count if the reply has no text.
            mode: Which calls are read, as in `Agent(read_text_calls=...)`.
            repairs: Whether names and JSON with small mistakes are read as well.
            may_be_cut: Whether the end of the reply may have been cut off.

        Returns:
            The text and the calls, or None if the reply is an ordinary answer: if it has no calls of existing tools in
            one of the known syntaxes, if they are quoted, or if it has more than 500,000 characters.
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
        """Returns whether a call cannot be made. JSON or code with text around it is then no call at all."""
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

    def find_request_name(self, asked: str) -> str | None:
        """Returns the name in requests of a tool, given that name or the one in the run; None for an unknown name."""
        return asked if asked in self._tools else self._request_names.get(asked)

    def resolve_name(self, asked: str) -> str | None:
        """Returns the name in requests of the only tool that a name can be meant for; None if there is none."""
        exact = self.find_request_name(asked)
        if exact is not None or not asked:
            return exact
        meant = find_meant_name(asked, self._request_names)
        return None if meant is None else self._request_names[meant]

    def _describe_unknown(self, asked: str) -> str:
        """Says that a tool does not exist, and lists those that do, with the most similar names first."""
        problem = f"there is no tool {shorten(asked, _QUOTED_CHARACTERS)!r}" if asked else "the call names no tool"
        if not self.names:
            return f"{problem}: there are no tools"
        similar = difflib.get_close_matches(asked[:LONGEST_NAME].lower(), self.names)
        names = [*similar, *(name for name in self.names if name not in similar)]
        more = f", and {len(names) - _LISTED_NAMES} more" if len(names) > _LISTED_NAMES else ""
        return f"{problem}; there are: {', '.join(names[:_LISTED_NAMES])}{more}"


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


def _asked_name(call: Mapping[str, Any]) -> str:
    function = call.get("function")
    return str(function.get("name") or "") if isinstance(function, MAPPING_TYPES) else ""


def _arguments_of(call: Mapping[str, Any]) -> Any:
    function = call.get("function")
    return function.get("arguments") if isinstance(function, MAPPING_TYPES) else None


def _decode_arguments(arguments: Any) -> tuple[Any, str | None, set[float]]:
    """Returns the JSON value of a call's arguments, which is None if it has none, or None and what is wrong.

    The third part of the result contains the numbers whose text differs from their `repr` in Python, such as 3.10.
    """
    if not isinstance(arguments, str):
        return arguments, None, set()
    if not arguments.strip():
        return None, None, set()
    inexact: set[float] = set()
    try:
        return decode_json(arguments, inexact), None, inexact
    except DuplicateKeyError as exc:
        return None, str(exc), set()
    except (ValueError, RecursionError) as exc:
        return None, f"not valid JSON: {_locate_json_error(arguments, exc)}", set()


def _without_arguments(tool: Tool) -> tuple[dict[str, Any] | None, str | None]:
    """Returns the arguments of a call that has none, or None and what is wrong with it.

    Only a tool without parameters is called. Otherwise the arguments may have been lost on the way, and the tool would
    do something else than the model wanted.
    """
    if not (tool.sent_parameters["properties"] or tool.sent_parameters.get("additionalProperties")):
        return {}, None
    is_optional = not tool.sent_parameters.get("required")
    return None, "the call has none" + ("; send {} to use the default of each of them" if is_optional else "")


def _repaired_call(call: Mapping[str, Any], *, may_be_cut: bool, in_thread: bool) -> dict[str, Any] | None:
    """Returns a call with its arguments in valid JSON, or None if they cannot be repaired, or need not be.

    Raises:
        StepLimitError: This takes so long that it has to be done in a thread.
    """
    function = call.get("function")
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(arguments, str):
        return None
    if len(arguments) > _LARGE_REPAIR and not in_thread:
        raise StepLimitError
    text = arguments
    for _ in range(_MOST_ENCODINGS):
        try:
            value = decode_json(text, set())
        except DuplicateKeyError:
            return None
        except (ValueError, RecursionError):
            try:
                text = repair_arguments(text, may_be_cut=may_be_cut)
                value = decode_json(text, set())
            except (ValueError, RecursionError):
                return None
        if not isinstance(value, str):
            break
        text = value
    return None if text == arguments else {**call, "function": {**function, "arguments": text}}


def _read_encoded_twice(decoded: Any, inexact: set[float]) -> dict[str, Any]:
    """Returns the arguments as a dict. A string is decoded once more, because some models encode their JSON twice.

    Args:
        decoded: The value of the arguments.
        inexact: Receives the numbers in a string whose text differs from their `repr` in Python.

    Raises:
        ValueError: The arguments are not an object, or an object has a key twice.
    """
    values = decoded
    if isinstance(decoded, str):
        try:
            values = decode_json(decoded, inexact)
        except DuplicateKeyError:
            raise
        except (ValueError, RecursionError):
            # The text is an ordinary one, which the error quotes.
            values = decoded
    values = values if isinstance(values, dict) else decoded
    if not isinstance(values, dict):
        shown = shorten(json.dumps(values), _QUOTED_CHARACTERS)
        raise ValueError(f"they have to be a JSON object, not {shown}")  # noqa: TRY004 - callers expect a ValueError
    return values


def _locate_json_error(text: str, error: Exception) -> str:
    """Describes why a text is not valid JSON, where the error is, and what the text says there.

    The message comes from the `json` module if it refuses the text as well, because msgspec reports only a byte offset.
    """
    try:
        json.loads(text)
    except json.JSONDecodeError as exc:
        begin = max(0, exc.pos - _QUOTED_CHARACTERS // 2)
        position = f"line {exc.lineno} column {exc.colno} (character {exc.pos})"
        return f"{exc.msg} at {position}, near {text[begin : begin + _QUOTED_CHARACTERS]!r}"
    except (ValueError, RecursionError):
        # The text is nested too deeply or contains a huge number; msgspec has described that already.
        pass
    return f"{error}, in {shorten(text, _QUOTED_CHARACTERS)!r}"


def _describe_parameters(tool: Tool) -> str:
    """Lists the parameters of a tool for a model that got its arguments wrong."""
    required = tool.sent_parameters.get("required", ())
    names = [name if name in required else f"{name} (optional)" for name in tool.sent_parameters["properties"]]
    listed = shorten(", ".join(names[:_LISTED_NAMES]), _LONGEST_PROBLEM)
    return f"it takes: {listed}" if names else "it takes no arguments"
