"""Tools whose definitions do not fit: which ones are offered, how the others are found, and that they can be called."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMValidationError, Tool, ToolCall
from lmbridge.agent import tools
from lmbridge.agent.argument_checks import build_validator
from lmbridge.agent.definition_budget import definition_tokens
from lmbridge.agent.tool_ranking import KeywordRanker
from lmbridge.agent.tool_search import SearchableToolset, ToolSearchOptions
from lmbridge.agent.tool_sources import RunInfo, ToolSources
from lmbridge.agent.toolset import Toolset
from lmbridge.testing import ScriptedServer, answer, reply
from tests.agent.support import add, asks, asks_raw, calls, check_valid, generations, sent, tool_texts

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = Tool(
    "get_weather",
    f"Gets the weather in a city. {'It is measured at noon. ' * 12}",
    CITY,
    lambda city: f"warm in {city}",
)


def filler(number: int, words: str = "Paints a picture.") -> Tool:
    """Returns a tool whose definition takes about a hundred tokens."""
    return Tool(f"paint_{number}", f"{words} {'Really. ' * 30}", {"type": "object", "properties": {}}, lambda: "done")


FILLERS = [filler(number) for number in range(8)]
LIMIT = 500


def agent(client: LLMClient, tools: Sequence[Any] = (*FILLERS, WEATHER), **options: Any) -> Agent:
    return Agent(client, tools=tools, **{"max_definition_tokens": LIMIT, **options})


def offered(server: ScriptedServer, number: int = -1) -> list[str]:
    """Returns the names of the tools in a request."""
    return [each["function"]["name"] for each in sent(server, number).get("tools", ())]


def definitions_size(server: ScriptedServer) -> int:
    """Returns the estimated tokens of the definitions in the last request."""
    return sum(
        definition_tokens(Tool(each["name"], each["description"], each["parameters"], print))
        for each in (definition["function"] for definition in sent(server)["tools"])
    )


# Which tools are offered


async def test_all_tools_are_offered_if_they_fit(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("Done."))
    await agent(client, [add, WEATHER]).run("Go.")
    assert offered(scripted_server) == ["add", "get_weather"]


async def test_tools_that_do_not_fit_are_behind_a_search(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmbridge.agent")
    scripted_server.script(answer("Done."))
    await agent(client).run("Go.")
    assert offered(scripted_server) == ["paint_0", "paint_1", "find_tools"]
    description = sent(scripted_server)["tools"][-1]["function"]["description"]
    assert "7 tools are not listed here" in description
    assert "paint_2, paint_3" in description
    assert "7 of 9 tools are left out" in caplog.text
    # There is room for those that are found later.
    assert definitions_size(scripted_server) <= LIMIT * 3 / 4


async def test_half_of_the_context_is_the_limit_by_default(scripted_server: ScriptedServer, client: LLMClient) -> None:
    sources = ToolSources([*FILLERS, WEATHER], None)
    options = ToolSearchOptions(mode="auto", ranker=KeywordRanker())
    expected = {None: (9, None), 100_000: (9, None), 2 * LIMIT: (3, "find_tools")}
    for context_length, (names, finder) in expected.items():
        async with sources.open(RunInfo(run_id="1", model=None, context_length=context_length), options) as opened:
            toolset = opened.toolset
            assert (len(toolset.names), toolset.finder and toolset.finder.name) == (names, finder)


@pytest.mark.parametrize("options", [{"tool_search": "never"}, {"max_definition_tokens": None}])
async def test_all_tools_are_offered_if_the_user_wants_that(
    scripted_server: ScriptedServer, client: LLMClient, options: dict[str, Any]
) -> None:
    scripted_server.script(answer("Done."))
    await agent(client, **options).run("Go.")
    assert len(offered(scripted_server)) == 9


@pytest.mark.parametrize("in_extra_body", [False, True])
async def test_a_tool_that_tool_choice_names_is_always_offered(
    scripted_server: ScriptedServer, client: LLMClient, in_extra_body: bool
) -> None:
    scripted_server.script(answer("Done."))
    choice: dict[str, Any] = {"tool_choice": {"type": "function", "function": {"name": "paint_7"}}}
    options: dict[str, Any] = {"extra_body": choice} if in_extra_body else choice
    await agent(client).run("Go.", **options)
    assert "paint_7" in offered(scripted_server)


async def test_the_search_has_a_name_that_no_tool_has(scripted_server: ScriptedServer, client: LLMClient) -> None:
    def find_tools(query: str) -> str:
        """Finds tools in the shed."""
        return query

    scripted_server.script(calls(asks("find_tools", query="hammer")), answer("Done."))
    result = await agent(client, [find_tools, *FILLERS]).run("Go.")
    assert offered(scripted_server)[-1] == "search_tools"
    assert tool_texts(result.messages) == ["hammer"]


# The search


async def test_tools_that_are_found_are_offered_at_the_end_for_the_rest_of_the_run(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        calls(asks("find_tools", query="weather forecast")),
        calls(asks("get_weather", city="Oslo")),
        answer("Warm."),
        answer("Another run."),
    )
    searching = agent(client)
    result = await searching.run("Go.")
    before = ["paint_0", "paint_1", "find_tools"]
    assert [offered(scripted_server, number) for number in range(3)] == [
        before,
        [*before, "get_weather"],
        [*before, "get_weather"],
    ]
    # The definitions before it are the same, so that they stay in the server's cache.
    assert sent(scripted_server, 1)["tools"][: len(before)] == sent(scripted_server, 0)["tools"]
    found, weather = tool_texts(result.messages)
    assert found.startswith("You can call these tools now:\n- get_weather: Gets the weather in a city. It is measured")
    assert weather == "warm in Oslo"
    check_valid(result.messages)
    await searching.run("Go on.")
    assert offered(scripted_server) == before


async def test_a_call_of_a_tool_that_was_not_offered_is_made_and_the_tool_is_offered_from_then_on(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "lmbridge.agent")
    scripted_server.script(calls(asks("get_weather", city="Oslo")), answer("Warm."))
    result = await agent(client).run("Go.")
    assert tool_texts(result.messages) == ["warm in Oslo"]
    assert offered(scripted_server) == ["paint_0", "paint_1", "find_tools", "get_weather"]
    assert "'get_weather', which it had not been offered" in caplog.text


async def test_a_call_in_the_text_of_a_tool_that_was_not_offered_is_made(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    text = '<tool_call>{"name": "getWeather", "arguments": {"city": "Oslo"}}</tool_call>'
    scripted_server.script(answer(text), answer("Warm."))
    result = await agent(client).run("Go.")
    assert tool_texts(result.messages) == ["warm in Oslo"]


async def test_wrong_arguments_for_a_tool_that_was_not_offered_are_explained_and_it_is_offered(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("get_weather", town="Oslo")), answer("Sorry."))
    result = await agent(client).run("Go.")
    assert "it takes: city" in tool_texts(result.messages)[0]
    assert offered(scripted_server)[-1] == "get_weather"
    assert sent(scripted_server)["response_format"]["json_schema"]["name"] == "get_weather"


async def test_an_unknown_tool_is_explained_with_the_similar_names_of_all_tools(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("get_the_weather", city="Oslo")), answer("Sorry."))
    result = await agent(client).run("Go.")
    (text,) = tool_texts(result.messages)
    assert "there are: get_weather, paint_0, paint_1, find_tools" in text
    assert text.endswith("find_tools finds 7 others")


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("", "Say in query what the tool has to do. The other tools are: paint_2, paint_3,"),
        ("quantum chromodynamics", "No tool matches 'quantum chromodynamics'. The other tools are: paint_2,"),
    ],
)
async def test_a_query_that_finds_nothing_gets_the_names_that_there_are(
    scripted_server: ScriptedServer, client: LLMClient, query: str, expected: str
) -> None:
    scripted_server.script(calls(asks("find_tools", query=query)), answer("Done."))
    result = await agent(client).run("Go.")
    assert tool_texts(result.messages)[0].startswith(expected)
    assert offered(scripted_server, 0) == offered(scripted_server, 1)


async def test_a_search_without_arguments_gets_the_names_that_there_are(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks_raw("find_tools", "{}")), answer("Done."))
    result = await agent(client).run("Go.")
    assert "The other tools are" in tool_texts(result.messages)[0]


async def test_a_search_names_the_tools_that_are_offered_already(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    tools = [add, *FILLERS]
    scripted_server.script(calls(asks("find_tools", query="add two numbers")), answer("Done."))
    result = await agent(client, tools).run("Go.")
    assert tool_texts(result.messages)[0].startswith("Already offered to you: add.\nNo other tool matches")


async def test_found_tools_take_no_more_room_than_the_limit_and_can_be_called_all_the_same(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        calls(asks("find_tools", query="paint")),
        calls(asks("find_tools", query="weather")),
        calls(asks("get_weather", city="Oslo")),
        answer("Done."),
    )
    result = await agent(client).run("Go.")
    assert definitions_size(scripted_server) <= LIMIT
    first, second, weather = tool_texts(result.messages)
    # One of the five fits.
    assert first.count("Its arguments follow this JSON schema") == 4
    assert second.endswith(f"Its arguments follow this JSON schema: {json.dumps(CITY, separators=(',', ':'))}")
    assert weather == "warm in Oslo"


async def test_the_schema_of_a_called_tool_without_room_is_not_prepared_in_the_event_loop(
    monkeypatch: pytest.MonkeyPatch, scripted_server: ScriptedServer, client: LLMClient
) -> None:
    threads: list[threading.Thread] = []

    def build(*schemas: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return build_validator(*schemas, **options)

    monkeypatch.setattr(tools, "build_validator", build)
    large = Tool("draw", "Draws. " * 300, CITY, lambda city: f"drawn: {city}")
    scripted_server.script(calls(asks("draw", city="Ulm")), answer("Done."))
    result = await agent(client, [*FILLERS, large]).run("Go.")
    assert tool_texts(result.messages) == ["drawn: Ulm"]
    assert "draw" not in offered(scripted_server)
    assert threads
    assert threading.main_thread() not in threads


async def test_two_searches_of_one_reply_offer_a_tool_once(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(
        calls(asks("find_tools", "1", query="weather"), asks("find_tools", "2", query="weather noon")), answer("Done.")
    )
    result = await agent(client).run("Go.")
    assert offered(scripted_server).count("get_weather") == 1
    assert any("Already offered to you: get_weather" in text for text in tool_texts(result.messages))


async def test_a_search_is_not_asked_approval_for_and_a_found_tool_is(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    asked: list[str] = []

    def approve(call: ToolCall) -> bool:
        asked.append(call.name)
        return True

    scripted_server.script(
        calls(asks("find_tools", query="weather")), calls(asks("get_weather", city="Oslo")), answer("Warm.")
    )
    await agent(client, approve=approve).run("Go.")
    assert asked == ["get_weather"]


class Growing:
    """A provider that adds tools after the first round."""

    def __init__(self, *later: Tool) -> None:
        self.later = list(later)
        self.is_asked = False

    async def list_tools(self) -> list[Tool]:
        return [WEATHER]

    async def new_tools(self) -> list[Tool]:
        was_asked, self.is_asked = self.is_asked, True
        return self.later if was_asked else []


async def test_tools_that_are_added_later_and_do_not_fit_are_behind_the_search(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(
        calls(asks("get_weather", city="Oslo")), calls(asks("find_tools", query="star map")), answer("Done.")
    )
    star_map = filler(9, "Draws a map of the stars.")
    await agent(client, [Growing(*FILLERS, star_map)]).run("Go.")
    assert offered(scripted_server, 0) == ["get_weather"]
    assert offered(scripted_server, 1)[-1] == "find_tools"
    assert "paint_9" not in offered(scripted_server, 1)
    assert offered(scripted_server, 2)[-1] == "paint_9"


async def test_tools_that_are_added_later_are_offered_if_they_fit(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.script(calls(asks("get_weather", city="Oslo")), answer("Done."))
    await agent(client, [Growing(FILLERS[0])]).run("Go.")
    assert offered(scripted_server) == ["get_weather", "paint_0"]


async def test_concurrent_runs_find_their_tools_independently(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    searching = agent(client)
    scripted_server.script(calls(asks("find_tools", query="weather")), answer("One."))
    await searching.run("One.")
    scripted_server.script(answer("Two."))
    await asyncio.gather(searching.run("Two."), searching.run("Three."))
    assert [len(offered(scripted_server, number)) for number in range(4)] == [3, 4, 3, 3]


# Ranking


def tools_of(*definitions: tuple[str, str]) -> list[Tool]:
    return [Tool(name, description, {"type": "object", "properties": {}}, print) for name, description in definitions]


GITHUB = tools_of(
    ("create_issue", "Opens a new ticket in a repository."),
    ("list_issues", "Lists the tickets of a repository."),
    ("merge_pull_request", "Merges a branch."),
    ("searchCode", "Finds text in files."),
    ("get", "Fetches a URL."),
    ("翻译", "翻译一段文字"),
)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("create issue", ["create_issue", "list_issues"]),
        ("creating an issue", ["create_issue", "list_issues"]),
        ("list_issues", ["list_issues", "create_issue"]),
        ("search the code", ["searchCode"]),
        ("fetch an url", ["get"]),
        ("get", ["get"]),
        ("文字", ["翻译"]),
        ("the", []),
        ("!?", []),
    ],
)
async def test_tools_are_ranked_by_the_words_in_their_names_and_descriptions(query: str, expected: list[str]) -> None:
    assert [GITHUB[place].name for place in await KeywordRanker().rank(query, GITHUB)] == expected


async def test_parameters_and_the_server_count_as_words() -> None:
    weather = Tool("now", "", CITY, print, server="meteo")
    for query in ("city", "meteo"):
        assert await KeywordRanker().rank(query, [*GITHUB, weather]) == [len(GITHUB)]


def embeddings_of(*vectors: Sequence[float]) -> Any:
    return reply(200, {"data": [{"index": number, "embedding": each} for number, each in enumerate(vectors)]})


async def test_an_embedding_model_ranks_the_tools_and_each_definition_is_embedded_once(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    search = calls(asks("find_tools", query="umbrella?"))
    others = [[0.0, 1.0]] * 8
    searching = agent(client, embedding_model="embedder")
    scripted_server.script(search, embeddings_of([2.0, 0.1], *others, [5.0, 0.0]), answer("Done."))
    result = await searching.run("Go.")
    assert "- get_weather" in tool_texts(result.messages)[0].splitlines()[1]
    scripted_server.script(search, embeddings_of([2.0, 0.1]), answer("Done."))
    result = await searching.run("Go.")
    assert "- get_weather" in tool_texts(result.messages)[0].splitlines()[1]
    first, second = (each.json for each in scripted_server.requests if each.path == "/v1/embeddings")
    assert (first["model"], len(first["input"]), second["input"]) == ("embedder", 10, ["umbrella?"])


async def test_words_rank_the_tools_if_the_server_has_no_embeddings(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    missing = reply(501, {"error": {"message": "This server does not support embeddings"}})
    scripted_server.script(calls(asks("find_tools", query="weather")), missing, answer("Done."))
    result = await agent(client.with_options(max_retries=0), embedding_model="embedder").run("Go.")
    assert "- get_weather" in tool_texts(result.messages)[0]
    assert "tools are found by words, because the embeddings failed" in caplog.text


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ([{"embedding": [1.0]}], "1 embeddings for 10 texts"),
        ([{"embedding": [1.0]}] * 11, "11 embeddings for 10 texts"),
        ([], "0 embeddings for 10 texts"),
        ([{"embedding": ["one"]}] * 10, "TypeError"),
        ([{"vector": [1.0]}] * 10, "KeyError"),
        (None, "TypeError"),
        (OSError("the embedder is gone"), "the embedder is gone"),
    ],
)
async def test_words_rank_the_tools_if_a_client_of_the_programs_own_returns_no_embeddings(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture, data: Any, problem: str
) -> None:
    class OwnClient:
        model = client.model
        chat_completion = staticmethod(client.chat_completion)

        async def embeddings(self, input: Any, *, model: str | None = None) -> Any:  # noqa: A002 - as in the API
            if isinstance(data, Exception):
                raise data
            return {"data": data}

    scripted_server.script(calls(asks("find_tools", query="weather")), answer("Done."))
    own: Any = OwnClient()
    result = await agent(own, embedding_model="embedder").run("Go.")
    assert "- get_weather" in tool_texts(result.messages)[0]
    assert "tools are found by words, because the embeddings failed" in caplog.text
    assert problem in caplog.text


class ChatOnly:
    """A client that cannot embed texts."""

    model = "chat"

    async def chat_completion(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


def test_an_embedding_model_needs_a_client_that_can_embed() -> None:
    with pytest.raises(LLMValidationError, match="needs a client with a method embeddings"):
        Agent(ChatOnly(), embedding_model="embedder")


@pytest.mark.parametrize(
    "options",
    [{"tool_search": "always"}, {"tool_search": True}, {"max_definition_tokens": 0}, {"embedding_model": ""}],
)
def test_wrong_options_are_refused(client: LLMClient, options: dict[str, Any]) -> None:
    with pytest.raises(LLMValidationError, match=next(iter(options))):
        Agent(client, **options)


async def test_a_thousand_tools_are_no_problem(scripted_server: ScriptedServer, client: LLMClient) -> None:
    many = [filler(number) for number in range(1_000)]
    scripted_server.script(calls(asks("find_tools", query="weather")), answer("Done."))
    result = await agent(client, [*many, WEATHER]).run("Go.")
    assert "- get_weather" in tool_texts(result.messages)[0]
    assert len(generations(scripted_server)) == 2


def test_a_toolset_that_is_not_searchable_has_no_finder() -> None:
    assert Toolset([WEATHER]).finder is None
    assert SearchableToolset([WEATHER], limit=LIMIT, ranker=KeywordRanker()).finder is None
