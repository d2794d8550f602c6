"""`GET /metrics`: the numbers of a gateway in the format of Prometheus.

The package prometheus-client writes the format, and is imported only here. Its counters and histograms are not used:
they live in a registry of the process, and two gateways in one process would count together.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lmbridge.gateway.activity import BUCKETS, Activity, Histogram
from lmbridge.gateway.gateway_errors import Problem
from lmbridge.transport import Transport

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_INSTALL_HINT = "pip install 'lmbridge[gateway]'"


def load_prometheus() -> Any:
    """Returns the module `prometheus_client`, or None if it is not installed. Importing it blocks for a moment."""
    try:
        return importlib.import_module("prometheus_client")
    except ImportError:
        return None


def metrics_page(prometheus: Any, activity: Activity, servers: Sequence[Transport]) -> tuple[str, bytes]:
    """Returns the content type and the body of the page.

    Raises:
        Problem: prometheus-client is not installed.
    """
    if prometheus is None:
        message = "the metrics need the package prometheus-client"
        raise Problem(501, message, code="not_installed", hint=f"install it where the gateway runs: {_INSTALL_HINT}")
    registry = prometheus.CollectorRegistry(auto_describe=False)
    registry.register(_Collector(list(_families(activity, servers))))
    return prometheus.CONTENT_TYPE_LATEST, prometheus.generate_latest(registry)


class _Collector:
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families

    def describe(self) -> Iterable[Metric]:
        return []


def _families(activity: Activity, servers: Sequence[Transport]) -> Iterator[Metric]:
    # Imported here because the package is optional, and has been imported by `load_prometheus`.
    from prometheus_client.core import (  # noqa: PLC0415
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    def histogram(name: str, text: str, durations: Histogram) -> Metric:
        bounds = [*map(str, BUCKETS), "+Inf"]
        counts = [sum(durations.counts[: index + 1]) for index in range(len(bounds))]
        family = HistogramMetricFamily(f"lmbridge_gateway_{name}", text)
        family.add_metric([], list(zip(bounds, counts, strict=True)), durations.total)
        return family

    uptime = time.monotonic() - activity.started_at
    yield GaugeMetricFamily("lmbridge_gateway_uptime_seconds", "Seconds since the gateway started.", value=uptime)
    requests = CounterMetricFamily(
        "lmbridge_gateway_requests", "Finished requests.", labels=["endpoint", "model", "outcome"]
    )
    for outcome, count in activity.outcomes.items():
        requests.add_metric(outcome, count)
    yield requests
    tokens = CounterMetricFamily("lmbridge_gateway_tokens", "Tokens that servers reported.", labels=["model"])
    for model, count in activity.tokens.items():
        tokens.add_metric([model], count)
    yield tokens
    yield histogram("queue_seconds", "Seconds from the arrival of a request to its admission.", activity.queue_seconds)
    yield histogram("request_seconds", "Seconds from the arrival of a request to its end.", activity.request_seconds)
    in_flight = GaugeMetricFamily("lmbridge_gateway_in_flight", "Requests that a server works on.", labels=["server"])
    queued = GaugeMetricFamily("lmbridge_gateway_queued", "Requests that wait for admission.", labels=["server"])
    swaps = CounterMetricFamily("lmbridge_gateway_swaps", "Models that took the place of another.", labels=["server"])
    retries = CounterMetricFamily("lmbridge_gateway_retries", "Requests that were sent again.", labels=["server"])
    for server in servers:
        stats, labels = server.stats(), [server.api_base]
        in_flight.add_metric(labels, stats.in_flight)
        queued.add_metric(labels, stats.queued)
        swaps.add_metric(labels, stats.swaps)
        retries.add_metric(labels, stats.retries)
    yield from (in_flight, queued, swaps, retries)
