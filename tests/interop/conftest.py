"""A client of the scripted server, and each of the frameworks."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from lmbridge import LLMClient
from lmbridge.testing import ScriptedServer
from tests.interop.frameworks import FRAMEWORKS, Framework


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    async with LLMClient(scripted_server.api_base, "test-model", max_retries=0) as client:
        yield client


@pytest.fixture(params=FRAMEWORKS, ids=lambda framework: framework.package)
def framework(request: pytest.FixtureRequest) -> Framework:
    made: Framework = request.param()
    return made
