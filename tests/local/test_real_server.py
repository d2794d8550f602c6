"""LocalServer with the real llama.cpp and the real model."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from lmbridge.errors import LLMConnectionError, ModelLoadError
from lmbridge.local import LocalServer
from lmbridge.local.model import locate_model
from tests.support import replaced

pytestmark = [pytest.mark.real, pytest.mark.slow]

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two integers",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
STORY = [{"role": "user", "content": "Write a long story about the sea."}]


@pytest_asyncio.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=50)) as session:
        yield session


async def _complete(http: aiohttp.ClientSession, server: LocalServer, **request: Any) -> dict[str, Any]:
    body = {"temperature": 0, "max_tokens": 60, **request}
    async with http.post(f"{server.api_base}/chat/completions", json=body) as response:
        reply = await response.json()
        assert response.status == 200, reply
        choice: dict[str, Any] = reply["choices"][0]
        return choice


async def _chunks(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    async for line in response.content:
        if line.startswith(b"data: {"):
            yield json.loads(line[6:])


@pytest.mark.parametrize(
    ("question", "tools", "result"),
    [
        ("Add 17 and 25.", [ADD], "42"),
        ("What is the weather in Paris?", [WEATHER], "18 C and sunny"),
        ("What is the weather in Rome?", [ADD, WEATHER], "snow"),
    ],
)
async def test_the_model_calls_a_tool_and_goes_on_with_its_result(
    http: aiohttp.ClientSession, question: str, tools: list[Any], result: str
) -> None:
    """The model has to call a tool, because what a small model chooses and says differs between processors."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": question}]
    async with LocalServer() as server:
        choice = await _complete(http, server, messages=messages, tools=tools, tool_choice="required")
        assert choice["finish_reason"] == "tool_calls"
        call, *_ = choice["message"]["tool_calls"]
        required = {tool["function"]["name"]: tool["function"]["parameters"]["required"] for tool in tools}
        assert set(json.loads(call["function"]["arguments"])) == set(required[call["function"]["name"]])
        choice["message"]["tool_calls"] = [call]
        messages += [choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": result}]
        choice = await _complete(http, server, messages=messages)
    assert choice["finish_reason"] in ("stop", "length")
    assert choice["message"]["content"].strip()


async def test_chat_streams(http: aiohttp.ClientSession) -> None:
    body = {
        "messages": [{"role": "user", "content": "What is the opposite of hot?"}],
        "temperature": 0,
        "max_tokens": 40,
        "ignore_eos": True,
        "stream": True,
    }
    async with LocalServer() as server, http.post(f"{server.api_base}/chat/completions", json=body) as response:
        chunks = [chunk async for chunk in _chunks(response)]
    assert {chunk["model"] for chunk in chunks} == {"smollm2-135m-instruct"}
    texts = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    assert sum(map(bool, texts)) > 3
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


async def test_it_serves_chat_and_embeddings_with_the_api_key_only(http: aiohttp.ClientSession) -> None:
    async with LocalServer(embeddings=True, api_key="a-secret-key") as server:
        request = {"input": ["a llama", "an alpaca"]}
        async with http.post(f"{server.api_base}/embeddings", json=request) as response:
            assert response.status == 401
        http.headers["Authorization"] = "Bearer a-secret-key"
        async with http.post(f"{server.api_base}/embeddings", json=request) as response:
            vectors = [item["embedding"] for item in (await response.json())["data"]]
        assert [len(vector) for vector in vectors] == [576, 576]
        await _complete(http, server, messages=STORY, max_tokens=2)
        for path in ("health", "slots", "metrics"):
            async with http.get(replaced(server.api_base, "v1", path)) as response:
                assert response.status == 200


async def test_close_does_not_wait_for_a_stream(http: aiohttp.ClientSession) -> None:
    server = await LocalServer().__aenter__()
    body = {"messages": STORY, "stream": True, "max_tokens": 8000, "ignore_eos": True}
    async with http.post(f"{server.api_base}/chat/completions", json=body) as response:
        chunks = _chunks(response)
        await anext(chunks)
        async with asyncio.timeout(5):
            await server.close()
        with pytest.raises(aiohttp.ClientError):
            async for _ in chunks:
                pass


async def test_the_error_for_a_file_that_llama_cpp_refuses_quotes_its_log(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(1000))
    with pytest.raises(
        ModelLoadError, match=r"llama\.cpp cannot load .*broken\.gguf; the end of its log:\n(?s:.*)bad GGUF"
    ):
        await LocalServer(path).__aenter__()


async def test_a_path_and_a_template_are_used(http: aiohttp.ClientSession, tmp_path: Path) -> None:
    template = tmp_path / "fixed.jinja"
    template.write_text("<|im_start|>user\nWhat is the opposite of hot?<|im_end|>\n<|im_start|>assistant\n")
    path = await locate_model()
    async with LocalServer(path, chat_template=template, n_ctx=1024, n_parallel=1) as server:
        assert server.model == path.stem
        counts = []
        for text in ("ignored", "ignored " * 50):
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
            async with http.post(f"{server.api_base}/chat/completions", json=body) as response:
                counts.append((await response.json())["usage"]["prompt_tokens"])
        async with http.get(f"{server.api_base}/models") as response:
            assert [model["id"] for model in (await response.json())["data"]] == [server.model]
    # The template has the same prompt for every message.
    assert counts[0] == counts[1] < 50


async def _get(http: aiohttp.ClientSession, server: LocalServer, path: str) -> Any:
    async with http.get(replaced(server.api_base, "v1", path)) as response:
        assert response.status == 200
        return await response.json()


async def test_n_ctx_and_n_parallel_reach_the_server(http: aiohttp.ClientSession) -> None:
    async with LocalServer(n_ctx=512, n_parallel=3) as server:
        props = await _get(http, server, "props")
        assert props["total_slots"] == len(await _get(http, server, "slots")) == 3
        assert props["default_generation_settings"]["n_ctx"] == 512
        body = {"messages": [{"role": "user", "content": "sea " * 600}]}
        async with http.post(f"{server.api_base}/chat/completions", json=body) as response:
            assert response.status == 400
            assert (await response.json())["error"]["type"] == "exceed_context_size_error"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
async def test_the_number_of_threads_is_the_requested_one(http: aiohttp.ClientSession) -> None:
    counts = []
    for threads in (1, 3):
        async with LocalServer(threads=threads) as server:
            await _complete(http, server, messages=STORY, max_tokens=2)
            assert server._process is not None
            counts.append(len(list(Path(f"/proc/{server._process.pid}/task").iterdir())))
    assert counts[1] - counts[0] == 2


async def test_a_port_can_be_reused_at_once(http: aiohttp.ClientSession) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    server = LocalServer(port=port, n_ctx=512)
    for _ in range(2):
        async with server:
            assert server.api_base == f"http://127.0.0.1:{port}/v1"
            await _complete(http, server, messages=STORY, max_tokens=2)
            with pytest.raises(LLMConnectionError, match=f"cannot listen on port {port} of"):
                await LocalServer(port=port).__aenter__()


async def test_llama_cpp_logs_that_a_port_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmbridge.local.local_server._check_port", lambda _: None)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ModelLoadError, match=rf"the end of its log:\n(?s:.*)couldn't bind(?s:.*)port: {port}"):
            await LocalServer(port=port).__aenter__()


async def test_a_cached_model_is_served_without_a_network(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    await locate_model()
    # A socket that is bound but does not listen refuses connections.
    with socket.socket() as refusing:
        refusing.bind(("127.0.0.1", 0))
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{refusing.getsockname()[1]}")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        async with LocalServer(n_ctx=512) as server:
            await _complete(http, server, messages=STORY, max_tokens=2)


_PARENT = """\
import asyncio
from lmbridge.local import LocalServer
async def main():
    async with LocalServer() as server:
        print(server.api_base, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_the_server_ends_when_its_parent_is_killed() -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", _PARENT, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    async with asyncio.timeout(50):
        address = (await parent.stdout.readline()).decode().split("/")[2].split(":")
        parent.kill()
        await parent.communicate()
        while not await _is_refused(*address):
            pass


async def _is_refused(host: str, port: str) -> bool:
    try:
        _, writer = await asyncio.open_connection(host, port)
    except ConnectionRefusedError:
        return True
    except ConnectionError:
        # It is about to end.
        return False
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
    return False
