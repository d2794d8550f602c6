"""The calls of every endpoint with the exchanges that were recorded from the embedded server.

They were recorded once with a `Cassette`; `python -m tests.reliability.exchanges` records them anew, which needs the
extra `local`. A cassette holds the parts of a body without its framing, so each can be replayed in any framing.
What the embedded server does not have is in `scripted_exchanges`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Final

import attrs

from lmbridge import Choice, LLMClient, LLMResponseError, LocalServer, collect
from lmbridge.testing import Cassette
from lmbridge.testing.cassette_file import RecordedExchange, read_cassette
from tests.reliability.scripted_exchanges import SCRIPTED_CALLS
from tests.reliability.steps import Call, RecordedCall, Step, as_plain
from tests.support import MESSAGES

FILE: Final = Path(__file__).parents[1] / "data" / "reliability" / "exchanges.json"
MODEL: Final = "smollm2-135m-instruct"
_GREEDY: Final[dict[str, Any]] = {"temperature": 0, "seed": 1, "max_tokens": 5}
_TOOL: Final = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    },
}


async def _stream_text(client: LLMClient) -> Any:
    return await collect(await client.text_completion("Once upon", stream=True, **_GREEDY))


async def _stream_chat(client: LLMClient) -> Any:
    stream = await client.chat_completion(MESSAGES, stream=True, stream_options={"include_usage": True}, **_GREEDY)
    return await collect(stream)


async def _stream_call(client: LLMClient) -> Any:
    options: dict[str, Any] = {**_GREEDY, "max_tokens": 40, "tools": [_TOOL], "tool_choice": "required"}
    return await collect(await client.chat_completion(MESSAGES, stream=True, **options))


async def _stream_response(client: LLMClient) -> Any:
    stream = await client.create_response("Say hello.", stream=True, temperature=0, max_output_tokens=3)
    return await collect(stream)


async def _server_info(client: LLMClient) -> Any:
    return as_plain(await client.server_info())


async def _count_tokens(client: LLMClient) -> Any:
    return as_plain(await client.count_tokens(MESSAGES))


async def _decide(client: LLMClient) -> Any:
    decisions = await client.decide("The sky is blue.", {"colour": Choice("Which colour?", ["red", "blue"])})
    # The usage follows the end of a streamed answer, and is not waited for on a busy machine.
    return as_plain(decisions.answers)


@attrs.frozen
class _Recorded:
    """A call of the embedded server, before what was recorded is known."""

    make: Call
    steps: tuple[Step, ...]
    unanswered: Any = None


def _post(path: str) -> tuple[Step, ...]:
    return (Step(f"POST /v1/{path}"),)


_MODELS: Final = Step("GET /v1/models")
_KNOWN_MODELS: Final = attrs.evolve(_MODELS, is_faulted=False)
_EMBEDDED: Final[Mapping[str, _Recorded]] = {
    "chat": _Recorded(lambda client: client.chat_completion(MESSAGES, **_GREEDY), _post("chat/completions")),
    "chat, streamed": _Recorded(_stream_chat, _post("chat/completions")),
    "tool call, streamed": _Recorded(_stream_call, _post("chat/completions")),
    "text": _Recorded(lambda client: client.text_completion("Once upon", **_GREEDY), _post("completions")),
    "text, streamed": _Recorded(_stream_text, _post("completions")),
    "response": _Recorded(
        lambda client: client.create_response("Say hello.", temperature=0, max_output_tokens=3), _post("responses")
    ),
    "response, streamed": _Recorded(_stream_response, _post("responses")),
    "embeddings": _Recorded(lambda client: client.embeddings("a", encoding_format="base64"), _post("embeddings")),
    "models": _Recorded(lambda client: client.list_models(), (_MODELS,)),
    # The server refuses it with status 400, so each of its outcomes is an error.
    "refusal": _Recorded(
        lambda client: client.chat_completion(MESSAGES, extra_body={"temperature": "hot"}), _post("chat/completions")
    ),
    "health": _Recorded(lambda client: client.health_check(), (_MODELS,), unanswered=False),
    "server info": _Recorded(_server_info, (_KNOWN_MODELS, Step("GET /props", is_optional=True))),
    "token count": _Recorded(_count_tokens, (Step("POST /v1/chat/completions/input_tokens", is_optional=True),)),
    # Its second response is a stream as the one above, with many log probabilities.
    "decision of a chat model": _Recorded(
        _decide,
        (Step("POST /v1/systemone", is_optional=True), Step("POST /v1/chat/completions", is_faulted=False)),
    ),
}
"""The calls of the embedded server, with the requests of each."""


@cache
def recorded_calls() -> Mapping[str, RecordedCall]:
    """Returns all calls with their exchanges, first those of the embedded server."""
    recorded = read_cassette(FILE)
    assert recorded is not None, f"there is no {FILE}; run `python -m tests.reliability.exchanges`"
    responses = iter(recorded.exchanges)
    embedded = {
        name: RecordedCall(call.make, tuple(_filled(step, responses) for step in call.steps), call.unanswered)
        for name, call in _EMBEDDED.items()
    }
    assert not list(responses), "there are more recorded exchanges than requests"
    return {**embedded, **SCRIPTED_CALLS}


def _filled(step: Step, responses: Iterator[RecordedExchange]) -> Step:
    response = next(responses)
    assert response.end == "complete"
    assert step.request == f"{response.request.method} {response.request.path}"
    fields = {name.lower(): value for name, value in response.headers.items()}
    parts = tuple(part.data for part in response.parts)
    return attrs.evolve(step, status=response.status, content_type=fields["content-type"], parts=parts)


async def _record() -> None:
    async with LocalServer(n_ctx=2048, n_parallel=1, embeddings=True) as server:
        with Cassette(FILE, mode="all"):
            for call in _EMBEDDED.values():
                async with LLMClient(server.api_base, server.model) as client:
                    # One of them is refused.
                    with suppress(LLMResponseError):
                        await call.make(client)


if __name__ == "__main__":
    asyncio.run(_record())
    # The server tells where the file of its model is, which differs from machine to machine.
    FILE.write_text(FILE.read_text().replace(f"{Path.home() / '.cache' / 'lmbridge'}/", "/models/"))
