"""`OpenTelemetryObserver`: spans and metrics of requests, runs and tool calls. Only this file imports opentelemetry.

It uses only OpenTelemetry's API. The SDK that the program has set up decides where the spans go; without an SDK,
nothing is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextvars import Token
from typing import Any, Final
from urllib.parse import urlsplit

import attrs

try:
    from opentelemetry import context, metrics, trace
    from opentelemetry.propagate import inject
    from opentelemetry.trace import Span, SpanKind, StatusCode
except ImportError as _error:
    raise ImportError("OpenTelemetryObserver needs opentelemetry-api: pip install 'lmbridge[otel]'") from _error

from lmbridge._checks import check_bool, check_text
from lmbridge._version import __version__
from lmbridge.observe import otel_names as names
from lmbridge.observe.events import (
    FirstEventArrived,
    McpRequestSent,
    ModelLoadProgressed,
    ModelSwapped,
    ObservedEvent,
    RequestAdmitted,
    RequestEnded,
    RequestQueued,
    RetryPlanned,
    RunBegun,
    RunEnded,
    ToolCallBegun,
    ToolCallEnded,
)

_Attributes = dict[str, str | int | float | bool]


@attrs.define(eq=False)
class _RequestSpan:
    """A request that has a span."""

    span: Span
    began: float
    metric_attributes: _Attributes


@attrs.define(eq=False)
class _OpenScope:
    """A run or a tool call, whose span is the current span of its task."""

    span: Span
    token: Token[context.Context]


class _Metrics:
    """The metrics of requests. The metrics of embeddings have other names."""

    def __init__(self, meter: metrics.Meter) -> None:
        def histogram(name: str, unit: str, text: str, buckets: Sequence[float]) -> metrics.Histogram:
            bounds = [float(bound) for bound in buckets]
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=bounds)

        def seconds(name: str, text: str) -> metrics.Histogram:
            return histogram(name, "s", text, names.DURATION_BUCKETS)

        def tokens(name: str, text: str) -> metrics.Histogram:
            return histogram(name, "{token}", text, names.TOKENS_BUCKETS)

        def usage(name: str, text: str) -> metrics.Counter:
            return meter.create_counter(name, "{token}", text)

        self.first_chunk: Final = seconds(names.FIRST_CHUNK_METRIC, "Time to receive the first chunk.")
        self._inference_duration = seconds(names.INFERENCE_DURATION_METRIC, "Duration of an inference operation.")
        self._embeddings_duration = seconds(names.EMBEDDINGS_DURATION_METRIC, "Duration of an embeddings operation.")
        self._input_usage = usage(names.INPUT_USAGE_METRIC, "Input tokens used, including cached tokens.")
        self._output_usage = usage(names.OUTPUT_USAGE_METRIC, "Output tokens used, including reasoning tokens.")
        self._cache_usage = usage(names.CACHE_USAGE_METRIC, "Input tokens that came from the cache.")
        self._input_tokens = tokens(names.INPUT_TOKENS_METRIC, "Input tokens per inference operation.")
        self._output_tokens = tokens(names.OUTPUT_TOKENS_METRIC, "Output tokens per inference operation.")
        self._embeddings_tokens = tokens(names.EMBEDDINGS_TOKENS_METRIC, "Input tokens per embeddings operation.")

    def record_duration(self, seconds: float, attributes: _Attributes) -> None:
        """Records how long a request took."""
        is_embeddings = attributes[names.OPERATION] == names.EMBEDDINGS
        (self._embeddings_duration if is_embeddings else self._inference_duration).record(seconds, attributes)

    def record_tokens(self, event: RequestEnded, attributes: _Attributes) -> None:
        """Records the tokens that the server has counted."""
        if attributes[names.OPERATION] == names.EMBEDDINGS:
            if event.prompt_tokens is not None:
                self._embeddings_tokens.record(event.prompt_tokens, attributes)
            return
        by_modality = attributes | {names.TOKEN_MODALITY: names.UNKNOWN_MODALITY}
        if event.prompt_tokens is not None:
            self._input_usage.add(event.prompt_tokens, by_modality)
            self._input_tokens.record(event.prompt_tokens, attributes)
        if event.completion_tokens is not None:
            self._output_usage.add(event.completion_tokens, by_modality)
            self._output_tokens.record(event.completion_tokens, attributes)
        if event.cached_tokens:
            self._cache_usage.add(event.cached_tokens, by_modality)


class OpenTelemetryObserver:
    """Records spans and metrics according to the semantic conventions for generative AI.

    ::

        observer = OpenTelemetryObserver()
        async with LLMClient(observers=[observer]) as client:
            agent = Agent(client, tools=[...], observers=[observer])

    A request has a span `chat MODEL`, `text_completion MODEL` or `embeddings MODEL`, a run has `invoke_agent`, and a
    tool call has `execute_tool NAME`. The span of a run is the parent of the spans of its requests and tool calls.
    While a tool runs, the span of its call is the current span, even if the tool runs in a thread. The span of a call
    to an MCP server has the attributes of MCP as well. The metrics are the durations, the times to the first chunk of
    streams, and the numbers of tokens.

    Args:
        capture_content: Whether the arguments and results of tools are recorded, which may be confidential. Prompts and
            answers never are. Default: False.
        propagate: Whether the context of the trace is sent to servers. Model servers and the gateway get it as headers
            such as `traceparent`, MCP servers as metadata of a call. Default: True.
        provider: The value of `gen_ai.provider.name`. Default: "openai_compatible", because the conventions have no
            name for the servers that people run themselves.
        tracer_provider: Where spans go. Default: OpenTelemetry's global provider.
        meter_provider: Where metrics go. Default: OpenTelemetry's global provider.

    Raises:
        LLMValidationError: An argument cannot be used.
    """

    def __init__(
        self,
        *,
        capture_content: bool = False,
        propagate: bool = True,
        provider: str = "openai_compatible",
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._captures = check_bool("capture_content", capture_content)
        self._propagates = check_bool("propagate", propagate)
        self._provider: Final = check_text("provider", provider)
        self._tracer = trace.get_tracer("lmbridge", __version__, tracer_provider)
        meter = metrics.get_meter("lmbridge", __version__, meter_provider)
        self._metrics = _Metrics(meter)
        self._requests: dict[int, _RequestSpan] = {}
        self._scopes: dict[tuple[str, str | None], _OpenScope] = {}

    def on_event(self, event: ObservedEvent) -> None:
        """Begins, changes or ends a span."""
        match event:
            case RequestQueued():
                self._begin_request(event)
            case RequestAdmitted() | ModelSwapped() | RetryPlanned() | FirstEventArrived():
                if (request := self._requests.get(event.request_id)) is not None:
                    self._note_progress(request, event)
            case RequestEnded():
                if (request := self._requests.pop(event.request_id, None)) is not None:
                    self._end_request(request, event)
            case RunBegun():
                self._begin_run(event)
            case RunEnded():
                self._end_run(event)
            case ModelLoadProgressed():
                self._note_load(event)
            case ToolCallBegun():
                self._begin_call(event)
            case McpRequestSent():
                self._note_mcp_request(event)
            case ToolCallEnded():
                self._end_call(event)
            case _:
                # Attempts and rounds have no spans in the conventions, and the time to the first chunk shows how long
                # a prompt took.
                pass

    def trace_context(self, request_id: int | None) -> Mapping[str, str]:
        """Returns what the propagators of OpenTelemetry add to a request; see `ContextPropagator`."""
        carrier: dict[str, str] = {}
        if self._propagates:
            request = None if request_id is None else self._requests.get(request_id)
            inject(carrier, None if request is None else trace.set_span_in_context(request.span))
        return carrier

    # Requests

    def _begin_request(self, event: RequestQueued) -> None:
        operation = names.OPERATIONS.get(event.operation)
        if operation is None:
            return
        url = urlsplit(event.url)
        attributes: _Attributes = {names.OPERATION: operation, names.PROVIDER: self._provider}
        if event.model is not None:
            attributes[names.REQUEST_MODEL] = event.model
        if url.hostname is not None:
            attributes[names.SERVER_ADDRESS] = url.hostname
            attributes[names.SERVER_PORT] = url.port or (443 if url.scheme == "https" else 80)
        ids: _Attributes = {} if event.run_id is None else {names.CONVERSATION_ID: event.run_id}
        name = operation if event.model is None else f"{operation} {event.model}"
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT, attributes=attributes | ids)
        self._requests[event.request_id] = _RequestSpan(span, event.at, attributes)

    def _note_progress(
        self, request: _RequestSpan, event: RequestAdmitted | ModelSwapped | RetryPlanned | FirstEventArrived
    ) -> None:
        match event:
            case RequestAdmitted():
                request.span.set_attribute(names.QUEUE_SECONDS, event.waited)
            case ModelSwapped():
                request.span.add_event(names.SWAP_EVENT, {names.SWAP_BEFORE: str(event.before)})
            case RetryPlanned():
                request.span.add_event(
                    names.RETRY_EVENT, {names.RETRY_REASON: event.reason, names.RETRY_WAIT: event.wait}
                )
            case FirstEventArrived():
                if event.is_stream:
                    seconds = event.at - request.began
                    request.span.set_attribute(names.TIME_TO_FIRST_CHUNK, seconds)
                    self._metrics.first_chunk.record(seconds, request.metric_attributes)

    def _end_request(self, request: _RequestSpan, event: RequestEnded) -> None:
        span, attributes = request.span, dict(request.metric_attributes)
        span.set_attributes({names.OUTCOME: event.outcome, names.ATTEMPTS: event.attempts})
        if event.status is not None:
            span.set_attribute(names.STATUS, event.status)
        if event.prompt_tokens is not None:
            span.set_attribute(names.INPUT_TOKENS, event.prompt_tokens)
        if event.completion_tokens is not None and attributes[names.OPERATION] != names.EMBEDDINGS:
            span.set_attribute(names.OUTPUT_TOKENS, event.completion_tokens)
        if event.cached_tokens:
            span.set_attribute(names.CACHED_TOKENS, event.cached_tokens)
        self._metrics.record_tokens(event, attributes)
        if event.outcome == "error":
            error = event.error or str(event.status)
            attributes[names.ERROR_TYPE] = error
            _mark_failed(span, error)
        self._metrics.record_duration(event.at - request.began, attributes)
        span.end()

    # Runs and tool calls

    def _begin_run(self, event: RunBegun) -> None:
        attributes: _Attributes = {
            names.OPERATION: names.INVOKE_AGENT,
            names.CONVERSATION_ID: event.run_id,
        }
        if event.model is not None:
            attributes[names.REQUEST_MODEL] = event.model
        self._enter((event.run_id, None), names.INVOKE_AGENT, attributes)

    def _note_load(self, event: ModelLoadProgressed) -> None:
        """Adds an event to the span of the run when a load begins.

        Further progress is not added: by default a span keeps only 128 events, and a load may report hundreds.
        """
        scope = self._scopes.get((event.run_id, None))
        if scope is not None and event.fraction is None:
            scope.span.add_event(names.LOAD_EVENT, {} if event.model is None else {names.REQUEST_MODEL: event.model})

    def _end_run(self, event: RunEnded) -> None:
        scope = self._leave((event.run_id, None))
        if scope is None:
            return
        span = scope.span
        span.set_attributes({names.STOP_REASON: event.stop_reason, names.ROUNDS: event.rounds})
        if event.prompt_tokens or event.completion_tokens:
            span.set_attributes({names.INPUT_TOKENS: event.prompt_tokens, names.OUTPUT_TOKENS: event.completion_tokens})
        if event.model is not None:
            span.set_attribute(names.REQUEST_MODEL, event.model)
        if event.error is not None and event.stop_reason != "cancelled":
            _mark_failed(span, event.error)
        span.end()

    def _begin_call(self, event: ToolCallBegun) -> None:
        attributes: _Attributes = {
            names.OPERATION: names.EXECUTE_TOOL,
            names.TOOL_NAME: event.name,
            names.TOOL_TYPE: "function",
            names.TOOL_CALL_ID: event.call_id,
        }
        if self._captures:
            attributes[names.TOOL_ARGUMENTS] = json.dumps(dict(event.arguments), ensure_ascii=False, default=repr)
        self._enter((event.run_id, event.call_id), f"{names.EXECUTE_TOOL} {event.name}", attributes)

    def _note_mcp_request(self, event: McpRequestSent) -> None:
        """Adds the attributes of MCP to the span of the call. The conventions recommend this over another span."""
        if (scope := self._scopes.get((event.run_id, event.call_id))) is None:
            return
        attributes: _Attributes = {
            names.MCP_METHOD: event.method,
            names.MCP_PROTOCOL: event.protocol,
            names.MCP_SERVER: event.server,
            names.JSONRPC_ID: event.request_id,
            names.NETWORK_TRANSPORT: "pipe" if event.transport == "stdio" else "tcp",
        }
        if event.host is not None:
            attributes[names.SERVER_ADDRESS] = event.host
        if event.port is not None:
            attributes[names.SERVER_PORT] = event.port
        scope.span.set_attributes(attributes)

    def _end_call(self, event: ToolCallEnded) -> None:
        scope = self._leave((event.run_id, event.call_id))
        if scope is None:
            return
        scope.span.set_attribute(names.OUTCOME, event.outcome)
        if self._captures:
            scope.span.set_attribute(names.TOOL_RESULT, event.text)
        if event.outcome == "error":
            _mark_failed(scope.span, "tool_error")
        scope.span.end()

    def _enter(self, key: tuple[str, str | None], name: str, attributes: Mapping[str, Any]) -> None:
        """Begins a span, and makes it the current span of this task and of the threads and tasks that it starts."""
        span = self._tracer.start_span(name, kind=SpanKind.INTERNAL, attributes=attributes)
        self._scopes[key] = _OpenScope(span, context.attach(trace.set_span_in_context(span)))

    def _leave(self, key: tuple[str, str | None]) -> _OpenScope | None:
        """Removes the scope of a run or a call, and makes the span that was current before it current again.

        This works because both events of a run or a call come from the same task.
        """
        scope = self._scopes.pop(key, None)
        if scope is not None:
            context.detach(scope.token)
        return scope


def _mark_failed(span: Span, error: str) -> None:
    span.set_attribute(names.ERROR_TYPE, error)
    span.set_status(StatusCode.ERROR, error)
