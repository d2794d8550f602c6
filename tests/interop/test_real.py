"""The frameworks with a real model on the embedded server."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from lmbridge import LLMClient, LocalServer
from tests.interop.frameworks import Framework, add

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.timeout(180),
    pytest.mark.filterwarnings("default"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[LocalServer]:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    async with LocalServer(n_ctx=4096, n_parallel=2) as running:
        yield running


@pytest_asyncio.fixture
async def client(server: LocalServer) -> AsyncIterator[LLMClient]:
    async with LLMClient(server.api_base, server.model) as client:
        yield client


async def test_an_answer_and_a_stream(framework: Framework, client: LLMClient) -> None:
    question = "Count from one to five."
    assert await framework.ask(client, question)
    assert len([piece async for piece in framework.stream(client, question)]) > 2


async def test_a_tool(framework: Framework, client: LLMClient) -> None:
    called = []

    def add_numbers(a: int, b: int) -> int:
        """Adds two numbers."""
        called.append((a, b))
        return add(a, b)

    assert await framework.ask(client, "What is 2 + 3? Use the tool.", [add_numbers])
    assert called[0] == (2, 3)


async def test_structured_output(framework: Framework, client: LLMClient) -> None:
    city = await framework.city(client, "Oslo is the capital of Norway. Give the city and its country.")
    assert city.name
