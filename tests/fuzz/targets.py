"""What is fuzzed: functions that take bytes of a stranger, and the fragments that their inputs are made of.

A target is called with any bytes. It raises nothing, because it allows the errors that its docstring names, and any
other exception is a finding. It also takes a time that is proportional to the bytes; see `tests.fuzz.growth`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

import attrs
import msgspec

from lmbridge import JournalError, LLMError, LLMValidationError, MCPError, Tool
from lmbridge._tasks import run_at_once
from lmbridge.agent.journal.database import Database
from lmbridge.agent.journal.journal import _describe_run, _export, find_run, read_recording
from lmbridge.agent.toolset import Toolset
from lmbridge.client import failures
from lmbridge.client.chat_accumulator import accumulator_for
from lmbridge.client.error_body import parse_error_body, reports_error
from lmbridge.client.response_accumulator import ResponseAccumulator
from lmbridge.gateway.gateway_errors import Problem
from lmbridge.gateway.request_fields import read_fields
from lmbridge.mcp.config.files import load_config
from lmbridge.mcp.jsonrpc import MessageReader, MessageTooLargeError, parse_json
from lmbridge.mcp.sdk.event_stream import EventReader
from lmbridge.mcp.sdk.message_filter import MessageExchange, NotificationHandlers, has_name
from lmbridge.mcp.sdk.sent_requests import track_request
from lmbridge.mcp.servers.definitions import describe_tool, read_hints, sanitize_schema
from lmbridge.mcp.servers.results import McpText, read_result
from lmbridge.transport.sse import SSEDecoder


@attrs.frozen
class Target:
    """A function that is fuzzed."""

    name: str
    """The name of the target, and of the folder of its corpus."""
    run: Callable[[bytes], object]
    """Reads the bytes."""
    fragments: Sequence[bytes]
    """Pieces that inputs are made of, beside any bytes."""
    as_json: bool = False
    """Whether inputs are JSON values whose names and texts are the fragments, rather than sequences of these."""


def _value(data: bytes) -> Any:
    """Returns the JSON value of an input, or None if the bytes are not JSON: other targets read those."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _items(data: bytes) -> list[Any]:
    value = _value(data)
    return value if isinstance(value, list) else [value]


def read_event_stream(data: bytes) -> None:
    """Decodes an event stream at once and byte by byte, with the same result. Allows `LLMStreamError`."""
    assert _decoded([data]) == _decoded(
        [data[place : place + 1] for place in range(min(len(data), 500))] + [data[500:]]
    )


def _decoded(pieces: Sequence[bytes]) -> list[Any]:
    decoder, events = SSEDecoder(max_size=100_000), list[Any]()
    try:
        for piece in pieces:
            if piece:
                events += decoder.feed(piece)
        events += decoder.close()
    except LLMError as error:
        events.append(type(error))
    return events


def read_chunks(data: bytes) -> None:
    """Joins the chunks of a stream. Allows `LLMError`."""
    chunks = _items(data)
    with suppress(LLMError):
        accumulator = accumulator_for(chunks[0] if chunks else None)
        for chunk in chunks:
            if isinstance(chunk, dict):
                accumulator.add(chunk)
        msgspec.json.encode(accumulator.reply())


def read_response_events(data: bytes) -> None:
    """Joins the events of a response. Allows `LLMError`."""
    with suppress(LLMError):
        accumulator = ResponseAccumulator()
        for event in _items(data):
            if isinstance(event, dict):
                accumulator.add(event)
        msgspec.json.encode(accumulator.reply())


def classify_failure(data: bytes) -> None:
    """Classifies the body of an error. Allows nothing."""
    for status in (200, 400, 404, 503):
        failures.classify(status, {}, data)
        failures.concerns_server(status, data)
    reports_error(data)
    error = failures.error_from_event(parse_error_body(data), {})
    _show(error)


def _show(value: object) -> tuple[str, str]:
    """Returns both texts of an object, which may fail like everything else."""
    return str(value), repr(value)


def _nothing(**_: object) -> str:
    return ""


_SCHEMA: Final = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array", "items": {}}},
}
_TOOLSET: Final = Toolset([Tool("weather", "", _SCHEMA, _nothing), Tool("add", "", {"type": "object"}, _nothing)])


def find_text_calls(data: bytes) -> None:
    """Looks for calls that a model has written as text, and reads them. Allows nothing."""
    text = data.decode(errors="replace")
    for may_be_cut in (False, True):
        found = _TOOLSET.find_text_calls(text, may_be_cut=may_be_cut)
        for call in found[1] if found else ():
            _TOOLSET.read(call, repairs=True, may_be_cut=may_be_cut)
    _TOOLSET.find_text_calls("", reasoning=text)


def use_schema(data: bytes) -> None:
    """Makes a tool of a schema, and checks arguments by it. Allows `LLMValidationError`."""
    schema = _value(data)
    with suppress(LLMValidationError):
        toolset = Toolset([Tool("made", "", schema, _nothing)])
        for arguments in ("{}", '{"a": [1, "x", null, {"a": 1.5}], "b": "xxxx", "type": {}}'):
            call = {"id": "1", "type": "function", "function": {"name": "made", "arguments": arguments}}
            toolset.read(call, repairs=True)


def read_json_rpc(data: bytes) -> None:
    """Reads the output of an MCP server on stdio. Allows `MessageTooLargeError`."""
    reader = MessageReader()
    with suppress(MessageTooLargeError):
        for message in [*reader.feed(data), *reader.end()]:
            _receive(message)


def read_mcp_events(data: bytes) -> None:
    """Reads the event stream of an MCP server. Allows `MessageTooLargeError`."""
    with suppress(MessageTooLargeError):
        for event in EventReader().feed(data + b"\n\n"):
            for message in parse_json(event.data):
                if isinstance(message, dict):
                    _receive(message)


def read_envelopes(data: bytes) -> None:
    """Handles messages, definitions and results of an MCP server. Allows `RecursionError` of a definition."""
    for message in _items(data):
        if not isinstance(message, dict):
            continue
        if "method" in message or "id" in message:
            _receive(message)
        run_at_once(read_result(message))
        msgspec.json.encode(McpText("", message).image_parts)
        with suppress(RecursionError):
            # The caller says that the definition is nested too deeply.
            for read in (describe_tool, read_hints, sanitize_schema, has_name):
                read(message)


def _receive(message: dict[str, Any]) -> None:
    if "method" not in message and "id" not in message:
        return
    handlers = NotificationHandlers(lambda: None, lambda *_: None, lambda *_: None, lambda *_: None)
    for method in ("tools/list", "tools/call", "initialize"):
        exchange = MessageExchange(handlers)
        with track_request(method):
            sent = exchange.outgoing({"jsonrpc": "2.0", "id": 0, "method": method, "params": {}})
            # It answers the request, whatever id it has.
            answer = {**message, "id": sent["id"]} if sent and "method" not in message else message
            run_at_once(exchange.incoming_in_slices(answer))


def read_config(data: bytes) -> None:
    """Reads the configuration of MCP servers. Allows `MCPError`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mcp.json")
        path.write_bytes(data)
        with suppress(MCPError):
            config = load_config(path)
            _show(config)
            for error in config.broken.values():
                _show(error)


def read_journal(data: bytes) -> None:
    """Lists and reads a run whose rows hold the values of a list. Allows `JournalError`."""
    rows = [value if isinstance(value, str | int | float | None) else json.dumps(value) for value in _items(data)]
    began, start, kind, at, *steps = [*rows, *[None] * 5][: max(5, len(rows))]
    with tempfile.TemporaryDirectory() as folder, closing(Database(Path(folder, "runs.db"), create=True)) as database:
        # SQLite has no integers of more than 64 bits, so no file has them.
        with suppress(JournalError, OverflowError), database.transaction():
            database._execute("INSERT INTO runs VALUES ('1', ?, 'unfinished', ?)", began, start)
            for number, step in enumerate(steps):
                database._execute("INSERT INTO steps VALUES ('1', ?, ?, ?, ?)", number, kind, at, step)
        with suppress(JournalError):
            _describe_run(database, find_run(database, None))
        with suppress(JournalError):
            read_recording("1", database.steps("1"), path=database.path)
        with suppress(JournalError):
            msgspec.json.encode(_export(database, "1"))


def read_request(data: bytes) -> None:
    """Reads the body of a request to the gateway. Allows `Problem`."""
    for encoding in (None, "gzip", "deflate"):
        with suppress(Problem):
            run_at_once(read_fields(data, encoding, 10_000_000))


def _words(text: str) -> tuple[bytes, ...]:
    return tuple(text.encode().split())


_JSON_PIECES: Final = (*_words(r"""{ } [ ] " : , 1 -0.5e3 null \ \ud83d"""), b"\n", b" ")
_NUMBERS: Final = (b"9" * 400, *_words("1e999 NaN -Infinity 18446744073709551616"))
_EVENT_STREAM: Final = (
    *_words(
        """
        data: id: : [DONE]
        """
    ),
    b"data: {",
    b"event: x",
    b"retry: 1",
    b"\n",
    b"\r",
    b"\r\n",
    b"\n\n",
    b"\xef\xbb\xbf",
    b"\xff",
)
_CHUNKS: Final = (
    *_words(
        """
        choices delta content index tool_calls function name arguments id finish_reason stop message text
        usage logprobs role { reasoning_content error
        """
    ),
)
_RESPONSE_EVENTS: Final = (
    *_words(
        """
        type response.output_item.added response.output_text.delta response.completed
        response.function_call_arguments.delta item item_id output_index content_index delta response output
        content id message part status
        """
    ),
)
_FAILURES: Final = (
    *_JSON_PIECES,
    *_words(
        """
        "error" "message" "code" "detail" model n_ctx tokens <html> ' Traceback exceeds 4096
        """
    ),
    b"not found",
    b"context length",
    b"loaded models:",
    b"\xff",
)
_TEXT_CALLS: Final = (
    *_JSON_PIECES,
    *_words(
        """
        <tool_call> </tool_call> <function=weather> </function> <parameter=city> </parameter> ``` ```json
        [TOOL_CALLS] weather add weather(city='Ulm') <think> </think> <|python_tag|> <|channel|> <|message|>
        <|call|> functions.weather ' = ( )
        """
    ),
    b'{"name": "weather", "arguments": {"city": "Ulm"',
)
_SCHEMAS: Final = (
    *_words(
        """
        type object string array properties items $ref #/$defs/a # $defs a b anyOf oneOf allOf not enum
        const pattern (a+)+$ patternProperties additionalProperties required $schema
        http://json-schema.org/draft-04/schema# uniqueItems minimum multipleOf prefixItems if then
        dependentSchemas $id
        """
    ),
)
_JSON_RPC: Final = (
    *_JSON_PIECES,
    *_NUMBERS,
    *_words(
        """
        {"jsonrpc":"2.0", "id": "result":{} "error":{"code":1} "method":"ping"
        """
    ),
    b"}\n",
    b"log line",
    b"\xff",
)
_MCP_EVENTS: Final = (
    *_JSON_PIECES,
    *_words(
        """
        data: {"jsonrpc":"2.0","id":1,"result":{}}
        """
    ),
    b"id: 1",
    b"retry: 5",
    b"event: message",
    b"\r",
    b"\n\n",
)
_ENVELOPES: Final = (
    *_words(
        """
        jsonrpc 2.0 id method tools/list notifications/progress notifications/message
        notifications/tools/list_changed elicitation/create params result error code message data tools name
        description inputSchema annotations content type text image resource uri blob mimeType image/png
        structuredContent isError nextCursor ttlMs protocolVersion capabilities serverInfo progressToken
        requestId resultType
        """
    ),
)
_CONFIG: Final = (
    *_JSON_PIECES,
    *_words(
        """
        "${HOME}" "${ // /* */ }}
        """
    ),
    b'{"mcpServers": {',
    b'"a": {',
    b'"command": "x"',
    b'"args": [',
    b'"env": {',
    b'"url": "http://[::1"',
    b'"url": "http://a"',
    b'"headers": {',
    b'"lmbridge": {',
    b'"type": "sse"',
    b'"timeout": 1e999',
    b'"allow": ["',
)
_JOURNAL: Final = (
    *_words(
        """
        task messages model settings has_approve output_schema extra version begun reply planned done ended
        number calls tools seconds
        """
    ),
)
_REQUESTS: Final = (
    *_JSON_PIECES,
    *_NUMBERS,
    *_words(
        """
        "model" "stream" true
        """
    ),
    b"\x1f\x8b\x08\x00",
    b"x\x9c",
    b"\xff",
)

TARGETS: Final = (
    Target("event-stream", read_event_stream, _EVENT_STREAM),
    Target("chunks", read_chunks, _CHUNKS, as_json=True),
    Target("response-events", read_response_events, _RESPONSE_EVENTS, as_json=True),
    Target("failures", classify_failure, _FAILURES),
    Target("text-calls", find_text_calls, _TEXT_CALLS),
    Target("schemas", use_schema, _SCHEMAS, as_json=True),
    Target("json-rpc", read_json_rpc, _JSON_RPC),
    Target("mcp-events", read_mcp_events, _MCP_EVENTS),
    Target("envelopes", read_envelopes, _ENVELOPES, as_json=True),
    Target("config", read_config, _CONFIG),
    Target("journal", read_journal, _JOURNAL, as_json=True),
    Target("requests", read_request, _REQUESTS),
)
