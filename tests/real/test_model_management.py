"""`client.models` on the real router of llama-server."""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from benchmarks.routers import LlamaServerRouter, two_models, why_no_llama_server
from lmbridge import LLMClient, LLMResponseError, ModelNotFoundError
from tests.support import MESSAGES

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest_asyncio.fixture
async def router(tmp_path: Path) -> AsyncIterator[LlamaServerRouter]:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("needs lmbridge[local]")
    if missing := why_no_llama_server():
        pytest.skip(missing)
    async with LlamaServerRouter(await two_models(tmp_path, alike=True)) as router:
        yield router


async def test_models_are_loaded_with_progress_counted_swapped_and_unloaded(router: LlamaServerRouter) -> None:
    first, second = router.models
    async with LLMClient(router.api_base) as client:
        assert [(each.id, each.status) for each in await client.models.list()] == [
            (first, "unloaded"),
            (second, "unloaded"),
        ]
        assert not (await client.count_tokens(MESSAGES, model=first)).exact
        assert router.loads == [], "a count loads nothing"
        fractions: list[float | None] = []
        loaded = await client.models.load(first, progress=fractions.append)
        assert (loaded.id, loaded.loaded, loaded.context_length) == (first, True, 4096 // 4)
        assert fractions[0] is None
        reported = [each for each in fractions if each is not None]
        assert reported == sorted(reported)
        assert reported, "the router reports the progress"
        assert (await client.count_tokens(MESSAGES, model=first)).exact
        await client.models.load(first)
        await client.models.load(second)
        assert router.loads == [first, second]
        assert {each.id: each.loaded for each in await client.models.list()} == {first: False, second: True}
        await client.models.unload(second)
        await client.models.unload(second)
        assert not any(each.loaded for each in await client.models.list())
        with pytest.raises(ModelNotFoundError, match="did you mean"):
            await client.models.load("smollm2-135m")
        with pytest.raises(LLMResponseError):
            async for _ in client.models.download("nobody/nothing:Q4_0"):
                pass
