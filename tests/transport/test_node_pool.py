"""Several servers behind one client: which one gets a request, and what happens when one fails."""

from __future__ import annotations

import asyncio
import gzip
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from lmbridge import (
    LLMAuthenticationError,
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMResponseError,
    LLMTimeoutError,
    LLMValidationError,
    ModelNotFoundError,
    NodePool,
    TaskCancelledError,
    Timeouts,
    Transport,
)
from lmbridge.client import failures
from lmbridge.client.error_body import reports_error
from lmbridge.testing import Exchange, MockResponse, ScriptedServer, answer, hang_up, reply, sse, stall
from lmbridge.transport import Interpreter, Request, Verdict
from lmbridge.transport.failover import Delivery
from lmbridge.transport.prefix import SentConversation
from tests.support import MESSAGES, cancel_at_each_step, piece, read_text, turns
from tests.transport.fake_servers import FakeServer, client_of, pool_of
from tests.transport.support import ask

STREAM = pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
BUSY = MockResponse(503, json={"error": "busy"})


@pytest_asyncio.fixture
async def servers() -> AsyncIterator[list[ScriptedServer]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(ScriptedServer()) for _ in range(3)]


@pytest.fixture
def instant_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has failed is asked again at the next request."""
    monkeypatch.setattr("lmbridge.transport.retry._FIRST_SERVER_BACKOFF", 0.0)
    monkeypatch.setattr("lmbridge.transport.node_pool.LOOK_UP_PAUSE", 0.0)


@pytest.fixture
def no_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has failed is never asked again."""
    monkeypatch.setattr("lmbridge.transport.retry._FIRST_SERVER_BACKOFF", 1000.0)
    monkeypatch.setattr("lmbridge.transport.retry.MAX_SERVER_BACKOFF", 1000.0)


def url_client(*servers: ScriptedServer, **options: Any) -> LLMClient:
    return LLMClient([server.api_base for server in servers], "test-model", **options)


def generations(server: ScriptedServer) -> int:
    return sum(request.method == "POST" for request in server.requests)


def counts(*servers: FakeServer) -> list[int]:
    return [len(server.generations) for server in servers]


def is_busy(server: ScriptedServer, requests: int) -> bool:
    return server.in_flight == requests


# On sockets


@STREAM
async def test_a_server_that_is_not_running_is_passed_over(servers: list[ScriptedServer], stream: bool) -> None:
    await servers[0].close()
    async with url_client(*servers[:2], max_retries=0) as client:
        for _ in range(3):
            assert await ask(client, stream) == "Hello from the scripted server."
        stats = client.stats()
    assert [stats.by_server[server.api_base].is_available for server in servers[:2]] == [False, True]


@STREAM
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_temporary_error_goes_to_another_server_at_once(
    servers: list[ScriptedServer], no_waits: list[float], status: int, stream: bool
) -> None:
    servers[0].default = reply(status, {"error": "busy"})
    async with url_client(*servers[:2]) as client:
        for _ in range(2):
            await ask(client, stream)
        assert client.stats().retries == 1
    assert (generations(servers[0]), generations(servers[1])) == (1, 2)
    assert set(no_waits) <= {0.5}, "only the back-off of the server, no wait of the request"


@STREAM
async def test_a_connection_that_breaks_before_the_answer_is_no_loss(
    servers: list[ScriptedServer], stream: bool
) -> None:
    servers[0].default = hang_up()
    async with url_client(*servers[:2]) as client:
        assert await ask(client, stream) == "Hello from the scripted server."


async def test_a_stream_that_breaks_before_its_first_event_goes_to_another_server(
    servers: list[ScriptedServer],
) -> None:
    servers[0].default = sse(b": still reading the prompt\n\n", end=False)
    async with url_client(*servers[:2]) as client:
        assert await ask(client, True) == "Hello from the scripted server."


async def test_comments_before_the_first_event_are_not_kept_without_a_bound(servers: list[ScriptedServer]) -> None:
    comments = b": still reading the prompt\n\n" * 10_000
    gate = asyncio.Event()

    async def behaviour(exchange: Exchange) -> None:
        await exchange.start()
        await exchange.send(comments)
        await gate.wait()
        await exchange.chunk(piece("Hello"))
        await exchange.chunk(piece(finish_reason="stop"))
        await exchange.done()

    servers[0].default = servers[1].default = behaviour
    async with url_client(*servers[:2]) as client:
        async with asyncio.timeout(10):
            stream = await client.chat_completion(MESSAGES, stream=True)
        gate.set()
        assert await read_text(stream) == "Hello"


@STREAM
async def test_a_reply_that_cannot_be_decompressed_does_not_take_the_server_down(
    servers: list[ScriptedServer], stream: bool
) -> None:
    servers[0].default = reply(200, b"?", {"Content-Encoding": "br"})
    transports = [Transport(servers[0].api_base)]
    async with NodePool(transports) as pool:
        client = LLMClient(transport=pool, model="test-model")
        with pytest.raises(LLMResponseError, match="compressed in a way"):
            await ask(client, stream)
        assert pool.stats().by_server[servers[0].api_base].is_available


async def test_a_stream_that_has_begun_is_never_sent_again(servers: list[ScriptedServer]) -> None:
    servers[0].default = servers[1].default = sse(piece("Hel"), end=False)
    async with url_client(*servers[:2]) as client:
        with pytest.raises(LLMError, match="broke mid-stream") as caught:
            await ask(client, True)
    assert caught.value.partial["choices"][0]["message"]["content"] == "Hel"
    assert sum(map(generations, servers)) == 1


async def test_idle_servers_share_the_load(servers: list[ScriptedServer]) -> None:
    gate = asyncio.Event()
    for server in servers:
        server.default = answer("Done.", gate=gate)
    async with url_client(*servers) as client:
        tasks = [asyncio.create_task(client.ask(f"Question {number}")) for number in range(9)]
        for server in servers:
            await server.wait_until(partial(is_busy, server, 3))
        gate.set()
        assert await asyncio.gather(*tasks) == ["Done."] * 9


async def test_a_request_that_must_not_be_repeated_is_not(servers: list[ScriptedServer]) -> None:
    servers[0].default = servers[1].default = hang_up()
    async with url_client(*servers[:2]) as client:
        with pytest.raises(LLMConnectionError, match="was not sent again"):
            await client.create_response("Hi")
    assert sum(map(generations, servers)) == 1


async def test_a_cancelled_request_leaves_nothing_behind(servers: list[ScriptedServer]) -> None:
    servers[0].default = hang_up()
    async with url_client(*servers[:2]) as client:

        async def nothing_is_in_flight() -> None:
            assert client._server.transport.in_flight == client._server.transport.queued == 0
            await asyncio.gather(*(server.wait_until(partial(is_busy, server, 0)) for server in servers))

        await cancel_at_each_step(partial(ask, client, True), nothing_is_in_flight, at_least=3)
        assert not client._server.transport.busy


async def test_closing_ends_everything(servers: list[ScriptedServer]) -> None:
    servers[0].default = servers[1].default = stall([piece("Hel")])
    client = url_client(*servers[:2])
    streams = [await client.chat_completion(MESSAGES, stream=True) for _ in range(2)]
    waiting = asyncio.create_task(client.ask("Hi"))
    # Both streams have the same conversation, so one server has both of them.
    await servers[0].wait_until(partial(is_busy, servers[0], 2))
    await servers[1].wait_until(partial(is_busy, servers[1], 1))
    await client.close()
    for stream in streams:
        with pytest.raises(TaskCancelledError):
            [chunk async for chunk in stream]
    with pytest.raises(TaskCancelledError):
        await waiting
    await client.close()
    for server in servers[:2]:
        await server.wait_until(partial(is_busy, server, 0))


# The choice


@STREAM
async def test_a_request_goes_to_the_server_that_has_the_model(stream: bool) -> None:
    one, two = FakeServer("one", ["a", "b"]), FakeServer("two", ["c"])
    client = client_of(one, two)
    for model, server in [("a", one), ("c", two), ("b", one), ("c", two)]:
        assert await ask(client.with_options(model=model), stream) == server.name


async def test_models_are_not_asked_for_at_each_request() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two)
    for number in range(10):
        await client.ask(f"Question {number}")
    assert one.questions == two.questions == ["/v1/models", "/api/v1/models"]


async def test_a_loaded_model_is_preferred_and_then_used_elsewhere_if_it_is_worth_loading() -> None:
    one, two = FakeServer("one", loaded=[], slots=1), FakeServer("two", slots=1)
    client = client_of(one, two)
    gate = one.gate = two.gate = asyncio.Event()
    tasks = [asyncio.create_task(client.ask(f"Question {number}")) for number in range(8)]
    await turns(50)
    assert (one.transport.in_flight, two.transport.in_flight, two.transport.queued) == (0, 1, 7)
    tasks += [asyncio.create_task(client.ask("One more")) for _ in range(3)]
    await turns(50)
    assert one.transport.in_flight, "loading the model is worth it when 8 rounds wait elsewhere"
    gate.set()
    await asyncio.gather(*tasks)


async def test_a_model_that_no_server_lists_is_asked_for_all_the_same() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two, model="unknown")
    with pytest.raises(ModelNotFoundError) as caught:
        await client.ask("Hi")
    assert counts(one, two) == [1, 1]
    assert caught.value.available_models == ["m"]
    assert caught.value.context["tried"] == ["http://one.test/v1: status 404", "http://two.test/v1: status 404"]


async def test_a_model_that_was_added_meanwhile_is_found(instant_checks: None) -> None:
    one, two = FakeServer("one", ["a"]), FakeServer("two", ["b"])
    client = client_of(one, two)
    await client.ask("Hi", model="a")
    two.models.append("new")
    assert await client.ask("Hi", model="new") == "two"


async def test_a_list_that_is_wrong_does_not_end_a_request() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.failure = MockResponse(404, json={"error": {"message": "model 'm' not found"}})
    client = client_of(one, two)
    assert [await client.ask("Hi") for _ in range(3)] == ["two"] * 3
    assert counts(one, two) == [1, 3]


@pytest.mark.parametrize(
    "failure",
    [
        MockResponse(200, json={"error": {"message": "model 'm' not found"}}),
        MockResponse(400, json={"error": {"message": "No models loaded. Please load a model."}}),
        MockResponse(500, json={"error": {"message": "Failed to load model: insufficient system resources"}}),
        MockResponse(401, json={"error": {"message": "invalid key"}}),
    ],
    ids=["200", "no model", "memory", "key"],
)
@STREAM
async def test_a_server_that_cannot_answer_is_passed_over(failure: MockResponse, stream: bool) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.failure = failure
    client = client_of(one, two, max_retries=0)
    assert await ask(client, stream) == "two"


async def test_an_error_as_the_first_event_of_a_stream_counts_as_well() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.failure = MockResponse(events=['{"error": {"message": "model \'m\' not found"}}'], done=False)
    client = client_of(one, two)
    assert await ask(client, True) == "two"
    two.failure = one.failure
    with pytest.raises(ModelNotFoundError):
        await ask(client_of(one, two), True)


@STREAM
@pytest.mark.parametrize(
    "failure", [MockResponse(400, json={"error": "Model unloaded."}), [{"error": "Model unloaded."}]]
)
async def test_a_server_learns_from_a_killed_generation_that_another_server_repeats(failure: Any, stream: bool) -> None:
    first, second = FakeServer("first"), FakeServer("second")
    first.failure = failure if stream or isinstance(failure, MockResponse) else failure[0]
    async with client_of(first, second) as client:
        assert await ask(client, stream) == "second"
        stats = client.stats()
    assert stats.evictions == 1
    assert first.transport.limits.max_loaded_models == 1
    assert second.transport.limits.max_loaded_models is None


async def test_a_mistake_in_the_request_is_not_tried_elsewhere() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.failure = two.failure = MockResponse(400, json={"error": {"message": "temperature must be a number"}})
    with pytest.raises(LLMResponseError, match="temperature must"):
        await client_of(one, two).ask("Hi")
    assert sum(counts(one, two)) == 1


# Conversations


async def test_a_conversation_stays_at_its_server() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two)
    talks: list[list[dict[str, str]]] = [[{"role": "user", "content": f"Talk {number}"}] for number in range(4)]
    homes = [await said(client, talk) for talk in talks]
    assert sorted(homes) == ["one", "one", "two", "two"]
    for _ in range(3):
        for talk, home in zip(talks, homes, strict=True):
            talk += [{"role": "assistant", "content": home}, {"role": "user", "content": "Go on."}]
            assert await said(client, talk) == home


async def said(client: LLMClient, messages: list[dict[str, str]], **params: Any) -> str:
    reply = await client.chat_completion(messages, **params)
    return reply["choices"][0]["message"]["content"] or ""


async def test_a_conversation_does_not_wait_for_its_server_for_long() -> None:
    one, two = FakeServer("one", slots=1), FakeServer("two", slots=1)
    client = client_of(one, two)
    home = await said(client, MESSAGES)
    here, there = (one, two) if home == "one" else (two, one)
    gate = here.gate = there.gate = asyncio.Event()
    tasks = [asyncio.create_task(said(client, MESSAGES)) for _ in range(3)]
    await turns(50)
    assert (here.transport.in_flight, here.transport.queued, there.transport.in_flight) == (1, 1, 1)
    gate.set()
    await asyncio.gather(*tasks)


async def test_with_prefer_warm_off_conversations_wander() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = LLMClient(transport=pool_of(one, two, prefer_warm=False), model="m")
    assert {await said(client, MESSAGES) for _ in range(2)} == {"one", "two"}


async def test_a_stored_response_is_continued_where_it_is() -> None:
    servers = [FakeServer(name) for name in ("one", "two", "three")]
    client = client_of(*servers)
    ids = [(await client.create_response(f"Question {number}")).get("id", "") for number in range(6)]
    for response_id in ids:
        follower = await client.create_response("And?", previous_response_id=response_id)
        assert follower.get("id", "").partition("-")[0] == response_id.partition("-")[0]


async def test_a_response_that_is_not_known_here_is_looked_for_elsewhere() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    for server in (one, two):
        server.failure = MockResponse(404, json={"error": {"message": "no response with this id"}})
    two.failure = None
    client = client_of(one, two)
    for _ in range(2):
        response = await client.create_response("And?", previous_response_id="from another client")
        assert response.get("id", "").startswith("two")


async def test_embeddings_are_spread() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two)
    for _ in range(4):
        await client.embeddings("The same text")
    assert counts(one, two) == [2, 2]


# Health


async def test_a_dead_server_is_checked_before_it_gets_requests_again(
    instant_checks: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmbridge.transport")
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two)
    one.down = ConnectionRefusedError()
    for number in range(5):
        assert await client.ask(f"Question {number}") == "two"
        await turns(20)
    assert counts(one, two)[0] <= 1
    asked = len(one.questions)
    one.down = None
    homes = set()
    for number in range(6):
        homes.add(await client.ask(f"Another question {number}"))
        await turns(20)
    assert homes == {"one", "two"}
    assert len(one.questions) > asked
    lines = [record.message for record in caplog.records if record.message.startswith("http://one.test")]
    assert "has failed (" in lines[0]
    assert lines[-1].endswith("answers again")


@pytest.mark.usefixtures("no_checks")
async def test_the_last_server_is_never_refused(no_waits: list[float]) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.down = two.down = ConnectionRefusedError()
    client = client_of(one, two, max_retries=1)
    for _ in range(2):
        with pytest.raises(LLMConnectionError, match=r"attempts at 2 servers") as caught:
            await client.ask("Hi")
        assert {each.partition(": ")[0] for each in caught.value.context["tried"]} == {one.api_base, two.api_base}
    two.down = None
    assert await client.ask("Hi") == "two"


@pytest.mark.usefixtures("no_checks")
async def test_all_servers_share_the_retries(no_waits: list[float]) -> None:
    for retries in (0, 1, 2, 4):
        servers = [FakeServer(name) for name in ("one", "two", "three")]
        for server in servers:
            server.failure = BUSY
        with pytest.raises(LLMResponseError, match="busy") as caught:
            await client_of(*servers, max_retries=retries).ask("Hi")
        assert sum(counts(*servers)) == retries + 1 == caught.value.context["attempts"]


@pytest.mark.usefixtures("no_checks", "no_waits")
async def test_a_model_of_one_server_is_not_asked_for_at_another_when_that_fails() -> None:
    one, two = FakeServer("one", ["a"]), FakeServer("two", ["b"])
    client = client_of(one, two)
    await client.ask("Hi", model="a")
    two.down = ConnectionRefusedError()
    with pytest.raises(LLMConnectionError):
        await client.ask("Hi", model="b")
    assert counts(one)[0] == 1


async def test_a_server_that_did_not_list_the_model_is_not_asked_when_the_others_refuse_it() -> None:
    one, two = FakeServer("one", ["a"]), FakeServer("two", ["b"])
    client = client_of(one, two)
    await client.ask("Hi", model="a")
    # A client of several servers has a `NodePool`.
    nodes = client._server.transport._nodes  # type: ignore[attr-defined]
    interpreter = Interpreter(classify=failures.classify)
    request = Request("test", "POST", "/chat/completions", interpreter, Timeouts(), 1, model="a")
    delivery = Delivery(nodes, request, SentConversation())
    assert delivery.candidates() == [nodes[0]]
    nodes[0].refuse("a")
    assert delivery.candidates() == [nodes[0]]


@pytest.mark.usefixtures("no_checks")
async def test_the_log_names_the_server_that_is_tried_next(
    no_waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.down = two.down = ConnectionRefusedError()
    with caplog.at_level(logging.INFO, "lmbridge.transport"), pytest.raises(LLMConnectionError) as caught:
        await client_of(one, two, max_retries=2).ask("Hi")
    logged = [message.partition("; trying ")[2] for message in caplog.messages if "; trying " in message]
    assert len(logged) > 2
    assert logged == [each.partition(": ")[0] for each in caught.value.context["tried"][1:]]


@pytest.mark.usefixtures("no_checks")
async def test_requests_that_wait_at_a_server_that_fails_go_elsewhere_at_once() -> None:
    one, two = FakeServer("one", slots=1), FakeServer("two", ["other"], slots=1)
    client = client_of(one, two)
    gate = one.gate = asyncio.Event()
    tasks = [asyncio.create_task(client.ask(f"Question {number}")) for number in range(4)]
    await turns(50)
    assert one.transport.queued == 3
    two.models.append("m")
    one.failure = ConnectionRefusedError()
    # A client of several servers has a `NodePool`.
    for node in client._server.transport._nodes:  # type: ignore[attr-defined]
        node.set_models(None, asyncio.get_running_loop().time())
    gate.set()
    assert await asyncio.gather(*tasks) == ["two"] * 4
    assert len(one.generations) == 1


async def test_the_total_time_limit_counts_at_all_servers() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.down = ConnectionResetError()
    two.gate = asyncio.Event()
    client = client_of(one, two, timeout=Timeouts(total=0.05))
    with pytest.raises(LLMTimeoutError) as caught:
        await client.ask("Hi")
    assert caught.value.phase == "total"
    assert caught.value.context["seconds"] >= 0.05


async def test_a_server_that_does_not_answer_in_time_gets_no_further_requests() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.gate = two.gate = asyncio.Event()
    client = client_of(one, two, timeout=Timeouts(first_byte=0.02))
    with pytest.raises(LLMTimeoutError):
        await client.ask("Hi")
    assert sum(each.is_available for each in client.stats().by_server.values()) == 1


def _has_none(server: ScriptedServer) -> bool:
    return server.open_connections == 0


async def test_a_close_that_is_cancelled_closes_the_connections_to_every_server(servers: list[ScriptedServer]) -> None:
    pool = NodePool([Transport(server.api_base) for server in servers])
    client = LLMClient(transport=pool, model="test-model")

    async def connect() -> None:
        await asyncio.gather(*(client.at_server(url).list_models() for url in client.servers))
        assert [server.open_connections for server in servers] == [1, 1, 1]

    async def is_closed() -> None:
        for server in servers:
            await server.wait_until(partial(_has_none, server))
        await connect()

    await connect()
    await cancel_at_each_step(pool.close, is_closed, at_least=1)


async def test_a_pool_closes_while_a_request_waits_for_its_next_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backoff.full_jitter", lambda _ceiling: 1000.0)
    one, two = FakeServer("one"), FakeServer("two")
    one.down = two.down = ConnectionRefusedError()
    client = client_of(one, two)
    pool = client._server.transport
    task = asyncio.create_task(client.ask("Hi"))
    await turns(60)
    assert not task.done()
    await pool.close()
    with pytest.raises(TaskCancelledError):
        await task


# The pool itself


def test_a_pool_needs_servers_and_no_server_twice() -> None:
    with pytest.raises(LLMValidationError, match="transports is empty"):
        NodePool([])
    with pytest.raises(LLMValidationError, match="is listed twice"):
        NodePool([Transport("http://a.test"), Transport("http://a.test/v1/")])
    with pytest.raises(LLMValidationError, match="a list of transports"):
        # Type checkers refuse it as well.
        NodePool("http://a.test")  # type: ignore[arg-type]
    with pytest.raises(LLMValidationError, match="a list of transports, not str"):
        # As above.
        NodePool(["http://a.test"])  # type: ignore[list-item]


async def test_a_pool_shows_no_key_of_any_server() -> None:
    pool = NodePool([Transport("http://a.test", api_key="first-key"), Transport("http://b.test", api_key="other-key")])
    assert pool.redact("first-key other-key") == "[api_key] [api_key]"


async def test_a_forwarded_request_goes_to_another_server_as_well() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.down = ConnectionRefusedError()
    body = b'{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}'
    request = Request(
        operation="chat completion",
        method="POST",
        path="/chat/completions",
        interpreter=Interpreter(classify=lambda _status, _headers, _body: Verdict.FAIL),
        timeouts=Timeouts(),
        max_retries=2,
        body=body,
        model="m",
    )
    async with pool_of(one, two) as pool, await pool.forward(request) as response:
        assert response.status == 200
        assert b'"content":"two"' in await response.read()
    assert two.generations == [{"model": "m", "messages": [{"role": "user", "content": "Hi"}]}]


@pytest.mark.parametrize("status", [200, 404])
async def test_a_compressed_error_of_a_forwarded_request_is_read_as_well(status: int) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    body = gzip.compress(b'{"error": {"message": "model \'m\' not found"}}')
    one.failure = MockResponse(status, body=body, headers=headers)
    request = Request(
        operation="chat completion",
        method="POST",
        path="/chat/completions",
        interpreter=Interpreter(
            classify=failures.classify, reports_error=reports_error, concerns_server=failures.concerns_server
        ),
        timeouts=Timeouts(),
        max_retries=0,
        body=b'{"model": "m", "messages": []}',
        model="m",
    )
    async with pool_of(one, two) as pool, await pool.forward(request) as response:
        assert response.status == 200
        assert b'"content":"two"' in await response.read()
    assert counts(one, two) == [1, 1]


def test_a_pool_works_in_one_event_loop_after_the_other() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    pool = pool_of(one, two)

    async def ask_once() -> str:
        async with pool:
            return await LLMClient(transport=pool, model="m").ask("Hi")

    for _ in range(3):
        assert asyncio.run(ask_once()) in ("one", "two")


@STREAM
async def test_look_ups_of_a_pool_that_is_being_closed_are_started_again(stream: bool, instant_checks: None) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    pool = pool_of(one, two)
    client = LLMClient(transport=pool, model="m")
    # The close begins first, and goes on in a task that starts after the look-ups were created.
    await asyncio.gather(pool.close(), ask(client, stream), return_exceptions=True)
    await ask(client, stream)
    assert "/v1/models" in one.questions
    assert "/v1/models" in two.questions
    assert [node.look_up for node in pool._nodes] == [None, None]


async def test_look_ups_that_are_cancelled_before_their_first_step_are_started_again(instant_checks: None) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    client = client_of(one, two)
    asking = asyncio.create_task(client.ask("Hi"))
    await turns(1)
    for task in asyncio.all_tasks() - {asyncio.current_task(), asking}:
        task.cancel()
    await asking
    assert not one.questions
    await client.ask("Hi")
    assert "/v1/models" in one.questions


def test_a_pool_that_is_closed_in_another_event_loop_forgets_its_look_ups(instant_checks: None) -> None:
    one, two = FakeServer("one"), FakeServer("two")
    pool = pool_of(one, two)
    client = LLMClient(transport=pool, model="m")
    former = asyncio.new_event_loop()
    asking = former.create_task(client.ask("Hi"))
    while not all(node.look_up for node in pool._nodes):
        former.run_until_complete(turns(1))
    one.questions.clear()
    # The loop is closed under its tasks, which asyncio.run would not do.
    lost = [asking, *asyncio.all_tasks(former)]
    former.close()
    for task in lost:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # the loss is intended
    with pytest.warns(ResourceWarning, match="still open"):
        asyncio.run(pool.close())
    asyncio.run(client.ask("Hi"))
    assert "/v1/models" in one.questions


async def test_one_key_that_is_refused_everywhere_is_an_authentication_error() -> None:
    one, two = FakeServer("one"), FakeServer("two")
    one.failure = two.failure = MockResponse(401, json={"error": {"message": "invalid key"}})
    with pytest.raises(LLMAuthenticationError):
        await client_of(one, two).ask("Hi")
    assert counts(one, two) == [1, 1]


# The slots of the servers


def has_slots(server: ScriptedServer, slots: int) -> None:
    """Makes a server describe itself as a llama.cpp server with one model."""
    model = {"id": "m", "object": "model", "owned_by": "llamacpp"}
    server.on_path("/v1/models", reply(200, {"object": "list", "data": [model]}))
    server.on_path("/props", reply(200, {"total_slots": slots}))


def generated(server: ScriptedServer) -> int:
    return sum(request.path.endswith("/completions") for request in server.requests)


@pytest.mark.parametrize("options", [{}, {"limits": "auto"}])
async def test_requests_that_start_together_are_divided_by_the_slots_of_the_servers(
    servers: list[ScriptedServer], options: dict[str, Any]
) -> None:
    small, large, _ = servers
    has_slots(small, 1)
    has_slots(large, 8)
    gate = asyncio.Event()
    small.default = large.default = answer("Hello", gate=gate)
    async with LLMClient([small.api_base, large.api_base], "m", **options) as client:
        asked = [
            asyncio.create_task(client.chat_completion([{"role": "user", "content": str(number)}]))
            for number in range(18)
        ]
        await large.wait_until(lambda: generated(large) == 8)
        while client.stats().in_flight + client.stats().queued < 18:
            await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*asked)
    assert (generated(small), generated(large)) == (2, 16)


async def ask_18_together(client: LLMClient, gate: asyncio.Event, topic: str) -> None:
    """Sends 18 requests, and opens the gate of the servers when all of them have been given to a server.

    Each topic makes other conversations, which no server has in its cache.
    """
    gate.clear()
    conversations = [[{"role": "user", "content": f"{topic} {number}"}] for number in range(18)]
    asked = [asyncio.create_task(client.chat_completion(each)) for each in conversations]
    while client.stats().in_flight + client.stats().queued < 18:
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*asked)


@pytest.mark.usefixtures("no_checks")
async def test_a_server_that_comes_back_is_asked_for_its_slots(servers: list[ScriptedServer]) -> None:
    small, large, _ = servers
    has_slots(small, 1)
    has_slots(large, 8)
    gate = asyncio.Event()
    small.default = large.default = answer("Hello", gate=gate)
    async with LLMClient([small.api_base, large.api_base], "m") as client:
        # A client of several servers has a `NodePool`.
        node = client._server.transport._nodes[0]  # type: ignore[attr-defined]
        node.note_failure(asyncio.get_running_loop().time(), "a test")
        await ask_18_together(client, gate, "one")
        node.note_success()
        await ask_18_together(client, gate, "two")
    assert (generated(small), generated(large)) == (2, 18 + 16)


async def test_servers_are_asked_for_their_slots_again_after_a_close(servers: list[ScriptedServer]) -> None:
    one, two, _ = servers
    gate = asyncio.Event()
    one.default = two.default = answer("Hello", gate=gate)
    async with LLMClient([one.api_base, two.api_base], "m") as client:
        for slots in ((1, 8), (8, 1)):
            has_slots(one, slots[0])
            has_slots(two, slots[1])
            await ask_18_together(client, gate, str(slots))
            await client.close()
    assert (generated(one), generated(two)) == (2 + 16, 16 + 2)


async def test_a_program_with_one_request_at_a_time_does_not_ask_for_slots(servers: list[ScriptedServer]) -> None:
    for server in servers:
        has_slots(server, 1)
        server.default = answer("Hello")
    async with LLMClient([each.api_base for each in servers], "m") as client:
        for _ in range(3):
            await client.chat_completion(MESSAGES)
        limits = [each.limits.max_concurrency for each in client.stats().by_server.values()]
    assert limits == [10, 10, 10]


async def test_a_server_that_does_not_report_its_slots_holds_up_requests_only_once(
    servers: list[ScriptedServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmbridge.transport.node_pool.SEARCH_PATIENCE", 0.05)
    monkeypatch.setattr("lmbridge.transport.limit_search.SEARCH_PATIENCE", 0.05)
    for server in servers:
        has_slots(server, 1)
        server.on_path("/props", stall())
        server.default = answer("Hello")
    async with LLMClient([each.api_base for each in servers], "m") as client:
        for _ in range(2):
            await asyncio.gather(*(client.chat_completion(MESSAGES) for _ in range(6)))
    assert sum(map(generated, servers)) == 12


async def test_closing_a_pool_that_asks_for_slots_ends_its_requests(servers: list[ScriptedServer]) -> None:
    for server in servers:
        has_slots(server, 1)
        server.on_path("/props", stall())
    client = LLMClient([each.api_base for each in servers], "m")
    asked = [asyncio.create_task(client.chat_completion(MESSAGES)) for _ in range(4)]
    await servers[0].wait_until(lambda: any(each.path == "/props" for each in servers[0].requests))
    await client.close()
    for outcome in await asyncio.gather(*asked, return_exceptions=True):
        assert isinstance(outcome, TaskCancelledError)


async def test_cancelling_requests_that_wait_for_slots_leaves_nothing_behind(servers: list[ScriptedServer]) -> None:
    for server in servers:
        has_slots(server, 1)
        server.default = answer("Hello")

    async def ask_beside_another() -> None:
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(LLMClient([each.api_base for each in servers], "m"))
            other = asyncio.create_task(client.chat_completion(MESSAGES))
            try:
                await client.chat_completion(MESSAGES)
            finally:
                await asyncio.shield(client.close())
                await asyncio.wait([other])
                other.exception()

    async def only_this_task_is_left() -> None:
        await turns(3)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    await cancel_at_each_step(ask_beside_another, only_this_task_is_left, at_least=5)
