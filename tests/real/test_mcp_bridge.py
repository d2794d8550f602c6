"""The bridge in front of a real llama.cpp server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from lmbridge import LocalServer
from lmbridge.mcp import sdk
from tests.mcp.bridge.support import official_session, wire_form
from tests.real.conftest import API_KEY
from tests.real.support import STORY, busy_slots, until_idle

pytestmark = [pytest.mark.real, pytest.mark.slow]


async def test_a_model_answers_through_the_bridge(local_server: LocalServer, tmp_path: Path) -> None:
    env = {"DEFAULT_MODEL": local_server.model, "LM_API_TOKEN": API_KEY}
    async with official_session(local_server.api_base, tmp_path, **env) as (session, _):
        listed = wire_form(await session.call_tool("list_models", {}))
        assert local_server.model in listed["structuredContent"]["models"]
        asked = {"prompt": "Say hello.", "max_tokens": 5, "temperature": 0}
        got = wire_form(await session.call_tool("chat_completion", asked))
        assert not got["isError"]
        assert got["structuredContent"]["finish_reason"] == "length"
        assert got["structuredContent"]["usage"]["completion_tokens"] == 5
        assert "not the whole answer" in got["content"][-1]["text"]


@pytest.mark.skipif(not sdk.is_v2(), reason="the client of SDK 1.x does not notify the server of a cancelled call")
async def test_a_cancelled_call_frees_the_slot(local_server: LocalServer, tmp_path: Path) -> None:
    is_answering = asyncio.Event()

    async def on_progress(progress: float, total: float | None, message: str | None) -> None:
        if "answering" in (message or ""):
            is_answering.set()

    async with official_session(local_server.api_base, tmp_path, LM_API_TOKEN=API_KEY) as (session, _):
        long: dict[str, Any] = {"messages": STORY, "max_tokens": 3000, "temperature": 0}
        call = asyncio.create_task(session.call_tool("chat_completion", long, progress_callback=on_progress))
        waiting = asyncio.create_task(is_answering.wait())
        await asyncio.wait({call, waiting}, return_when=asyncio.FIRST_COMPLETED)
        assert not call.done(), call.result()
        assert await busy_slots(local_server) == 1
        call.cancel()
        await until_idle(local_server)
        await asyncio.wait({call})
