"""Answers that end in a tool call which nothing has read: each has a warning in the result and in the log."""

from __future__ import annotations

import json
import logging

import pytest

from lmbridge import Agent, LLMClient
from lmbridge.agent.text_calls.finding import read_text_calls, without_repetition, without_template_tokens
from lmbridge.agent.text_calls.unread_calls import _SIGN, _UNREAD_SYNTAXES, describe_markup, repeated_unit
from lmbridge.testing import ScriptedServer, answer
from tests.agent.support import add, asks_raw, calls, check_valid, sent, tool_texts
from tests.support import assert_linear

CALL = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
HERMES = f"<tool_call>\n{CALL}\n</tool_call>"
REQUEST = f"[TOOL_REQUEST]{CALL}[END_TOOL_REQUEST]"


# Read


async def test_a_call_that_is_written_several_times_is_one_call(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    other = CALL.replace("2", "5")
    for deduplicate, results in ((True, ["3", "6"]), (False, ["3", "6", "3"])):
        scripted_server.script(answer(f"{CALL}\n{other}\n{CALL}"), answer("ok"))
        result = await Agent(client, tools=[add], deduplicate_calls=deduplicate).run("Go.")
        assert tool_texts(result.messages) == results


@pytest.mark.parametrize(
    ("text", "before"),
    [
        (f"Let me add them.\n{HERMES}", "Let me add them."),
        (f"Let me add them. {REQUEST}", "Let me add them."),
        (f"First `2 + 2`, then:\n```\n1 + 2\n```\n{HERMES}\n", "First `2 + 2`, then:\n```\n1 + 2\n```"),
        (f"So:{HERMES}<|im_end|>", "So:"),
        (f"> 1 + 2?\n\nLet me see.\n~~~\n1\n~~~\n{HERMES}", "> 1 + 2?\n\nLet me see.\n~~~\n1\n~~~"),
        (f"{HERMES}<|im_end|>\n<|endoftext|> ", ""),
        (f"{REQUEST}</s>", ""),
        (f"<tool_call>{CALL}{CALL}</tool_call>", ""),
        (f"<tool_call>{CALL}\n{CALL}\n{CALL}</tool_call>", ""),
        (f'<tool_call>{CALL}{{"a": 1, "b": 2}}</tool_call>', ""),
        ('<tool_call>{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}{\\"a\\": 1, \\"b\\": 2}"}</tool_call>', ""),
        ('<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2, "a": 1}}</tool_call>', ""),
    ],
)
async def test_a_whole_call_at_the_end_of_a_reply_is_made(
    scripted_server: ScriptedServer, client: LLMClient, text: str, before: str
) -> None:
    scripted_server.script(answer(text), answer("It is 3."))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, result.warnings, result.log[0].text) == ("It is 3.", (), before)
    assert tool_texts(result.messages) == ["3"]
    message = sent(scripted_server)["messages"][1]
    assert message["content"] == before
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": 2}
    check_valid(result.messages)


async def test_several_calls_after_a_text_are_made(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer(f"Both:\n{HERMES}\n{HERMES.replace('2', '5')}"), answer("ok"))
    assert tool_texts((await Agent(client, tools=[add]).run("Go.")).messages) == ["3", "6"]


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": 1, "b": 2}{"a": 1, "b": 2}',
        '{"a": 1, "b": 2}\n {"a":1,"b":2} ',
        '{"a": 1, "b": 2}{"b": 2, "a": 1}{"a": 1, "b": 2}',
    ],
)
async def test_arguments_that_were_sent_twice_are_read_once(
    scripted_server: ScriptedServer, client: LLMClient, arguments: str
) -> None:
    scripted_server.script(calls(asks_raw("add", arguments)), answer("3"))
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert tool_texts(result.messages) == ["3"]
    assert result.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"a": 1, "b": 2}'


@pytest.mark.parametrize(
    "arguments",
    ["", "{}", "[1][1]", '{"a": 1}{"a": 2}', '{"a": 1}{"a": 1', '{"a": 1}x', '{"a": 1}[]', '{{"a": 1}', "11", '"x""x"'],
)
def test_other_arguments_are_left_alone(arguments: str) -> None:
    assert without_repetition(arguments) == arguments


@pytest.mark.parametrize(
    "text",
    [
        f"Write {HERMES} for that.",
        f"Write this:\n```\n{HERMES}\n```",
        f"Write this:\n```xml\n{HERMES}",
        f"Write `{HERMES}`",
        f"Never do this:\n> {HERMES}",
        f"> {HERMES}",
        f"Never do this:\n > Write {HERMES}",
        f"Write this:\n~~~\n{HERMES}",
        f"Write this:\n~~~xml\n```\n```\n{HERMES}",
        f"Write this:\n````\n```\na\n```\n{HERMES}",
        f"{HERMES} or {HERMES}",
        f"I could write <tool_call>x</tool_call> but {HERMES}",
        f'<tool_call>{CALL}{{"a": 1}}</tool_call>',
        '<tool_call>{"name": "add", "arguments": {"a": 1, "a": 2, "b": 2}}</tool_call>',
    ],
)
def test_any_other_call_in_a_text_is_not_read(text: str) -> None:
    assert read_text_calls(text) is None


def test_tokens_of_a_template_are_taken_off_the_end() -> None:
    for token in ("<|im_end|>", "<|eot_id|>", "</s>", "<end_of_turn>", "<\uff5cend\u2581of\u2581sentence\uff5c>"):
        assert without_template_tokens(f"It is 3. {token}\n{token} ") == "It is 3."
        assert without_template_tokens(token) == ""
    for text in ("", "a < b", "a <|", "<|im_end|> means the end", "</b>", "x" * 1000 + ">"):
        assert without_template_tokens(text) == text


# Not read, but noticed

UNREAD = [
    # Tags that are never closed, or whose call is wrong.
    f"Let me see. {HERMES.removesuffix('</tool_call>')}",
    '<tool_call>{"name": "add", "arguments": {"a": 1,',
    "<tool_call>",
    f"I call it.\n<tool_call>{CALL}",
    "<tool_call>{'name': 'add', 'arguments': {'a': 1}}</tool_call>",
    f"{HERMES.replace('add', 'subtract')}",
    f"So: {HERMES.replace('add', 'subtract')}",
    f"{HERMES}{REQUEST}",
    f"{HERMES} and then {HERMES}",
    f'<tool_call>{CALL}{{"a": 7}}</tool_call>',
    '<tool_call>{"name": "add", "arguments": {"a": 1, "a": 2}}</tool_call>',
    f"[TOOL_REQUEST]{CALL}",
    f"<tool_calls>[{CALL}]</tool_calls>",
    # Other syntaxes.
    '<function=add>{"a": 1, "b": 2}</function>',
    'Let me add: <function=add>{"a": 1',
    "<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>",
    "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n</tool_call>",
    '<function name="add">{"a": 1}</function>',
    f"[TOOL_CALLS][{CALL}]",
    f"Sure. [TOOL_CALLS] [{CALL}]</s>",
    '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}',
    '[TOOL_CALLS]add{"a": 1, "b": 2}',
    f"<|python_tag|>{CALL}",
    "<|python_tag|>add.call(a=1, b=2)<|eom_id|>",
    "<|python_tag|>",
    "<function=add>a=1, b=2</function>",
    '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a":1,"b":2}<|call|>',
    '<|channel|>analysis<|message|>Add.<|end|><|channel|>commentary to=functions.add<|message|>{"a":1',
    'assistantcommentary to=functions.add json{"a": 1, "b": 2}',
    '<|start|>assistant to=functions.add<|channel|>commentary<|message|>{"a": 1}<|call|>',
    '<invoke name="add"><parameter name="a">1</parameter></invoke>',
    '<minimax:tool_call>\n<invoke name="add"></invoke>\n</minimax:tool_call>',
    '<function_calls>\n<invoke name="add">\n</invoke>\n</function_calls>',
    "<\uff5ctool\u2581calls\u2581begin\uff5c>add<\uff5ctool\u2581calls\u2581end\uff5c>",
    '<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0{"a": 1}<|tool_calls_section_end|>',
    f"<|tool_call|>[{CALL}]<|/tool_call|>",
    "<|tool_call>call:add{a:1,b:2}<tool_call|>",
    "<start_function_call>call:add{a:1}<end_function_call>",
    f"functools[{CALL}]",
    "```tool_code\nadd(a=1, b=2)\n```",
    f"```tool_call\n{CALL}\n```",
    # Without tags, but with the name of a tool.
    CALL,
    f"I will call it now:\n\n```json\n{CALL}\n```",
    f"[{CALL}]",
    '{"tool": "add", "args": {"a": 1, "b": 2}}',
    '{"function": "add", "input": {"a": 1, "b": 2}}',
    '```json\n{"action": "add", "action_input": {"a": 1, "b": 2}}\n```',
    '{ "name" : "add", "parameters" : {"a": 1',
    f'{{"type": "function", "function": {CALL}}}',
    "[add(a=1, b=2)]",
    '{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}',
    '{"type": "function", "name": "add", "parameters": {"a": 1',
    'Sure!\n```json\n{"id": "1", "name": "add", "arguments": {}}\n```',
    '{"arguments": {"a": 1, "b": {"c": 2}}, "name": "add"}',
    '{"arguments": {"a": "if (x) {"}, "name": "add"}',
    '{"arguments": {"a": "}}"}, "name": "add"}',
    f'{{"function": {CALL}, "type": "function", "id": "call_1"}}',
    f'[{{"id": "call_1", "function": {CALL}, "type": "function"}}]',
    "Sure!\n[add(a=1, b=2)]",
    "Sure!\n```python\n[add(a=1, b=2),\n add(a=1, b=3)]\n```",
    'I have to add.\nAction: add\nAction Input: {"a": 1, "b": 2}',
]


@pytest.mark.parametrize("text", UNREAD)
def test_a_call_that_was_not_read_is_noticed(text: str) -> None:
    for ending in ("", "\n", "<|im_end|>", "</s>\n"):
        warning = describe_markup(text + ending, ["add"])
        assert warning is not None
        assert warning.startswith("the answer ends in a tool call that could not be read (")


@pytest.mark.parametrize("text", ["It is 3.<|im_end|>", "It is 3.</s>\n", "<|eot_id|>"])
def test_template_tokens_at_the_end_of_an_answer_are_noticed(text: str) -> None:
    assert describe_markup(text, ["add"]) == "the answer ends in tokens of the model's chat template"


ORDINARY = [
    "",
    "It is 3.",
    "a < b and b > a",
    "Write <b>bold</b> text",
    f"Write {HERMES} for that.",
    f"Use this:\n```xml\n{HERMES}\n```\nThe server reads it.",
    "The <tool_call> tag begins a call.",
    "A reply begins with `<tool_call>` and ends with `</tool_call>`.",
    "The token <|python_tag|> marks code, and [TOOL_CALLS] marks calls.",
    "gpt-oss writes <|channel|>commentary for calls.",
    "Use <function=add> in the template.",
    "Set to=functions.add in the header of a message.",
    f"Send {CALL} to the server.",
    '{"name": "Bob", "age": 3}',
    '{"name": "add"}',
    '{"tool": "add", "year": 1950}',
    '{"name": "subtract", "arguments": {"a": 1}}',
    "[1, 2, 3]",
    "[subtract(1, 2)]",
    'Send {"type": "function", "name": "add", "arguments": {}} to the server.',
    'In {x: y send {"name": "add", "arguments": {}} to the server.',
    '{"type": "function", "name": "subtract", "parameters": {"a": 1}}',
    '{"people": [{"arguments": {"a": 1}}], "title": "a list", "name": "Bob"}',
    "Call add(1, 2) in Python.",
    "The loop prints Action: and Action Input: lines.",
    "```python\nprint(add(1, 2))\n```",
]


ONLY_CALLS = [
    # Qwen2.5-Coder-0.5B-Instruct after the result of a call, which it repeats.
    f'{CALL}\n{{"name": "response", "arguments": [[3,]]}}',
    f'{CALL}\n{{"name": "subtract", "arguments": {{"a": 1, "b": 2}}}}\n{{"name": "mod", "arguments',
    f'```json\n{CALL}\n```\n```json\n{{"name": "divide", "arguments": {{"a": 1, "b": 2}}}}\n```',
    f'{CALL}; {{"name": "divide", "arguments": {{}}}}',
]


@pytest.mark.parametrize("text", ONLY_CALLS)
def test_an_answer_that_has_only_calls_is_noticed_even_if_the_last_one_names_no_tool(text: str) -> None:
    assert describe_markup(text, ["add"]) == "the answer ends in a tool call that could not be read (JSON)"


@pytest.mark.parametrize(
    "text",
    [
        f'{CALL}\n{{"result": 3}}\nThese are the request and its result.',
        f'{CALL}\n\nThe answer is {{"sum": 3}}.',
        ONLY_CALLS[0].replace('"add"', '"divide"'),
        '{"name": "add", "description": "Adds."}\n{"name": "divide", "description": "Divides."}',
        '{"name": "add"} {',
        "{}{",
    ],
)
def test_other_answers_that_begin_with_json_have_no_warning(text: str) -> None:
    assert describe_markup(text, ["add"]) is None


@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_answer_has_no_warning(text: str) -> None:
    assert describe_markup(text, ["add"]) is None


async def test_the_warning_is_in_the_result_and_in_the_log(
    scripted_server: ScriptedServer, client: LLMClient, caplog: pytest.LogCaptureFixture
) -> None:
    scripted_server.script(answer("<function=add>a=1, b=2</function>"))
    with caplog.at_level(logging.WARNING, "lmbridge.agent"):
        result = await Agent(client, tools=[add]).run("1 + 2?")
    (warning,) = result.warnings
    assert result.stop_reason == "stop"
    assert "(<function=)" in warning
    assert [record.levelname for record in caplog.records if warning.split(";")[0] in record.getMessage()] == [
        "WARNING"
    ]


async def test_a_call_in_the_reasoning_of_an_empty_answer_is_noticed(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    again = answer("", reasoning="Again. <tool_call>{")
    scripted_server.script(calls(asks_raw("add", '{"a": 1, "b": 2}')), again, again, again)
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.text, len(result.warnings)) == ("", 1)


async def test_markup_that_was_cut_off_is_noticed(scripted_server: ScriptedServer, client: LLMClient) -> None:
    cut = answer('<tool_call>{"name": "add", "arg', finish_reason="length")
    scripted_server.script(cut, cut)
    result = await Agent(client, tools=[add]).run("1 + 2?")
    assert (result.stop_reason, len(result.warnings)) == ("length", 1)


async def test_an_ordinary_run_has_no_warnings(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("It is 3."))
    assert (await Agent(client).run("1 + 2?")).warnings == ()


@pytest.mark.parametrize(
    "piece",
    [
        "<tool_call>",
        "<tool_call>{",
        HERMES,
        CALL,
        '{"name":',
        "<|im_end|>",
        " ",
        "<function=add>",
        "[TOOL_CALLS][",
        '{"type": "function", "name": "add", "parameters": ',
        '"name": "add", "arguments": {',
        "[add(",
        "`",
    ],
)
def test_the_time_to_look_for_markup_is_linear(piece: str) -> None:
    assert_linear(lambda size: describe_markup(piece * size, ["add"]), 5_000)


@pytest.mark.parametrize("opening", [each.opening for each in _UNREAD_SYNTAXES])
def test_no_syntax_is_missed_by_the_quick_look(opening: str) -> None:
    assert _SIGN.search(opening)


# Repetitions of a call


@pytest.mark.parametrize("separator", ["\n", "", ", "])
@pytest.mark.parametrize("cut", [0, 1, 10])
def test_the_unit_of_a_text_that_repeats_one_call_is_found(separator: str, cut: int) -> None:
    text = f"{CALL}{separator}" * 3 + CALL[:cut]
    unit = repeated_unit(text)
    assert unit is not None
    assert unit.rstrip(", \n") == CALL


@pytest.mark.parametrize(
    "text",
    [
        "",
        CALL,
        f"{CALL}\n{CALL[:10]}",
        f"{CALL}\n{CALL}\nThat is all.",
        f"{CALL}\n{CALL}\n{CALL.replace('2', '3')}",
        f"Like this:\n{CALL}\n{CALL}",
        HERMES * 2,
    ],
)
def test_a_text_with_anything_else_has_no_unit(text: str) -> None:
    assert repeated_unit(text) is None


def test_the_time_for_a_long_repetition_is_linear() -> None:
    assert_linear(lambda size: repeated_unit(f"{CALL}\n" * size), 1_000)
