"""OpenTelemetryObserver, with the exporters of the real SDK."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.trace import SpanKind, StatusCode

from lmbridge import Agent, Limits, LLMClient, LLMResponseError, LLMValidationError, ToolCall
from lmbridge.observe import ObservedEvent, OpenTelemetryObserver
from lmbridge.testing import FakeChatClient, ScriptedServer, answer, reply, retry_without_waiting, sse
from tests.observe.telemetry import Telemetry
from tests.support import MESSAGES, opened, read_text


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.close()


async def test_a_chat_is_a_span_with_the_names_of_the_conventions(
    scripted_server: ScriptedServer, telemetry: Telemetry
) -> None:
    scripted_server.on_path("/v1/embeddings", reply(200, {"data": [{"index": 0, "embedding": [0.5]}]}))
    async with LLMClient(scripted_server.api_base, "m", observers=[telemetry.observer()]) as client:
        await client.list_models()
        await client.chat_completion(MESSAGES)
        await client.embeddings("text")
    span = telemetry.span("chat m")
    port = int(scripted_server.origin.rpartition(":")[2])
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai_compatible",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 1,
        "gen_ai.usage.output_tokens": 5,
        "server.address": "127.0.0.1",
        "server.port": port,
        "http.response.status_code": 200,
        "lmbridge.attempts": 1,
        "lmbridge.outcome": "answer",
    }
    attributes = dict(span.attributes)
    assert isinstance(attributes.pop("lmbridge.queue.seconds"), float)
    assert attributes == expected
    assert (span.kind, span.status.status_code, span.parent) == (SpanKind.CLIENT, StatusCode.UNSET, None)
    assert [each.name for each in telemetry.spans] == ["chat m", "embeddings m"]


async def test_metrics_have_durations_tokens_and_the_first_chunk_of_streams(
    scripted_server: ScriptedServer, telemetry: Telemetry
) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": {"cached_tokens": 8}}
    scripted_server.script(answer("Hello", usage=usage))
    async with LLMClient(scripted_server.api_base, "m", observers=[telemetry.observer()]) as client:
        await client.chat_completion(MESSAGES)
        assert telemetry.metric("gen_ai.client.inference.time_to_first_chunk") == []
        await read_text(await opened(client))
    (duration,) = telemetry.metric("gen_ai.client.inference.duration")
    assert (duration.count, duration.attributes["gen_ai.operation.name"]) == (2, "chat")
    assert duration.explicit_bounds[0] == 0.01
    (first,) = telemetry.metric("gen_ai.client.inference.time_to_first_chunk")
    assert first.count == 1
    for kind, count in (("input", 9), ("output", 5)):
        (used,) = telemetry.metric(f"gen_ai.client.inference.usage.{kind}_tokens")
        assert (used.value, used.attributes["gen_ai.token.modality"]) == (count, "unknown")
        (each,) = telemetry.metric(f"gen_ai.client.inference.operation.{kind}_tokens")
        assert (each.sum, each.explicit_bounds[1]) == (count, 4)
        assert "gen_ai.token.modality" not in each.attributes
    (cached,) = telemetry.metric("gen_ai.client.inference.usage.cache_read.input_tokens")
    assert cached.value == 8


async def test_embeddings_have_metrics_of_their_own(scripted_server: ScriptedServer, telemetry: Telemetry) -> None:
    vectors = {"data": [{"index": 0, "embedding": [0.5]}], "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    scripted_server.on_path("/v1/embeddings", reply(200, vectors))
    async with LLMClient(scripted_server.api_base, "m", observers=[telemetry.observer()]) as client:
        await client.embeddings("text")
    assert telemetry.metric_names == {
        "gen_ai.client.embeddings.duration",
        "gen_ai.client.embeddings.operation.input_tokens",
    }
    (duration,) = telemetry.metric("gen_ai.client.embeddings.duration")
    assert (duration.count, duration.attributes["gen_ai.operation.name"]) == (1, "embeddings")
    (tokens,) = telemetry.metric("gen_ai.client.embeddings.operation.input_tokens")
    assert tokens.sum == 3
    attributes = telemetry.span("embeddings m").attributes
    assert (attributes["gen_ai.usage.input_tokens"], "gen_ai.usage.output_tokens" in attributes) == (3, False)


async def test_errors_retries_and_swaps_are_on_the_span(scripted_server: ScriptedServer, telemetry: Telemetry) -> None:
    scripted_server.script(answer("Hello"), reply(503, {}), reply(400, {"error": "bad"}))
    limits = Limits(max_loaded_models=1)
    async with LLMClient(scripted_server.api_base, limits=limits, observers=[telemetry.observer()]) as client:
        await client.ask("?", model="a")
        with retry_without_waiting(), pytest.raises(LLMResponseError):
            await client.ask("?", model="b")
    span = telemetry.span("chat b")
    assert [event.name for event in span.events] == ["lmbridge.model_swap", "lmbridge.retry"]
    assert span.events[0].attributes == {"lmbridge.model_swap.before": "a"}
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "400")
    failed = [
        point for point in telemetry.metric("gen_ai.client.inference.duration") if "error.type" in point.attributes
    ]
    assert len(failed) == 1


async def test_a_run_is_the_parent_of_its_requests_and_calls_and_a_call_of_what_its_tool_does(
    scripted_server: ScriptedServer, telemetry: Telemetry
) -> None:
    tracer = trace.get_tracer("test", tracer_provider=telemetry.provider)

    def in_thread(a: int) -> int:
        """Works in a thread."""
        with tracer.start_as_current_span("in thread"):
            return a

    async def in_task(a: int) -> int:
        """Works in a task."""
        with tracer.start_as_current_span("in task"):
            await asyncio.sleep(0)
            return a

    calls = [
        {"id": str(number), "type": "function", "function": {"name": name, "arguments": '{"a": 1}'}}
        for number, name in enumerate(("in_thread", "in_task"))
    ]
    scripted_server.script(answer("", tool_calls=calls), answer("Done."))
    observers = [telemetry.observer()]
    async with LLMClient(scripted_server.api_base, "m", observers=observers) as client:
        with tracer.start_as_current_span("program"):
            await Agent(client, tools=[in_thread, in_task], observers=observers).run("?")
            await client.ask("?")
    run = telemetry.span("invoke_agent")
    parents = {
        span.name: next((each.name for each in telemetry.spans if span.parent and each.context == span.parent), None)
        for span in telemetry.spans
        if span.name != "chat m"
    }
    assert parents == {
        "program": None,
        "invoke_agent": "program",
        "execute_tool in_thread": "invoke_agent",
        "execute_tool in_task": "invoke_agent",
        "in thread": "execute_tool in_thread",
        "in task": "execute_tool in_task",
    }
    chats = [span for span in telemetry.spans if span.name == "chat m"]
    program = telemetry.span("program")
    assert [span.parent and span.parent.span_id for span in chats] == [
        run.context.span_id,
        run.context.span_id,
        program.context.span_id,
    ]
    assert chats[0].attributes is not None
    assert chats[0].attributes["gen_ai.conversation.id"] == run.attributes["gen_ai.conversation.id"]
    assert (run.attributes["lmbridge.stop_reason"], run.attributes["lmbridge.rounds"]) == ("stop", 2)
    # The agent runs in this process, so it has no provider.
    assert "gen_ai.provider.name" not in run.attributes
    assert trace.get_current_span() is trace.INVALID_SPAN


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_server_gets_the_context_of_the_span_of_its_request(
    scripted_server: ScriptedServer, telemetry: Telemetry, is_stream: bool
) -> None:
    async with LLMClient(scripted_server.api_base, "m", observers=[telemetry.observer()]) as client:
        if is_stream:
            await read_text(await opened(client))
        else:
            scripted_server.script(reply(503, {}))
            with retry_without_waiting():
                await client.chat_completion(MESSAGES)
        await client.list_models()
        span = telemetry.span("chat m").context
        *chats, models = scripted_server.requests
        expected = f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
        assert [request.headers["traceparent"] for request in chats] == [expected] * (1 if is_stream else 2)
        # Questions about the server have no span, and there is none around them.
        assert "traceparent" not in models.headers
        await client.chat_completion(MESSAGES, extra_headers={"traceparent": "00-mine"})
    assert scripted_server.requests[-1].headers["traceparent"] == "00-mine"


async def test_a_context_is_sent_only_if_it_should_be(scripted_server: ScriptedServer, telemetry: Telemetry) -> None:
    async with LLMClient(scripted_server.api_base, "m", observers=[telemetry.observer(propagate=False)]) as client:
        await client.chat_completion(MESSAGES)
    assert telemetry.span("chat m")
    assert "traceparent" not in scripted_server.requests[-1].headers


@pytest.mark.parametrize("error", [RuntimeError, asyncio.CancelledError])
async def test_a_propagator_that_raises_is_switched_off(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    class Broken:
        def on_event(self, event: ObservedEvent) -> None: ...

        def trace_context(self, request_id: int | None) -> dict[str, str]:
            raise error

    async with LLMClient(scripted_server.api_base, observers=[Broken()]) as client:
        for _ in range(2):
            assert await client.ask("?")
    assert [record.message.partition(" has ")[2] for record in caplog.records if record.levelname == "ERROR"] == [
        "raised an exception, and is not notified of any further events"
    ]


async def test_the_load_of_a_model_is_an_event_of_the_run(
    scripted_server: ScriptedServer, telemetry: Telemetry
) -> None:
    status = {"id": "m", "owned_by": "llamacpp", "status": {"value": "unloaded"}}
    scripted_server.on_path("/v1/models", reply(200, {"data": [status]}))
    scripted_server.on_path("/props", reply(200, {"max_instances": 1}))
    loaded = {"model": "m", "event": "status_change", "data": {"status": "loaded"}}
    scripted_server.on_path("/models/sse", sse(loaded))
    async with LLMClient(scripted_server.api_base, "m") as client:
        await Agent(client, observers=[telemetry.observer()]).run("Hi.")
    [event] = telemetry.span("invoke_agent").events
    assert (event.name, event.attributes) == ("lmbridge.model_load", {"gen_ai.request.model": "m"})


@pytest.mark.parametrize(("cached", "expected"), [(8, 8), (0, None)])
async def test_tokens_from_the_cache_are_on_the_span_if_there_are_any(
    scripted_server: ScriptedServer, telemetry: Telemetry, cached: int, expected: int | None
) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": cached}}
    scripted_server.default = answer("Hello", usage=usage)
    async with LLMClient(scripted_server.api_base, "m", observers=[telemetry.observer()]) as client:
        await client.ask("?")
    assert telemetry.span("chat m").attributes.get("gen_ai.usage.cache_read.input_tokens") == expected


async def test_a_request_after_a_call_is_below_the_run_again(
    scripted_server: ScriptedServer, telemetry: Telemetry
) -> None:
    def add(a: int) -> int:
        """Adds one."""
        return a + 1

    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    scripted_server.script(answer("", tool_calls=[call]), answer("Done."))
    observers = [telemetry.observer()]
    async with LLMClient(scripted_server.api_base, "m", observers=observers) as client:
        await Agent(client, tools=[add], observers=observers).run("?")
    run = telemetry.span("invoke_agent").context.span_id
    below = [span.parent and span.parent.span_id for span in telemetry.spans if span.name != "invoke_agent"]
    assert below == [run, run, run]


@pytest.mark.parametrize("captures", [False, True])
async def test_content_is_recorded_only_on_request(telemetry: Telemetry, captures: bool) -> None:
    def secret(word: str) -> str:
        """Keeps a word."""
        raise ValueError(f"{word} is secret")

    client = FakeChatClient([ToolCall("1", "secret", {"word": "xyzzy"}), "xyzzy"])
    observer = telemetry.observer(capture_content=captures)
    await Agent(client, tools=[secret], observers=[observer]).run("xyzzy?")
    assert any("xyzzy" in span.to_json() for span in telemetry.spans) is captures
    span = telemetry.span("execute_tool secret")
    assert (span.status.status_code, span.attributes["error.type"]) == (StatusCode.ERROR, "tool_error")
    assert ("gen_ai.tool.call.arguments" in span.attributes) is captures


async def test_a_cancelled_run_ends_its_spans_and_is_no_error(
    telemetry: Telemetry, caplog: pytest.LogCaptureFixture
) -> None:
    begun = asyncio.Event()

    async def wait() -> None:
        begun.set()
        await asyncio.Event().wait()

    agent = Agent(FakeChatClient([ToolCall("1", "wait", {})]), tools=[wait], observers=[telemetry.observer()])
    handle = agent.start("?")
    await begun.wait()
    await handle.aclose()
    assert [span.name for span in telemetry.spans] == ["execute_tool wait", "invoke_agent"]
    assert [span.status.status_code for span in telemetry.spans] == [StatusCode.UNSET] * 2
    assert caplog.records == []


def test_arguments_are_checked() -> None:
    with pytest.raises(LLMValidationError):
        OpenTelemetryObserver(capture_content="yes")  # type: ignore[arg-type]  # the wrong value is the case
    with pytest.raises(LLMValidationError):
        OpenTelemetryObserver(propagate="no")  # type: ignore[arg-type]  # the wrong value is the case
    with pytest.raises(LLMValidationError):
        OpenTelemetryObserver(provider="")


@pytest.mark.slow
def test_without_the_package_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; from lmbridge.observe import OpenTelemetryObserver"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'lmbridge[otel]'" in result.stderr
