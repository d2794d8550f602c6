"""The client reads recorded replies of real servers from the other endpoints: completions, responses, embeddings.

The servers and models are those of `test_captures`, and each capture is listed below with its expected result.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from lmbridge import LLMClient, LLMError, LLMResponseError, collect
from lmbridge.client.reply_stream import ReplyStream
from lmbridge.testing import ScriptedServer, raw
from tests.client.test_captures import Capture, parse, split_bytes

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
"""Captures of text completions, all of which ended at `max_tokens`, with their text."""
RESPONSES: Final = {
    "reasoning/responses": " is a mathematical concept that refers to the sum of two numbers.",
    "xllamacpp-smollm2-autotpl/responses": _HELLO,
    "xllamacpp-smollm2-autotpl/responses_stream": _HELLO,
    "xllamacpp-smollm2/responses": _HELLO,
    "xllamacpp-smollm2/responses_stream": _HELLO,
}
EMBEDDINGS: Final = {
    # The model has no pooling, so there is a vector for each token, and the server ignores "base64".
    "llamacpppython-embed/embeddings": [1, 1],
    "llamacpppython-embed/embeddings_b64": [1],
}
"""Captures of embeddings, with the length of the embedding of each text."""
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
"""Captures of refusals, with the status, the message and the hint of the `LLMResponseError`."""


def each_of(*tables: dict[str, Any]) -> pytest.MarkDecorator:
    names = [name for table in tables for name in table]
    return pytest.mark.parametrize("capture", [pytest.param(CAPTURES[name], id=name) for name in names])


def test_each_capture_has_exactly_one_expected_result() -> None:
    assert sorted([*TEXTS, *RESPONSES, *EMBEDDINGS, *FAILURES]) == sorted(CAPTURES)
    assert len(CAPTURES) == 20


async def ask(client: LLMClient, capture: Capture) -> Any:
    """Sends the recorded request again, or a similar one if it was not recorded."""
    params = {key: value for key, value in capture.asked.items() if key != "model"}
    match capture.name.rpartition("/")[2].partition("_")[0]:
        case "completions":
            return await client.text_completion(**params)
        case "embeddings":
            return await client.embeddings(**params)
        case _:
            options: dict[str, Any] = {"input": "What is 2 + 2?", **params}
            return await client.create_response(**options)


@pytest.fixture
def replay(scripted_server: ScriptedServer) -> Any:
    """Returns a function that asks for a capture and lets the server send it in the given pieces."""

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
async def test_a_text_completion_is_read_as_the_server_sent_it(replay: Any, capture: Capture) -> None:
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
async def test_a_response_is_read_as_the_server_sent_it(replay: Any, capture: Capture) -> None:
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
async def test_embeddings_are_read_as_the_server_sent_them(replay: Any, capture: Capture) -> None:
    reply, _ = await replay(capture, capture.as_recorded())
    assert reply == json.loads(capture.body)
    assert [len(entry["embedding"]) for entry in reply["data"]] == EMBEDDINGS[capture.name]


@each_of(FAILURES)
async def test_a_refusal_raises_with_its_status_and_text(replay: Any, capture: Capture) -> None:
    status, message, hint = FAILURES[capture.name]
    with pytest.raises(LLMError) as caught:
        await replay(capture, capture.as_recorded())
    assert type(caught.value) is LLMResponseError
    assert caught.value.message == f"the server answered {status}: {message}"
    assert (caught.value.status, caught.value.body, caught.value.hint) == (status, capture.body.decode(), hint)


@each_of({name: None for name in CAPTURES if name.endswith("_stream")})
async def test_a_stream_that_stops_early_raises(replay: Any, capture: Capture) -> None:
    # Without the chunk that ends the body.
    events = list(capture.as_recorded())[:-1]
    last = next(place for place, event in enumerate(events) if b'"length"' in event or b"response.completed" in event)
    for kept in range(2, last, 3):
        with pytest.raises(LLMError) as caught:
            await replay(capture, iter(events[:kept]))
        assert caught.value.partial is not None


@pytest.mark.parametrize("size", [1, 7, 4096])
@each_of(TEXTS, RESPONSES)
async def test_a_reply_is_the_same_however_its_body_is_split(replay: Any, capture: Capture, size: int) -> None:
    expected = await replay(capture, capture.as_recorded())
    packets = split_bytes(b"".join(capture.wire(split_bytes(capture.body, [size]))), [4096])
    assert await replay(capture, packets) == expected
