"""The mistakes of small models, as a table of functions that spoil a right call.

"structured" mistakes are in calls that the server has recognised as such. "text" mistakes are calls that the server's
parser has left in the text, and replies that are neither an answer nor a call.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import attrs

from benchmarks.solving.tasks import Step

Group = Literal["structured", "text"]


@attrs.frozen(kw_only=True)
class Reply:
    """A reply of the scripted model."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    """The names and the arguments of its calls; the arguments are a text that need not be JSON."""
    finish_reason: str = ""
    """The finish reason. If it is empty, the one that fits the reply is sent."""
    ids: tuple[str, ...] | None = None
    """The ids of the calls; by default, each has its own."""


@attrs.frozen
class Mistake:
    """A way to spoil a reply."""

    name: str
    group: Group
    spoil: Callable[[Step], Reply]
    for_answers: bool = False
    """Whether the final answer can be spoiled in this way, too."""


def arguments_of(step: Step) -> str:
    """Returns the arguments of a call as JSON."""
    return json.dumps(step.arguments, ensure_ascii=False)


def _call(name: str, arguments: str, **more: Any) -> Reply:
    return Reply(calls=((name, arguments),), **more)


def _named(change: Callable[[str], str]) -> Callable[[Step], Reply]:
    return lambda step: _call(change(step.tool), arguments_of(step))


def _spelled(change: Callable[[str], str]) -> Callable[[Step], Reply]:
    return lambda step: _call(step.tool, change(arguments_of(step)))


def _valued(change: Callable[[dict[str, Any]], Any]) -> Callable[[Step], Reply]:
    return lambda step: _call(step.tool, json.dumps(change(json.loads(arguments_of(step))), ensure_ascii=False))


def _written(form: Callable[[str, str], str], **more: Any) -> Callable[[Step], Reply]:
    return lambda step: Reply(text=form(step.tool, arguments_of(step)), **more)


def _camel_case(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(word.title() for word in rest)


def _python(value: str) -> str:
    return repr(json.loads(value))


def _each(kind: type, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], Any]:
    """Returns a function that changes all values of a type, at any depth.

    If the arguments have no such value, it drops the first argument.
    """

    def walk(value: Any) -> Any:
        if type(value) is kind:
            return change(value)
        if isinstance(value, dict):
            return {key: walk(each) for key, each in value.items()}
        return [walk(each) for each in value] if isinstance(value, list) else value

    return lambda arguments: walk(arguments) if walk(arguments) != arguments else dict(list(arguments.items())[1:])


def _first_key(change: Callable[[str], str]) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: {
        change(key) if not place else key: each for place, (key, each) in enumerate(arguments.items())
    }


def _always(reply: Reply) -> Callable[[Step], Reply]:
    return lambda _: reply


def _units(change: Callable[[str], str]) -> Callable[[dict[str, Any]], Any]:
    return lambda arguments: {key: change(each) if key == "unit" else each for key, each in arguments.items()}


def _hermes(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def _xml_parameters(name: str, arguments: str, opening: str, form: str) -> str:
    values: Mapping[str, Any] = json.loads(arguments)
    lines = [
        form.format(key=key, value=value if isinstance(value, str) else json.dumps(value))
        for key, value in values.items()
    ]
    return opening.format(name=name, lines="\n".join(lines))


def _keywords(arguments: str) -> str:
    return ", ".join(f"{key}={value!r}" for key, value in json.loads(arguments).items())


def _without_last(text: str) -> str:
    return text[:-1]


_STRUCTURED: Final[Mapping[str, Callable[[Step], Reply]]] = {
    # Names.
    "name in camelCase": _named(_camel_case),
    "name in PascalCase": _named(lambda name: _camel_case(name)[0].upper() + _camel_case(name)[1:]),
    "name in capitals": _named(str.upper),
    "name with hyphens": _named(lambda name: name.replace("_", "-")),
    "name with blanks": _named(lambda name: f" {name} "),
    "name with a prefix": _named(lambda name: f"functions.{name}"),
    "name with a channel": _named(lambda name: f"{name}<|channel|>commentary"),
    "name with a letter missing": _named(lambda name: name[:4] + name[5:]),
    "name with letters exchanged": _named(lambda name: name[:3] + name[4] + name[3] + name[5:]),
    "name of a tool that does not exist": _named(lambda _: "search_the_web"),
    "name missing": _named(lambda _: ""),
    # Arguments that are not JSON.
    "single quotes": _spelled(_python),
    "Python literals": _spelled(lambda text: text.replace("true", "True").replace("false", "False") + " "),
    "trailing comma": _spelled(lambda text: text[:-1] + ",}"),
    "comment": _spelled(lambda text: text[:-1] + " // that is all\n}"),
    "newline in a string": _spelled(lambda text: text.replace("\\n", "\n")),
    "closing brace missing": _spelled(_without_last),
    "one brace too many": _spelled(lambda text: text + "}"),
    "object twice": _spelled(lambda text: text + text),
    "in a code fence": _spelled(lambda text: f"```json\n{text}\n```"),
    "sentence before": _spelled(lambda text: f"Here are the arguments: {text}"),
    "token of the template after": _spelled(lambda text: text + "<|im_end|>"),
    "keys without quotes": _spelled(lambda text: text.replace('"', "", 2)),
    "typographic quotes": _spelled(lambda text: text.replace('"', "\u201d")),
    "empty text": _spelled(lambda _: ""),
    "null": _spelled(lambda _: "null"),
    "encoded twice": _spelled(json.dumps),
    "encoded three times": _spelled(lambda text: json.dumps(json.dumps(text))),
    "in a list": _spelled(lambda text: f"[{text}]"),
    "cut off in the middle": lambda step: _call(
        step.tool, arguments_of(step)[: len(arguments_of(step)) // 2], finish_reason="length"
    ),
    # Arguments that do not fit the schema.
    "within another object": _valued(lambda arguments: {"arguments": arguments}),
    "within parameters": _valued(lambda arguments: {"parameters": arguments}),
    "argument missing": _valued(lambda arguments: dict(list(arguments.items())[1:])),
    "argument unknown": _valued(lambda arguments: {**arguments, "reason": "The user wants it."}),
    "argument in capitals": _valued(_first_key(str.upper)),
    "argument misspelled": _valued(_first_key(lambda key: key[:-1])),
    "numbers as text": _valued(_each(int, str)),
    "numbers with a fraction": _valued(_each(int, float)),
    "numbers in words": _valued(_each(int, lambda _: "a few")),
    "booleans as text": _valued(_each(bool, lambda value: str(value).lower())),
    "booleans in words": _valued(_each(bool, lambda value: "yes" if value else "no")),
    "lists as JSON text": _valued(_each(list, json.dumps)),
    "lists as text with commas": _valued(_each(list, ", ".join)),
    "objects as JSON text": _valued(
        lambda arguments: {key: json.dumps(each) if isinstance(each, dict) else each for key, each in arguments.items()}
    ),
    "enum in capitals": _valued(_units(str.upper)),
    "enum unknown": _valued(_units(lambda _: "kelvin")),
    "null for an argument": _valued(lambda arguments: {**arguments, next(iter(arguments)): None}),
    "schema instead of arguments": _valued(
        lambda arguments: {"type": "object", "properties": {key: {"type": "string"} for key in arguments}}
    ),
    # Everything around the call.
    "finish reason stop": lambda step: _call(step.tool, arguments_of(step), finish_reason="stop"),
    "finish reason without a call": lambda _: Reply(text="Now the next step.", finish_reason="tool_calls"),
    "the same call three times": lambda step: Reply(calls=((step.tool, arguments_of(step)),) * 3),
    "text beside the call": lambda step: _call(step.tool, arguments_of(step), text="I will do the next step now."),
    "two calls with one id": lambda step: Reply(
        calls=((step.tool, arguments_of(step)), ("search_the_web", "{}")), ids=("call_1", "call_1")
    ),
    "call without an id": lambda step: _call(step.tool, arguments_of(step), ids=("",)),
}  # fmt: skip

_TEXT: Final[Mapping[str, Callable[[Step], Reply]]] = {
    "Hermes": _written(_hermes),
    "Hermes after prose": _written(lambda name, arguments: f"I will call the tool.\n{_hermes(name, arguments)}"),
    "Hermes before prose": _written(lambda name, arguments: f"{_hermes(name, arguments)}\nI wait for the result."),
    "Hermes unclosed": _written(lambda name, arguments: _hermes(name, arguments).removesuffix("\n</tool_call>")),
    "Hermes in the reasoning": lambda step: Reply(reasoning=f"Next step.\n{_hermes(step.tool, arguments_of(step))}"),
    "Hermes in think tags": _written(lambda name, arguments: f"<think>Next step.\n{_hermes(name, arguments)}</think>"),
    "Hermes with parameters": _written(
        lambda name, arguments: _hermes(name, arguments).replace('"arguments"', '"parameters"')
    ),
    "Hermes with single quotes": _written(
        lambda name, arguments: f"<tool_call>\n{{'name': '{name}', 'arguments': {_python(arguments)}}}\n</tool_call>"
    ),
    "bare JSON": _written(lambda name, arguments: f'{{"name": "{name}", "arguments": {arguments}}}'),
    "bare JSON with parameters": _written(lambda name, arguments: f'{{"name": "{name}", "parameters": {arguments}}}'),
    "bare JSON of a function": _written(
        lambda name, arguments: f'{{"type": "function", "function": {{"name": "{name}", "arguments": {arguments}}}}}'
    ),
    "fenced JSON": _written(lambda name, arguments: f'```json\n{{"name": "{name}", "arguments": {arguments}}}\n```'),
    "fenced JSON after prose": _written(
        lambda name, arguments: f'Let me do that:\n\n```json\n{{"name": "{name}", "arguments": {arguments}}}\n```'
    ),
    "LM Studio": _written(
        lambda name, arguments: f'[TOOL_REQUEST]{{"name": "{name}", "arguments": {arguments}}}[END_TOOL_REQUEST]'
    ),
    "Mistral, list": _written(lambda name, arguments: f'[TOOL_CALLS][{{"name": "{name}", "arguments": {arguments}}}]'),
    "Mistral, name": _written(lambda name, arguments: f"[TOOL_CALLS]{name}[ARGS]{arguments}"),
    "Llama, function": _written(lambda name, arguments: f"<function={name}>{arguments}</function>"),
    "Llama, python_tag": _written(
        lambda name, arguments: f'<|python_tag|>{{"name": "{name}", "parameters": {arguments}}}<|eom_id|>'
    ),
    "Qwen3-Coder": _written(
        lambda name, arguments: _xml_parameters(
            name,
            arguments,
            "<tool_call>\n<function={name}>\n{lines}\n</function>\n</tool_call>",
            "<parameter={key}>\n{value}\n</parameter>",
        )
    ),
    "GLM": _written(
        lambda name, arguments: _xml_parameters(
            name,
            arguments,
            "<tool_call>{name}\n{lines}\n</tool_call>",
            "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>",
        )
    ),
    "Pythonic": _written(lambda name, arguments: f"[{name}({_keywords(arguments)})]"),
    "tool_code": _written(lambda name, arguments: f"```tool_code\n{name}({_keywords(arguments)})\n```"),
    "Harmony": _written(
        lambda name, arguments: (
            f"<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>{arguments}<|call|>"
        )
    ),
    "functools": _written(lambda name, arguments: f'functools[{{"name": "{name}", "arguments": {arguments}}}]'),
    "unreadable call": _written(lambda name, arguments: f"<tool_call>\n{name}: {arguments[:-4]}"),
    "promise": lambda step: Reply(text=f"I will now call {step.tool}."),
    "promise with a colon": lambda _: Reply(text="Okay. Let me do the next step and look that up:"),
    "please wait": lambda _: Reply(text="One moment, please."),
}  # fmt: skip

_ANSWERS: Final[Mapping[str, Reply]] = {
    "empty": Reply(),
    "blank": Reply(text=" \n"),
    "reasoning only": Reply(reasoning="The user wants me to go on. So I should do the next step."),
    "reasoning only, in tags": Reply(text="<think>So I should do the next step.</think>"),
    "reasoning left open": Reply(text="<think>So I should do the next step, and then"),
    "reasoning cut off": Reply(reasoning="So I should do the next step, and then", finish_reason="length"),
}

MISTAKES: Final = (
    *(Mistake(name, "structured", spoil) for name, spoil in _STRUCTURED.items()),
    *(Mistake(name, "text", spoil) for name, spoil in _TEXT.items()),
    *(Mistake(name, "text", _always(reply), for_answers=True) for name, reply in _ANSWERS.items()),
)
"""All mistakes."""
