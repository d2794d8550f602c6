"""What a run sends only grows at its end or is trimmed, and what the server did not find in its cache is noticed."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from lmbridge import Agent, LLMClient, LLMResponseError, PromptCacheLost, Tool
from lmbridge.agent.prompt_cache import PromptCacheWatch
from lmbridge.client.usage import cached_tokens
from lmbridge.testing import Behaviour, Exchange, ScriptedServer, answer, reply
from tests.agent.support import asks, asks_raw, calls, collect_events, generations

MODELS = {"data": [{"id": "test-model", "owned_by": "vllm", "max_model_len": 3000}]}


@pytest_asyncio.fixture
async def client(scripted_server: ScriptedServer) -> AsyncIterator[LLMClient]:
    async with LLMClient(scripted_server.api_base, "test-model") as client:
        yield client


def usage(prompt: int, cached: int | None) -> Any:
    """Returns the usage of a reply; with None, the server does not report its cache."""
    counted: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": 10, "total_tokens": prompt + 10}
    return counted if cached is None else {**counted, "prompt_tokens_details": {"cached_tokens": cached}}


def read(page: int) -> str:
    """Reads a page."""
    return f"page {page}"


# What is sent

KINDS = ("call", "two calls", "bad call", "unknown tool", "empty", "promise", "reasoning")


def turn(kind: str, number: int) -> Behaviour:
    """Returns a reply of a model, good or flawed."""
    match kind:
        case "call":
            return calls(asks("read", f"c{number}", page=number), text="Let us see.")
        case "two calls":
            return calls(asks("read", f"c{number}", page=number), asks("read", f"d{number}", page=number + 100))
        case "bad call":
            return calls(asks_raw("read", "{page: ", f"c{number}"))
        case "unknown tool":
            return calls(asks("write", f"c{number}", page=number))
        case "empty":
            return answer("")
        case "promise":
            return answer("I will now call read.")
    return answer("", reasoning="Hm.")


def encoded(request: Any) -> tuple[list[bytes], bytes]:
    """Returns the messages and the tools of a request as the bytes of their JSON."""
    body = json.loads(request.body)
    return [json.dumps(each).encode() for each in body["messages"]], json.dumps(body.get("tools")).encode()


def without_nudges(messages: Sequence[bytes]) -> list[bytes]:
    """Returns the messages without those at the end that ask for another reply, which are sent only once."""
    kept = list(messages)
    while len(kept) > 2 and kept[-1].startswith(b'{"role": "user"'):
        del kept[-2:]
    return kept


async def check_that_it_only_grows(kinds: Sequence[str]) -> None:
    """Runs an agent whose model gives these replies, and compares what was sent from request to request."""
    async with ScriptedServer() as server, LLMClient(server.api_base, "test-model") as client:
        server.script(*(turn(kind, number) for number, kind in enumerate(kinds)))
        server.default = answer("Done.")
        # A model whose first replies are all empty ends the run, which changes nothing in what was sent.
        with contextlib.suppress(LLMResponseError):
            await Agent(client, tools=[read], system_prompt="Be brief.", max_bad_calls=9).run("Read.")
        requests = [encoded(request) for request in generations(server)]
    # The request for an answer without tools is the exception: a model that goes on to call would not stop otherwise.
    assert len({tools for _, tools in requests} - {b"null"}) == 1
    for (before, _), (after, _) in itertools.pairwise(requests):
        grown = without_nudges(before)
        assert after[: len(grown)] == grown


async def test_what_is_sent_only_grows_at_its_end_byte_for_byte() -> None:
    await check_that_it_only_grows(["call", *KINDS, "call"])


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(max_examples=25, deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=6))
async def test_what_any_run_sends_only_grows_at_its_end(kinds: list[str]) -> None:
    await check_that_it_only_grows(kinds)


def counted(call: Mapping[str, Any]) -> Behaviour:
    """Returns a reply with a call, whose usage counts four bytes as one token."""

    async def behave(exchange: Exchange) -> None:
        await calls(call, usage=usage(len(exchange.request.body) // 4, None))(exchange)

    return behave


async def check_that_one_block_is_left_out(sizes: Sequence[int]) -> int:
    """Runs an agent with results of these sizes in a small context, and returns how often something was left out."""

    def long(words: int) -> str:
        """Returns many words."""
        return "word " * words

    async with ScriptedServer() as server, LLMClient(server.api_base, "test-model") as client:
        server.on_path("/v1/models", reply(200, MODELS))
        turns = [counted(asks("long", f"c{number}", words=size)) for number, size in enumerate(sizes)]
        server.script(*turns, answer("Done."))
        agent = Agent(client, tools=[long], system_prompt="Be brief.", compaction="drop", repetition_limit=None)
        await agent.run("Go.")
        requests = [encoded(request)[0] for request in generations(server)]
    times = 0
    for before, after in itertools.pairwise(requests):
        if after[: len(before)] != before:
            times += 1
            kept = next(index for index, message in enumerate(before) if after[index] != message)
            assert kept == 2, "the system message and the task stay"
            rest = before[before.index(after[kept]) :] if after[kept] in before else []
            assert after[kept : kept + len(rest)] == rest, "and one block behind them is missing"
    return times


async def test_what_is_left_out_is_one_block_behind_the_task() -> None:
    assert await check_that_one_block_is_left_out([500, 400, 20, 500, 300, 500]) > 0


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 500), min_size=4, max_size=10))
async def test_what_any_run_leaves_out_is_one_block_behind_the_task(sizes: list[int]) -> None:
    await check_that_one_block_is_left_out(sizes)


async def check_that_what_is_trimmed_is_marked(sizes: Sequence[int], mode: Any) -> Counter[str]:
    """Runs an agent in a context that is too small for its results, and compares what was sent from round to round.

    Returns:
        How often each kind of step made room.
    """

    def long(words: int) -> str:
        """Returns many words."""
        return "word " * words

    async with ScriptedServer() as server, LLMClient(server.api_base, "test-model") as client:
        server.on_path("/v1/models", reply(200, {"data": [{**MODELS["data"][0], "max_model_len": 6000}]}))
        turns = iter([counted(asks("long", f"c{number}", words=size)) for number, size in enumerate(sizes)])

        async def behave(exchange: Exchange) -> None:
            is_summary = "about to be removed" in exchange.request.json["messages"][-1]["content"]
            await (answer("I read on.") if is_summary else next(turns, answer("Done.")))(exchange)

        server.default = behave
        agent = Agent(client, tools=[long], system_prompt="Be brief.", compaction=mode, repetition_limit=None)
        result = await agent.run("Go.")
        requests = [request.json["messages"] for request in generations(server)]
    sent: list[list[dict[str, Any]]] = []
    for messages in requests:
        if "about to be removed" in messages[-1]["content"]:
            # The question for a summary is asked below what the server has in its cache.
            assert messages[:-2] == sent[-1][: len(messages) - 2]
        else:
            sent.append(messages)
    for (before, after), finished in zip(itertools.pairwise(sent), result.log[1:], strict=True):
        if finished.compactions:
            check_trimmed(before, after)
        else:
            assert after[: len(before)] == before
    return Counter(step.kind for finished in result.log for step in finished.compactions)


def check_trimmed(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> None:
    """Checks that one block behind the task is missing, and that only a note and shortened results are different."""
    task = len("Go.")
    assert (after[0], after[1]["role"], after[1]["content"][:task]) == (before[0], "user", "Go.")
    # The last call and its result are new.
    kept = after[2:-2]
    for old, new in zip(before[len(before) - len(kept) :], kept, strict=True):
        if new != old:
            assert {**new, "content": ""} == {**old, "content": ""}
            assert new["role"] == "tool"
            assert len(new["content"]) < len(old["content"])


MODES = ("drop", "shorten", "summarize")


@pytest.mark.parametrize("mode", MODES)
async def test_what_is_trimmed_is_marked_and_everything_else_stays(mode: str) -> None:
    steps = await check_that_what_is_trimmed_is_marked([900, 700, 200, 900, 900, 700, 900, 900, 200, 900], mode)
    assert steps["drop"] or steps["summarize"]
    assert bool(steps["shorten"]) == (mode != "drop")
    assert bool(steps["summarize"]) == (mode == "summarize")


@pytest.mark.slow
@pytest.mark.timeout(300)
@settings(max_examples=10, deadline=None)
@given(sizes=st.lists(st.integers(1, 1000), min_size=6, max_size=12), mode=st.sampled_from(MODES))
async def test_what_any_run_trims_is_marked(sizes: list[int], mode: str) -> None:
    await check_that_what_is_trimmed_is_marked(sizes, mode)


async def test_the_definitions_of_tools_have_the_order_in_which_they_were_given(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    tools = [Tool(name, "A tool.", {"type": "object", "properties": {}}, lambda: "") for name in ("b", "c", "a")]
    agent = Agent(client, tools=tools)
    for _ in range(3):
        await agent.run("Go.")
    bodies = {json.dumps(json.loads(request.body)["tools"]) for request in generations(scripted_server)}
    assert len(bodies) == 1
    assert [each["function"]["name"] for each in json.loads(bodies.pop())] == ["b", "c", "a"]


async def test_a_slot_is_pinned_in_each_request_of_a_run(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(calls(asks("read", page=1)), answer(""), answer("Done."))
    await Agent(client, tools=[read], extra_body={"id_slot": 1}).run("Go.")
    assert [request.json["id_slot"] for request in generations(scripted_server)] == [1, 1, 1]


# What comes from the cache


async def test_the_tokens_from_the_cache_are_counted_in_a_run_and_in_each_round(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("read", page=1), usage=usage(1000, 0)), answer("Done.", usage=usage(1100, 1005)))
    result = await Agent(client, tools=[read]).run("Go.")
    assert result.usage == {"prompt_tokens": 2100, "completion_tokens": 20, "total_tokens": 2120, "cached": 1005}
    assert [each.usage and each.usage.get("cached") for each in result.log] == [0, 1005]


async def test_the_count_of_an_older_llama_cpp_is_in_its_timings(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    counted = answer("Done.", usage=usage(1100, None), extra={"timings": {"cache_n": 900, "prompt_n": 200}})
    scripted_server.script(counted)
    assert (await Agent(client).run("Go.")).usage.get("cached") == 900


async def test_a_server_that_does_not_report_its_cache_leaves_the_field_out(client: LLMClient) -> None:
    assert "cached" not in (await Agent(client).run("Go.")).usage


@pytest.mark.parametrize(
    ("cached", "lost"), [(1000, []), (400, [PromptCacheLost(None)]), (None, [])], ids=["warm", "cold", "unknown"]
)
async def test_a_listener_learns_that_the_server_has_dropped_its_cache(
    scripted_server: ScriptedServer, client: LLMClient, cached: int | None, lost: list[PromptCacheLost]
) -> None:
    scripted_server.script(
        calls(asks("read", page=1), usage=usage(1000, 0)), answer("Done.", usage=usage(1100, cached))
    )
    events = await collect_events(Agent(client, tools=[read]))
    assert [event for event in events if isinstance(event, PromptCacheLost)] == lost


def message(text: str) -> Mapping[str, Any]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize(
    ("after", "tools", "index"),
    [
        (["a", "b", "c", "d"], None, None),
        (["a", "x", "c"], None, 1),
        (["a", "c"], None, 1),
        (["a", "b"], None, 2),
        (["a", "b", "c", "d"], ["new"], 0),
    ],
    ids=["only grown", "changed", "left out", "cut", "other tools"],
)
def test_the_first_message_that_has_changed_is_named(after: list[str], tools: Any, index: int | None) -> None:
    watch = PromptCacheWatch()
    assert watch.compare([message(each) for each in "abc"], None, usage(5000, 0)) is None
    lost = watch.compare([message(each) for each in after], tools, usage(5100, 10))
    assert lost == PromptCacheLost(index)


def test_a_small_loss_is_not_worth_a_word() -> None:
    watch = PromptCacheWatch()
    watch.compare([message("a")], None, usage(300, 0))
    assert watch.compare([message("b")], None, usage(300, 100)) is None


def test_a_shorter_prompt_that_comes_from_the_cache_is_not_a_loss() -> None:
    watch = PromptCacheWatch()
    watch.compare([message("a"), message("a long flawed reply")], None, usage(3000, 0))
    assert watch.compare([message("a"), message("b")], None, usage(1050, 1000)) is None


def test_the_log_says_that_the_tools_have_changed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lmbridge.agent")
    watch = PromptCacheWatch()
    watch.compare([message("a")], None, usage(3000, 0))
    watch.compare([message("a")], ["new"], usage(3100, 10))
    [logged] = caplog.messages
    assert logged.startswith("the server took 10 of the 3100 tokens of a prompt from its cache")
    assert logged.endswith("after a prompt of 3000 tokens; the tools have changed")


def test_only_numbers_are_counts() -> None:
    assert cached_tokens({"prompt_tokens_details": {"cached_tokens": 5}}) == 5
    for other in (None, {}, {"prompt_tokens_details": None}, {"prompt_tokens_details": {"cached_tokens": True}}):
        assert cached_tokens(other) is None
