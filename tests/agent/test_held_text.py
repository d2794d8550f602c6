"""What a stream shows of a reply that may have calls in its text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from lmbridge import Agent, LLMClient, TextDelta
from lmbridge.agent.text_calls.finding import read_text_calls
from lmbridge.agent.text_calls.held_text import HeldText
from lmbridge.testing import ScriptedServer, answer, sse
from tests.agent.call_examples import EXAMPLES, JSON
from tests.agent.support import add, collect_events
from tests.support import assert_linear, piece

HERMES = EXAMPLES["hermes"].text


def shown(pieces: Sequence[str], *, is_whole: bool = False) -> tuple[str, HeldText]:
    """Returns what is shown of a reply before its end."""
    held = HeldText(lambda name: name == "add", is_whole=is_whole)
    return "".join(map(held.feed, pieces)), held


@pytest.mark.parametrize("example", list(EXAMPLES.values()), ids=list(EXAMPLES))
@pytest.mark.parametrize("before", ["", "Let me add.\n", "A b c.\n\n"])
def test_nothing_of_a_call_is_shown(example: Any, before: str) -> None:
    text = before + example.text
    for pieces in (list(text), [text], [text[place : place + 3] for place in range(0, len(text), 3)]):
        seen, held = shown(pieces)
        assert before.startswith(seen)
        assert seen.strip() == before.strip()
        assert seen + held.rest(None) == text
        assert (seen + held.rest(before.strip())).strip() == before.strip()


@pytest.mark.parametrize(
    "text",
    [
        "It is 3.",
        "a < b and b > a, see [1] and {x}.\n",
        "The <tool_call> tag begins a call, and `<tool_call>` too.",
        "```python\nprint(add(a=1, b=2))\n```\nThat is it.",
        '{"name": "Bob", "arguments": {}} is a person.',
        '```json\n{"name": "Bob"}\n```\n',
        "[subtract(a=1)] is a list.",
        "x = [add(a=1)] is a list.",
        f"Send {JSON} to it.",
        "functools.partial is a function.",
        "Actions speak louder.\nAction: none.\n",
        "<b>bold</b> <table>\n<tr>",
        f"For example:\n\n    {JSON}\n",
        f"For example:\n\n \t  {JSON}\n",
    ],
)
def test_an_ordinary_answer_is_shown_before_its_end(text: str) -> None:
    for pieces in (list(text), [text]):
        seen, held = shown([*pieces, " More text follows here, and it is long enough." * 4])
        assert seen.startswith(text.rstrip())
        assert (seen + held.rest(None)).startswith(text)


@pytest.mark.parametrize("before", ["      ", "\n     ", "So:\n   ", "```json\n      ", "So:\n```\n      "])
def test_an_indented_call_is_held_if_it_is_read_as_one(before: str) -> None:
    text = before + JSON + ("\n```" if "```" in before else "")
    assert read_text_calls(text) is not None
    for pieces in (list(text), [text]):
        seen, held = shown(pieces)
        assert seen.strip() in ("", "So:")
        assert seen + held.rest(None) == text


def test_in_whole_mode_nothing_is_held_after_a_text() -> None:
    assert shown([f"So:\n{HERMES}"], is_whole=True)[0] != ""
    text = f"So:\n{HERMES}"
    assert shown(list(text), is_whole=True)[0] == text
    assert shown(list(HERMES), is_whole=True)[0] == ""


def test_the_time_to_hold_text_is_linear() -> None:
    for unit in ("<tool_call>", "`<tool_call>` ", "```json\n", "{", "[ ", "<", '{"name": "x"}\n', "a "):
        assert_linear(partial(shown_units, unit), 300, doublings=2)


def shown_units(unit: str, size: int) -> str:
    """Returns what is shown of a reply that consists of one piece again and again."""
    return shown([unit] * size)[0]


def in_pieces(text: str) -> Any:
    """Returns a stream of a text in pieces of three characters."""
    chunks = [piece(text[place : place + 3]) for place in range(0, len(text), 3)]
    return sse(*chunks, piece(finish_reason="stop"), done=True)


async def text_of_events(agent: Agent) -> str:
    """Returns the text that a run shows."""
    return "".join(event.text for event in await collect_events(agent) if isinstance(event, TextDelta))


@pytest.mark.parametrize(
    ("text", "visible"),
    [
        (HERMES, "It is 3."),
        (f"Let me add.\n{HERMES}", "Let me add.\nIt is 3."),
        (f"Let me add.\n{HERMES}\nPlease wait.", "Let me add.\nIt is 3."),
        (f"Let me add.\n```json\n{JSON}\n```", "Let me add.\nIt is 3."),
        (f"<think>Hm.</think>\n\n{JSON}", "It is 3."),
        (f"The `<tool_call>` comes now.\n{HERMES}", "The `<tool_call>` comes now.\nIt is 3."),
    ],
)
async def test_a_stream_does_not_show_calls_as_text(
    scripted_server: ScriptedServer, client: LLMClient, text: str, visible: str
) -> None:
    scripted_server.script(in_pieces(text), answer("It is 3."))
    assert await text_of_events(Agent(client, tools=[add])) == visible


@pytest.mark.parametrize("options", [{}, {"read_text_calls": "never"}, {"read_text_calls": "whole"}])
async def test_a_stream_shows_all_of_an_ordinary_answer(
    scripted_server: ScriptedServer, client: LLMClient, options: dict[str, Any]
) -> None:
    text = f"For example:\n\n{HERMES}\n\nThe server parses it."
    scripted_server.script(in_pieces(text))
    assert await text_of_events(Agent(client, tools=[add], max_nudges=0, **options)) == text
