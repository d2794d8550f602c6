"""Cassette: recorded from a scripted server, and replayed without it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from lmbridge import (
    Agent,
    Limits,
    LLMClient,
    LLMConnectionError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
)
from lmbridge.testing import (
    Cassette,
    CassetteError,
    CassetteRequest,
    ScriptedServer,
    answer,
    raw,
    reply,
    retry_without_waiting,
    sse,
)
from lmbridge.testing.cassette_file import RecordedPart, redacted_parts
from lmbridge.transport.headers import secret_pattern
from lmbridge.transport.interception import interceptors
from tests.support import MESSAGES, in_flight, opened, piece, read_text, text_of

NOWHERE = "http://127.0.0.1:1/v1"
"""Nothing listens there, so what is answered comes from the cassette."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cassettes" / "test.json"


async def ask(client: LLMClient, question: str = "?", **options: Any) -> str:
    return await client.ask(question, **options)


async def ask_and_fail(client: LLMClient) -> None:
    await ask(client, "Something else?")
    raise ZeroDivisionError


def exchanges(path: Path) -> list[Any]:
    found: list[Any] = json.loads(path.read_text())["exchanges"]
    return found


async def test_what_was_recorded_is_replayed_without_the_server(scripted_server: ScriptedServer, path: Path) -> None:
    scripted_server.script(answer("Hello"), answer("Goodbye"))
    with Cassette(path) as recording:
        assert recording.is_recording
        async with LLMClient(scripted_server.api_base, "m") as client:
            recorded = await client.chat_completion(MESSAGES), await ask(client, "And now?")
    with Cassette(path) as cassette:
        async with LLMClient(NOWHERE, "m") as client:
            assert (await client.chat_completion(MESSAGES), await ask(client, "And now?")) == recorded
        assert (cassette.is_recording, cassette.play_count, cassette.all_played) == (False, 2, True)
    assert interceptors == []


async def test_a_client_that_was_open_before_uses_the_cassette_as_well(client: LLMClient, path: Path) -> None:
    await ask(client)
    with Cassette(path):
        await ask(client)
    assert len(exchanges(path)) == 1


async def test_a_stream_is_replayed_in_the_parts_in_which_it_arrived(client: LLMClient, path: Path) -> None:
    with Cassette(path):
        chunks = [chunk async for chunk in await opened(client)]
    parts = exchanges(path)[0]["response"]["parts"]
    assert len(parts) > 1
    with Cassette(path):
        async with LLMClient(NOWHERE, "test-model") as replayed:
            assert [chunk async for chunk in await opened(replayed)] == chunks


async def test_an_agent_is_replayed_with_its_calls(scripted_server: ScriptedServer, path: Path) -> None:
    def weather(city: str) -> str:
        """Returns the weather."""
        return f"It rains in {city}."

    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    scripted_server.script(answer("", tool_calls=[call]), answer("Take an umbrella."))
    for api_base in (scripted_server.api_base, NOWHERE):
        with Cassette(path):
            async with LLMClient(api_base, "m") as client:
                result = await Agent(client, tools=[weather]).run("What is the weather in Oslo?")
        assert (result.text, result.rounds) == ("Take an umbrella.", 2)
    assert [request.path for request in scripted_server.requests].count("/v1/chat/completions") == 2


async def test_errors_and_retries_are_replayed(scripted_server: ScriptedServer, path: Path) -> None:
    scripted_server.script(reply(503, {"error": "busy"}), answer("Hello"), reply(400, {"error": "bad"}))
    for api_base in (scripted_server.api_base, NOWHERE):
        with Cassette(path), retry_without_waiting():
            async with LLMClient(api_base, "m") as client:
                assert await ask(client) == "Hello"
                with pytest.raises(LLMResponseError, match="bad"):
                    await ask(client, "Bad?")


async def test_a_stream_that_broke_breaks_at_the_same_place(scripted_server: ScriptedServer, path: Path) -> None:
    scripted_server.script(sse(piece("Hel"), end=False))
    for api_base in (scripted_server.api_base, NOWHERE):
        with Cassette(path):
            async with LLMClient(api_base, "test-model") as client:
                with pytest.raises(LLMStreamError) as caught:
                    await read_text(await opened(client))
        assert caught.value.partial["choices"][0]["message"]["content"] == "Hel"
    assert exchanges(path)[0]["response"]["end"] == "broken"


async def test_a_stream_that_was_left_can_be_left_again_but_not_read_on(client: LLMClient, path: Path) -> None:
    async with LLMClient(NOWHERE, "test-model") as replayed:
        for each in (client, replayed):
            with Cassette(path):
                async with await opened(each) as stream:
                    async for chunk in stream:
                        if text_of(chunk):
                            break
            assert in_flight(each) == 0
        content = json.loads(path.read_text())
        response = content["exchanges"][0]["response"]
        # The scripted server is fast enough to have sent more than was read.
        response["parts"], response["end"] = response["parts"][:2], "left"
        path.write_text(json.dumps(content))
        with Cassette(path), pytest.raises(CassetteError, match="stopped reading"):
            await read_text(await opened(replayed))
        assert in_flight(replayed) == 0


async def test_bytes_that_are_not_text_are_kept(scripted_server: ScriptedServer, path: Path) -> None:
    body = json.dumps({"choices": [{"message": {"content": "ä"}}]}, ensure_ascii=False).encode()
    half = body.index("ä".encode()) + 1
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
    scripted_server.script(raw(head, body[:half], body[half:]))
    for api_base in (scripted_server.api_base, NOWHERE):
        with Cassette(path):
            async with LLMClient(api_base, "m") as client:
                assert await ask(client) == "ä"


async def test_concurrent_and_equal_requests_get_the_answers_in_order(
    scripted_server: ScriptedServer, path: Path
) -> None:
    scripted_server.script(answer("1"), answer("2"))
    with Cassette(path):
        async with LLMClient(scripted_server.api_base, "m", limits=Limits(max_concurrency=1)) as client:
            await asyncio.gather(ask(client), ask(client))
    with Cassette(path):
        # A client without limits asks for those of its server, which no cassette has to answer.
        async with LLMClient(NOWHERE, "m") as client:
            assert sorted(await asyncio.gather(ask(client), ask(client))) == ["1", "2"]


# Matching


async def test_a_request_that_was_not_recorded_is_an_error_that_names_the_difference(
    client: LLMClient, path: Path
) -> None:
    with Cassette(path):
        await ask(client, "What is red?", temperature=0.5)
    with Cassette(path), pytest.raises(CassetteError, match=r"differs in temperature \(recorded: 0.5, now: 0.7\)"):
        await ask(client, "What is red?", temperature=0.7)
    with Cassette(path), pytest.raises(CassetteError, match=r"no exchange for POST /v1/embeddings; delete"):
        await client.embeddings("red")
    with Cassette(path):
        await ask(client, "What is red?", temperature=0.5)
        with pytest.raises(CassetteError, match="more often than when it was recorded"):
            await ask(client, "What is red?", temperature=0.5)
    assert in_flight(client) == 0


async def test_a_get_is_replayed_any_number_of_times(client: LLMClient, path: Path) -> None:
    with Cassette(path):
        assert await client.health_check()
    with Cassette(path):
        async with LLMClient(NOWHERE) as replayed:
            assert [await replayed.health_check() for _ in range(3)] == [True] * 3


async def test_the_fields_that_are_compared_can_be_chosen(client: LLMClient, path: Path) -> None:
    with Cassette(path):
        await ask(client, "What is red?")
    with Cassette(path, match_on=["method", "path"]):
        await ask(client, "What is blue?")
    with Cassette(path, match_on=["host", "body"]):
        async with LLMClient(NOWHERE, "test-model") as elsewhere:
            with pytest.raises(CassetteError):
                await ask(elsewhere, "What is red?")

    def same_model(recorded: CassetteRequest, new: CassetteRequest) -> bool:
        return bool(recorded.body["model"] == new.body["model"])

    with Cassette(path, match_on=[same_model]):
        await ask(client, "What is blue?")
    with Cassette(path, match_on=[same_model]), pytest.raises(CassetteError):
        await ask(client, "What is blue?", model="another")
    with pytest.raises(LLMValidationError, match="match_on"):
        Cassette(path, match_on=["headers"])


# Modes


async def test_none_never_records(client: LLMClient, path: Path) -> None:
    with pytest.raises(CassetteError, match="does not exist"), Cassette(path, "none"):
        pass
    assert interceptors == []


async def test_all_records_anew(scripted_server: ScriptedServer, client: LLMClient, path: Path) -> None:
    for text in ("old", "new"):
        scripted_server.script(answer(text))
        with Cassette(path, mode="all"):
            assert await ask(client) == text
    with Cassette(path, mode="none"):
        assert await ask(client) == "new"


async def test_a_block_that_fails_leaves_the_file_as_it_was(client: LLMClient, path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Cassette(path):
        await ask_and_fail(client)
    assert not path.exists()
    with Cassette(path):
        await ask(client)
    content = path.read_bytes()
    with pytest.raises(ZeroDivisionError), Cassette(path, "all"):
        await ask_and_fail(client)
    assert path.read_bytes() == content
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"lmbridge_cassette": 1, "exchanges": [{}]}'])
def test_a_file_that_is_not_a_cassette_is_an_error(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(CassetteError, match="is not a cassette"), Cassette(path):
        pass


def test_a_cassette_of_a_later_format_is_an_error(path: Path) -> None:
    path.parent.mkdir()
    path.write_text('{"lmbridge_cassette": 2, "exchanges": []}')
    with pytest.raises(CassetteError, match="has the format 2"), Cassette(path):
        pass


@pytest.mark.parametrize("options", [{"mode": "new_episodes"}, {"time_scale": -1}, {"time_scale": None}])
def test_options_are_checked(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(LLMValidationError):
        Cassette(path, **options)


# Secrets


async def test_no_key_is_written_even_if_the_server_quotes_it(scripted_server: ScriptedServer, path: Path) -> None:
    key, customer = "sk-very-secret-key-1", "Miller Industries"
    quoted = reply(401, {"error": f"the key {key} of {customer} is wrong"}, {"Set-Cookie": "session=1", "X-Key": key})
    scripted_server.on_path("/v1/chat/completions", quoted)
    for api_base in (scripted_server.api_base, NOWHERE):
        with Cassette(path, redact=[customer]):
            async with LLMClient(api_base, "m", key, headers={"X-Tenant": "secret-tenant-7"}) as client:
                question = f"Is {customer} rich? secret-tenant-7?"
                with pytest.raises(LLMResponseError, match="401"):
                    await ask(client, question, extra_query={"api-key": "in-the-query", "version": "2"})
    text = path.read_text()
    for secret in (key, customer, "secret-tenant-7", "in-the-query", "session=1"):
        assert secret not in text
    assert "version=2" in text


def test_a_secret_that_two_parts_share_is_found() -> None:
    parts = [RecordedPart(0.1, b"the key sk-very-"), RecordedPart(0.2, b"secret-key-1 is wrong")]
    found = redacted_parts(parts, secret_pattern(["sk-very-secret-key-1"]))
    assert [part.data for part in found] == [b"the key [redacted] is wrong"]
    assert redacted_parts(parts, secret_pattern(["another-secret"])) == parts


# Time


async def test_waits_are_replayed_at_the_chosen_scale(client: LLMClient, path: Path) -> None:
    with Cassette(path):
        await read_text(await opened(client))
    content = json.loads(path.read_text())
    content["exchanges"][0]["response"]["parts"][0]["seconds"] = 1000.0
    path.write_text(json.dumps(content))
    with Cassette(path):
        await read_text(await opened(client))
    with Cassette(path, time_scale=1.0), pytest.raises(LLMTimeoutError):
        await read_text(await client.chat_completion(MESSAGES, stream=True, timeout=0.05))


async def test_a_replayed_wait_ends_when_the_stream_is_closed(client: LLMClient, path: Path) -> None:
    with Cassette(path):
        await read_text(await opened(client))
    content = json.loads(path.read_text())
    content["exchanges"][0]["response"]["parts"][-1]["seconds"] = 1000.0
    path.write_text(json.dumps(content))
    with Cassette(path, time_scale=1.0):
        stream = await opened(client)
        reader = asyncio.ensure_future(read_text(stream))
        await asyncio.sleep(0)
        await stream.aclose()
        with pytest.raises(Exception, match="closed"):
            await reader
    assert in_flight(client) == 0


async def test_a_cancelled_replay_returns_its_permit(client: LLMClient, path: Path) -> None:
    with Cassette(path):
        await ask(client)
    content = json.loads(path.read_text())
    content["exchanges"][0]["response"]["seconds"] = 1000.0
    path.write_text(json.dumps(content))
    with Cassette(path, time_scale=1.0):
        task = asyncio.ensure_future(ask(client))
        while not in_flight(client):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert in_flight(client) == 0


async def test_a_failed_connection_is_not_recorded(path: Path) -> None:
    with Cassette(path):
        async with LLMClient(NOWHERE, "m", max_retries=0) as client:
            with pytest.raises(LLMConnectionError):
                await ask(client)
    assert exchanges(path) == []
