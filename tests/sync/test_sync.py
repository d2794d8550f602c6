"""The blocking classes: plain calls, streams, agents, threads, interruption, and the end of the interpreter."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster

import lmbridge
from lmbridge import (
    ContextLengthExceededError,
    LLMConnectionError,
    LLMError,
    LLMValidationError,
    RunFinished,
    Tool,
    sync,
)
from lmbridge.sync import Agent, DynamicAutonomousAgent, LLMClient, LLMClientPool
from lmbridge.testing import answer, reply, stall
from tests.agent.support import asks, tool_texts
from tests.threaded_server import ThreadedServer

ROOT = Path(__file__).parent.parent.parent
HELLO = [{"role": "user", "content": "Hello!"}]
FOX = "The quick brown fox jumps over the lazy dog. " * 20
PIECE = {"choices": [{"index": 0, "delta": {"content": "Once"}}], "model": "test-model"}


def call(name: str, arguments: str) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": name, "arguments": arguments}}


def text_of(reply: Any) -> str:
    return str(reply["choices"][0]["message"]["content"])


def test_a_plain_call_returns_the_reply(server: ThreadedServer, client: LLMClient) -> None:
    server.answer(answer("Hello!"))
    assert text_of(client.chat_completion(HELLO)) == "Hello!"
    assert client.model == "test-model"
    assert client.stats().in_flight == 0


def test_a_stream_is_an_iterator(server: ThreadedServer, client: LLMClient) -> None:
    server.answer(answer(FOX))
    with client.chat_completion(HELLO, stream=True) as stream:
        text = "".join(choice["delta"].get("content") or "" for chunk in stream for choice in chunk["choices"])
    assert text == FOX
    assert text_of(stream.partial) == FOX
    assert list(stream) == []


def test_collect_returns_the_whole_reply_of_a_stream_that_was_begun(server: ThreadedServer, client: LLMClient) -> None:
    server.answer(answer(FOX))
    stream = client.chat_completion(HELLO, stream=True)
    next(stream)
    assert text_of(stream.collect()) == FOX


def test_the_end_of_a_stream_says_that_its_prompt_was_cut(server: ThreadedServer, client: LLMClient) -> None:
    models = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 4096}]}
    server.scripted.on_path("/v1/models", reply(200, models))
    server.answer(answer("Hello.", usage={"prompt_tokens": 4096, "completion_tokens": 2, "total_tokens": 4098}))
    careful = client.with_options(context_overflow="raise")
    with careful.stream_chat(HELLO, stream_options={"include_usage": True}) as stream:
        with pytest.raises(ContextLengthExceededError, match="cut the prompt to 4096 tokens") as caught:
            list(stream)
        assert caught.value.partial["choices"][0]["message"]["content"] == "Hello."
    with pytest.raises(ContextLengthExceededError):
        careful.with_raw_response.chat_completion(HELLO)


@pytest.mark.parametrize("how", ["close", "with", "break and drop"])
def test_leaving_a_stream_stops_the_server(server: ThreadedServer, client: LLMClient, how: str) -> None:
    server.answer(stall([PIECE]))
    stream = client.chat_completion(HELLO, stream=True)
    if how == "close":
        next(stream)
        stream.close()
    elif how == "with":
        with stream:
            next(stream)
    else:
        for _ in stream:
            break
        del stream
        gc.collect()
    server.wait_until(lambda scripted: not scripted.open_connections)


def test_errors_are_those_of_the_asynchronous_client(server: ThreadedServer, client: LLMClient) -> None:
    server.answer(reply(400, {"error": "no such thing"}))
    with pytest.raises(lmbridge.LLMResponseError, match="no such thing") as caught:
        client.chat_completion(HELLO)
    assert caught.value.status == 400
    with pytest.raises(LLMValidationError, match="messages"):
        client.chat_completion([])
    with pytest.raises(LLMValidationError, match="max_retries"):
        LLMClient(max_retries=-1)


def test_setting_the_api_base_sends_later_requests_there(server: ThreadedServer) -> None:
    with LLMClient("http://127.0.0.1:9", max_retries=0) as client:
        with pytest.raises(LLMConnectionError):
            client.chat_completion(HELLO)
        client.api_base = server.api_base
        assert client.chat_completion(HELLO)["choices"]


def test_a_closed_client_opens_again(server: ThreadedServer) -> None:
    client = LLMClient(server.api_base)
    client.close()
    client.close()
    assert client.chat_completion(HELLO)["choices"]
    client.close()
    server.wait_until(lambda scripted: not scripted.open_connections)


def test_a_dropped_client_is_closed(server: ThreadedServer) -> None:
    assert LLMClient(server.api_base).chat_completion(HELLO)["choices"]
    gc.collect()
    server.wait_until(lambda scripted: not scripted.open_connections)


def test_many_threads_share_a_client(server: ThreadedServer, client: LLMClient) -> None:
    server.answer(answer("Hello!"))
    with ThreadPoolExecutor(20) as executor:
        texts = list(executor.map(lambda _: text_of(client.chat_completion(HELLO)), range(60)))
    assert texts == ["Hello!"] * 60


async def test_it_works_where_an_event_loop_is_running(client: LLMClient, no_blocking_calls: BlockBuster) -> None:
    no_blocking_calls.deactivate()  # Blocking the caller's loop is what is tested.
    assert client.chat_completion(HELLO)["choices"]
    assert (await asyncio.to_thread(client.chat_completion, HELLO))["choices"]


def test_a_pool_lends_blocking_clients(server: ThreadedServer) -> None:
    with LLMClientPool(2, api_base=server.api_base) as pool:
        with pool.client("a") as client:
            assert client.chat_completion(HELLO)["choices"]
            assert pool.stats().in_use == 1
        assert pool.stats().in_use == 0
        client = pool.get_client("b")
        assert client.model == "b"
        pool.release_client(client)
        with pytest.raises(ValueError, match="from the block"), pool.client():
            raise ValueError("from the block")
        assert pool.stats().in_use == 0


def test_an_agent_runs_with_plain_functions_as_tools(server: ThreadedServer, client: LLMClient) -> None:
    server.scripted.script(answer("", tool_calls=[call("add", '{"a": 17, "b": 25}')]), answer("42"))

    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    result = Agent(client, tools=[add]).run("Add 17 and 25.")
    assert result.text == "42"
    assert tool_texts(result.messages) == ["42"]


def test_an_agent_reads_calls_from_a_text_and_repairs_them(server: ThreadedServer, client: LLMClient) -> None:
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    text = "<tool_call>{'name': 'Add', 'arguments': {'a': 17, 'b': 25}}</tool_call>"
    server.scripted.script(answer(text), answer("42"))
    result = Agent(client, tools=[add], read_text_calls="whole", repair_calls=True).run("Add 17 and 25.")
    assert (result.text, result.log[0].tool_calls[0].repaired) == ("42", True)
    server.scripted.script(answer(text))
    never = Agent(client, tools=[add], read_text_calls="never", repair_calls=False, max_nudges=0)
    assert never.run("Add 17 and 25.").text == text


def test_an_agent_finds_tools_that_do_not_fit_by_embeddings(server: ThreadedServer, client: LLMClient) -> None:
    empty = {"type": "object", "properties": {}}
    tools = [Tool(f"paint_{number}", "Paints a picture. " * 20, empty, lambda: "painted") for number in range(6)]
    vectors = [{"index": number, "embedding": [1.0, float(number)]} for number in range(7)]
    server.scripted.script(
        answer("", tool_calls=[asks("find_tools", query="paint")]), reply(200, {"data": vectors}), answer("Done.")
    )
    agent = Agent(client, tools=tools, max_definition_tokens=400, embedding_model="embedder", constrain_retries=False)
    (found,) = tool_texts(agent.run("Paint.").messages)
    assert found.startswith("You can call these tools now:\n- paint_")


def test_the_events_of_a_run_are_an_iterator(server: ThreadedServer, client: LLMClient) -> None:
    server.answer(answer("Done."))
    agent = Agent(client)
    with agent.stream("Do it.") as events:
        *_, last = events
    assert isinstance(last, RunFinished)
    handle = agent.start("Do it again.")
    assert handle.result().text == "Done."
    assert not handle.cancel()
    assert handle.done


def test_a_tool_may_use_the_blocking_client(server: ThreadedServer, client: LLMClient) -> None:
    server.scripted.script(answer("", tool_calls=[call("ask", "{}")]), answer("inner"), answer("outer"))

    def ask() -> str:
        """Asks the model itself."""
        return text_of(client.chat_completion(HELLO))

    assert Agent(client, tools=[ask]).run("Ask.").text == "outer"


def test_an_asynchronous_tool_that_blocks_its_own_loop_gets_an_error(server: ThreadedServer, client: LLMClient) -> None:
    server.scripted.script(answer("", tool_calls=[call("ask", "{}")]), answer("outer"))

    async def ask() -> str:
        """Asks the model itself."""
        return text_of(client.chat_completion(HELLO))

    result = Agent(client, tools=[ask]).run("Ask.")
    (text,) = tool_texts(result.messages)
    assert "inside its own event loop" in text


def test_an_agent_of_mcp_servers_lists_them(client: LLMClient, tmp_path: Path) -> None:
    pytest.importorskip("mcp", reason="needs lmbridge[mcp]")
    config = tmp_path / "mcp.json"
    config.write_text('{"mcpServers": {"time": {"command": "mcp-server-time"}}}')
    with DynamicAutonomousAgent(client, config_path=config) as agent:
        assert agent.list_available_mcps() == ["time"]
        with pytest.raises(lmbridge.MCPError, match="weather"):
            agent.autonomous_with_mcp("weather", "What is the weather?")


def test_ctrl_c_cancels_the_request(server: ThreadedServer, client: LLMClient) -> None:
    server.answer(stall([PIECE]))

    is_open = threading.Event()

    def interrupt() -> None:
        # Before, the interrupt could come when the stream belongs to nobody yet, which Python reports.
        is_open.wait()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()

    def collect() -> None:
        with client.chat_completion(HELLO, stream=True) as stream:
            is_open.set()
            stream.collect()

    with pytest.raises(KeyboardInterrupt):
        collect()
    thread.join()
    server.wait_until(lambda scripted: not scripted.open_connections)


PROGRAM = """\
import sys
from lmbridge.sync import LLMClient
client = LLMClient(sys.argv[1])
stream = client.chat_completion([{"role": "user", "content": "Hello!"}], stream=True)
next(stream)
print("done")
"""


def test_what_is_open_at_exit_is_closed_without_a_word(server: ThreadedServer) -> None:
    server.answer(stall([PIECE]))
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", PROGRAM, server.api_base],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    server.wait_until(lambda scripted: not scripted.open_connections)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_a_forked_child_begins_with_a_loop_of_its_own(server: ThreadedServer) -> None:
    program = (
        "import os, sys\nfrom lmbridge.sync import LLMClient\nbase = sys.argv[1]\n"
        "LLMClient(base).list_models()\n"
        "pid = os.fork()\nnames = LLMClient(base).list_models()\n"
        "if pid: os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    command = [sys.executable, "-c", program, server.api_base]
    assert subprocess.run(command, timeout=50, check=False, stdout=subprocess.DEVNULL).returncode == 0


def test_the_generated_classes_are_up_to_date() -> None:
    command = [sys.executable, "scripts/generate_sync.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["Agent", "DynamicAutonomousAgent", "Journal", "LLMClient", "LLMClientPool"])
def test_a_blocking_class_has_every_public_name_of_the_asynchronous_one(name: str) -> None:
    blocking, asynchronous = getattr(sync, name), getattr(lmbridge, name)
    public = {each for each in dir(asynchronous) if not each.startswith("_")}
    assert public - {"close"} <= set(dir(blocking))
    assert not [each for each in public if inspect.iscoroutinefunction(getattr(blocking, each, None))]


def test_it_refuses_to_wait_for_itself() -> None:
    from lmbridge.sync._portal import portal  # noqa: PLC0415 - not a public name

    with pytest.raises(LLMError, match="inside its own event loop"):
        portal.call(lambda: portal.call(lambda: None))


def test_decisions_counts_and_models_are_plain_calls(server: ThreadedServer, client: LLMClient) -> None:
    answers = {"ok": {"type": "noul", "noul": 0.9}}
    server.scripted.on_path("/v1/systemone", reply(200, {"model": "test-model", "answers": answers}))
    assert client.decide("Fine.", {"ok": lmbridge.TrueFalse("Is it fine?")}).answers["ok"].winner is True
    assert not client.count_tokens(HELLO).exact
    assert [each.id for each in client.models.list()] == ["test-model"]
    with pytest.raises(LLMError, match="cannot download"):
        next(client.models.download("other"))
