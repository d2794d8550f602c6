"""Answers of real servers on paths that a client never asks, recorded byte for byte: none of them is a chat.

A wrong `api_base`, or a proxy in between, may bring any of these. They are llama.cpp's own paths and those that it has
from others (Anthropic's messages, LM Studio's and Ollama's APIs), of its router, and of llama-cpp-python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from lmbridge import LLMClient, LLMError, LLMResponseError, LLMStreamError, ModelChangedDuringExecutionError, collect
from lmbridge.testing import ScriptedServer, raw
from tests.client.test_captures import Capture, parse
from tests.support import MESSAGES, in_flight, opened

FOLDER: Final = Path(__file__).parents[1] / "data" / "foreign"
CAPTURES: Final = {
    name: parse(name, path.read_bytes())
    for path in sorted(FOLDER.rglob("*.*"))
    for name in [path.relative_to(FOLDER).with_suffix("").as_posix()]
}
NO_SUCH_PATH: Final = (404, "the server does not know this path; check api_base")
RUNNING: Final = (400, "the server answered 400: model is already running")
NO_RERANKING: Final = (501, "This server does not support reranking")
NO_REPLY: Final = (200, "the server answered 200 with something that is n")  # ot a ..., or: either ... nor ...
TOLD: Final = {
    **dict.fromkeys(("api_tags", "api_v0_models", "err_404", "lmstudio_chat", "ollama_chat", "version"), NO_SUCH_PATH),
    "llamacpppython-smol/health": NO_SUCH_PATH,
    "load_again": RUNNING,
    "rerank": NO_RERANKING,
}
"""Status, and what the error says, of those that are not simply something else."""
EVENTS: Final[dict[str, type[LLMError]]] = {
    "messages_stream": LLMStreamError,
    "models_sse": ModelChangedDuringExecutionError,  # they tell of several models
}
"""They are event streams, but of other events."""


@pytest.fixture(params=[pytest.param(capture, id=name) for name, capture in CAPTURES.items()])
def capture(request: pytest.FixtureRequest) -> Capture:
    found: Capture = request.param
    return found


def test_all_of_them_are_here() -> None:
    assert len(CAPTURES) == 42


async def test_none_is_taken_for_a_reply(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], capture: Capture
) -> None:
    serve(scripted_server, capture)
    with pytest.raises(LLMResponseError) as caught:
        await client.chat_completion(MESSAGES)
    check(caught.value, capture)


async def test_none_is_taken_for_a_stream(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], capture: Capture
) -> None:
    serve(scripted_server, capture)
    with pytest.raises(LLMError) as caught:
        await collect(await opened(client))
    if (kind := EVENTS.get(capture.name.rpartition("/")[2])) is not None:
        assert type(caught.value) is kind
    else:
        check(caught.value, capture)
    assert in_flight(client) == 0


def serve(server: ScriptedServer, capture: Capture) -> None:
    server.script(*[raw(*capture.as_recorded())] * 6)  # as often as it may be asked for


def check(error: LLMError, capture: Capture) -> None:
    status, told = TOLD.get(capture.name) or TOLD.get(capture.name.rpartition("/")[2]) or NO_REPLY
    assert (capture.status, error.status) == (status, status)
    assert told in str(error)
