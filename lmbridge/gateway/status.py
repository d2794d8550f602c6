"""The data of the status page: `GET /status.json`.

The page in status.html reads this object. All times are in seconds, and `at` says how long ago something happened::

    {
      "version": str,
      "uptime": float,
      "draining": bool,
      "servers": [{
        "url": str,                     # without credentials
        "healthy": bool,                # false while it gets no requests, or if it did not answer when last asked
        "limits": {"max_concurrency": int, "max_loaded_models": int | null},
        "in_flight": int, "queued": int, "swaps": int, "retries": int
      }],
      "models": [{
        "name": str | null,             # null stands for requests that name no model
        "server": str,
        "state": "loaded" | "cold" | "loading" | "draining",
        "in_flight": int, "queued": int
      }],
      "in_flight": [{
        "id": int, "model": str | null, "endpoint": "/v1/chat/completions", "priority": str,
        "client": str,                  # an address, with a label in place of a key
        "age": float,                   # since the arrival
        "streaming": bool, "chunks": int, "bytes": int, "server": str
      }],
      "waiting": [{
        "id": int, "model": str | null, "endpoint": str, "priority": str, "client": str, "age": float,
        "place": int                    # from 1, roughly in the order of admission if no other request arrives
      }],
      "rates": {"tokens_per_second": float | null, "requests_per_minute": float},
      "swaps": [{"at": float, "server": str, "from": str | null, "to": str | null}],
      "finished": [{                    # the last 100, the latest last
        "id": int, "model": str | null, "endpoint": str,
        "status": int | str,            # the HTTP status, or the reason why there was no complete response
        "seconds": float, "queued_seconds": float, "tokens": int | null, "at": float
      }]
    }
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

from lmbridge._version import __version__
from lmbridge.gateway.activity import Activity, Entry
from lmbridge.gateway.model_catalog import ModelCatalog
from lmbridge.transport import Transport
from lmbridge.transport.base_transport import BaseTransport
from lmbridge.transport.stats import ServerStats


def status_of(activity: Activity, upstream: BaseTransport, catalog: ModelCatalog, *, draining: bool) -> Any:
    """Returns the object that `GET /status.json` sends, as the top of this module describes it."""
    now = time.monotonic()
    servers, by_server = upstream.nodes, upstream.stats().by_server
    return {
        "version": __version__,
        "uptime": now - activity.started_at,
        "draining": draining,
        "servers": [_server(server, by_server[server.api_base], catalog) for server in servers],
        "models": [model for server in servers for model in _models(server, activity, catalog)],
        "in_flight": [_in_flight(entry, now) for entry in activity.in_flight()],
        "waiting": [
            {**_described(entry, now), "place": place} for place, entry in enumerate(activity.waiting(), start=1)
        ],
        "rates": {
            "tokens_per_second": activity.tokens_per_second(now),
            "requests_per_minute": activity.requests_per_minute(now),
        },
        "swaps": [swap for server in servers for swap in _swaps(server)],
        "finished": [_finished(entry, now) for entry in activity.finished],
    }


def _server(server: Transport, stats: ServerStats, catalog: ModelCatalog) -> dict[str, Any]:
    limits = server.limits
    return {
        "url": server.api_base,
        "healthy": stats.is_available and catalog.is_healthy(server),
        "limits": {"max_concurrency": limits.max_concurrency, "max_loaded_models": limits.max_loaded_models},
        "in_flight": stats.in_flight,
        "queued": stats.queued,
        "swaps": stats.swaps,
        "retries": stats.retries,
    }


def _models(server: Transport, activity: Activity, catalog: ModelCatalog) -> Iterator[dict[str, Any]]:
    scheduled = {model.name: model for model in server.scheduled_models()}
    for name in dict.fromkeys([*scheduled, *catalog.names(server)]):
        model = scheduled.get(name)
        state = None if model is None else model.state
        if state is None:
            # Without a limit on models, the scheduler does not know the state, so it is guessed from earlier answers.
            has_answered = (name or "") in activity.answered_models
            state = "loaded" if has_answered else "loading" if model is not None and model.in_flight else "cold"
            # With a limit, the scheduler knows all models that are loaded, so this one is not.
            if server.limits.max_loaded_models is not None:
                state = "cold"
        yield {
            "name": name,
            "server": server.api_base,
            "state": state,
            "in_flight": 0 if model is None else model.in_flight,
            "queued": 0 if model is None else model.queued,
        }


def _swaps(server: Transport) -> Iterator[dict[str, Any]]:
    swaps = server.recent_swaps()
    now = asyncio.get_running_loop().time() if swaps else 0.0
    for swap in swaps:
        yield {"at": now - swap.at, "server": server.api_base, "from": swap.before, "to": swap.after}


def _described(entry: Entry, now: float) -> dict[str, Any]:
    return {
        "id": entry.id,
        "model": entry.model,
        "endpoint": entry.endpoint,
        "priority": entry.priority_name,
        "client": entry.client,
        "age": now - entry.arrived_at,
    }


def _in_flight(entry: Entry, now: float) -> dict[str, Any]:
    more = {
        "streaming": entry.streaming,
        "chunks": entry.chunks,
        "bytes": entry.bytes,
        "server": entry.server or "",
    }
    return {**_described(entry, now), **more}


def _finished(entry: Entry, now: float) -> dict[str, Any]:
    queued_until = entry.ended_at if entry.admitted_at is None else entry.admitted_at
    return {
        "id": entry.id,
        "model": entry.model,
        "endpoint": entry.endpoint,
        "status": entry.status,
        "seconds": entry.ended_at - entry.arrived_at,
        "queued_seconds": queued_until - entry.arrived_at,
        "tokens": entry.tokens,
        "at": now - entry.ended_at,
    }
