"""lmbridge in a FastAPI application with a browser that leaves, and in Django views."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import django
import pytest
import uvicorn
from asgiref.sync import async_to_sync
from django.conf import settings
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncRequestFactory, RequestFactory
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from lmbridge import LLMClient, sync
from lmbridge.testing import ScriptedServer, answer, stall
from tests.support import piece
from tests.threaded_server import ThreadedServer


def make_app(client: LLMClient) -> FastAPI:
    """The application of docs/recipes.md, with a client that is given."""
    app = FastAPI()

    @app.get("/ask")
    async def ask(question: str) -> StreamingResponse:
        stream = await client.chat_completion([{"role": "user", "content": question}], stream=True)

        async def text() -> AsyncIterator[str]:
            async with stream:
                async for chunk in stream:
                    for choice in chunk["choices"]:
                        yield choice["delta"].get("content") or ""

        return StreamingResponse(text(), media_type="text/plain")

    return app


@asynccontextmanager
async def serving(app: FastAPI) -> AsyncIterator[str]:
    """Serves an application with uvicorn on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    # uvicorn says when it has started in no other way.
    started = asyncio.Event()
    startup = server.startup

    async def start_and_tell(*args: Any, **options: Any) -> None:
        await startup(*args, **options)
        started.set()

    # uvicorn has no hook for the moment at which it listens.
    server.startup = start_and_tell  # type: ignore[method-assign]
    task = asyncio.create_task(server._serve())
    await started.wait()
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


async def test_a_browser_that_stays_gets_the_whole_answer(client: LLMClient, scripted_server: ScriptedServer) -> None:
    scripted_server.default = answer("one two three")
    async with (
        serving(make_app(client)) as url,
        aiohttp.ClientSession() as browser,
        browser.get(f"{url}/ask", params={"question": "Count."}) as response,
    ):
        assert await response.text() == "one two three"


async def test_a_browser_that_leaves_stops_the_model(client: LLMClient, scripted_server: ScriptedServer) -> None:
    scripted_server.default = stall([piece("Once")])
    async with serving(make_app(client)) as url, aiohttp.ClientSession() as browser:
        async with browser.get(f"{url}/ask", params={"question": "Tell a story."}) as response:
            assert await response.content.readany() == b"Once"
            assert scripted_server.in_flight == 1
        await scripted_server.wait_until(lambda: not scripted_server.in_flight)


@pytest.fixture(scope="module", autouse=True)
def django_settings() -> None:
    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF=__name__, USE_TZ=True)
        django.setup()


@pytest.fixture
def server() -> Iterator[ThreadedServer]:
    with ThreadedServer() as server:
        yield server


def test_a_django_view_streams_with_the_blocking_client(server: ThreadedServer) -> None:
    server.answer(answer("one two three"))
    with sync.LLMClient(server.api_base) as client:

        def ask(request: HttpRequest) -> StreamingHttpResponse:
            messages = [{"role": "user", "content": request.GET["question"]}]
            stream = client.chat_completion(messages, stream=True)
            texts = (choice["delta"].get("content") or "" for chunk in stream for choice in chunk["choices"])
            return StreamingHttpResponse(texts, content_type="text/plain")

        response: Any = ask(RequestFactory().get("/ask", {"question": "Count."}))
        assert b"".join(response.streaming_content) == b"one two three"


def test_an_asynchronous_view_works_under_async_to_sync(server: ThreadedServer) -> None:
    server.answer(answer("one two three"))

    async def ask(request: HttpRequest) -> HttpResponse:
        async with LLMClient(server.api_base) as client:
            reply = await client.chat_completion([{"role": "user", "content": request.GET["question"]}])
            return HttpResponse((reply["choices"][0]["message"]["content"] or "").encode())

    for _ in range(2):
        response = async_to_sync(ask)(AsyncRequestFactory().get("/ask", {"question": "Count."}))
        assert response.content == b"one two three"


def test_the_blocking_client_works_inside_an_asynchronous_view(server: ThreadedServer) -> None:
    server.answer(answer("one two three"))
    with sync.LLMClient(server.api_base) as client:

        async def ask(_request: HttpRequest) -> HttpResponse:
            reply = await asyncio.to_thread(client.chat_completion, [{"role": "user", "content": "Count."}])
            return HttpResponse((reply["choices"][0]["message"]["content"] or "").encode())

        assert async_to_sync(ask)(AsyncRequestFactory().get("/ask")).content == b"one two three"
