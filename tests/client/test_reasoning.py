# The server of these tests sends every field that they read.
# pyright: reportTypedDictNotRequiredAccess=false

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmbridge import LLMClient, LLMValidationError, ReasoningMarkers, ReasoningSplitter, collect, split_reasoning
from lmbridge.client.chat_accumulator import ChatAccumulator
from lmbridge.testing import ScriptedServer, answer, reply
from tests.support import MESSAGES, assert_linear

CAPTURES = Path(__file__).parent.parent / "data" / "captures" / "reasoning"


def chunk(_index: Any = 0, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": _index, "delta": delta, "finish_reason": None}]}


def a_reply(content: str | None, **message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content, **message}}]}


def streamed(chunks: Sequence[dict[str, Any]], *, starts_in_reasoning: bool = False, **options: Any) -> tuple[str, str]:
    """Returns the reasoning and the text of a stream, as a splitter separates them."""
    splitter = ReasoningSplitter(starts_in_reasoning=starts_in_reasoning, **options)
    pieces = [piece for each in chunks for piece in splitter.feed(each)] + splitter.close()
    assert splitter.close() == []
    assert all(text for _, text in pieces)
    joined = ["".join(text for kind, text in pieces if kind == which) for which in ("reasoning", "text")]
    return joined[0], joined[1]


SPLITS = [
    ("Hello.", "", "Hello."),
    ("", "", ""),
    ("  \n", "", "  \n"),
    ("<think>Hm.</think>Hello.", "Hm.", "Hello."),
    ("\n <think>\nHm.\n</think>\n\nHello.\n", "\nHm.\n", "Hello.\n"),
    ("<think></think>Hello.", "", "Hello."),
    ("<think>Hm.", "Hm.", ""),
    ("<think>1 < 2 </thin", "1 < 2 </thin", ""),
    ("<think>a </ think> </th</think>b", "a </ think> </th", "b"),
    ("<think>Hm.</think>  \n", "Hm.", ""),
    ("<thi", "", "<thi"),
    ("<thinking>Hm.</thinking>Hello.", "", "<thinking>Hm.</thinking>Hello."),
    ("Write <think>so</think>.", "", "Write <think>so</think>."),
    ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
    ("<think><think>a</think>b</think>c", "<think>a", "b</think>c"),
    ("[THINK]Hm.[/THINK]Hello.", "Hm.", "Hello."),
    ("\n[THINK]Hm. </think>", "Hm. </think>", ""),
    ("[1, 2]", "", "[1, 2]"),
    ("[TH", "", "[TH"),
    ("It ends with [/THINK].", "", "It ends with [/THINK]."),
    ("<|channel>thought\nHm.\n<channel|>Hello.", "Hm.\n", "Hello."),
    ("<|channel>thought\n<channel|>Hello.", "", "Hello."),
    ("<|channel>thought\nHm.", "Hm.", ""),
    ("<seed:think>Hm.</seed:think>\nHello.", "Hm.", "Hello."),
    ("<|START_THINKING|>Hm.<|END_THINKING|>Hello.", "Hm.", "Hello."),
    ("<|inner_prefix|>Hm.<|inner_suffix|>Hello.", "Hm.", "Hello."),
    ("◁think▷Hm.◁/think▷Hello.", "Hm.", "Hello."),
    (
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi.<|return|>",
        "Hm.",
        "Hi.",
    ),
]


@pytest.mark.parametrize(("content", "reasoning", "text"), SPLITS)
def test_only_a_think_block_at_the_start_is_reasoning(content: str, reasoning: str, text: str) -> None:
    assert split_reasoning(a_reply(content)) == (reasoning, text)
    assert streamed([chunk(content=content)]) == (reasoning, text)
    assert streamed([chunk(content=character) for character in content]) == (reasoning, text)


@pytest.mark.parametrize(
    ("content", "reasoning", "text"),
    [
        ("Hm.</seed:think>Hello.", "Hm.", "Hello."),
        ("Hm.<|END_THINKING|>Hello.", "Hm.", "Hello."),
        ("Hm.[/THINK]Hello.", "", "Hm.[/THINK]Hello."),
    ],
)
def test_a_block_that_the_prompt_opened_is_reasoning_where_templates_do_that(
    content: str, reasoning: str, text: str
) -> None:
    assert split_reasoning(a_reply(content)) == (reasoning, text)


def test_the_markers_can_be_chosen() -> None:
    content = "<reasoning>Hm.</reasoning>Hello."
    markers = [*ReasoningSplitter.DEFAULT_MARKERS, ReasoningMarkers("<reasoning>", "</reasoning>")]
    assert split_reasoning(a_reply(content), markers=(pair for pair in markers)) == ("Hm.", "Hello.")
    assert split_reasoning(a_reply(content), markers=[("<reasoning>", "</reasoning>")]) == ("Hm.", "Hello.")
    assert split_reasoning(a_reply("Hm.</reasoning>Hello."), markers=markers) == ("Hm.", "Hello.")
    characters = [chunk(content=character) for character in content]
    assert streamed(characters, markers=markers) == ("Hm.", "Hello.")
    assert streamed(characters) == ("", content)
    for content in ("<think>Hm.</think>", "<|channel|>analysis<|message|>Hm.<|end|>"):
        assert split_reasoning(a_reply(content), markers=[]) == ("", content)
        assert streamed([chunk(content=character) for character in content], markers=[]) == ("", content)


@pytest.mark.parametrize("markers", ["<think>", [("<think>",)], [("", "x")], [("a", 1)], [("a", " ")], [1]])
def test_markers_that_are_not_pairs_are_refused(markers: Any) -> None:
    with pytest.raises(LLMValidationError, match=r"markers\[0\] must be a pair of an opening and a closing text"):
        ReasoningSplitter(markers=markers)
    with pytest.raises(LLMValidationError, match="must be a pair"):
        split_reasoning(a_reply("x"), markers=markers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["<think>", "</think>", " ", "[THINK]", "<", "<|channel|>analysis<|message|>a<|end|>", "<|channel|>"]
)
def test_splitting_takes_linear_time(part: str) -> None:
    def stream(size: int) -> None:
        splitter = ReasoningSplitter()
        for _ in range(size):
            splitter.feed(chunk(content=part))
        splitter.close()

    assert_linear(lambda size: split_reasoning(a_reply(part * size)), 2_000)
    assert_linear(stream, 500)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning"])
def test_reasoning_is_found_under_both_of_its_names(key: str) -> None:
    assert split_reasoning(a_reply("Hello.", **{key: "Hm."})) == ("Hm.", "Hello.")
    chunks = [chunk(role="assistant", content=None), chunk(**{key: "H"}), chunk(**{key: "m."}), chunk(content="Hello.")]
    assert streamed(chunks) == ("Hm.", "Hello.")


def test_reasoning_that_is_sent_under_both_names_is_returned_once() -> None:
    assert split_reasoning(a_reply("Hello.", reasoning_content="Hm.", reasoning="Hm.")).reasoning == "Hm."
    assert streamed([chunk(reasoning_content="Hm.", reasoning="Hm.")]) == ("Hm.", "")


def test_pieces_are_returned_as_soon_as_their_kind_is_known() -> None:
    splitter = ReasoningSplitter()
    contents = [" ", "<th", "ink>Let me", " think <", "/b> </thi", "nk>\n", "\n", "Hel", "lo </think>"]
    pieces = [[tuple(piece) for piece in splitter.feed(chunk(content=content))] for content in contents]
    assert pieces == [
        [],
        [],
        [("reasoning", "Let me")],
        [("reasoning", " think ")],
        [("reasoning", "</b> ")],
        [],
        [],
        [("text", "Hel")],
        [("text", "lo </think>")],
    ]


def test_one_chunk_may_hold_pieces_of_both_kinds() -> None:
    splitter = ReasoningSplitter()
    pieces = splitter.feed(chunk(reasoning="a", content="<think>b</think>c"))
    assert [tuple(piece) for piece in pieces] == [("reasoning", "a"), ("reasoning", "b"), ("text", "c")]


def test_a_block_that_the_prompt_opened_is_reasoning_if_that_is_known() -> None:
    content = "I think.\n</think>\n\nHello."
    assert split_reasoning(a_reply(content)) == ("I think.\n", "Hello.")
    assert split_reasoning(a_reply("</think>Hello.")) == ("", "Hello.")
    characters = [chunk(content=character) for character in content]
    assert streamed(characters, starts_in_reasoning=True) == ("I think.\n", "Hello.")
    # Text that was already handed out stays text.
    assert streamed(characters) == ("", content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        # The template opens the block, and the model opens it again.
        ("<think>Hm.</think>Hello.", ("Hm.", "Hello.")),
        ("</think>Hello.", ("", "Hello.")),
        ("Hm.", ("Hm.", "")),
        ("<thi", ("<thi", "")),
    ],
)
def test_a_stream_that_starts_in_reasoning_ends_it_once(content: str, expected: tuple[str, str]) -> None:
    assert streamed([chunk(content=content)], starts_in_reasoning=True) == expected
    assert streamed([chunk(content=character) for character in content], starts_in_reasoning=True) == expected


def test_starts_in_reasoning_has_no_effect_if_the_server_sends_reasoning_in_a_field() -> None:
    chunks = [chunk(reasoning_content="Hm."), chunk(content="Hello.")]
    assert streamed(chunks, starts_in_reasoning=True) == ("Hm.", "Hello.")
    assert split_reasoning(a_reply("The tag </think> ends it.", reasoning="Hm.")).text == "The tag </think> ends it."


def test_only_the_first_answer_is_split() -> None:
    chunks = [
        chunk(content="<think>a"),
        chunk(1, content="<think>b</think>c", reasoning="d"),
        chunk(content="</think>e"),
    ]
    assert streamed(chunks) == ("a", "e")


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"choices": None},
        {"choices": []},
        {"choices": [{"index": 0, "delta": None}]},
        chunk(),
        chunk(content=3),
        chunk(reasoning=3),
        chunk(reasoning_content=[]),
    ],
)
def test_chunks_and_replies_without_text_are_accepted(odd: dict[str, Any]) -> None:
    assert streamed([odd, chunk(content="<think>a"), odd, chunk(content="</think>b"), odd]) == ("a", "b")
    assert split_reasoning(odd) == ("", "")


def test_chunks_and_replies_are_not_changed() -> None:
    chunks = [chunk(content="<think>a"), chunk(reasoning="b", content="</think>c")]
    reply = a_reply("<think>a</think>c", reasoning="b")
    before = copy.deepcopy((chunks, reply))
    streamed(chunks)
    split_reasoning(reply)
    assert (chunks, reply) == before


CONTENTS = st.lists(
    st.sampled_from(["<think>", "</think>", "<", "/", ">", "think", "\n", " ", "a", "🙂", "<think", "</think"])
).map("".join)


@given(content=CONTENTS, reasoning=CONTENTS, cuts=st.lists(st.integers(0, 80)), key=st.sampled_from(["reasoning", ""]))
@example(content="<think>a</think>\nb", reasoning="", cuts=[3, 9, 12], key="")
def test_a_stream_is_split_like_its_whole_reply_however_it_is_chunked(
    content: str, reasoning: str, cuts: list[int], key: str
) -> None:
    bounds = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    chunks = [chunk(**{key: reasoning})] if key else []
    chunks += [chunk(content=content[start:end]) for start, end in pairwise(bounds)]
    accumulator = ChatAccumulator()
    for each in chunks or [chunk()]:
        accumulator.add(each)
    before, close, _ = content.partition("</think>")
    is_known = bool(close) and "<think>" not in before
    assert streamed(chunks, starts_in_reasoning=is_known) == split_reasoning(accumulator.reply())


@pytest.mark.parametrize("name", ["", "_budget3"])
def test_reasoning_of_a_real_server_is_found_in_streams_and_plain_replies(name: str) -> None:
    plain = json.loads((CAPTURES / f"nonstream{name}.json").read_text())
    lines = (CAPTURES / f"stream{name}.txt").read_text().splitlines()
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    assert split_reasoning(plain).reasoning
    assert streamed(chunks) == split_reasoning(plain)


def test_markers_of_the_caller_are_found_although_no_usual_marker_begins_like_them() -> None:
    reply = {"choices": [{"message": {"content": "##I add.//\n It is 3."}}]}
    assert split_reasoning(reply) == ("", "##I add.//\n It is 3.")
    assert split_reasoning(reply, markers=[("##", "//")]) == ("I add.", "It is 3.")
    opened_by_prompt = {"choices": [{"message": {"content": "I add.//It is 3."}}]}
    assert split_reasoning(opened_by_prompt, markers=[("##", "//")]) == ("I add.", "It is 3.")


async def test_a_stream_and_its_collected_reply_are_split_alike(
    scripted_server: ScriptedServer, client: LLMClient
) -> None:
    scripted_server.default = answer("Hello to you.", reasoning="Be kind, be brief.")
    stream = await client.chat_completion(MESSAGES, stream=True)
    splitter = ReasoningSplitter()
    kinds = [piece.kind async for each in stream for piece in splitter.feed(each)]
    assert kinds == ["reasoning"] * 4 + ["text"] * 3
    assert split_reasoning(await collect(stream)) == ("Be kind, be brief.", "Hello to you.")
    assert split_reasoning(await client.chat_completion(MESSAGES)) == ("Be kind, be brief.", "Hello to you.")


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ([], ("Hm.", "Hello.")),
        ([{"role": "assistant", "content": ""}], ("Hm.", "Hello.")),
        ([{"content": "Hel"}, {"content": "lo."}], ("", "Hello.")),
        ([{"reasoning_content": "Hm."}], ("Hm.", "")),
        ([{"tool_calls": [{"index": 0, "id": "1", "function": {"name": "add", "arguments": "{}"}}]}], ("", "")),
    ],
)
def test_a_whole_message_at_the_end_of_a_stream_counts_only_if_nothing_came_before(
    deltas: list[dict[str, Any]], expected: tuple[str, str]
) -> None:
    message = {"role": "assistant", "content": "Hello.", "reasoning_content": "Hm."}
    last = {"index": 0, "delta": {}, "message": message, "finish_reason": "stop"}
    chunks = [*(chunk(**delta) for delta in deltas), {"choices": [last]}]
    assert streamed(chunks) == expected
    accumulator = ChatAccumulator()
    for each in chunks:
        accumulator.add(each)
    assert split_reasoning(accumulator.reply()) == expected


async def test_usage_is_none_if_the_server_did_not_send_it(scripted_server: ScriptedServer, client: LLMClient) -> None:
    scripted_server.script(answer("Hello."), reply(200, a_reply("Hello.")))
    assert (await collect(await client.chat_completion(MESSAGES, stream=True)))["usage"] is None
    assert (await client.chat_completion(MESSAGES)).get("usage") is None


@pytest.mark.parametrize(("piece", "size"), [(" " * 200, 1_000), ("<think>", 1_000), ("</think>", 1_000)])
def test_the_time_to_split_pieces_is_linear(piece: str, size: int) -> None:
    def split(count: int) -> None:
        splitter = ReasoningSplitter()
        chunk = {"choices": [{"index": 0, "delta": {"content": piece}}]}
        for _ in range(count):
            splitter.feed(chunk)
        splitter.close()

    assert_linear(split, size)


def test_white_space_at_the_start_is_kept_in_an_answer_and_dropped_before_reasoning() -> None:
    def pieces(*texts: str) -> list[tuple[str, str]]:
        splitter = ReasoningSplitter()
        fed = [each for text in texts for each in splitter.feed({"choices": [{"delta": {"content": text}}]})]
        return [*fed, *splitter.close()]

    assert pieces(" ", "\n", " Hi", ".") == [("text", " \n Hi"), ("text", ".")]
    assert pieces(" ", "\n", "<th", "at") == [("text", " \n<that")]
    assert pieces(" ", "\n", "<th", "ink>Hm.") == [("reasoning", "Hm.")]
    assert pieces(" ", "\n") == [("text", " \n")]
