"""Replies of real servers on other endpoints than that of chats, recorded byte for byte, through the client.

The servers and models are those of `test_captures`; each capture has one line below that says what it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from lmbridge import LLMClient, LLMError, LLMResponseError, collect
from lmbridge.client.stream import ReplyStream
from lmbridge.testing import ScriptedServer, raw
from tests.client.test_captures import Capture, cut, parse

FOLDER: Final = Path(__file__).parents[1] / "data" / "endpoints"
CAPTURES: Final = {
    name: parse(name, path.read_bytes())
    for path in sorted(FOLDER.rglob("*.*"))
    for name in [path.relative_to(FOLDER).with_suffix("").as_posix()]
}

_PARIS: Final = " Paris.\n\nThe United States has"
_HELLO: Final = "Hello! I'm here to help with"
TEXTS: Final = {
    "llamacpppython-smol/completions": " Paris.\n- The United States has",
    "llamacpppython-smol/completions_stream": " Paris.\n-",
    "xllamacpp-gemma/completions": " the capital of the country of France.",
    "xllamacpp-smollm2-autotpl/completions": _PARIS,
    "xllamacpp-smollm2-autotpl/completions_stream": " Paris.\n\n",
    "xllamacpp-smollm2/completions": _PARIS,
    "xllamacpp-smollm2/completions_stream": " Paris.\n\n",
}
"""Text completions, all ended by `max_tokens`."""
RESPONSES: Final = {
    "reasoning/responses": " is a mathematical concept that refers to the sum of two numbers.",
    "xllamacpp-smollm2-autotpl/responses": _HELLO,
    "xllamacpp-smollm2-autotpl/responses_stream": _HELLO,
    "xllamacpp-smollm2/responses": _HELLO,
    "xllamacpp-smollm2/responses_stream": _HELLO,
}
EMBEDDINGS: Final = {
    # No pooling, so a vector for each token; "base64" is not heard of.
    "llamacpppython-embed/embeddings": [1, 1],
    "llamacpppython-embed/embeddings_b64": [1],
}
"""Vectors of each text."""
_NO_EMBEDDINGS: Final = (501, "This server does not support embeddings. Start it with `--embeddings`", None)
FAILURES: Final = {
    "llamacpppython-smol/embeddings": (
        500,
        "Llama model must be created with embedding=True to call this method",
        None,
    ),
    "llamacpppython-smol/responses": (404, "Not Found", "the server does not know this path; check api_base"),
    "xllamacpp-smollm2-autotpl/embeddings": _NO_EMBEDDINGS,
    "xllamacpp-smollm2-autotpl/embeddings_b64": _NO_EMBEDDINGS,
    "xllamacpp-smollm2/embeddings": _NO_EMBEDDINGS,
    "xllamacpp-smollm2/embeddings_b64": _NO_EMBEDDINGS,
}
"""Status, what is told, and the hint; all are a `LLMResponseError`."""


def each_of(*tables: dict[str, Any]) -> pytest.MarkDecorator:
    names = [name for table in tables for name in table]
    return pytest.mark.parametrize("capture", [pytest.param(CAPTURES[name], id=name) for name in names])


def test_each_capture_has_one_line_that_says_what_it_is() -> None:
    assert sorted([*TEXTS, *RESPONSES, *EMBEDDINGS, *FAILURES]) == sorted(CAPTURES)
    assert len(CAPTURES) == 20


async def ask(client: LLMClient, capture: Capture) -> Any:
    """The same request again, as far as it was recorded, or a like one."""
    params = {key: value for key, value in capture.asked.items() if key != "model"}
    match capture.name.rpartition("/")[2].partition("_")[0]:
        case "completions":
            return await client.text_completion(**params)
        case "embeddings":
            return await client.embeddings(**params)
        case _:
            return await client.create_response(**{"input": "What is 2 + 2?", **params})


@pytest.fixture
def replay(scripted_server: ScriptedServer) -> Any:
    """Asks for a capture, its bytes in these pieces."""

    async def replayed(capture: Capture, pieces: Iterator[bytes]) -> Any:
        scripted_server.script(raw(*pieces))
        async with LLMClient(scripted_server.api_base, capture.model, max_retries=0, model_mismatch="raise") as client:
            answer = await ask(client, capture)
            if not isinstance(answer, ReplyStream):
                return answer, None
            async with answer:
                items = [item async for item in answer]
            return await collect(answer), items

    return replayed


@each_of(TEXTS)
async def test_a_text_completion_is_read(replay: Any, capture: Capture) -> None:
    reply, chunks = await replay(capture, capture.as_recorded())
    (choice,) = reply["choices"]
    assert (choice["text"], choice["finish_reason"]) == (TEXTS[capture.name], "length")
    assert choice["logprobs"] is None
    assert (reply["object"], reply["model"]) == ("text_completion", capture.model)
    if chunks is None:
        assert reply == json.loads(capture.body)
    else:
        assert chunks == capture.events
        assert (reply["usage"] is None) == capture.name.startswith("llamacpppython")


@each_of(RESPONSES)
async def test_a_response_is_read(replay: Any, capture: Capture) -> None:
    reply, events = await replay(capture, capture.as_recorded())
    assert (reply["object"], reply["status"]) == ("response", "completed")
    assert reply["output"][-1]["content"][0]["text"].startswith(RESPONSES[capture.name])
    assert reply["usage"]["output_tokens"] > 0
    if events is None:
        assert reply == json.loads(capture.body)
    else:
        assert [data for _, data in events] == capture.events
        assert [event.type for event, _ in events] == [data["type"] for data in capture.events]
        assert reply == capture.events[-1]["response"]


@each_of(EMBEDDINGS)
async def test_embeddings_are_read(replay: Any, capture: Capture) -> None:
    reply, _ = await replay(capture, capture.as_recorded())
    assert reply == json.loads(capture.body)
    assert [len(entry["embedding"]) for entry in reply["data"]] == EMBEDDINGS[capture.name]


@each_of(FAILURES)
async def test_a_refusal_is_named(replay: Any, capture: Capture) -> None:
    status, told, hint = FAILURES[capture.name]
    with pytest.raises(LLMError) as caught:
        await replay(capture, capture.as_recorded())
    assert type(caught.value) is LLMResponseError
    assert caught.value.message == f"the server answered {status}: {told}"
    assert (caught.value.status, caught.value.body, caught.value.hint) == (status, capture.body.decode(), hint)


@each_of({name: None for name in CAPTURES if name.endswith("_stream")})
async def test_a_stream_that_stops_early_is_never_whole(replay: Any, capture: Capture) -> None:
    events = list(capture.as_recorded())[:-1]  # without the chunk that ends the body
    last = next(place for place, event in enumerate(events) if b'"length"' in event or b"response.completed" in event)
    for kept in range(2, last, 3):
        with pytest.raises(LLMError) as caught:
            await replay(capture, iter(events[:kept]))
        assert caught.value.partial is not None


@pytest.mark.parametrize("size", [1, 7, 4096])
@each_of(TEXTS, RESPONSES)
async def test_however_the_body_is_cut_it_is_the_same_reply(replay: Any, capture: Capture, size: int) -> None:
    expected = await replay(capture, capture.as_recorded())
    packets = cut(b"".join(capture.wire(cut(capture.body, [size]))), [4096])
    assert await replay(capture, packets) == expected
