"""Runs an agent, and prints its spans of OpenTelemetry as a tree: the run, its requests, and its calls of tools.

    pip install 'lmbridge[otel]' opentelemetry-sdk
    python examples/tracing.py

A real program sends the spans to a collector instead: it adds a `BatchSpanProcessor(OTLPSpanExporter())` of the package
opentelemetry-exporter-otlp-proto-http to the provider. The rest stays as it is.
"""

from __future__ import annotations

import asyncio

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from lmbridge import Agent, LLMClient
from lmbridge.observe import OpenTelemetryObserver


def count_people(city: str) -> str:
    """Counts the people of a city."""
    return {"ulm": "130,000", "oslo": "720,000"}.get(city.lower(), "nobody has counted them")


def print_tree(spans: list[ReadableSpan], parent: int | None = None, depth: int = 0) -> None:
    """Prints the spans below a parent, each with the seconds that it took."""
    below = [span for span in spans if (span.parent.span_id if span.parent else None) == parent]
    for span in sorted(below, key=lambda each: each.start_time or 0):
        seconds = ((span.end_time or 0) - (span.start_time or 0)) / 1e9
        print(f"{'  ' * depth}{span.name} ({seconds:.2f} s)")
        print_tree(spans, span.context.span_id if span.context else None, depth + 1)


async def main() -> None:
    """Runs the agent, and prints its answer and its spans."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    observers = [OpenTelemetryObserver(tracer_provider=provider)]
    async with LLMClient(observers=observers) as client:
        agent = Agent(client, tools=[count_people], max_tokens=100, observers=observers)
        result = await agent.run("How many people live in Oslo?")
    print(result.text)
    print_tree(list(exporter.get_finished_spans()))


if __name__ == "__main__":
    asyncio.run(main())
