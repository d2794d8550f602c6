"""The client reads replies of real servers that were recorded byte for byte.

The captures are of llama.cpp (`xllamacpp-*`, and `skulk-*`, which is another build), of its router (`router`) and of
llama-cpp-python, with SmolLM2, Qwen2.5-Coder-0.5B and Gemma 3, with and without chat templates that support tools. Each
of them is listed below as what it is, so that no capture passes without an expectation.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections.abc import AsyncGenerator, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import attrs
import pytest

from lmbridge import (
    ContextLengthExceededError,
    LLMAuthenticationError,
    LLMClient,
    LLMError,
    LLMResponseError,
    LLMStreamError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
    collect,
)
from lmbridge.client.chat_stream import ChatStream
from lmbridge.client.failures import classify
from lmbridge.testing import ScriptedServer, raw
from lmbridge.testing.wire import encode_chunk
from lmbridge.transport import Verdict
from tests.support import MESSAGES

FOLDER: Final = Path(__file__).parents[1] / "data" / "captures"


# Captures


@attrs.frozen
class Capture:
    """A recorded exchange."""

    name: str
    """The path of the file in the folder, without its suffix."""
    asked: dict[str, Any]
    """The body of the request. A long one was recorded only in part."""
    status: int
    headers: dict[str, str]
    """The headers of the response, without those about the framing of the body."""
    body: bytes
    is_whole: bool
    """Whether the body came to its proper end. Otherwise the connection broke."""

    @property
    def is_stream(self) -> bool:
        return self.headers["content-type"].startswith("text/event-stream")

    @property
    def model(self) -> str | None:
        return self.asked.get("model")

    @property
    def events(self) -> list[Any]:
        """The parsed data of the stream's events, without `[DONE]`."""
        data = re.findall(rb"^data: (?!\[DONE\])(.*)$", self.body, re.MULTILINE)
        return [json.loads(event) for event in data]

    @property
    def chunks(self) -> list[Any]:
        return [event for event in self.events if "choices" in event]

    def wire(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yields the response as it is sent: the head, and the pieces of the body with their framing."""
        framing = {"transfer-encoding": "chunked"} if self.is_stream else {"content-length": str(len(self.body))}
        fields = "".join(f"{name}: {value}\r\n" for name, value in {**self.headers, **framing}.items())
        yield f"HTTP/1.1 {self.status} As Recorded\r\n{fields}\r\n".encode()
        for piece in pieces:
            yield encode_chunk(piece) if self.is_stream else piece
        if self.is_stream and self.is_whole:
            yield encode_chunk(b"")

    def as_recorded(self) -> Iterator[bytes]:
        """Yields the response with each event in a separate packet."""
        return self.wire(re.findall(rb".+?\n\n|.+\Z", self.body, re.DOTALL) if self.is_stream else [self.body])


def parse(name: str, data: bytes) -> Capture:
    """Parses a file: lines about the request, a status line, headers and the body; or only the body."""
    asked: dict[str, Any] = {}
    while data.startswith(b"### "):
        line, _, data = data.partition(b"\n")
        if line.startswith(b"### request: "):
            asked = _request(line.removeprefix(b"### request: "))
    status, headers = 200, {}
    if data.startswith(b"HTTP/1.1 "):
        head, data = re.split(rb"\r?\n\r?\n", data, maxsplit=1)
        first, *lines = head.decode().splitlines()
        status = int(first.split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    # The recording tool has written a line after the body.
    left = re.search(rb"curl rc=(\d+)\n\Z", data)
    data = re.sub(rb"curl rc=\d+\n\Z|\n\[t=[^\]]*\]\n\Z", b"", data)
    length = headers.pop("content-length", None)
    assert length is None or len(data) <= int(length), "some paths in the bodies were shortened; none grew"
    headers.pop("transfer-encoding", None)
    headers.setdefault("content-type", "application/json" if data.startswith(b"{") else "text/event-stream")
    return Capture(name, asked, status, headers, data, left is None or left[1] == b"0")


def _request(line: bytes) -> dict[str, Any]:
    try:
        asked = json.loads(line)
    # It was cut, or is not JSON on purpose.
    except ValueError:
        model = re.search(rb'"model": "([^"]+)"', line)
        return {"model": model[1].decode()} if model else {}
    assert isinstance(asked, dict)
    return asked


CAPTURES: Final = {
    name: parse(name, path.read_bytes())
    for path in sorted(FOLDER.rglob("*.*"))
    if path.suffix in (".txt", ".json")
    for name in [path.relative_to(FOLDER).with_suffix("").as_posix()]
}


# The expected result of each capture

ENDINGS: Final = {
    "stop": """
        llamacpppython-smol: chat chat_max_completion_tokens err_no_messages json_object tool_auto tool_auto_stream
            tool_required
        llamacpppython-smoltools: tool_none
        reasoning: nonstream nonstream_budget3 stream stream_budget3
        skulk-qwen05: chat json_schema tool_auto tool_auto_stream tool_named tool_named_stream tool_none tool_roundtrip
        skulk-smollm2-qwentpl: tool_auto tool_auto_stream tool_named tool_named_stream tool_roundtrip
        xllamacpp-gemma: json_schema
        xllamacpp-smollm2: chat chat_content_parts err_tool_choice_named_unknown err_tool_schema_pattern json_schema
            json_schema_and_tools stream_stopnatural tool_auto tool_auto_stream tool_named tool_named_stream tool_none
            tool_none_stream tool_required tool_required_add tool_required_stream
        xllamacpp-smollm2-autotpl: chat chat_content_parts json_schema json_schema_and_tools stream_stopnatural
            tool_none tool_none_stream tool_roundtrip tool_roundtrip_notools
        xllamacpp-smollm2-qwentpl: chat json_schema_and_tools stream_usage tool_auto_stream tool_named
            tool_named_stream tool_none tool_roundtrip tool_roundtrip_notools
    """,
    "length": """
        .: sse_pings
        llamacpppython-smol: chat_len1 chat_n2 err_assistant_last err_messages_empty err_missing_model
            err_tool_schema_bad err_unknown_model stream stream_usage stream_utf8
        router: chat_b
        skulk-qwen05: err_required_no_tools err_tool_choice_named_unknown stream_usage tool_required tool_required_add
            tool_required_parallel tool_required_parallel_stream tool_required_stream tool_required_truncated
            tool_required_truncated_stream
        skulk-smollm2-qwentpl: err_required_no_tools err_tool_choice_named_unknown tool_required tool_required_add
            tool_required_parallel tool_required_parallel_stream tool_required_stream tool_required_truncated
            tool_required_truncated_stream
        xllamacpp-gemma: chat json_object stream_stopnatural stream_usage tool_auto tool_named tool_required
            tool_required_add
        xllamacpp-smollm2: chat_len1 chat_logprobs chat_max0 chat_max_completion_tokens chat_n2 chat_stop
            ctx_fill_generate err_assistant_last err_assistant_null_no_tools err_messages_empty err_missing_model
            err_required_no_tools err_role err_tool_args_notjson err_tool_orphan err_tool_schema_bad
            err_tool_schema_badref err_unknown_model json_object stream stream_timings stream_usage stream_utf8
            tool_required_parallel tool_required_parallel_stream tool_required_truncated tool_required_truncated_stream
            tool_roundtrip tool_roundtrip_notools
        xllamacpp-smollm2-autotpl: chat_len1 chat_logprobs chat_max0 chat_max_completion_tokens chat_n2 chat_stop
            ctx_fill_generate err_assistant_last err_assistant_null_no_tools err_messages_empty err_missing_model
            err_required_no_tools err_role err_tool_choice_named_unknown err_tool_orphan err_tool_schema_pattern
            err_unknown_model json_object stream stream_timings stream_usage stream_utf8 tool_required_truncated
            tool_required_truncated_stream
        xllamacpp-smollm2-qwentpl: err_assistant_null_no_tools err_required_no_tools err_tool_choice_named_unknown
            err_tool_schema_pattern tool_auto tool_required tool_required_add tool_required_parallel
            tool_required_parallel_stream tool_required_stream tool_required_truncated tool_required_truncated_stream
    """,
    "tool_calls": """
        .: parallel_tool_stream
        llamacpppython-smoltools: tool_auto tool_named tool_named_stream
        xllamacpp-smollm2-autotpl: tool_auto tool_auto_stream tool_named tool_named_stream tool_required
            tool_required_add tool_required_parallel tool_required_parallel_stream tool_required_stream
    """,
}
"""The captures of complete replies, by finish reason."""

CALLS: Final = {
    "llamacpppython-smoltools/tool_auto": [("get_weather", '{ "city": "Paris", "unit": "c"}')],
    "llamacpppython-smoltools/tool_named*": [("add", '{ "a": 2, "b": 3 }')],
    "parallel_tool_stream": [("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city": "Rome"}')],
    "xllamacpp-smollm2-autotpl/tool_auto*": [("get_weather", '{"city": ",", "unit": "c"}')],
    "xllamacpp-smollm2-autotpl/tool_named*": [("get_weather", '{"city": ",", "unit": "c"}')],
    "xllamacpp-smollm2-autotpl/tool_required": [("get_weather", '{"city": ",", "unit": "c"}')],
    "xllamacpp-smollm2-autotpl/tool_required_stream": [("get_weather", '{"city": ",", "unit": "c"}')],
    "xllamacpp-smollm2-autotpl/tool_required_add": [("add", '{"a": 17, "b": 25}')],
    "xllamacpp-smollm2-autotpl/tool_required_parallel*": [("get_weather", '{"city": "Paris", "unit": "c"}')],
    # These were cut off by max_tokens.
    "xllamacpp-smollm2-autotpl/err_tool_choice_named_unknown": [("add", "{")],
    "xllamacpp-smollm2-autotpl/err_tool_schema_pattern": [("f", '{"')],
}
"""The tool calls of captures. The other replies have none, though some write calls into their text."""

REASONING: Final = {
    "reasoning/nonstream": "\nThe answer is 4.",
    "reasoning/stream": "\nThe answer is 4.",
    "reasoning/*_budget3": "\nThe",
    "sse_pings": "\nTo",
}
MODELS: Final = {
    "auth/models_nokey": ["smol"],
    "llamacpppython-smol/models": ["smol", "smol-tools", "gemma", "embed"],
    "router/models_before": ["broken", "gemma3-270m", "smol-a", "smol-b"],
    "xllamacpp-*/models": ["smollm2"],
}
OTHERS: Final = {"skulk-qwen05/*": "qwen-coder-0.5b", "xllamacpp-*/err_unknown_model": "smollm2"}
"""The model that answered, for captures in which another one was asked for."""
UNLIKE: Final = {
    "llamacpppython-smol/tool_auto",
    "skulk-smollm2-qwentpl/tool_required_parallel",
    # The start of a call is text in one of the two, and missing in the other.
    "xllamacpp-smollm2-autotpl/tool_required_truncated",
    "xllamacpp-smollm2-qwentpl/tool_auto",
    "xllamacpp-smollm2-qwentpl/tool_required_parallel",
}
"""Captures in which the model itself wrote something else when a stream was asked for."""


@attrs.frozen
class Failure:
    """The error that a capture is expected to raise."""

    kind: type[LLMError]
    message_part: str
    """A part of its message."""
    hint: str | None = None
    """A part of its hint."""
    verdict: Verdict = Verdict.FAIL
    attributes: dict[str, Any] = attrs.field(factory=dict)
    body: str | None = None
    """The event or text in the middle of a stream that reported it, or None."""


_CUT_OFF: Final = Failure(LLMStreamError, "cut off: it ended without [DONE] or a finish reason", "server stopped")
_BROKEN_CONNECTION: Final = Failure(LLMStreamError, "the connection broke mid-stream", "server stopped")
_INVALID_KEY: Final = Failure(LLMAuthenticationError, "answered 401: Invalid API Key", "pass api_key=")
_UNKNOWN_PATH: Final = Failure(LLMResponseError, "answered 404: File Not Found", "check api_base")
_UNKNOWN_500: Final = Failure(LLMResponseError, 'answered 500: {"message": ""', verdict=Verdict.RETRY)


def _overflow(message_part: str, prompt: int) -> Failure:
    tokens = {"prompt_tokens": prompt, "context_length": 2048}
    return Failure(ContextLengthExceededError, message_part, "shorten the messages", attributes=tokens)


def _refused(status: int, message_part: str, verdict: Verdict = Verdict.FAIL) -> Failure:
    return Failure(LLMResponseError, f"the server answered {status}: {message_part}", verdict=verdict)


FAILURES: Final = {
    "auth/chat_badkey": _INVALID_KEY,
    "auth/chat_nokey": _INVALID_KEY,
    "kill_KILL": _BROKEN_CONNECTION,
    "kill_TERM": _BROKEN_CONNECTION,
    "llamacpppython-smol/chat_content_parts": _refused(500, "can only concatenate str"),
    "llamacpppython-smol/err_405": Failure(LLMResponseError, "answered 405: Method Not Allowed", "check api_base"),
    "llamacpppython-smol/err_bad_json": _refused(500, "Internal Server Error", Verdict.RETRY),
    "llamacpppython-smol/err_ctx_overflow": _overflow("maximum context length is 2048 tokens", 40031),
    "llamacpppython-smol/err_ctx_overflow_stream": _CUT_OFF,
    "llamacpppython-smol/err_role": _refused(500, "7 validation errors"),
    "llamacpppython-smol/err_temp_string": _refused(500, "1 validation error"),
    "llamacpppython-smol/json_schema": _refused(500, "1 validation error"),
    "llamacpppython-smoltools/err_tool_choice_named_unknown": _refused(500, "Tool with name 'zzz' not found"),
    "llamacpppython-smoltools/err_tool_schema_bad": _UNKNOWN_500,
    "llamacpppython-smoltools/tool_auto_stream": _CUT_OFF,
    "llamacpppython-smoltools/tool_required": _UNKNOWN_500,
    "llamacpppython-smoltools/tool_required_add": _UNKNOWN_500,
    "llamacpppython-smoltools/tool_required_stream": _CUT_OFF,
    "llamacpppython-smoltools/tool_roundtrip": _refused(500, "7 validation errors"),
    "midstream_error_nonstream": _refused(500, "The model produced output that does not match the expected peg-native"),
    "midstream_error_sse": Failure(
        LLMStreamError,
        "ended the stream: The model produced output that does not match the expected peg-native format",
        body='{"error":{"code":500,"message":"The model produced output that does not match the expected peg-native'
        ' format","type":"server_error"}}',
    ),
    "router/child_killed_midstream": Failure(
        LLMStreamError,
        "ended the stream: proxy error: Failed to read connection",
        body="proxy error: Failed to read connection",
    ),
    "router/err_badjson": _refused(500, "[json.exception.parse_error.101] parse error at line 1"),
    "router/err_broken": Failure(ModelLoadError, "500: model name=broken failed to load", "see the server's own log"),
    "router/err_missing_model": _refused(400, "model name is missing from the request"),
    "router/err_no-such": Failure(
        ModelNotFoundError,
        "model 'no-such' not found",
        "list_models()",
        attributes={"model_name": "no-such", "available_models": []},
    ),
    "router/err_not_loaded_autoload_false": Failure(ModelLoadError, "400: model is not loaded", "load a model first"),
    "xllamacpp-gemma/err_ctx_overflow": _overflow("request (40024 tokens) exceeds the available context", 40024),
    "xllamacpp-smollm2*/chat_image": _refused(500, "image input is not supported"),
    "xllamacpp-smollm2*/err_405": _UNKNOWN_PATH,
    "xllamacpp-smollm2*/err_bad_json": _refused(400, "[json.exception.parse_error.101] parse error at line 1"),
    "xllamacpp-smollm2*/err_ctx_overflow": _overflow("request (40031 tokens) exceeds the available context", 40031),
    "xllamacpp-smollm2*/err_ctx_overflow_stream": _overflow("request (40031 tokens) exceeds the available", 40031),
    "xllamacpp-smollm2*/err_delete": _UNKNOWN_PATH,
    "xllamacpp-smollm2*/err_empty_body": _refused(400, "[json.exception.parse_error.101] parse error at line 1"),
    "xllamacpp-smollm2*/err_messages_type": _refused(400, "Expected 'messages' to be an array"),
    "xllamacpp-smollm2*/err_no_messages": _refused(400, "'messages' is required"),
    "xllamacpp-smollm2*/err_temp_string": _refused(400, "Field 'temperature': [json.exception.type_error.302]"),
    "xllamacpp-smollm2-*tpl/err_tool_args_notjson": _refused(500, "Failed to parse tool call arguments as JSON"),
    "xllamacpp-smollm2*/err_tool_choice_bad": _refused(400, "Invalid tool_choice: sometimes"),
    "xllamacpp-smollm2*/err_tool_no_function": _refused(500, "Failed to parse tools: Missing tool function"),
    "xllamacpp-smollm2-*tpl/err_tool_schema_bad": _refused(400, "Unable to generate parser for this template"),
    "xllamacpp-smollm2-*tpl/err_tool_schema_badref": _refused(400, "Unable to generate parser for this template"),
    "xllamacpp-smollm2*/err_tools_type": _refused(500, "Failed to parse tools: Expected 'tools' to be an array"),
    "xllamacpp-smollm2*/err_two_assistant_last": _refused(400, "Cannot have 2 or more assistant messages"),
    "xllamacpp-smollm2*/json_schema_bad": _refused(400, "Unable to generate parser for this template"),
    "xllamacpp-smollm2*/models_id": _UNKNOWN_PATH,
}


def captures_in(table: str) -> list[str]:
    """Returns the captures in a table whose lines have a folder, a colon and names."""
    names, folder = [], ""
    for word in table.split():
        if word.endswith(":"):
            folder = "" if word == ".:" else f"{word[:-1]}/"
        else:
            names.append(folder + word)
    return names


def finish_reason_of(capture: Capture) -> str:
    (ending,) = [reason for reason, names in ENDINGS.items() if capture.name in captures_in(names)]
    return ending


def expectation_for(capture: Capture, table: dict[str, Any], default: Any = None) -> Any:
    found = [value for pattern, value in table.items() if fnmatch(capture.name, pattern)]
    assert len(found) <= 1
    return found[0] if found else default


REPLIES: Final = [CAPTURES[name] for name in captures_in(" ".join(ENDINGS.values()))]
PLAIN: Final = [capture for capture in REPLIES if not capture.is_stream]
STREAMS: Final = [capture for capture in REPLIES if capture.is_stream]
FAILED: Final = [each for each in CAPTURES.values() if expectation_for(each, FAILURES)]
REFUSALS: Final = [capture for capture in FAILED if capture.status >= 400]
BREAKS: Final = [capture for capture in FAILED if capture.status < 400]
LISTS: Final = [capture for capture in CAPTURES.values() if expectation_for(capture, MODELS)]


def each_of(captures: Iterable[Capture]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("capture", [pytest.param(each, id=each.name) for each in captures])


def test_each_capture_has_exactly_one_expected_result() -> None:
    known = [each.name for each in [*REPLIES, *FAILED, *LISTS]]
    assert sorted(known) == sorted(CAPTURES)
    assert len(CAPTURES) == 250


def test_no_expectation_is_about_a_missing_capture() -> None:
    patterns = [*FAILURES, *MODELS, *CALLS, *REASONING, *OTHERS, *UNLIKE]
    assert [each for each in patterns if not any(fnmatch(name, each) for name in CAPTURES)] == []


def test_a_capture_is_a_stream_if_one_was_asked_for() -> None:
    wrong = [
        each.name
        for each in CAPTURES.values()
        if "messages" in each.asked and each.status == 200 and each.is_stream != bool(each.asked.get("stream"))
    ]
    assert wrong == []


# Replay


async def ask(server: ScriptedServer, capture: Capture, *, stream: bool, mismatch: Any = None) -> Any:
    """Returns the reply, or the chunks of the stream. Raises failures, and unexpected names of models."""
    mismatch = mismatch or ("warn" if expectation_for(capture, OTHERS) else "raise")
    async with LLMClient(server.api_base, capture.model, max_retries=0, model_mismatch=mismatch) as client:
        reply: Any = await client.chat_completion(MESSAGES, stream=stream)
        if not isinstance(reply, ChatStream):
            return reply
        async with reply:
            return [chunk async for chunk in reply]


async def streamed(chunks: Iterable[Any]) -> AsyncGenerator[Any, None]:
    for each in chunks:
        yield each


def merge_chunks(chunks: Iterable[Any]) -> dict[str, Any]:
    """Merges the chunks of a stream in the simplest way that works for these servers."""
    texts: dict[tuple[int, str], str] = {}
    calls: dict[tuple[int, int], dict[str, Any]] = {}
    endings: dict[int, str | None] = {}
    usage = None
    for each in chunks:
        usage = each.get("usage") or usage
        for choice in each["choices"]:
            number = choice["index"]
            endings[number] = choice["finish_reason"] or endings.get(number)
            for key in ("content", "reasoning_content"):
                texts[number, key] = texts.get((number, key), "") + (choice["delta"].get(key) or "")
            for part in choice["delta"].get("tool_calls") or ():
                call = calls.setdefault((number, part["index"]), {"arguments": ""})
                call.setdefault("id", part.get("id"))
                call.setdefault("name", part["function"].get("name"))
                call["arguments"] += part["function"].get("arguments") or ""
    assert set(endings) == {0}, "these servers stream one answer at a time"
    return {
        "content": texts[0, "content"],
        "reasoning": texts[0, "reasoning_content"],
        "calls": list(calls.values()),
        "finish_reason": endings[0],
        "usage": usage,
    }


def summarize(reply: Any) -> dict[str, Any]:
    """Returns the same summary of a whole reply as `merge_chunks` returns of a stream."""
    (choice,) = reply["choices"]
    message = choice["message"]
    assert message["role"] == "assistant"
    calls = [{"id": call["id"], **call["function"]} for call in message.get("tool_calls", ())]
    return {
        "content": message["content"] or "",
        "reasoning": message.get("reasoning_content", ""),
        "calls": calls,
        "finish_reason": choice["finish_reason"],
        "usage": reply["usage"],
    }


def calls_of(summary: dict[str, Any]) -> list[tuple[str, str]]:
    return [(call["name"], call["arguments"]) for call in summary["calls"]]


@each_of(PLAIN)
async def test_a_plain_reply_is_returned_as_the_server_sent_it(
    scripted_server: ScriptedServer, capture: Capture
) -> None:
    scripted_server.script(raw(*capture.as_recorded()))
    reply = await ask(scripted_server, capture, stream=False)
    assert reply == json.loads(capture.body)
    assert {choice["finish_reason"] for choice in reply["choices"]} == {finish_reason_of(capture)}
    assert reply["usage"]["total_tokens"] == reply["usage"]["prompt_tokens"] + reply["usage"]["completion_tokens"]
    if len(reply["choices"]) == 1:
        summary = summarize(reply)
        assert calls_of(summary) == expectation_for(capture, CALLS, [])
        assert summary["reasoning"] == expectation_for(capture, REASONING, "")
        assert summary["content"] or summary["calls"] or summary["reasoning"]


@each_of(STREAMS)
async def test_chunks_are_returned_as_the_server_sent_them_and_collected_into_the_reply(
    scripted_server: ScriptedServer, capture: Capture
) -> None:
    scripted_server.script(raw(*capture.as_recorded()))
    chunks = await ask(scripted_server, capture, stream=True)
    assert chunks == capture.events
    reply = await collect(streamed(chunks))
    summary = summarize(reply)
    assert summary == merge_chunks(chunks)
    known = {"role", "content", "reasoning_content", "tool_calls"}
    legacy = {"function_call"} if capture.name == "llamacpppython-smoltools/tool_named_stream" else set()
    assert set(reply["choices"][0]["message"]) - known == legacy
    assert summary["finish_reason"] == finish_reason_of(capture)
    assert calls_of(summary) == expectation_for(capture, CALLS, [])
    assert summary["reasoning"] == expectation_for(capture, REASONING, "")
    wants_usage = bool((capture.asked.get("stream_options") or {}).get("include_usage"))
    assert (summary["usage"] is not None) == (wants_usage and "llamacpppython" not in capture.name)


@each_of(each for each in STREAMS if each.name.removesuffix("_stream") in CAPTURES and each.name.endswith("_stream"))
def test_a_stream_is_collected_into_the_reply_of_the_same_plain_request(capture: Capture) -> None:
    streamed, plain = (
        merge_chunks(capture.chunks),
        summarize(json.loads(CAPTURES[capture.name.removesuffix("_stream")].body)),
    )
    usage = streamed.pop("usage")
    assert usage is None or usage["prompt_tokens"] == plain["usage"]["prompt_tokens"]
    same = [streamed[key] == plain[key] for key in ("content", "reasoning", "finish_reason")]
    same.append(calls_of(streamed) == calls_of(plain))
    assert all(same) == (capture.name.removesuffix("_stream") not in UNLIKE)


async def test_text_in_many_scripts_is_complete(scripted_server: ScriptedServer) -> None:
    capture = CAPTURES["llamacpppython-smol/stream_utf8"]
    scripted_server.script(raw(*capture.as_recorded()))
    summary = summarize(await collect(streamed(await ask(scripted_server, capture, stream=True))))
    assert summary["content"].startswith("🙂 ñandú 日本\n\nThis is a Japanese phrase th")


@each_of(capture for capture in REPLIES if expectation_for(capture, OTHERS))
async def test_an_answer_of_another_model_is_noticed(
    scripted_server: ScriptedServer, capture: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.script(raw(*capture.as_recorded()), raw(*capture.as_recorded()))
    served = expectation_for(capture, OTHERS)
    with caplog.at_level(logging.WARNING, "lmbridge"):
        await ask(scripted_server, capture, stream=capture.is_stream)
    (line,) = caplog.messages
    assert line.startswith(f"asked for model {capture.model!r}, but {served!r} answered")
    with pytest.raises(ModelMismatchError) as caught:
        await ask(scripted_server, capture, stream=capture.is_stream, mismatch="raise")
    assert (caught.value.asked, caught.value.served) == (capture.model, served)
    assert caught.value.status == 200


@pytest.mark.parametrize("stream", [False, True])
@each_of(REFUSALS)
async def test_a_refusal_raises_the_same_error_for_streams_and_plain_requests(
    scripted_server: ScriptedServer, capture: Capture, stream: bool
) -> None:
    failure = expectation_for(capture, FAILURES)
    scripted_server.script(raw(*capture.as_recorded()))
    scripted_server.models = []
    async with LLMClient(scripted_server.api_base, capture.model, max_retries=0) as client:
        with pytest.raises(LLMError) as caught:
            # The await raises, and not the iteration.
            await client.chat_completion(MESSAGES, stream=stream)
    check(caught.value, capture, failure)
    assert caught.value.body == capture.body.decode()
    assert caught.value.partial is None
    assert classify(capture.status, {}, capture.body) is failure.verdict


@each_of(BREAKS)
async def test_an_incomplete_stream_raises_with_the_partial_reply(
    scripted_server: ScriptedServer, capture: Capture
) -> None:
    failure = expectation_for(capture, FAILURES)
    scripted_server.script(raw(*capture.as_recorded()))
    chunks: list[Any] = []
    async with LLMClient(scripted_server.api_base, capture.model, max_retries=0) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)
        with pytest.raises(LLMError) as caught:
            await read_into(chunks, stream)
    check(caught.value, capture, failure)
    assert caught.value.body == failure.body
    assert chunks == capture.chunks
    if chunks:
        assert caught.value.partial == await collect(streamed(chunks))
        assert summarize(caught.value.partial) == merge_chunks(chunks)
        assert caught.value.partial["choices"][0]["finish_reason"] is None
    else:
        assert caught.value.partial is None


async def read_into(chunks: list[Any], stream: ChatStream) -> None:
    async for each in stream:
        chunks.append(each)  # noqa: PERF401 - a comprehension would lose them to the error


def check(error: LLMError, capture: Capture, failure: Failure) -> None:
    assert type(error) is failure.kind
    assert failure.message_part in error.message
    if failure.hint is None:
        assert error.hint is None
    else:
        assert failure.hint in (error.hint or "")
    assert error.status == capture.status
    assert {name: getattr(error, name) for name in failure.attributes} == failure.attributes
    assert error.context["model"] == capture.model
    assert re.match(r"chat completion (with model '[^']+' )?at http://\S+/v1/chat/completions: ", str(error))
    assert "1 attempt" in str(error)


@each_of(LISTS)
async def test_a_list_of_models_is_read(scripted_server: ScriptedServer, capture: Capture) -> None:
    scripted_server.on_path("/v1/models", raw(*capture.as_recorded()))
    async with LLMClient(scripted_server.api_base) as client:
        assert await client.list_models() == expectation_for(capture, MODELS)
        assert await client.health_check()


# However the bytes are split

ODD: Final = (1, 2, 3, 5, 7, 11, 13, 64, 1021)


def split_bytes(data: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for size in itertools.cycle(sizes):
        if start >= len(data):
            break
        yield data[start : start + size]
        start += size


SHORT: Final = (
    "llamacpppython-smoltools/tool_named_stream",
    "midstream_error_sse",
    "parallel_tool_stream",
    "reasoning/stream",
    "router/err_no-such",
    "sse_pings",
    "xllamacpp-smollm2-autotpl/tool_auto",
    "xllamacpp-smollm2/stream_utf8",
)
LONG: Final = (
    "kill_KILL",
    "llamacpppython-smol/stream_utf8",
    "router/child_killed_midstream",
    "xllamacpp-smollm2-autotpl/tool_none_stream",
    "xllamacpp-smollm2/tool_required_parallel_stream",
)


async def outcome(server: ScriptedServer, capture: Capture, packets: Iterable[bytes]) -> tuple[Any, ...]:
    """Returns everything that the caller can see, except times and generated ids."""
    server.script(raw(*packets))
    try:
        return (await ask(server, capture, stream=capture.is_stream),)
    except LLMError as error:
        return type(error), error.message, error.status, error.body, error.hint, error.partial


@each_of(CAPTURES[name] for name in SHORT)
async def test_a_reply_that_arrives_byte_by_byte_is_the_same(scripted_server: ScriptedServer, capture: Capture) -> None:
    expected = await outcome(scripted_server, capture, capture.as_recorded())
    packets = split_bytes(b"".join(capture.as_recorded()), [1])
    assert await outcome(scripted_server, capture, packets) == expected


@each_of(CAPTURES[name] for name in [*SHORT, *LONG])
@pytest.mark.parametrize("sizes", [[1], ODD, [2**20]], ids=["bytes", "odd sizes", "all at once"])
async def test_a_reply_is_the_same_however_its_body_is_split(
    scripted_server: ScriptedServer, capture: Capture, sizes: Iterable[int]
) -> None:
    expected = await outcome(scripted_server, capture, capture.as_recorded())
    packets = split_bytes(b"".join(capture.wire(split_bytes(capture.body, sizes))), [4096])
    assert await outcome(scripted_server, capture, packets) == expected
