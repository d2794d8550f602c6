"""Recorded answers of real servers that are not chat completions: none of them is mistaken for one.

A wrong `api_base`, or a proxy in between, can lead to any of them. They come from llama.cpp's own paths, from those of
other APIs that it serves (Anthropic, LM Studio, Ollama), from its router, and from llama-cpp-python.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from lmbridge import LLMClient, LLMError, LLMResponseError, LLMStreamError, collect
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
# The text goes on with "not a ..." or with "neither ... nor ...".
NO_REPLY: Final = (200, "the server answered 200 with something that is n")
REFUSALS: Final = {
    **dict.fromkeys(("api_tags", "api_v0_models", "err_404", "lmstudio_chat", "ollama_chat", "version"), NO_SUCH_PATH),
    "llamacpppython-smol/health": NO_SUCH_PATH,
    "load_again": RUNNING,
    "rerank": NO_RERANKING,
}
"""The status and a part of the message, for captures that are refusals. The others are `NO_REPLY`."""
OTHER_STREAMS: Final[dict[str, type[LLMError]]] = {
    "messages_stream": LLMStreamError,
    "models_sse": LLMStreamError,
}
"""The errors for captures that are event streams of another kind."""


@pytest.fixture(params=[pytest.param(capture, id=name) for name, capture in CAPTURES.items()])
def capture(request: pytest.FixtureRequest) -> Capture:
    found: Capture = request.param
    return found


def test_no_capture_is_missing() -> None:
    assert len(CAPTURES) == 42


async def test_a_plain_request_raises(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], capture: Capture
) -> None:
    serve(scripted_server, capture)
    with pytest.raises(LLMResponseError) as caught:
        await client.chat_completion(MESSAGES)
    if capture.name.rpartition("/")[2] in OTHER_STREAMS:
        assert caught.value.status == 200
        assert "the server answered 200 with an event stream: " in str(caught.value)
    else:
        check(caught.value, capture)


async def test_a_streamed_request_raises(
    scripted_server: ScriptedServer, client: LLMClient, no_waits: list[float], capture: Capture
) -> None:
    serve(scripted_server, capture)
    with pytest.raises(LLMError) as caught:
        await collect(await opened(client))
    if (kind := OTHER_STREAMS.get(capture.name.rpartition("/")[2])) is not None:
        assert type(caught.value) is kind
    else:
        check(caught.value, capture)
    assert in_flight(client) == 0


def serve(server: ScriptedServer, capture: Capture) -> None:
    # The client may ask six times, retries included.
    server.script(*[raw(*capture.as_recorded())] * 6)


def check(error: LLMError, capture: Capture) -> None:
    status, message_part = REFUSALS.get(capture.name) or REFUSALS.get(capture.name.rpartition("/")[2]) or NO_REPLY
    assert (capture.status, error.status) == (status, status)
    assert message_part in str(error)
