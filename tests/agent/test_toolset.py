"""`Toolset`: names, definitions, and calls that a model requests, also as text."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge import LLMValidationError, MCPError, Tool, ToolCall, ToolContext, ToolError
from lmbridge.agent.argument_checks import build_validator
from lmbridge.agent.schema_check_limit import STEPS_AT_ONCE, spend_steps
from lmbridge.agent.text_calls.finding import read_text_calls
from lmbridge.agent.tool_names import names_in_requests, names_in_run
from lmbridge.agent.toolset import InvalidCall, ReadyCall, Toolset
from tests.support import assert_linear, replaced

CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}


async def weather(city: str, days: int = 3) -> str:
    """Forecasts the weather."""
    return f"{days} days of rain in {city}"


def now() -> str:
    """Returns the time."""
    return "12:00"


def tool(name: str, server: str | None = None, parameters: dict[str, Any] | None = None) -> Tool:
    return Tool(name, "", parameters or {}, lambda **_: name, server=server)


class Provider:
    """A provider that returns these tools, or raises this error."""

    def __init__(self, *tools: Tool, error: Exception | None = None) -> None:
        self.tools = tools
        self.error = error

    async def list_tools(self) -> Sequence[Tool]:
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.tools


class GrowingProvider(Provider):
    """A provider whose new tools are added by the test."""

    def __init__(self, *tools: Tool) -> None:
        super().__init__(*tools)
        self.new: list[Tool] = []

    async def new_tools(self) -> Sequence[Tool]:
        return self.new


def wire(name: Any, arguments: Any = "{}", call_id: Any = "call_1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


async def read_ready(*tools: Any, name: str, arguments: Any = "{}") -> ReadyCall:
    read = (await Toolset.collect(tools)).read(wire(name, arguments))
    assert isinstance(read, ReadyCall)
    return read


async def read_invalid(*tools: Any, name: Any, arguments: Any = "{}") -> InvalidCall:
    read = (await Toolset.collect(tools)).read(wire(name, arguments))
    assert isinstance(read, InvalidCall)
    return read


# Collecting


async def test_functions_tools_and_providers_become_definitions_in_their_order() -> None:
    tools = await Toolset.collect([weather, tool("By hand", parameters=CITY), Provider(tool("a.b"), tool("c")), now])
    assert tools.names == ["weather", "by_hand", "a_b", "c", "now"]
    assert [definition["function"]["name"] for definition in tools.definitions] == tools.names
    assert tools.definitions[0] == {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Forecasts the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 3}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    assert tools.definitions[1]["function"]["parameters"] == CITY
    assert json.loads(json.dumps(tools.definitions)) == tools.definitions


async def test_a_set_without_tools_has_no_definitions() -> None:
    tools = await Toolset.collect(())
    assert (tools.definitions, tools.names) == ([], [])
    assert find_text_calls(tools, '<tool_call>{"name": "x"}</tool_call>') is None


@pytest.mark.parametrize(
    ("tools", "text"),
    [
        (weather, "tools must be a list of functions, Tools or providers, not <function weather.*"),
        ("weather", "tools must be a list of functions, Tools or providers, not 'weather'"),
        (["weather"], "'weather' is not a tool"),
        ([Provider], "<class '.*Provider'> is not a tool"),
        ([weather, weather], "there are two tools 'weather'; give one of them another name"),
        ([tool("x", "a"), tool("x", "a")], "there are two tools 'a__x'"),
        ([tool("x", "a"), tool("x", "b"), tool("a__x")], "there are two tools 'a__x'"),
        ([{"type": "function"}], "{'type': 'function'} is not a tool"),
    ],
)
async def test_objects_that_are_not_tools_and_duplicates_are_refused(tools: Any, text: str) -> None:
    with pytest.raises(LLMValidationError, match=f"^{text}"):
        await Toolset.collect(tools)


async def test_an_error_of_a_provider_is_raised() -> None:
    with pytest.raises(MCPError, match="gone"):
        await Toolset.collect([weather, Provider(error=MCPError("gone"))])
    with pytest.raises(ToolError, match="raised OSError: gone") as caught:
        await Toolset.collect([weather, Provider(error=OSError("gone"))])
    assert isinstance(caught.value.__cause__, OSError)


# Names


def test_a_tool_keeps_its_name_where_it_is_unique() -> None:
    tools = [tool("search", "web"), tool("search", "files"), tool("read", "files"), tool("search")]
    assert names_in_run(tools) == ["web__search", "files__search", "read", "search"]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("get_weather", "get_weather"),
        ("getWeather", "get_weather"),
        ("Get weather!", "get_weather"),
        ("files/read.txt", "files_read_txt"),
        ("my-server__tool", "my_server__tool"),
        ("a" * 64, "a" * 64),
        ("a" * 65, "a" * 57 + "_......"),
        ("天気", "tool_......"),
        ("é", "tool_......"),
    ],
)
def test_a_name_becomes_snake_case_in_requests(name: str, pattern: str) -> None:
    sent = names_in_requests([name])[name]
    assert re.fullmatch(r"[a-z0-9_]{1,64}", sent)
    assert re.fullmatch(pattern, sent)


def test_names_that_would_become_the_same_get_a_hash_unless_they_are_valid() -> None:
    sent = names_in_requests(["get_weather", "getWeather", "get-weather", "read.file", "read-file"])
    assert sent["get_weather"] == "get_weather"
    assert re.fullmatch(r"get_weather_[0-9a-f]{6}", sent["getWeather"])
    assert re.fullmatch(r"read_file_[0-9a-f]{6}", sent["read.file"])
    assert len(set(sent.values())) == 5


def test_a_name_that_looks_like_a_hashed_one_is_kept() -> None:
    hashed = names_in_requests(["a.b", "a-b"])["a.b"]
    sent = names_in_requests(["a.b", "a-b", hashed])
    assert sent[hashed] == hashed
    assert sent["a.b"] != hashed
    assert len(set(sent.values())) == 3


def test_names_with_the_same_hash_do_not_depend_on_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = hashlib.sha256
    monkeypatch.setattr("hashlib.sha256", lambda _: sha256(b"the same hash"))
    sent = names_in_requests(["a.b", "a-b", "a b"])
    assert names_in_requests(["a b", "a.b", "a-b"]) == sent
    assert sorted(len(name) for name in sent.values()) == [10, 11, 12]


NAMES = st.lists(st.text("aAbB_.-1 é", min_size=1, max_size=6) | st.text(min_size=1, max_size=80), unique=True)


@given(NAMES, st.randoms())
def test_names_in_requests_are_valid_unique_and_independent_of_their_order(names: list[str], random: Any) -> None:
    sent = names_in_requests(names)
    assert set(sent) == set(names)
    assert len(set(sent.values())) == len(names)
    assert all(re.fullmatch(r"[a-z0-9_]{1,64}", name) for name in sent.values())
    shuffled = names.copy()
    random.shuffle(shuffled)
    assert names_in_requests(shuffled) == sent


@pytest.mark.parametrize("asked", ["files_read", "Files.Read"])
async def test_a_model_may_use_the_name_in_requests_or_the_original_one(asked: str) -> None:
    read = await read_ready(tool("Files.Read"), name=asked)
    assert read.call.name == "Files.Read"


async def test_a_name_that_several_servers_share_needs_the_server() -> None:
    tools = (tool("Search", "Web"), tool("Search", "Files"))
    for asked in ("web__search", "Web__Search"):
        read = await read_ready(*tools, name=asked)
        assert read.call.name == "Web__Search"
        assert read.call.tool is tools[0]
    wrong = await read_invalid(*tools, name="Search")
    assert wrong.text == "there is no tool 'Search'; there are: web__search, files__search"


# Reading calls


async def test_a_valid_call_is_ready() -> None:
    by_hand = tool("By hand", parameters=CITY)
    read = await read_ready(by_hand, name="by_hand", arguments='{"city": "Ulm"}')
    assert read.call == ToolCall("call_1", "By hand", {"city": "Ulm"}, by_hand)
    assert read.arguments == {"city": "Ulm"}


@pytest.mark.parametrize(
    "arguments",
    [
        '{"city": "Ulm", "days": "2"}',
        {"city": "Ulm", "days": 2.0},
        '"{\\"city\\": \\"Ulm\\", \\"days\\": 2}"',
        ' {"city": "Ulm", "days": 2}\n',
    ],
)
@pytest.mark.parametrize("function", [weather, tool("weather", parameters=CITY)])
async def test_arguments_with_one_possible_reading_are_coerced(arguments: Any, function: Any) -> None:
    read = await read_ready(function, name="weather", arguments=arguments)
    assert read.call.arguments == read.arguments == {"city": "Ulm", "days": 2}


MISSING_ARGUMENTS = ["", " ", "\n", None, "null", " null\n"]


@pytest.mark.parametrize("arguments", [*MISSING_ARGUMENTS, "{}", {}])
@pytest.mark.parametrize("function", [now, tool("now"), tool("now", parameters={"additionalProperties": False})])
async def test_a_tool_without_parameters_needs_no_arguments(arguments: Any, function: Any) -> None:
    assert (await read_ready(function, name="now", arguments=arguments)).arguments == {}


@pytest.mark.parametrize("arguments", MISSING_ARGUMENTS)
async def test_a_tool_with_parameters_is_not_called_without_arguments(arguments: Any) -> None:
    wrong = await read_invalid(weather, name="weather", arguments=arguments)
    assert wrong.text == ("the arguments for 'weather' are wrong: the call has none; it takes: city, days (optional)")

    def remove(pattern: str = "*") -> str:
        return pattern

    for each in (remove, tool("remove", parameters={"properties": {"pattern": {"type": "string"}}})):
        wrong = await read_invalid(each, name="remove", arguments=arguments)
        assert wrong.text == (
            "the arguments for 'remove' are wrong: the call has none; send {} to use the default of each of them;"
            " it takes: pattern (optional)"
        )
        assert (await read_ready(each, name="remove", arguments="{}")).arguments == {}
    anything = tool("set", parameters={"additionalProperties": {"type": "string"}})
    assert "the call has none" in (await read_invalid(anything, name="set", arguments=arguments)).text


async def test_the_text_about_a_wrong_call_is_bounded() -> None:
    for arguments in ('{"' + "x" * 100_000 + '": 1}', {"city": "Ulm", "days": "x" * 100_000}, {"x" * 100_000: 1}):
        for each in (weather, tool("weather", parameters={**CITY, "additionalProperties": False})):
            assert len((await read_invalid(each, name="weather", arguments=arguments)).text) < 3_000
    assert len((await read_invalid(weather, name="x" * 100_000)).text) < 3_000


@pytest.mark.parametrize(
    "call",
    [
        lambda size: wire("weather", "[" * size),
        lambda size: wire("weather", '{"city": ' + "1" * size),
        lambda size: wire("weather", '{"city": "' + "\\n" * size),
        lambda size: wire("weather", "{" + "\n" * size),
        lambda size: wire("weather", '{"' + "x" * size + '": 1}'),
        lambda size: wire("weather", '{"city": "Ulm", "days": "' + "1" * size + '"}'),
        lambda size: wire("weather", '{"city": "Ulm", "days": "' + "[1," * size + '"}'),
        lambda size: wire("weather", json.dumps('{"city": "' + "x" * size)),
        lambda size: wire("x" * size),
    ],
)
def test_the_time_to_read_a_call_is_linear(call: Any) -> None:
    tools = Toolset([Tool.from_function(weather)])
    assert_linear(lambda size: tools.read(call(size)), 100_000)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"city": "Ulm"', "not valid JSON: Expecting ',' delimiter at line 1 column 15 (character 14), near '{\""),
        ('{"city":\n "Ulm",\n}', "not valid JSON: "),
        ("{'city': 'Ulm'}", "not valid JSON: Expecting property name enclosed in double quotes at line 1 column 2"),
        ('{"city": "Ulm"} {"city": "Bonn"}', "not valid JSON: Extra data at line 1 column 17 (character 16), near"),
        ('{"days": NaN}', "not valid JSON: JSON is malformed: invalid character (byte 9), in '{\"days\": NaN}'"),
        ('{"city": "\\ud800"}', "not valid JSON: "),
        ('{"days": 1e999}', "not valid JSON: Number out of range"),
        ("[" * 10_000, "not valid JSON: "),
        ("[1]", "they have to be a JSON object, not [1]"),
        ("5", "they have to be a JSON object, not 5"),
        ('"Ulm"', 'they have to be a JSON object, not "Ulm"'),
    ],
)
async def test_arguments_that_are_not_a_json_object_are_reported_with_the_position(arguments: str, text: str) -> None:
    wrong = await read_invalid(weather, name="weather", arguments=arguments)
    assert wrong.text.startswith(f"the arguments for 'weather' are wrong: {text}")
    assert wrong.text.endswith("; it takes: city, days (optional)")
    assert len(wrong.text) < 700


async def test_the_position_in_long_arguments_is_quoted() -> None:
    arguments = '{"city": "' + "x" * 10_000 + '" "days": 5, "more": "' + "y" * 10_000 + '"}'
    wrong = await read_invalid(weather, name="weather", arguments=arguments)
    assert "(character 10012)" in wrong.text
    assert 'xx" "days": 5' in wrong.text
    assert len(wrong.text) < 500


async def test_arguments_of_the_wrong_type_are_reported_with_their_path() -> None:
    wrong = await read_invalid(weather, name="weather", arguments='{"city": true}')
    assert wrong == InvalidCall(
        "call_1",
        "weather",
        "the arguments for 'weather' are wrong: $.city: expected `str`, got `bool`; it takes: city, days (optional)",
        tool="weather",
    )
    wrong = await read_invalid(tool("weather", parameters=CITY), name="weather", arguments='{"city": true}')
    assert wrong.text.startswith("the arguments for 'weather' are wrong: $.city: True is not of type 'string'; ")
    points = {"type": "object", "properties": {"at": {"$ref": "#/$defs/P"}}, "$defs": {"P": {"type": "integer"}}}
    wrong = await read_invalid(tool("p", parameters=points), name="p", arguments='{"at": "x"}')
    assert wrong.text.endswith("$.at: 'x' is not of type 'integer'; it takes: at (optional)")
    wrong = await read_invalid(now, name="now", arguments='{"zone": "CET"}')
    assert wrong.text.endswith("$: object contains unknown field `zone`; it takes no arguments")
    wrong = await read_invalid(weather, name="weather", arguments='"{\\"city\\": [5]}"')
    assert "$.city: expected `str`, got `array`" in wrong.text


@pytest.mark.parametrize("function", [weather, tool("weather", parameters=CITY)])
async def test_a_number_becomes_a_text_only_if_that_is_how_it_was_written(function: Any) -> None:
    for written in ("5", "-12", "2.5", "12345678901234567890123"):
        read = await read_ready(function, name="weather", arguments=f'{{"city": {written}}}')
        assert read.arguments == {"city": written}
    tools = await Toolset.collect([function])
    for written in ("3.10", "1e3", "1.0e1", "0.10", "-0"):
        arguments = f'{{"city": {written}}}'
        for sent in (arguments, json.dumps(arguments)):
            assert "$.city: " in (await read_invalid(function, name="weather", arguments=sent)).text
        for text in (f'"arguments": {arguments}', f'"parameters": {json.dumps(arguments)}'):
            (call,) = find_text_calls(tools, f'<tool_call>{{"name": "weather", {text}}}</tool_call>') or []
            wrong = tools.read(call)
            assert isinstance(wrong, InvalidCall)
            assert "$.city: " in wrong.text


async def test_a_number_within_a_text_becomes_a_text_only_if_that_is_how_it_was_written() -> None:
    part = {"type": "object", "properties": {"version": {"type": "string"}}}
    outer = tool("outer", parameters={"properties": {"part": part, "parts": {"type": "array", "items": part}}})
    for written in ("3.10", "-0"):
        for arguments in ({"part": f'{{"version": {written}}}'}, {"parts": f'[{{"version": {written}}}]'}):
            assert "version: " in (await read_invalid(outer, name="outer", arguments=json.dumps(arguments))).text
    read = await read_ready(outer, name="outer", arguments='{"part": "{\\"version\\": 3.1}"}')
    assert read.arguments == {"part": {"version": "3.1"}}


DUPLICATE_KEYS = '{"city": "Ulm", "city": "Bonn"}'


@pytest.mark.parametrize(
    "arguments",
    [
        DUPLICATE_KEYS,
        json.dumps(DUPLICATE_KEYS),
        '{"city": "Ulm", "days": 1, "days": true}',
        '{"city": "Ulm", "days": 1, "days": 1.0}',
        '{"city": {"a": 1, "a": 2}}',
    ],
)
async def test_a_key_that_is_there_twice_with_different_values_is_refused(arguments: str) -> None:
    wrong = await read_invalid(weather, name="weather", arguments=arguments)
    assert "occurs twice, with different values" in wrong.text
    same = '{"city": "Ulm", "days": 1, "city": "Ulm"}'
    assert (await read_ready(weather, name="weather", arguments=same)).arguments == {"city": "Ulm", "days": 1}


async def test_arguments_that_are_nested_too_deeply_are_refused_on_any_stack() -> None:
    tools = await Toolset.collect([tool("anything", parameters={"properties": {"list": {"type": "array"}}})])
    lists = "[" * 300 + "]" * 300
    text = f'{{"list": {lists}}}'
    large = f'{{"x": "{"x" * 60_000}", "list": {lists}}}'
    for arguments in (text, large, json.dumps({"list": lists}), json.dumps(text), json.loads(text)):
        (read,) = await tools.read_all([wire("anything", arguments)])
        assert isinstance(read, InvalidCall)
        assert "they are nested too deeply" in read.text
    fitting = await tools.read_all([wire("anything", '{"list": ' + "[" * 199 + "]" * 199 + "}")])
    assert isinstance(fitting[0], ReadyCall)


async def test_all_calls_of_any_shape_are_read() -> None:
    tools = await Toolset.collect([weather])
    shapes: list[Any] = [5, True, 1.5, [], {}, None]
    for read in await tools.read_all([wire("weather", arguments) for arguments in shapes]):
        assert isinstance(read, InvalidCall)


async def test_blank_values_of_optional_parameters_become_their_defaults() -> None:
    async def search(
        query: str, limit: int = 10, exact: bool = True, folder: str | None = None, depth: int | None = None
    ) -> str:
        return f"{query} {limit} {exact} {folder} {depth}"

    for blank in ("null", '""', '"null"'):
        arguments = f'{{"query": "x", "limit": {blank}, "exact": {blank}}}'
        assert (await read_ready(search, name="search", arguments=arguments)).arguments == {"query": "x"}
        wrong = await read_invalid(weather, name="weather", arguments=f'{{"city": "Ulm", "town": {blank}}}')
        assert "unknown field `town`" in wrong.text
    read = await read_ready(search, name="search", arguments='{"query": "", "folder": null}')
    assert read.arguments == {"query": "", "folder": None}
    assert (await read_ready(search, name="search", arguments='{"query": "", "depth": ""}')).arguments == {"query": ""}
    assert "$.query" in (await read_invalid(search, name="search", arguments='{"query": null}')).text


async def test_calls_that_are_large_or_hard_to_check_are_read_in_a_thread() -> None:
    threads: list[bool] = []

    def tool_with_steps(name: str, steps: int) -> Tool:
        def convert(values: Any) -> dict[str, Any]:
            threads.append(threading.current_thread() is not threading.main_thread())
            spend_steps(steps)
            return dict(values)

        return Tool(name, "", {}, lambda **_: name, _convert=convert)

    tools = await Toolset.collect(
        [tool_with_steps("easy", 0), tool_with_steps("hard", STEPS_AT_ONCE), tool_with_steps("endless", 10**9)]
    )
    small = json.dumps({"a": "x"})
    calls = [wire("easy", small), wire("easy", json.dumps({"a": "x" * 60_000})), wire("hard", small)]
    read = await tools.read_all([*calls, wire("endless", small), wire("unknown", "{")])
    assert [type(each) for each in read] == [ReadyCall, ReadyCall, ReadyCall, InvalidCall, InvalidCall]
    assert threads == [False, True, False, True, False, True]
    assert isinstance(read[3], InvalidCall)
    assert "it would take too long to check them" in read[3].text


async def test_other_tasks_run_while_many_calls_are_read() -> None:
    tools = await Toolset.collect([now])
    reading = asyncio.ensure_future(tools.read_all([wire("now")] * 1_000))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 5
    assert len(await reading) == 1_000


async def test_an_unknown_tool_is_reported_with_the_known_names() -> None:
    wrong = await read_invalid(now, weather, name="get_weather")
    assert wrong == InvalidCall("call_1", "get_weather", "there is no tool 'get_weather'; there are: weather, now")
    assert (
        await read_invalid(now, name="x" * 5_000, arguments="{")
    ).text == f"there is no tool '{'x' * 200}...'; there are: now"
    assert (await read_invalid(name="x")).text == "there is no tool 'x': there are no tools"
    many = await read_invalid(*(tool(f"t{number}") for number in range(60)), name="zzz")
    assert many.text.endswith("t49, and 10 more")


@pytest.mark.parametrize(
    "call", [{}, {"function": None}, {"id": None, "function": {}}, wire(None), wire(""), wire(5), {"function": "now"}]
)
async def test_a_call_of_any_shape_is_read(call: Any) -> None:
    read = (await Toolset.collect([now])).read(call)
    assert isinstance(read, InvalidCall)
    assert "there are: now" in read.text


@pytest.mark.parametrize("fault", [{"$schema": "http://[bad"}, {"$id": 4}, {"$ref": 5}, {"required": 5}])
async def test_a_tool_whose_schema_is_not_valid_can_be_called_like_the_others(fault: dict[str, Any]) -> None:
    tools = await Toolset.collect([tool("bad", parameters={**CITY, **fault}), now])
    assert isinstance(tools.read(wire("bad", {"city": "Ulm"})), ReadyCall)
    assert isinstance(tools.read(wire("bad", {"city": 5, "days": "x"})), InvalidCall)
    assert isinstance(tools.read(wire("now", {})), ReadyCall)


async def test_an_exception_of_a_users_type_makes_the_call_invalid() -> None:
    class Odd:
        def __init__(self) -> None: ...

    def convert(_: Any) -> dict[str, Any]:
        raise KeyError("inside")

    deep = '{"city": ' + "[" * 700 + "]" * 700 + "}"
    assert isinstance(await read_invalid(tool("deep", parameters=CITY), name="deep", arguments=deep), InvalidCall)
    odd = Tool("odd", "", {}, Odd, _convert=convert)
    assert "KeyError: 'inside'; it takes no arguments" in (await read_invalid(odd, name="odd")).text


@given(st.text(max_size=60) | st.none() | st.integers() | st.dictionaries(st.text(max_size=3), st.integers()))
def test_reading_never_raises(arguments: Any) -> None:
    tools = Toolset([Tool.from_function(weather), tool("by hand", parameters=CITY)])
    for name in tools.names:
        assert isinstance(tools.read(wire(name, arguments)), ReadyCall | InvalidCall)


# Calls as text

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
REQUEST = '[TOOL_REQUEST]{"name": "weather", "arguments": {"city": "Ulm"}}[END_TOOL_REQUEST]'


def find_text_calls(tools: Toolset, text: str) -> list[dict[str, Any]] | None:
    """Returns the calls in a reply that ends in them."""
    found = tools.find_text_calls(text)
    return None if found is None else found[1]


@pytest.mark.parametrize(
    "text", [CALL, REQUEST, f"\n{CALL}\n", f"<think>Ulm?</think>\n\n{CALL}", f"Ulm?</think>{CALL}"]
)
async def test_a_reply_that_consists_of_a_call_is_recognized(text: str) -> None:
    tools = await Toolset.collect([weather])
    (call,) = find_text_calls(tools, text) or []
    assert call["type"] == "function"
    assert call["id"].startswith("call_")
    assert call["function"] == {"name": "weather", "arguments": '{"city": "Ulm"}'}
    read = tools.read(call)
    assert isinstance(read, ReadyCall)
    assert read.arguments == {"city": "Ulm"}


async def test_several_calls_in_one_reply_are_recognized() -> None:
    tools = await Toolset.collect([weather, tool("Other.Tool")])
    other, bare = '{"name": "Other.Tool", "arguments": "{}"}', '{"name": "weather"}'
    text = f"{CALL}\n<tool_call>{other}</tool_call><tool_call>{bare}</tool_call>"
    calls = find_text_calls(tools, text) or []
    assert [call["function"] for call in calls] == [
        {"name": "weather", "arguments": '{"city": "Ulm"}'},
        {"name": "other_tool", "arguments": "{}"},
        {"name": "weather", "arguments": ""},
    ]
    assert len({call["id"] for call in calls}) == 3


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ({"parameters": {"city": "Ulm"}}, {"city": "Ulm"}),
        ({"parameters": '{"city": "Ulm"}'}, {"city": "Ulm"}),
        ({"arguments": None, "parameters": {"city": "Ulm"}}, {"city": "Ulm"}),
        ({"arguments": {"city": "Ulm"}, "parameters": None}, {"city": "Ulm"}),
        ({"arguments": {"city": "Ulm"}, "parameters": {"city": "Ulm"}}, {"city": "Ulm"}),
    ],
)
@pytest.mark.parametrize("tags", [("<tool_call>", "</tool_call>"), ("[TOOL_REQUEST]", "[END_TOOL_REQUEST]")])
async def test_parameters_in_place_of_arguments_are_read(written: Any, arguments: Any, tags: tuple[str, str]) -> None:
    tools = await Toolset.collect([weather])
    (call,) = find_text_calls(tools, json.dumps({"name": "weather", **written}).join(tags)) or []
    read = tools.read(call)
    assert isinstance(read, ReadyCall)
    assert read.arguments == arguments


@pytest.mark.parametrize(
    "written",
    [
        {},
        {"arguments": None},
        {"arguments": ""},
        {"parameters": None},
        {"args": {"zone": "CET"}},
        {"input": {"zone": "CET"}},
        {"zone": "CET"},
        {"arguments": {"zone": "CET"}, "parameters": {"zone": "UTC"}},
        {"arguments": [], "parameters": {"zone": "UTC"}},
    ],
)
@pytest.mark.parametrize("schema", [{}, {"required": ["zone"]}])
async def test_a_call_as_text_whose_arguments_are_missing_or_contradictory_is_not_made(
    written: Any, schema: Any
) -> None:
    tools = await Toolset.collect([tool("time", parameters={"properties": {"zone": {"type": "string"}}, **schema})])
    (call,) = find_text_calls(tools, f"<tool_call>{json.dumps({'name': 'time', **written})}</tool_call>") or []
    assert isinstance(tools.read(call), InvalidCall)
    (call,) = find_text_calls(tools, '<tool_call>{"name": "time", "arguments": {}}</tool_call>') or []
    assert isinstance(tools.read(call), InvalidCall if schema else ReadyCall)


def _calls_with_unknown_name(size: int) -> str:
    return CALL * size + replaced(CALL, "weather", "forecast")


@pytest.mark.slow
@pytest.mark.parametrize(
    "text_of",
    [
        lambda size: f"{CALL}\n" * size,
        lambda size: REQUEST * size,
        _calls_with_unknown_name,
        lambda size: f"{CALL * size} That was it.",
        lambda size: CALL * size + "<tool_call>" + '{"a":' * size,
        lambda size: f"<think>{'<think>' * size}</think>{CALL * size}",
        lambda size: f"{CALL}{' ' * 60 * size}" * 2,
        lambda size: "<tool_call>" * 10 * size,
        lambda size: "</tool_call>" * 10 * size + "</think>" * 10 * size,
        lambda size: f"<tool_call>{' ' * 60 * size}x",
        lambda size: (
            f'<tool_call>{{"name": "weather", "arguments": {{"city": "{"</tool_call>" * 10 * size}"}}}}</tool_call>'
        ),
        lambda size: f'<tool_call>{{"name": "weather", "arguments": {{"days": {"1" * 60 * size}}}}}</tool_call>',
        lambda size: f'<tool_call>{{"name": "weather", "arguments": {{"days": 0.{"1" * 60 * size}}}}}</tool_call>',
        lambda size: f'<tool_call>{{"name": "weather", "arguments": {"[" * 60 * size}',
        lambda size: "<function=weather>```" * 10 * size,
        lambda size: "~~~ <|python_tag|>```json\n" * 10 * size,
    ],
)
def test_the_time_to_read_calls_from_a_text_is_linear(text_of: Any) -> None:
    assert_linear(lambda size: read_text_calls(text_of(size)), 500)


async def test_a_text_that_is_too_long_to_be_read_at_once_is_an_ordinary_answer() -> None:
    tools = await Toolset.collect([weather])
    assert len(find_text_calls(tools, CALL * 5_000) or []) == 5_000
    assert find_text_calls(tools, CALL * 80_000) is None


async def test_tags_within_the_arguments_of_a_call_are_kept() -> None:
    arguments = {"city": "</think></tool_call><think>"}
    text = f"<tool_call>{json.dumps({'name': 'weather', 'arguments': arguments})}</tool_call>"
    (call,) = find_text_calls(await Toolset.collect([weather]), text) or []
    assert json.loads(call["function"]["arguments"]) == arguments


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It rains.",
        f"{CALL} and that was it.",
        f"An example:\n```\n{CALL}\n```",
        replaced(CALL, "weather", "forecast"),
        f"{CALL}{replaced(CALL, 'weather', 'forecast')}",
        replaced(CALL, '"name"', '"tool"'),
        replaced(CALL, '"weather"', "5"),
        "<tool_call></tool_call>",
        "<tool_call>[1]</tool_call>",
        "<tool_call>" + "[" * 100_000,
        f"<think>{CALL}</think>",
        f"<think>{CALL}",
        'Yes: {"name": "weather", "arguments": {"city": "Ulm"}}',
        "<tool_call><function=weather>Ulm</function></tool_call>",
        "[TOOL_REQUEST]weather[END_TOOL_REQUEST]",
    ],
)
async def test_any_other_reply_is_an_ordinary_answer(text: str) -> None:
    assert find_text_calls(await Toolset.collect([weather]), text) is None


# Calling


async def test_a_call_receives_the_converted_arguments() -> None:
    tools = await Toolset.collect([weather])
    read = tools.read(wire("weather", '{"city": "Ulm"}'))
    assert isinstance(read, ReadyCall)
    context = ToolContext("run", "call_1", "weather", lambda: False)
    outcome = await tools.call(read, context, timeout=30, max_output=100)
    assert (outcome.text, outcome.is_error) == ("3 days of rain in Ulm", False)
    with pytest.raises(LLMValidationError, match="there is no tool 'x'"):
        await tools.call(ReadyCall(ToolCall("1", "x", {}), {}), context, timeout=30, max_output=100)


# New tools


async def test_new_tools_are_added_at_the_end_and_the_others_stay_as_they_are() -> None:
    provider = GrowingProvider(tool("b"), tool("Odd Name"))
    toolset = await Toolset.collect([tool("a"), provider])
    before = toolset.definitions
    assert not await toolset.add_new_tools()
    provider.new = [tool("c"), tool("odd_name"), tool("a", server="s"), tool("d.e")]
    assert await toolset.add_new_tools()
    assert toolset.names[:4] == ["a", "b", "odd_name", "c"]
    assert toolset.names[4].startswith("odd_name_")
    assert toolset.names[5:] == ["s__a", "d_e"]
    assert toolset.definitions[:3] == before
    assert len(before) == 3
    for name in toolset.names:
        assert isinstance(toolset.read(wire(name)), ReadyCall)
    assert not await toolset.add_new_tools()


async def test_a_new_tool_whose_name_is_taken_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    provider = GrowingProvider(tool("a"))
    toolset = await Toolset.collect([provider])
    provider.new = [tool("a")]
    assert not await toolset.add_new_tools()
    assert not await toolset.add_new_tools()
    assert toolset.names == ["a"]
    assert caplog.text.count("a new tool 'a' is left out") == 1


async def test_an_error_of_a_provider_that_is_asked_for_new_tools_is_raised() -> None:
    class Broken(Provider):
        async def new_tools(self) -> Sequence[Tool]:
            raise OSError("gone")

    toolset = await Toolset.collect([Broken()])
    with pytest.raises(ToolError, match=r"\(Broken\) raised OSError: gone.*its new_tools\(\) has to return"):
        await toolset.add_new_tools()


# Validators


async def test_the_validators_of_hand_made_tools_are_built_outside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built: list[tuple[Any, threading.Thread]] = []

    def build(parameters: Any, sent_parameters: Any, **options: Any) -> Any:
        built.append((parameters, threading.current_thread()))
        return build_validator(parameters, sent_parameters, **options)

    monkeypatch.setattr("lmbridge.agent.tools.build_validator", build)
    provider = GrowingProvider(tool("at_first", parameters=CITY))
    toolset = await Toolset.collect([weather, provider])
    provider.new = [tool("later", parameters={"type": "object", "properties": {}})]
    await toolset.add_new_tools()
    read = await toolset.read_all(
        [wire("at_first", {"city": "Oslo"}), wire("later"), wire("weather", {"city": "Oslo"})]
    )
    assert [type(each) for each in read] == [ReadyCall] * 3
    assert [set(parameters["properties"]) for parameters, _ in built] == [{"city", "days"}, set()]
    assert threading.current_thread() not in [thread for _, thread in built]
