"""Calls that a model wrote as text: in each syntax, with text around them, and in ordinary answers, which have none."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, LLMValidationError
from lmbridge.agent.text_calls.finding import may_have_calls, read_text_calls
from lmbridge.agent.text_calls.syntaxes import CALL_SYNTAXES
from lmbridge.agent.toolset import ReadyCall, Toolset
from lmbridge.testing import ScriptedServer, answer
from tests.agent.call_examples import EXAMPLES, JSON, Example
from tests.agent.ordinary_answers import ADD, CALLS, ORDINARY_ANSWERS
from tests.agent.support import add, check_valid, sent, tool_texts
from tests.support import assert_linear, replaced

HERMES = EXAMPLES["hermes"].text


def weather(city: str) -> str:
    """Returns the weather."""
    return f"rain in {city}"


def delete_file(path: str) -> str:
    """Deletes a file."""
    return f"deleted {path}"


def search(query: str) -> str:
    """Searches."""
    return f"found {query}"


@pytest.fixture(scope="module")
def toolset() -> Toolset:
    """The tools of the examples and of the ordinary answers."""
    return asyncio.run(Toolset.collect([add, weather, delete_file, search]))


def made(toolset: Toolset, text: str, **options: Any) -> list[tuple[str, Any]] | None:
    """Returns the names and arguments of the calls in a text, with "error" in place of arguments that are invalid."""
    found = toolset.find_text_calls(text, **options)
    if found is None:
        return None
    read = [toolset.read(call) for call in found[1]]
    return [
        (each.call.name, dict(each.arguments)) if isinstance(each, ReadyCall) else (each.name, "error") for each in read
    ]


SUM = [("add", {"a": 1, "b": 2})]


@pytest.fixture(params=list(EXAMPLES.values()), ids=list(EXAMPLES))
def example(request: pytest.FixtureRequest) -> Example:
    """Each syntax."""
    found: Example = request.param
    return found


def test_a_reply_that_is_a_call_is_read(toolset: Toolset, example: Example) -> None:
    for text in (example.text, f"\n{example.text}\n\n", f"{example.text}<|im_end|>", f"{example.text}</s>\n"):
        assert made(toolset, text) == SUM
        assert made(toolset, text, mode="whole") == SUM
        assert made(toolset, text, repairs=False) == SUM


@pytest.mark.parametrize(
    "before",
    [
        "Let me add them.",
        "I'll use the add tool:",
        "Sure!\n\nFirst I need the sum, because I don't know it.",
        "Voilà :",
    ],
)
def test_a_call_after_a_text_is_read(toolset: Toolset, example: Example, before: str) -> None:
    text = f"{before}\n{example.text}"
    assert made(toolset, text) == SUM
    assert toolset.find_text_calls(text)[0] == before.strip()  # type: ignore[index]  # it was found above
    assert made(toolset, text, mode="whole") is None
    assert made(toolset, text, mode="never") is None


@pytest.mark.parametrize("after", ["I will tell you the result.", "The answer follows.", "Observation: 3\nIt is 3."])
def test_a_call_before_a_text_is_read(toolset: Toolset, example: Example, after: str) -> None:
    found = toolset.find_text_calls(f"{example.text}\n{after}")
    assert found is not None
    assert found[0] == ""
    assert made(toolset, f"Let me add.\n{example.text}\n{after}") == SUM


def test_a_call_without_its_end_is_read(toolset: Toolset, example: Example) -> None:
    text = example.text.removesuffix(example.closing).rstrip()
    assert made(toolset, text) == SUM
    assert made(toolset, f"Let me add.\n{text}") == SUM


def test_a_call_that_was_cut_off_is_not_read(toolset: Toolset, example: Example) -> None:
    """A text that ends anywhere within the call has either the whole call in it, or none."""
    for end in range(len(example.text)):
        assert made(toolset, example.text[:end], may_be_cut=True) in (None, SUM)


def test_a_call_in_the_reasoning_is_read_if_there_is_no_answer(toolset: Toolset, example: Example) -> None:
    for reasoning in (example.text, f"The sum is needed.\n{example.text}"):
        assert made(toolset, "", reasoning=reasoning) == SUM
        assert made(toolset, "It is 3.", reasoning=reasoning) is None
    assert made(toolset, "", reasoning=f"{example.text}\nBut I know it.") is None


def test_two_calls_are_read(toolset: Toolset, example: Example) -> None:
    other = example.text.replace("2", "5")
    expected = [*SUM, ("add", {"a": 1, "b": 5})]
    assert made(toolset, f"{example.text}\n{other}") == expected
    assert made(toolset, f"First:\n{example.text}\nSecond:\n{other}") == expected


def test_a_call_of_an_unknown_tool_is_an_ordinary_answer(toolset: Toolset, example: Example) -> None:
    assert made(toolset, replaced(example.text, "add", "multiply")) is None


def test_a_call_with_invalid_arguments_is_not_made(toolset: Toolset, example: Example) -> None:
    text = example.text.replace("1", '"x"' if '"a": 1' in example.text or "a=1" in example.text else "x")
    assert made(toolset, text) in (None, [("add", "error")])
    if example.is_bare:
        assert made(toolset, f"Let me see.\n{text}") is None


async def test_each_syntax_is_read_in_a_run(
    scripted_server: ScriptedServer, client: LLMClient, example: Example
) -> None:
    agent = Agent(client, tools=[add])
    scripted_server.script(answer(f"Let me add.\n{example.text}"), answer("It is 3."))
    result = await agent.run("1 + 2?")
    assert (result.text, result.warnings, tool_texts(result.messages)) == ("It is 3.", (), ["3"])
    check_valid(sent(scripted_server)["messages"])
    message = result.messages[1]
    assert message["content"] == "Let me add."
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]).keys() == {"a", "b"}


# Forms that only some syntaxes have


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}; {"name": "weather", "parameters": {"city": "Ulm"}}', 2),
        (f"<tool_calls>\n{JSON}\n{JSON.replace('2', '3')}\n</tool_calls>", 2),
        ('[TOOL_CALLS]add{"a": 1, "b": 2}[TOOL_CALLS]weather{"city": "Ulm"}', 2),
        ('[add(a=1, b=2), weather(city="Ulm")]', 2),
        ("<|python_tag|>add.call(a=1, b=2)", 1),
        ('```tool_code\nadd(a=1, b=2)\nweather(city="Ulm")\n```', 2),
        ('{"tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 2}}]}', 1),
        (f"<tool_call>{JSON}</tool_call>\n```json\n{JSON}\n```", 2),
        (f"<think>Hm.</think>\n{HERMES}", 1),
        ('Thought: I need it.\nAction: add\nAction Input: {"a": 1, "b": 2}\nObservation: 3\nFinal Answer: 3', 1),
    ],
)
def test_other_forms_of_calls(toolset: Toolset, text: str, expected: int) -> None:
    calls = made(toolset, text) or []
    assert len(calls) == expected
    assert all(arguments != "error" for _, arguments in calls)


@pytest.mark.parametrize(
    ("text", "city"),
    [
        ("<function=weather>\n<parameter=city>\nUlm\n</parameter>\n</function>", "Ulm"),
        ("<function=weather><parameter=city>a < b\n\n c</parameter></function>", "a < b\n\n c"),
        ("<function=weather><parameter=city>5</parameter></function>", "5"),
        ('<function=weather><parameter=city>{"a": 1}</parameter></function>', '{"a": 1}'),
        ('<start_function_call>call:weather{city:<escape>Ulm, "Do"<escape>}<end_function_call>', 'Ulm, "Do"'),
        ('<|tool_call>call:weather{city:<|"|>Ulm<|"|>}<tool_call|>', "Ulm"),
        ("[weather(city='Ulm')]", "Ulm"),
        ("[weather(city='it\\'s')]", "it's"),
        ('[weather(city="""two\nlines""")]', "two\nlines"),
        ('[weather(city="a) b]")]', "a) b]"),
        ('<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>', "</tool_call>"),
    ],
)
def test_texts_in_arguments_are_kept(toolset: Toolset, text: str, city: str) -> None:
    assert made(toolset, text) == [("weather", {"city": city})]


@pytest.mark.parametrize(
    "text",
    [
        "[add(1, 2)]",
        "[add(a=1, 2)]",
        "[add(a=1, b=2), 3]",
        "[add(a=x, b=2)]",
        "[add(a=1, b=2) for a in b]",
        "```tool_code\nx = add(a=1, b=2)\n```",
        "<function=add><parameter=a>1</parameter><parameter=a>2</parameter><parameter=b>2</parameter></function>",
        "<function=add><parameter=a>1",
        f"{HERMES}<tool_call>{{",
        f"<tool_call>{JSON}{JSON.replace('2', '3')[:-4]}</tool_call>",
        '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}{"a": 1, "b": 3}',
        "<tool_call>" * 20 + JSON,
    ],
)
def test_what_is_not_clear_is_not_read(toolset: Toolset, text: str) -> None:
    assert made(toolset, text) is None


def test_each_syntax_has_an_example() -> None:
    texts = [example.text for example in EXAMPLES.values()]
    for syntax in CALL_SYNTAXES:
        assert any(syntax.opening in text for text in texts), syntax.opening


# Ordinary answers


def test_there_are_enough_ordinary_answers() -> None:
    assert len(set(ORDINARY_ANSWERS)) == len(ORDINARY_ANSWERS) > 200


@pytest.mark.parametrize("repairs", [True, False])
def test_no_call_in_an_ordinary_answer_is_made(toolset: Toolset, repairs: bool) -> None:
    called = [text for text in ORDINARY_ANSWERS if made(toolset, text, repairs=repairs)]
    assert not called


def test_the_calls_in_the_ordinary_answers_would_be_made_elsewhere(toolset: Toolset) -> None:
    for call in CALLS:
        assert made(toolset, f"Let me do that.\n{call}"), call
    assert made(toolset, ADD)


@pytest.mark.parametrize("before", ["Let me check.", "I would use the add tool:", "The user wants the sum of 1 and 2."])
@pytest.mark.parametrize("after", ["", "Please wait.", "This adds 1 and 2."])
def test_what_small_models_say_around_their_calls_does_not_matter(toolset: Toolset, before: str, after: str) -> None:
    for call in (HERMES, JSON, f"```json\n{JSON}\n```"):
        assert made(toolset, f"{before}\n{call}\n{after}") == SUM


# In a run


@pytest.mark.parametrize(
    ("mode", "text", "is_made"),
    [
        ("always", HERMES, True),
        ("always", f"So:\n{HERMES}", True),
        ("whole", HERMES, True),
        ("whole", f"<think>Hm.</think>{HERMES}", True),
        ("whole", f"So:\n{HERMES}", False),
        ("whole", f"{HERMES}\nThat was it.", False),
        ("never", HERMES, False),
    ],
)
async def test_the_option_decides_which_calls_are_read(
    scripted_server: ScriptedServer, client: LLMClient, mode: Any, text: str, is_made: bool
) -> None:
    scripted_server.script(answer(text), answer("It is 3."))
    result = await Agent(client, tools=[add], read_text_calls=mode, max_nudges=0).run("1 + 2?")
    assert (tool_texts(result.messages) == ["3"]) == is_made
    assert (result.text == "It is 3.") == is_made


@pytest.mark.parametrize("options", [{"read_text_calls": True}, {"read_text_calls": "some"}, {"repair_calls": 1}])
def test_an_invalid_option_is_refused(client: LLMClient, options: dict[str, Any]) -> None:
    with pytest.raises(LLMValidationError, match=next(iter(options))):
        Agent(client, **options)


async def test_calls_in_the_reasoning_of_a_reply_are_made(scripted_server: ScriptedServer, client: LLMClient) -> None:
    for reply in (
        answer("", reasoning=f"I need the sum.\n{HERMES}"),
        answer(f"<think>I need the sum.\n{HERMES}"),
        answer(f"<think>I need the sum.\n{HERMES}</think>"),
    ):
        scripted_server.script(reply, answer("It is 3."))
        result = await Agent(client, tools=[add]).run("1 + 2?")
        assert (result.text, tool_texts(result.messages)) == ("It is 3.", ["3"])
        check_valid(sent(scripted_server)["messages"])


async def test_a_text_that_is_cut_off_has_no_calls(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("<tool_call>{'name': 'add', 'arguments': {'a': 1, 'b': 2", finish_reason="length"))
    result = await Agent(client, tools=[add], max_nudges=0).run("1 + 2?")
    assert (result.stop_reason, result.tool_calls) == ("length", ())


async def test_an_unclosed_call_is_repaired_if_the_model_ended_it(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    text = "<tool_call>{'name': 'Add', 'arguments': {'a': 1, 'b': 2"
    scripted_server.script(answer(text), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert tool_texts(result.messages) == ["3"]
    assert [record.repaired for record in result.log[0].tool_calls] == [True]
    assert result.messages[1]["tool_calls"][0]["function"]["name"] == "add"


# Time


def test_an_ordinary_answer_is_hardly_examined() -> None:
    assert not may_have_calls("It is 3, and not 4. " * 1_000)
    assert not may_have_calls("")
    assert all(may_have_calls(example.text) for example in EXAMPLES.values())


UNITS = (
    *(f"{example.text}\n" for example in EXAMPLES.values()),
    *(each.opening for each in CALL_SYNTAXES),
    "{'name': ",
    '{"name": "add", "arguments": {',
    "[add(a=",
    "[add(a=1, b=2), ",
    "```json\n",
    "```json\n{\n```\n",
    "Action: add\n",
    "<tool_call>add\n",
    "<parameter=a>",
    "<function=add><parameter=a>1",
    "<function=add><parameter=a>1</parameter>",
    "to=functions.add ",
    "[ ",
    "{ ",
    '\n\n{"name": 1}',
    "`<tool_call>`",
    "> <tool_call>\n",
    "/* ",
    "}]",
    "Sure, for example. ",
)
"""Pieces of which hostile texts consist."""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["<tool_call>", "So:\n", "```json\n", '{"name": "add", "arguments": {"a": [1, '])
def test_the_time_to_look_for_calls_is_linear(before: str) -> None:
    def read(size: int) -> None:
        for unit in UNITS:
            read_text_calls(before + unit * size)

    assert_linear(read, 5)


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
def test_the_time_for_each_hostile_text_is_linear(unit: str) -> None:
    assert_linear(lambda size: read_text_calls(f"<tool_call>{unit * size}"), 200)
    assert_linear(lambda size: read_text_calls(f"So:\n{unit * size}"), 200)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x", "y\n<|channel|>commentary to=functions.add {}"),
        ("<|tool_call_begin|>add", "x {"),
        ("<tool_call>add\n<arg_key>", "x"),
        ("<tool_call>add<arg_key>a", "x"),
        ("```", "`\n" + HERMES),
    ],
)
def test_the_time_to_read_white_space_is_linear(before: str, after: str) -> None:
    assert_linear(lambda size: read_text_calls(f"{before}{' ' * size}{after}"), 2_000)


async def test_megabytes_of_text_of_calls_are_an_ordinary_answer(toolset: Toolset) -> None:
    assert toolset.find_text_calls(HERMES * 70_000) is None
