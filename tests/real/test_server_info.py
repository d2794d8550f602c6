"""`server_info()` and the LM Studio methods on a real llama.cpp server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lmbridge import LLMAuthenticationError, LLMClient, LLMResponseError, LocalServer, ModelInfo, ServerInfo

pytestmark = pytest.mark.real


async def test_llama_cpp_reports_its_slots_and_its_context_length(local_server: LocalServer, client: LLMClient) -> None:
    info = await client.server_info()
    (size,) = (each.size_bytes for each in info.models)
    # The small model has 135 million weights, quantized to fewer than two bytes each.
    assert size is not None
    assert 50_000_000 < size < 270_000_000
    model = ModelInfo(id=local_server.model, loaded=True, context_length=4096, slots=4, vision=False, size_bytes=size)
    # A build of Debian has a version, and that of xllamacpp has none.
    expected = ServerInfo(kind="llama.cpp", models=(model,), context_length=4096, slots=4, version=info.version)
    assert info == expected


async def test_a_wrong_api_key_raises_an_authentication_error(local_server: LocalServer) -> None:
    async with LLMClient(local_server.api_base, api_key="sk-wrong") as client:
        with pytest.raises(LLMAuthenticationError, match="pass api_key="):
            await client.server_info()


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.lmstudio.models(),
        lambda client: client.lmstudio.load("smollm2", context_length=2048),
        lambda client: client.lmstudio.unload("smollm2"),
        lambda client: anext(client.lmstudio.download("smollm2")),
    ],
    ids=["models", "load", "unload", "download"],
)
async def test_methods_of_lm_studio_raise_on_llama_cpp(
    client: LLMClient, call: Callable[[LLMClient], Awaitable[Any]]
) -> None:
    with pytest.raises(LLMResponseError, match=r"\(it calls itself 'llama.cpp'\) is not LM Studio") as caught:
        await call(client)
    assert caught.value.status == 404
    assert await client.health_check()
