"""What the gateway says about itself: `/status.json`, `/metrics`, `/health` and the page."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import aiohttp
import pytest

from lmbridge.gateway import Gateway
from lmbridge.gateway.activity import Activity, Entry, Histogram, RateCounter
from lmbridge.gateway.fair_order import FairOrder
from lmbridge.testing import ScriptedServer, reply, sse, stall
from tests.gateway.support import BODY, CHAT, STREAM, fetch, fetch_json
from tests.support import HALF, piece

OTHER = BODY.replace(b"test-model", b"other")


async def test_the_status_says_what_is_in_flight_and_what_waits(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    scripted_server.script(stall(after=HALF))
    async with http.post(gateway.origin + CHAT, data=STREAM, headers={"Authorization": "Bearer secret-1"}) as response:
        await response.content.readuntil(b"\n\n")
        headers = {"X-Lmbridge-Priority": "batch", "X-Api-Key": "secret-2"}
        waiting = asyncio.create_task(fetch(http, gateway, CHAT, OTHER, headers=headers))
        status = await fetch_json(http, gateway, "/status.json")
        while not status["waiting"]:
            status = await fetch_json(http, gateway, "/status.json")
        [in_flight] = status["in_flight"]
        expected = {"model": "test-model", "endpoint": CHAT, "priority": "normal", "streaming": True}
        assert expected.items() <= in_flight.items()
        assert in_flight["server"] == scripted_server.api_base
        assert (in_flight["chunks"], in_flight["bytes"]) > (0, 0)
        [queued] = status["waiting"]
        expected = {"model": "other", "endpoint": CHAT, "priority": "batch", "place": 1}
        assert expected.items() <= queued.items()
        assert in_flight["client"] != queued["client"]
        assert in_flight["client"].startswith("127.0.0.1 key ")
        assert "secret" not in json.dumps(status)
        [server] = status["servers"]
        assert (server["in_flight"], server["queued"]) == (1, 1)
        assert server["limits"] == {"max_concurrency": 2, "max_loaded_models": 1}
        assert [model["state"] for model in status["models"] if model["name"] == "test-model"] == ["loaded"]
    await waiting
    status = await fetch_json(http, gateway, "/status.json")
    assert (status["in_flight"], status["waiting"]) == ([], [])
    assert [each["status"] for each in status["finished"]] == ["client left", 200]
    assert [(swap["from"], swap["to"]) for swap in status["swaps"]] == [("test-model", "other")]
    assert status["rates"]["requests_per_minute"] == 2
    assert status["rates"]["tokens_per_second"] > 0


async def test_finished_requests_have_their_tokens(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    openai = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    anthropic = {"usage": {"input_tokens": 1, "output_tokens": 3}}
    scripted_server.script(
        reply(200, openai),
        reply(200, anthropic),
        sse(piece("x"), {**piece(finish_reason="stop"), **openai}, "[DONE]"),
        sse({"type": "message_delta", "usage": {"output_tokens": 4}}),
        sse({"type": "response.completed", "response": anthropic}),
        sse({**piece(finish_reason="stop"), "timings": {"predicted_n": 5}}),
        reply(200, {"usage": "none"}),
        reply(400, {"error": "x"}),
    )
    for body in (BODY, BODY, STREAM, STREAM, STREAM, STREAM, BODY, BODY):
        await fetch(http, gateway, CHAT, body)
    finished = (await fetch_json(http, gateway, "/status.json"))["finished"]
    assert [each["tokens"] for each in finished] == [2, 3, 2, 4, 3, 5, None, None]
    assert [each["status"] for each in finished] == [200] * 7 + [400]
    assert all(each["seconds"] >= each["queued_seconds"] >= 0 for each in finished)


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["plain", "stream"])
@pytest.mark.parametrize("streams", [False, True])
async def test_the_rate_of_tokens_counts_each_token_once_whatever_the_client_has_asked_for(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession, body: bytes, streams: bool
) -> None:
    usage = {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}
    scripted_server.script(sse(piece("x"), {**piece("y"), **usage}) if streams else reply(200, usage))
    await fetch(http, gateway, CHAT, body)
    assert gateway._activity._recent_tokens.total(time.monotonic()) == 2


async def test_a_server_that_is_gone_is_not_healthy(http: aiohttp.ClientSession) -> None:
    async with Gateway("http://127.0.0.1:9", max_retries=0) as gateway:
        status, _, body = await fetch(http, gateway)
        assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_error")
        status_page = await fetch_json(http, gateway, "/status.json")
        while status_page["servers"][0]["healthy"]:
            status_page = await fetch_json(http, gateway, "/status.json")
        assert [each["status"] for each in status_page["finished"]] == [502]


async def test_the_metrics_have_the_numbers(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    scripted_server.script(reply(200, {"usage": {"prompt_tokens": 1, "completion_tokens": 7}}), reply(400))
    await fetch(http, gateway)
    await fetch(http, gateway)
    status, headers, body = await fetch(http, gateway, "/metrics", method="GET")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain")
    text = body.decode()
    labels = f'endpoint="{CHAT}",model="test-model",outcome='
    assert f'lmbridge_gateway_requests_total{{{labels}"200"}} 1.0' in text
    assert f'lmbridge_gateway_requests_total{{{labels}"400"}} 1.0' in text
    assert 'lmbridge_gateway_tokens_total{model="test-model"} 7.0' in text
    assert f'lmbridge_gateway_in_flight{{server="{scripted_server.api_base}"}} 0.0' in text
    assert 'lmbridge_gateway_request_seconds_bucket{le="+Inf"} 2.0' in text
    assert "lmbridge_gateway_queue_seconds_count 2.0" in text


async def test_the_names_of_models_cannot_fill_the_metrics(
    scripted_server: ScriptedServer, gateway: Gateway, http: aiohttp.ClientSession
) -> None:
    scripted_server.default = reply(404, {"error": "no such model"})
    for number in range(3):
        await fetch(http, gateway, CHAT, BODY.replace(b"test-model", b"made-up-%d" % number))
    _, _, body = await fetch(http, gateway, "/metrics", method="GET")
    assert b"made-up" not in body
    assert b'model="other",outcome="404"} 3.0' in body


async def test_metrics_say_what_to_install(
    gateway: Gateway, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway, "_prometheus", None)
    status, _, body = await fetch(http, gateway, "/metrics", method="GET")
    assert status == 501
    assert "pip install 'lmbridge[gateway]'" in json.loads(body)["error"]["hint"]


async def test_health_and_the_page(gateway: Gateway, http: aiohttp.ClientSession) -> None:
    assert await fetch_json(http, gateway, "/health") == {"status": "ok"}
    status, headers, body = await fetch(http, gateway, "/status", method="GET")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert b"status.json" in body


def test_rates_forget_what_is_long_ago() -> None:
    counter = RateCounter(10)
    counter.add(100.0, 5)
    counter.add(105.5)
    assert (counter.total(109.9), counter.total(110.0), counter.total(120.0)) == (6, 1, 0)


def test_durations_are_counted_in_classes() -> None:
    histogram = Histogram()
    for seconds in (0.05, 0.1, 0.2, 5000.0):
        histogram.add(seconds)
    assert (histogram.counts[0], histogram.counts[1], histogram.counts[-1], histogram.total) == (2, 1, 1, 5000.35)


def test_waiting_requests_are_listed_in_the_order_of_the_queue() -> None:
    activity, order = Activity(), FairOrder()

    def enter(client: str, priority: int) -> None:
        fields: dict[str, Any] = {"model": None, "endpoint": CHAT, "priority_name": "", "streaming": False}
        position = order.enter(client, priority)
        entry = Entry(
            id=activity.next_id(), client=client, priority=priority, position=position, arrived_at=0.0, **fields
        )
        activity.enter(entry)

    for client, priority in (("a", 0), ("a", 0), ("b", 0), ("c", -1), ("d", 1)):
        enter(client, priority)
    assert [entry.id for entry in activity.waiting()] == [5, 1, 3, 2, 4]
