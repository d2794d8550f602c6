"""What only pydantic-ai has: models to fall back to, and profiles."""

from __future__ import annotations

from typing import Any

import pytest

from lmbridge import LLMClient
from lmbridge.testing import ScriptedServer, answer, reply
from tests.interop.frameworks import PydanticAI

pytestmark = [
    # Importing the framework takes seconds.
    pytest.mark.slow,
    # What the framework and its libraries deprecate is not ours.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture
def pydantic_ai() -> PydanticAI:
    return PydanticAI()


async def test_another_model_is_asked_if_one_fails(
    pydantic_ai: PydanticAI, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    scripted_server.on_model("small", reply(500, {"error": "broken"}))
    scripted_server.on_model("large", answer("Hello"))
    fallback: Any = pytest.importorskip("pydantic_ai.models.fallback")
    models = [pydantic_ai.interop.LMBridgeModel(client, name) for name in ("small", "large")]
    result = await pydantic_ai.framework.Agent(fallback.FallbackModel(*models)).run("Hi")
    assert result.output == "Hello"
    assert [request.json["model"] for request in scripted_server.requests] == ["small", "large"]


async def test_settings_are_sent_in_the_form_that_local_servers_know(
    pydantic_ai: PydanticAI, client: LLMClient, scripted_server: ScriptedServer
) -> None:
    scripted_server.default = answer("Hello", reasoning="Be kind.")
    model = pydantic_ai.interop.LMBridgeModel(client, settings={"max_tokens": 20, "timeout": 30})
    result = await pydantic_ai.framework.Agent(model).run("Hi")
    sent = scripted_server.requests[-1].json
    assert sent["max_tokens"] == 20
    assert "max_completion_tokens" not in sent
    assert [part.content for part in result.response.parts] == ["Be kind.", "Hello"]
    assert (model.system, model.model_name, model.base_url) == ("lmbridge", "test-model", f"{client.api_base}/")
