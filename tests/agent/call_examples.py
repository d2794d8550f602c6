"""One call of `add(a=1, b=2)` in each syntax, as models write it."""

from __future__ import annotations

from typing import Final, NamedTuple


class Example(NamedTuple):
    """A call in one syntax."""

    text: str
    """The call."""
    closing: str = ""
    """What ends it, and may be missing; empty if nothing does."""
    is_bare: bool = False
    """Whether the call could be ordinary JSON or code."""


JSON: Final = '{"name": "add", "arguments": {"a": 1, "b": 2}}'
PARAMETERS: Final = "<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n</parameter>\n"
NAMED_PARAMETERS: Final = '<parameter name="a">1</parameter>\n<parameter name="b">2</parameter>\n'
DSML: Final = "\uff5cDSML\uff5c"

EXAMPLES: Final = {
    "hermes": Example(f"<tool_call>\n{JSON}\n</tool_call>", "</tool_call>"),
    "hermes, parameters": Example(
        '<tool_call>\n{"name": "add", "parameters": {"a": 1, "b": 2}}\n</tool_call>', "</tool_call>"
    ),
    "hermes, in a fence": Example(f"<tool_call>\n```json\n{JSON}\n```\n</tool_call>", "```\n</tool_call>"),
    "lm studio": Example(f"[TOOL_REQUEST]{JSON}[END_TOOL_REQUEST]", "[END_TOOL_REQUEST]"),
    "jamba, hunyuan": Example(f"<tool_calls>[{JSON}]</tool_calls>", "</tool_calls>"),
    "minimax m1": Example(f"<tool_calls>\n{JSON}\n</tool_calls>", "</tool_calls>"),
    "qwen 2.5 coder": Example(f"<tools>\n{JSON}\n</tools>", "</tools>"),
    "nemotron": Example(f"<TOOLCALL>[{JSON}]</TOOLCALL>", "</TOOLCALL>"),
    "granite 20b": Example(f"<function_call> {JSON}"),
    "glaive": Example(f"<functioncall> {JSON} </functioncall>", "</functioncall>"),
    "longcat": Example(f"<longcat_tool_call>{JSON}</longcat_tool_call>", "</longcat_tool_call>"),
    "llama 3, custom": Example('<function=add>{"a": 1, "b": 2}</function>', "</function>"),
    "llama 3.1": Example('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}<|eom_id|>', "<|eom_id|>"),
    "llama 3.1, built-in": Example("<|python_tag|>add.call(a=1, b=2)"),
    "llama 4": Example("<|python_start|>[add(a=1, b=2)]<|python_end|>", "<|python_end|>"),
    "qwen 3 coder": Example(
        f"<tool_call>\n<function=add>\n{PARAMETERS}</function>\n</tool_call>", "</function>\n</tool_call>"
    ),
    "qwen 3 coder, without an opening": Example(
        f"<function=add>\n{PARAMETERS}</function>\n</tool_call>", "</tool_call>"
    ),
    "seed": Example(
        f"<seed:tool_call>\n<function=add>\n{PARAMETERS}</function>\n</seed:tool_call>", "</seed:tool_call>"
    ),
    "minicpm": Example(
        '<function name="add"><param name="a">1</param><param name="b"><![CDATA[2]]></param></function>', "</function>"
    ),
    "claude": Example(
        f'<function_calls>\n<invoke name="add">\n{NAMED_PARAMETERS}</invoke>\n</function_calls>', "</function_calls>"
    ),
    "minimax m2": Example(
        f'<minimax:tool_call>\n<invoke name="add">\n{NAMED_PARAMETERS}</invoke>\n</minimax:tool_call>',
        "</minimax:tool_call>",
    ),
    "deepseek 3.2": Example(
        f'<{DSML}function_calls>\n<{DSML}invoke name="add">\n'
        f'<{DSML}parameter name="a" string="false">1</{DSML}parameter>'
        f'\n<{DSML}parameter name="b" string="true">2</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}function_calls>',
        f"</{DSML}function_calls>",
    ),
    "glm": Example(
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>",
        "</tool_call>",
    ),
    "glm 4.7": Example(
        "<tool_call>add<arg_key>a</arg_key><arg_value>1</arg_value>"
        "<arg_key>b</arg_key><arg_value>2</arg_value></tool_call>",
        "</tool_call>",
    ),
    "step 3": Example(
        "<\uff5ctool_calls_begin\uff5c><\uff5ctool_call_begin\uff5c>function<\uff5ctool_sep\uff5c>"
        '<steptml:invoke name="add"><steptml:parameter name="a">1</steptml:parameter>'
        '<steptml:parameter name="b">2</steptml:parameter></steptml:invoke>'
        "<\uff5ctool_call_end\uff5c><\uff5ctool_calls_end\uff5c>",
        "<\uff5ctool_calls_end\uff5c>",
    ),
    "mistral": Example(f"[TOOL_CALLS][{JSON}]"),
    "mistral, with a space": Example(f"[TOOL_CALLS] [{JSON}]"),
    "mistral, newer": Example('[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}'),
    "mistral, with an id": Example('[TOOL_CALLS]add[CALL_ID]a1B2c3D4e[ARGS]{"a": 1, "b": 2}'),
    "magistral": Example('[TOOL_CALLS]add{"a": 1, "b": 2}'),
    "gpt-oss": Example(
        '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a":1,"b":2}<|call|>', "<|call|>"
    ),
    "gpt-oss, recipient first": Example(
        '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 1, "b": 2}<|call|>', "<|call|>"
    ),
    "gpt-oss, while it thinks": Example(
        '<|channel|>analysis to=functions.add code<|message|>{"a": 1, "b": 2}<|call|>', "<|call|>"
    ),
    "gpt-oss, without tokens": Example('to=functions.add json{"a": 1, "b": 2}'),
    "deepseek v3": Example(
        "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>function<\uff5ctool\u2581sep\uff5c>add\n"
        '```json\n{"a": 1, "b": 2}\n```<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>',
        "<\uff5ctool\u2581calls\u2581end\uff5c>",
    ),
    "deepseek v3.1": Example(
        "<\uff5ctool\u2581calls\u2581begin\uff5c><\uff5ctool\u2581call\u2581begin\uff5c>add<\uff5ctool\u2581sep\uff5c>"
        '{"a": 1, "b": 2}<\uff5ctool\u2581call\u2581end\uff5c><\uff5ctool\u2581calls\u2581end\uff5c>',
        "<\uff5ctool\u2581calls\u2581end\uff5c>",
    ),
    "kimi k2": Example(
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0<|tool_call_argument_begin|>"
        '{"a": 1, "b": 2}<|tool_call_end|><|tool_calls_section_end|>',
        "<|tool_calls_section_end|>",
    ),
    "kimi k3": Example(
        '<|open|>tools<|sep|><|open|>call tool="add" index="1"<|sep|><|open|>argument key="a" type="number"<|sep|>1'
        '<|close|>argument<|sep|><|open|>argument key="b" type="number"<|sep|>2<|close|>argument<|sep|>'
        "<|close|>call<|sep|><|close|>tools<|sep|>",
        "<|close|>tools<|sep|>",
    ),
    "granite 3": Example(f"<|tool_call|>[{JSON}]"),
    "phi 4 mini": Example(f"<|tool_call|>[{JSON}]<|/tool_call|>", "<|/tool_call|>"),
    "firefunction": Example(f"functools[{JSON}]"),
    "lfm2": Example("<|tool_call_start|>[add(a=1, b=2)]<|tool_call_end|>", "<|tool_call_end|>"),
    "gemma 3": Example("```tool_code\nadd(a=1, b=2)\n```", "```"),
    "gemma 3, printed": Example("```tool_code\nprint(default_api.add(a=1, b=2))\n```", "```"),
    "gemma 4": Example("<|tool_call>call:add{a:1,b:2}<tool_call|>", "<tool_call|>"),
    "functiongemma": Example(
        "<start_function_call>call:add{a:<escape>1<escape>,b:<escape>2<escape>}<end_function_call>",
        "<end_function_call>",
    ),
    "apertus": Example('<|tools_prefix|>[{"add": {"a": 1, "b": 2}}]<|tools_suffix|>', "<|tools_suffix|>"),
    "internlm": Example(
        '<|action_start|><|plugin|>\n{"name": "add", "parameters": {"a": 1, "b": 2}}<|action_end|>', "<|action_end|>"
    ),
    "command r7b": Example(
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "add", "parameters": {"a": 1, "b": 2}}]<|END_ACTION|>',
        "<|END_ACTION|>",
    ),
    "command r": Example('Action: ```json\n[{"tool_name": "add", "parameters": {"a": 1, "b": 2}}]\n```', "```"),
    "gigachat": Example(f"<|function_call|>{JSON}"),
    "gigachat, older": Example(f"function call<|role_sep|>\n{JSON}"),
    "olmo 3": Example("<function_calls>\nadd(a=1, b=2)\n</function_calls>", "</function_calls>"),
    "functionary": Example('>>>add\n{"a": 1, "b": 2}'),
    "react": Example('Action: add\nAction Input: {"a": 1, "b": 2}'),
    "tool_call fence": Example(f"```tool_call\n{JSON}\n```", "```"),
    "json": Example(JSON, is_bare=True),
    "json, parameters": Example('{"type": "function", "name": "add", "parameters": {"a": 1, "b": 2}}', is_bare=True),
    "json, openai": Example(f'{{"id": "call_1", "type": "function", "function": {JSON}}}', is_bare=True),
    "json, list": Example(f"[{JSON}]", is_bare=True),
    "json, fenced": Example(f"```json\n{JSON}\n```", "```", is_bare=True),
    "json, fenced without a language": Example(f"```\n{JSON}\n```", "```", is_bare=True),
    "pythonic": Example("[add(a=1, b=2)]", is_bare=True),
}
"""The examples, by the models that write them."""
