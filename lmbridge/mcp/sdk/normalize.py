"""Turns what servers send in answer to a request into what the protocol specifies.

Many servers send almost what the protocol says: a list as structured content, a result without `content`, an error that
is a string, a tool without a schema. The SDK rejects each of these, and with it the data that a model could have used.
So every answer passes through here before anybody else sees it. The functions do no I/O.

Each deviation adds a note to a set, a few words such as "a result that is null". The caller logs it once for each
session.

An answer may hold a million blocks. The functions that go through them are therefore generators, which yield after
every 100 blocks so that other tasks can run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any, Final, TypeVar

import attrs

from lmbridge._tasks import ITEMS_PER_STEP
from lmbridge._text import json_for_model, shorten

_T = TypeVar("_T")

MOST_TOOLS: Final = 5_000
"""How many tools a server may have. More would not fit into any prompt, and the SDK reads the list in one step."""
TOO_MANY_TOOLS: Final = f"its list of tools has more than {MOST_TOOLS:,} tools"
"""Why a longer list is refused."""

_LONGEST_REFUSAL: Final = 2000
"""The length to which the message of a server's error is shortened, in characters."""
_LONGEST_DATA: Final = 300
"""The length up to which the data of an error is quoted with its message, in characters."""
_TRUE_TEXTS: Final = ("true", "yes", "1")
_ENVELOPE_KEYS: Final = ("content", "structuredContent", "isError", "_meta", "resultType")
"""The keys of a tool's result that are defined by the protocol. The values of all others are data of the server."""
_NO_PARAMETERS: Final = {"type": "object", "properties": {}}


@attrs.frozen
class ServerAnswer:
    """The answer to a request: either a result or a refusal."""

    result: dict[str, Any] | None = None
    """The result as the protocol specifies it; None if the server refused the request."""
    refusal: str = ""
    """The code and the message of the server's error; empty if there is a result."""
    error: Mapping[str, Any] = attrs.field(factory=dict)
    """The error as the protocol specifies it, with `code` and `message`; empty if there is a result."""
    notes: set[str] = attrs.field(factory=set)
    """Notes on what had to be changed, each of a few words."""


def read_answer(message: Mapping[str, Any], method: str) -> Generator[None, None, ServerAnswer]:
    """Reads the answer to a request, as a generator that yields whenever other tasks should run.

    Args:
        message: The message that has arrived.
        method: The method of the request that it answers.
    """
    notes: set[str] = set()
    if message.get("jsonrpc") != "2.0":
        notes.add('an answer without "jsonrpc": "2.0"')
    error = message.get("error")
    has_error = error is not None if "result" not in message else error not in (None, False, "", {}, [])
    if has_error:
        normalized = normalize_error(error, notes)
        return ServerAnswer(refusal=describe_refusal(normalized), error=normalized, notes=notes)
    if "error" in message and "result" in message:
        notes.add("a result with an empty error beside it")
    if "result" not in message:
        notes.add("an answer with neither a result nor an error")
        return _unreadable("its answer has neither a result nor an error", notes)
    result = message["result"]
    if method == "tools/call":
        fields = yield from normalize_call_result(result, notes)
        return ServerAnswer(fields, notes=notes)
    if method == "tools/list":
        return (yield from _read_tool_page(result, notes))
    if not isinstance(result, dict):
        notes.add("a result that is not an object")
        return _unreadable(f"its answer to {method!r} is not an object", notes)
    return ServerAnswer(result, notes=notes)


def _read_tool_page(result: Any, notes: set[str]) -> Generator[None, None, ServerAnswer]:
    tools = result.get("tools") if isinstance(result, dict) else result
    if isinstance(tools, list | dict) and len(tools) > MOST_TOOLS:
        return _unreadable(TOO_MANY_TOOLS, notes)
    page = yield from normalize_tool_page(result, notes)
    return _unreadable("its list of tools is not valid", notes) if page is None else ServerAnswer(page, notes=notes)


def _unreadable(problem: str, notes: set[str]) -> ServerAnswer:
    """Returns a refusal in place of an answer that contains nothing usable."""
    return ServerAnswer(refusal=problem, error={"code": 0, "message": problem}, notes=notes)


def normalize_error(error: Any, notes: set[str]) -> dict[str, Any]:
    """Returns an error with an integer `code`, which is 0 by default, and a string as its `message`."""
    if not isinstance(error, Mapping):
        notes.add("an error that is not an object")
        return {"code": 0, "message": _as_text(error)}
    code, message = error.get("code"), error.get("message")
    if not isinstance(code, int) or isinstance(code, bool) or not isinstance(message, str):
        notes.add("an error without a numeric code or without a message")
    rest = dict(error)
    rest.pop("code", None)
    words = message if isinstance(message, str) else _as_text(message if message is not None else rest or "no reason")
    normalized = {"code": _as_integer(code), "message": words}
    return normalized if error.get("data") is None else {**normalized, "data": error["data"]}


def describe_refusal(error: Mapping[str, Any]) -> str:
    """Returns the code and the message of a normalized error, and its data if that is short."""
    words, data = error["message"].strip(), _as_text(error.get("data") or "")
    if not words:
        words = data or "no reason was given"
    elif data and len(data) <= _LONGEST_DATA and data not in words:
        words = f"{words} ({data})"
    words = shorten(words, _LONGEST_REFUSAL)
    return f"{error['code']}: {words}" if error["code"] else words


def normalize_call_result(result: Any, notes: set[str]) -> Generator[None, None, dict[str, Any]]:
    """Returns the result of a tool with a list of blocks as `content` and a bool as `isError`.

    A result that is not an object, or whose data is under other keys, becomes the content or the structured content.
    """
    if isinstance(result, dict):
        fields = dict(result)
    else:
        notes.add("a result that is not an object")
        fields = yield from _wrap_result(result)
    content = fields.get("content")
    fields["content"] = yield from _normalize_blocks(content, notes)
    if not isinstance(content, list):
        notes.add("a result without a list as content")
        if fields.get("structuredContent") is None and (rest := _data_outside(fields)) is not None and not content:
            fields["structuredContent"] = rest
    structured = fields.get("structuredContent")
    if structured is not None and not isinstance(structured, dict):
        notes.add("structured content that is not an object")
    if structured is not None and (yield from _are_all(_is_empty_text, fields["content"])):
        # An empty text block would be shown to the model in place of the data.
        fields["content"] = []
    fields["isError"] = _is_true(fields.get("isError"))
    return fields


def _wrap_result(result: Any) -> Generator[None, None, dict[str, Any]]:
    if result is None:
        return {"content": []}
    is_content = isinstance(result, list) and bool(result) and (yield from _are_all(_is_block, result))
    return {"content": result} if isinstance(result, str) or is_content else {"structuredContent": result}


def _is_block(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("type"), str)


def _data_outside(fields: Mapping[str, Any]) -> Any:
    """Returns the data that a result has under keys that the protocol does not define, or None."""
    # There may be many keys, so they are copied by C code.
    rest = dict(fields)
    for key in _ENVELOPE_KEYS:
        rest.pop(key, None)
    # In the first revision of the protocol, the data of a result was under the key `toolResult`.
    return rest.get("toolResult", rest or None)


def _normalize_blocks(content: Any, notes: set[str]) -> Generator[None, None, list[dict[str, Any]]]:
    if content is None:
        return []
    blocks: list[dict[str, Any]] = []
    for items in _slices(content if isinstance(content, list) else [content]):
        blocks += [_normalize_block(each, notes) for each in items if each is not None]
        if len(items) == ITEMS_PER_STEP:
            yield
    return blocks


def _slices(items: list[_T]) -> Iterable[list[_T]]:
    return (items[begin : begin + ITEMS_PER_STEP] for begin in range(0, len(items), ITEMS_PER_STEP))


def _are_all(fits: Callable[[_T], bool], items: list[_T]) -> Generator[None, None, bool]:
    """Returns whether all items fit, as a generator that yields after every 100 items."""
    for some in _slices(items):
        if not all(map(fits, some)):
            return False
        if len(some) == ITEMS_PER_STEP:
            yield
    return True


def _normalize_block(given: Any, notes: set[str]) -> dict[str, Any]:
    block: dict[str, Any] = given if isinstance(given, dict) else {"type": "text", "text": _as_text(given)}
    if not isinstance(given, dict):
        notes.add("a content block that is not an object")
    kind = block.get("type")
    if not isinstance(kind, str):
        notes.add("a content block without a type")
        kind = _guess_block_type(block)
        block = {**block, "type": kind}
    if kind == "text" and not isinstance(block.get("text"), str):
        notes.add("a text block without a text")
        text = block.get("text", block.get("data"))
        return {**block, "text": "" if text is None else _as_text(text)}
    resource = block.get("resource")
    if kind == "resource" and isinstance(resource, dict) and not isinstance(resource.get("text"), str | None):
        notes.add("a resource whose text is not a string")
        return {**block, "resource": {**resource, "text": _as_text(resource["text"])}}
    return block


def _guess_block_type(block: Mapping[str, Any]) -> str:
    if "text" in block:
        return "text"
    if "resource" in block:
        return "resource"
    media = block.get("mimeType")
    if "data" in block and isinstance(media, str) and media.startswith(("image/", "audio/")):
        return media.partition("/")[0]
    return "resource_link" if "uri" in block else "unknown"


def _is_empty_text(block: Mapping[str, Any]) -> bool:
    return block.get("type") == "text" and not str(block.get("text", "")).strip()


def normalize_tool_page(result: Any, notes: set[str]) -> Generator[None, None, dict[str, Any] | None]:
    """Returns a page of tools with a list as `tools`, or None if it has no list of tools."""
    page = dict(result) if isinstance(result, dict) else {"tools": result}
    tools = page.get("tools", ())
    if isinstance(tools, dict):
        notes.add("tools that are not a list")
        tools = [{"name": name, **each} for name, each in tools.items() if isinstance(each, dict)]
    if tools is None and isinstance(result, dict):
        notes.add("tools that are null")
        tools = []
    if not isinstance(tools, list):
        return None
    page["tools"] = normalized = []
    for some in _slices(tools):
        normalized += [_normalize_tool(each, notes) for each in some]
        if len(some) == ITEMS_PER_STEP:
            yield
    cursor = page.get("nextCursor")
    if isinstance(cursor, int | float) and not isinstance(cursor, bool):
        notes.add("a cursor that is a number")
        page["nextCursor"] = str(cursor)
    return page


def _normalize_tool(tool: Any, notes: set[str]) -> Any:
    if not isinstance(tool, dict):
        return tool
    schema = tool.get("inputSchema")
    if schema is None or schema is True or schema == {}:
        if schema != {}:
            notes.add("a tool without an inputSchema")
        return {**tool, "inputSchema": dict(_NO_PARAMETERS)}
    if not isinstance(schema, dict):
        return tool
    fixed = {key: value for key, value in schema.items() if value is not None or key not in ("properties", "required")}
    if fixed.get("type") is None or fixed["type"] in (["object"], ["object", "null"], ["null", "object"]):
        fixed["type"] = "object"
    if fixed != schema:
        notes.add("an inputSchema without the type object")
    return {**tool, "inputSchema": fixed}


def normalize_handshake(
    result: Mapping[str, Any], known_versions: tuple[str, ...], notes: set[str]
) -> tuple[dict[str, Any], str]:
    """Returns the answer to `initialize` that the SDK accepts, and the protocol revision that the server named.

    If the SDK does not know the server's revision, it is given one that it knows: the newest one that is older than the
    server's, or the oldest one if none is older. If the server's revision is not a date, the SDK is given the newest
    revision that it knows. The messages that lmbridge uses are the same in all revisions.

    Args:
        result: The server's answer.
        known_versions: The revisions that the SDK accepts, oldest first.
        notes: A set to which deviations are added.
    """
    named = result.get("protocolVersion")
    version = str(named) if named else known_versions[-1]
    accepted = version
    if version not in known_versions or not isinstance(named, str):
        notes.add(f"the unknown protocol revision {shorten(_as_text(named), 40)}")
        older = [each for each in known_versions if each <= version]
        accepted = older[-1] if older and version[:2] == "20" else known_versions[-1 if version[:2] != "20" else 0]
    info = result.get("serverInfo")
    if not isinstance(info, dict) or not isinstance(info.get("name"), str) or not isinstance(info.get("version"), str):
        notes.add("a handshake without the name and version of the server")
        info = info if isinstance(info, dict) else {"name": info}
        info = {"name": _as_text(info.get("name") or ""), "version": _as_text(info.get("version") or "")}
    instructions = result.get("instructions")
    handshake = {
        "protocolVersion": accepted,
        "capabilities": _normalize_capabilities(result.get("capabilities"), notes),
        "serverInfo": {"name": info["name"], "version": info["version"]},
    }
    return (handshake | ({"instructions": instructions} if isinstance(instructions, str) else {})), version


def _normalize_capabilities(given: Any, notes: set[str]) -> dict[str, Any]:
    """Returns only the capability `tools`, the one that lmbridge uses, or nothing if the server does not have it."""
    if isinstance(given, list):
        notes.add("capabilities that are a list")
        given = {each: {} for each in given if isinstance(each, str)}
    if not isinstance(given, dict):
        notes.add("a handshake without capabilities")
        return {}
    tools = given.get("tools")
    if tools is None or tools is False:
        return {}
    if not isinstance(tools, dict):
        notes.add("a capability that is not an object")
        return {"tools": {}}
    return {"tools": {"listChanged": _is_true(tools.get("listChanged"))}}


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json_for_model(value)
    except (ValueError, TypeError, RecursionError):
        return str(type(value).__name__)


def _as_integer(value: Any) -> int:
    try:
        return 0 if isinstance(value, bool) else int(value)
    except (TypeError, ValueError, OverflowError):
        return 0


def _is_true(value: Any) -> bool:
    return value.strip().lower() in _TRUE_TEXTS if isinstance(value, str) else bool(value)
