"""`Telemetry`: an OpenTelemetryObserver with the real SDK, and what it has recorded."""

from __future__ import annotations

from typing import Any

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lmbridge.observe import OpenTelemetryObserver


class Telemetry:
    """An observer, and what it has recorded."""

    def __init__(self) -> None:
        self._exporter, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters = MeterProvider(metric_readers=[self._reader])

    def observer(self, **options: Any) -> OpenTelemetryObserver:
        return OpenTelemetryObserver(tracer_provider=self.provider, meter_provider=self.meters, **options)

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def span(self, name: str) -> Any:
        (found,) = [span for span in self.spans if span.name == name]
        return found

    def metric(self, name: str) -> list[Any]:
        return [point for each in self._metrics() if each.name == name for point in each.data.data_points]

    @property
    def metric_names(self) -> set[str]:
        return {each.name for each in self._metrics()}

    def _metrics(self) -> list[Any]:
        data: Any = self._reader.get_metrics_data()
        return [each for part in data.resource_metrics for scope in part.scope_metrics for each in scope.metrics]

    def close(self) -> None:
        self.provider.shutdown()
        self.meters.shutdown()
