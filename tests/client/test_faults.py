"""Retries, polls, connections, limits and secrets, against a server that misbehaves on demand."""

from __future__ import annotations

import asyncio
import logging
import pickle
import socket
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from blockbuster import BlockBuster

from lmbridge import (
    Limits,
    LLMAuthenticationError,
    LLMClient,
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    ModelLoadError,
    Timeouts,
    collect,
)
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, hang_up, raw, reply, reset, sse, stall
from tests.support import MESSAGES, piece, read_text

LOADING = reply(503, {"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}})


async def ask(client: LLMClient, stream: bool) -> str:
    if stream:
        return await read_text(await client.chat_completion(MESSAGES, stream=True))
    message = (await client.chat_completion(MESSAGES))["choices"][0]["message"]
    return message["content"]


# Retries


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_passing_error_is_retried(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], status: int, stream: bool
) -> None:
    scripted_server.script(reply(status, {"error": "busy"}), reply(status, b""), answer("Hi"))
    assert await ask(client, stream) == "Hi"
    assert len(scripted_server.requests) == 3
    assert no_waits == [0.5, 1.0]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("behaviour", [hang_up(), reset()])
async def test_a_connection_that_breaks_before_a_reply_is_retried(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], behaviour: Behaviour, stream: bool
) -> None:
    scripted_server.script(behaviour, behaviour, answer("Hi"))
    assert await ask(client, stream) == "Hi"
    assert len(no_waits) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 501])
async def test_an_error_of_the_requests_own_is_not_retried(
    scripted_server: ScriptedServer, client: LLMClient, status: int
) -> None:
    scripted_server.script(reply(status, {"error": "no"}))
    with pytest.raises(LLMResponseError, match=f"the server answered {status}: no") as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.status == status
    assert caught.value.body == '{"error":"no"}'
    assert len(scripted_server.requests) == 1


async def test_a_500_that_comes_again_for_ever_is_not_retried(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    told = {"error": {"code": 500, "message": "Failed to parse tool call arguments as JSON", "type": "server_error"}}
    scripted_server.script(reply(500, told))
    with pytest.raises(LLMResponseError, match="Failed to parse tool call arguments"):
        await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1


@pytest.mark.parametrize(("asked_for", "made"), [(0, 0), (1, 1), (5, 5), (50, 5)])
async def test_no_more_than_five_retries_are_ever_made(
    scripted_server: ScriptedServer, no_waits: list[float], asked_for: int, made: int
) -> None:
    scripted_server.default = reply(429, {"error": "slow down"})
    async with LLMClient(scripted_server.api_base, max_retries=asked_for) as client:
        with pytest.raises(LLMRateLimitError) as caught:
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1 + made
    assert caught.value.context["attempts"] == 1 + made
    assert max(no_waits, default=0) <= 15


@pytest.mark.parametrize("in_words", [True, False])
async def test_a_server_that_asks_for_too_long_a_wait_is_told_at_once(
    scripted_server: ScriptedServer, client: LLMClient, in_words: bool
) -> None:
    after = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True) if in_words else "100"
    scripted_server.script(reply(429, {"error": "slow down"}, {"Retry-After": after}))
    with pytest.raises(LLMRateLimitError) as caught:
        await client.chat_completion(MESSAGES)
    assert caught.value.retry_after == pytest.approx(100, abs=5)
    assert len(scripted_server.requests) == 1


async def test_the_wait_that_a_server_asks_for_is_not_cut_short(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.script(reply(429, {"error": "slow down"}, {"Retry-After": "0.3"}), answer("Hi"))
    loop = asyncio.get_running_loop()
    began = loop.time()
    with caplog.at_level(logging.DEBUG, "lmbridge.transport"):
        assert await ask(client, stream=False) == "Hi"
    assert loop.time() - began >= 0.3
    assert "chat completion: status 429; retry in 0.30 s" in caplog.text


async def test_a_stream_that_began_is_never_asked_for_again(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(sse(piece("a"), end=False))
    with pytest.raises(LLMStreamError, match="the connection broke in mid-stream"):
        await ask(client, stream=True)
    scripted_server.script(sse(end=False))  # not even before its first event
    with pytest.raises(LLMStreamError):
        await ask(client, stream=True)
    assert len(scripted_server.requests) == 2


async def test_a_plain_reply_cut_in_the_middle_is_an_error(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(raw(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"))
    with pytest.raises(LLMConnectionError, match="in the middle of the answer"):
        await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1


async def test_nobody_there_is_a_connection_error_that_says_where(no_waits: list[float]) -> None:
    async with ScriptedServer() as gone:
        pass
    async with LLMClient(gone.api_base, "m") as client:
        with pytest.raises(LLMConnectionError) as caught:
            await client.chat_completion(MESSAGES)
    assert isinstance(caught.value, ConnectionError)
    assert caught.value.__cause__ is not None
    told = str(caught.value)
    assert f"with model 'm' at {gone.api_base}/chat/completions: could not connect: Connection refused" in told
    assert "(after 3 attempts, " in told
    assert told.endswith("start the server there, or pass the right api_base")
    assert len(no_waits) == 2


async def test_what_does_not_speak_http_is_told_so(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"))
    with pytest.raises(LLMConnectionError, match="not proper HTTP"):
        await client.chat_completion(MESSAGES)


async def test_a_name_that_cannot_be_resolved_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_such_host(*_: object, **__: object) -> object:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", no_such_host)
    async with LLMClient("http://no-such-host.invalid") as client:
        with pytest.raises(
            LLMConnectionError, match=r"cannot be resolved: .*Name or service not known.*check api_base"
        ):
            await client.chat_completion(MESSAGES)


# Loading


async def test_a_loading_server_is_polled_without_counting_retries(
    scripted_server: ScriptedServer, no_waits: list[float]
) -> None:
    scripted_server.script(*[LOADING] * 8, reply(500, {"error": "hiccup"}), LOADING, answer("Hi"))
    async with LLMClient(scripted_server.api_base, max_retries=1) as client:
        assert await ask(client, stream=True) == "Hi"
        assert client.stats().retries == 1
    assert len(scripted_server.requests) == 11


async def test_loading_has_a_budget_of_its_own(scripted_server: ScriptedServer, no_waits: list[float]) -> None:
    scripted_server.default = LOADING
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(load=0.1)) as client:
        with pytest.raises(LLMTimeoutError, match=r"still loading its model, not ready within 0\.1 s") as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.phase == "load"
    assert caught.value.status == 503
    assert "Loading model" in (caught.value.body or "")


@pytest.mark.parametrize("status", [400, 503])
async def test_nothing_loaded_is_told_at_once_with_what_to_do(
    scripted_server: ScriptedServer, client: LLMClient, status: int
) -> None:
    told = "No models loaded. Please load a model in the developer page or use the 'lms load' command."
    scripted_server.script(reply(status, {"error": told}))
    with pytest.raises(ModelLoadError, match="load a model first"):
        await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1


# Time


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_does_not_come_is_a_timeout(scripted_server: ScriptedServer, stream: bool) -> None:
    scripted_server.script(stall())
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.1)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await ask(client, stream)
        assert client._server.transport.in_flight == 0
    assert caught.value.phase == "first_byte"
    await scripted_server.wait_until(lambda: scripted_server.aborts)
    assert len(scripted_server.requests) == 1


async def test_a_plain_reply_has_to_be_whole_in_time(scripted_server: ScriptedServer) -> None:
    async def trickle(exchange: Exchange) -> None:
        await exchange.start(200, {"Content-Length": "1000"}, chunked=False)
        while True:
            await exchange.send(b" ")
            await asyncio.sleep(0.01)

    scripted_server.script(trickle)
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(first_byte=0.1)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.phase == "first_byte"


async def test_the_total_spans_attempts_and_their_waits(scripted_server: ScriptedServer, no_waits: list[float]) -> None:
    scripted_server.script(reply(503, {"error": "busy"}), stall())
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(total=1)) as client:
        with pytest.raises(LLMTimeoutError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.phase == "total"
    assert caught.value.context["attempts"] == 2


async def test_a_wait_longer_than_what_is_left_of_the_total_is_not_begun(scripted_server: ScriptedServer) -> None:
    scripted_server.script(reply(429, {"error": "slow down"}, {"Retry-After": "30"}))
    async with LLMClient(scripted_server.api_base, timeout=Timeouts(total=5)) as client:
        with pytest.raises(LLMRateLimitError) as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.retry_after == 30


@pytest.fixture
def full_listener() -> Iterator[str]:
    """The address of a socket whose backlog is full: a further connect gets no answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        yield f"http://{address[0]}:{address[1]}"
        for filler in fillers:
            filler.close()


async def test_a_connect_that_gets_no_answer_is_a_timeout_of_its_own(full_listener: str) -> None:
    async with LLMClient(full_listener, timeout=Timeouts(connect=0.1)) as client:
        with pytest.raises(LLMTimeoutError, match=r"no connection within 0\.1 s") as caught:
            await client.chat_completion(MESSAGES)
    assert caught.value.phase == "connect"


# Connections


async def test_requests_one_after_another_share_a_connection(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    for stream in (True, False, True, False):
        await ask(client, stream)
    await client.list_models()
    assert scripted_server.connections == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_a_kept_connection_that_is_dead_is_replaced_silently(
    scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture, stream: bool
) -> None:
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        await ask(client, stream)
        scripted_server.hang_up_reused = 1
        with caplog.at_level(logging.INFO, "lmbridge"):
            assert await ask(client, stream) == "Hello from the scripted server."
        assert [request.refused for request in scripted_server.requests] == [False, True, False]
        assert client.stats().retries == 0
    assert [record.levelname for record in caplog.records] == ["INFO"]


async def test_a_fresh_connection_that_breaks_is_not_replaced_silently(scripted_server: ScriptedServer) -> None:
    scripted_server.script(hang_up())
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        with pytest.raises(LLMConnectionError, match="closed the connection without an answer"):
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 1


async def test_the_silent_resend_happens_once(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base, max_retries=0) as client:
        await ask(client, stream=False)
        scripted_server.hang_up_reused = 1
        scripted_server.script(hang_up())
        with pytest.raises(LLMConnectionError):
            await client.chat_completion(MESSAGES)
    assert len(scripted_server.requests) == 3


async def test_sixty_streams_in_a_row_are_whole_where_keep_alive_is_a_lie() -> None:
    async with (
        ScriptedServer(close_after_stream=True) as server,
        LLMClient(server.api_base, max_retries=0) as client,
    ):
        for _ in range(60):
            assert await ask(client, stream=True) == "Hello from the scripted server."


async def test_a_redirect_is_an_error_that_names_its_target(scripted_server: ScriptedServer) -> None:
    async with ScriptedServer() as elsewhere:
        target = f"http://user:secret@{elsewhere.origin.removeprefix('http://')}/v1/chat/completions?token=secret"
        scripted_server.default = reply(307, b"", {"Location": target})
        async with LLMClient(scripted_server.api_base, api_key="my-key") as client:
            for stream in (True, False):
                with pytest.raises(LLMResponseError, match=r"redirects \(307\) to http") as caught:
                    await ask(client, stream)
                assert elsewhere.origin in str(caught.value)
                assert "secret" not in str(caught.value)
                assert caught.value.status == 307
        assert not elsewhere.requests


@pytest.mark.parametrize("trust_env", [True, False])
async def test_loopback_is_never_proxied(
    scripted_server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, trust_env: bool
) -> None:
    async with ScriptedServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        async with LLMClient(scripted_server.api_base, trust_env=trust_env) as client:
            await ask(client, stream=False)
        assert not proxy.requests


async def test_a_proxy_is_used_only_if_the_environment_is_trusted(
    monkeypatch: pytest.MonkeyPatch, no_blocking_calls: BlockBuster
) -> None:
    no_blocking_calls.deactivate()  # aiohttp 3.13 looks for a .netrc in the event loop
    async with ScriptedServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.origin)
        proxy.default = answer("through the proxy")
        proxy.on_path("http://lm.example/v1/chat/completions", proxy.default)
        async with LLMClient("http://lm.example", trust_env=True) as client:
            assert await ask(client, stream=False) == "through the proxy"


# Limits


async def test_no_more_generations_than_allowed_are_in_flight(scripted_server: ScriptedServer) -> None:
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=3)) as client:
        texts = await asyncio.gather(*[ask(client, stream=bool(number % 2)) for number in range(30)])
    assert texts == ["Hello from the scripted server."] * 30
    assert scripted_server.max_in_flight == 3


async def test_a_place_is_held_for_the_whole_stream_and_given_on_in_order(scripted_server: ScriptedServer) -> None:
    gate = asyncio.Event()
    scripted_server.script(answer("first", gate=gate))
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        stream = await client.chat_completion(MESSAGES, stream=True)

        async def ask_for(number: int) -> None:
            await client.chat_completion(MESSAGES, model=f"m{number}")

        waiting = [asyncio.create_task(ask_for(number)) for number in range(5)]
        await asyncio.sleep(0)
        assert client._server.transport.queued == 5
        assert await client.health_check()
        assert await client.list_models() == ["test-model"]  # these do not queue
        waiting[1].cancel()
        gate.set()
        await read_text(stream)
        await asyncio.gather(*waiting, return_exceptions=True)
    asked = [request.json["model"] for request in scripted_server.requests[1:] if request.method == "POST"]
    assert asked == ["m0", "m2", "m3", "m4"]


async def test_a_request_that_is_not_admitted_in_time_is_told_who_holds_the_places(
    scripted_server: ScriptedServer,
) -> None:
    scripted_server.script(stall(after=[piece("a")]))
    limits = Limits(max_concurrency=1, max_queue=0.05)
    async with LLMClient(scripted_server.api_base, "m", limits=limits) as client:
        async with await client.chat_completion(MESSAGES, stream=True):
            asked = asyncio.create_task(client.chat_completion(MESSAGES))  # another task: it may well wait
            with pytest.raises(LLMTimeoutError, match=r"held by: m for \d+ s \(unread for \d+ s\)") as caught:
                await asked
        assert caught.value.phase == "queue"
        assert str(caught.value).startswith(f"chat completion with model 'm' at {scripted_server.api_base}/chat")
        assert (await client.chat_completion(MESSAGES))["choices"]
    assert len(scripted_server.requests) == 2


async def test_a_task_that_would_wait_for_its_own_stream_is_told_at_once(scripted_server: ScriptedServer) -> None:
    scripted_server.script(stall(after=[piece("a")]))
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=1)) as client:
        async for _ in (stream := await client.chat_completion(MESSAGES, stream=True)):
            with pytest.raises(LLMTimeoutError, match="forever, for streams that its own task holds open") as caught:
                await client.chat_completion(MESSAGES)
            assert caught.value.phase == "queue"
            break
        await stream.aclose()


async def test_places_come_back_however_a_request_ends(scripted_server: ScriptedServer, no_waits: list[float]) -> None:
    behaviours = [
        reply(400, {"error": "no"}),
        reply(500, {"error": "no"}),
        reply(200, b"no"),
        sse(piece("a")),
        sse(piece("a"), {"error": "no"}),
        sse(done=True),
        raw(b"no"),
    ]
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=2), max_retries=0) as client:
        for behaviour in behaviours * 12:
            for stream in (True, False):
                scripted_server.script(behaviour)
                with pytest.raises(LLMError):
                    await ask(client, stream)
        scripted_server.default = stall(after=[piece("a")])
        for _ in range(50):
            await (await client.chat_completion(MESSAGES, stream=True)).aclose()
        assert client._server.transport.in_flight == 0
        scripted_server.default = answer("Hi")
        assert await ask(client, stream=True) == "Hi"


# Secrets


async def test_a_key_is_never_shown(scripted_server: ScriptedServer, caplog: pytest.LogCaptureFixture) -> None:
    key = "sk-lm-very-secret"
    told = {"error": {"message": f"Incorrect API key provided: {key}", "code": "invalid_api_key"}}
    async with LLMClient(scripted_server.api_base, api_key=key, max_retries=0) as client:
        with caplog.at_level(logging.DEBUG):
            for behaviour in (
                reply(401, told),
                reply(200, told),
                reply(200, {"echo": key}),
                sse(told),
                sse(f"data: nonsense {key}\n\n"),
                sse(piece(choices=key)),
                sse(piece("a"), f"proxy error: {key}"),
                raw(b"no HTTP\r\n\r\n"),
                hang_up(),
                reset(),
            ):
                for stream in (True, False):
                    scripted_server.script(behaviour)
                    with pytest.raises(LLMError) as caught:
                        await ask(client, stream)
                    error = caught.value
                    shown = [str(error), repr(error), repr(vars(error)), repr(error.__cause__), repr(error.__context__)]
                    shown += traceback.format_exception(error)
                    assert key not in "".join(shown)
                    assert key.encode() not in pickle.dumps(error)
        assert key not in repr(client)
    assert key not in caplog.text
    assert scripted_server.requests[0].headers["authorization"] == f"Bearer {key}"


async def test_a_refused_key_is_an_authentication_error(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(reply(401, {"error": {"message": "Invalid API Key", "type": "authentication_error"}}))
    with pytest.raises(LLMAuthenticationError, match="pass api_key=, or set LM_API_TOKEN"):
        await client.chat_completion(MESSAGES)


async def test_a_hundred_streams_at_a_time_are_all_whole(scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("one two three four")
    async with LLMClient(scripted_server.api_base, limits=Limits(max_concurrency=100)) as client:

        async def one() -> str:
            return (await collect(await client.chat_completion(MESSAGES, stream=True)))["choices"][0]["message"][
                "content"
            ]

        assert await asyncio.gather(*[one() for _ in range(100)]) == ["one two three four"] * 100
