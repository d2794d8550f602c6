"""Replies in the Harmony format of gpt-oss, from servers that leave it in the content."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmbridge import ReasoningSplitter, split_reasoning

CALL = "<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"


def a_reply(content: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}


def streamed(pieces: list[str]) -> tuple[str, str]:
    splitter = ReasoningSplitter()
    chunks = [{"choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    found = [piece for chunk in chunks for piece in splitter.feed(chunk)] + splitter.close()
    assert all(piece.text for piece in found)
    reasoning, text = ("".join(piece.text for piece in found if piece.kind == kind) for kind in ("reasoning", "text"))
    return reasoning, text


@pytest.mark.parametrize(
    ("content", "reasoning", "text"),
    [
        # The example of the documentation.
        (
            "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>4.<|return|>",
            "Simple.",
            "4.",
        ),
        # llama.cpp leaves out the ends.
        ("<|channel|>analysis<|message|>Hm.<|start|>assistant<|channel|>final<|message|>Hello", "Hm.", "Hello"),
        ("<|channel|>analysis<|message|>Hm.<|channel|>final<|message|>Hello", "Hm.", "Hello"),
        ("\n<|start|>assistant<|channel|>final<|message|>Hello<|end|>", "", "Hello"),
        ("<|channel|>analysis<|message|>Hm.<|end|>Hello", "Hm.", "Hello"),
        ("<|channel|>final <|constrain|>JSON<|message|>{}<|return|>", "", "{}"),
        ("<|channel|>commentary<|message|>Let me see.<|end|>", "", "Let me see."),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>", "a\nb", ""),
        ("<|channel|>commentary<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "", "a\nb"),
        # A call is left as it is.
        (CALL, "", CALL),
        (f"<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant{CALL}", "Hm.", f"<|start|>assistant{CALL}"),
        (CALL.replace("commentary", "analysis"), "", CALL.replace("commentary", "analysis")),
        # Replies that were cut off.
        ("<|channel|>analysis<|message|>1 <| 2 <|en", "1 <| 2 <|en", ""),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assis", "Hm.", ""),
        ("<|channel|>analysis<|message|>Hm.<|end|><|sta", "Hm.", ""),
        ("<|channel|>anal", "", "<|channel|>anal"),
        ("<|chan", "", "<|chan"),
        # Headers without the token that ends them.
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final The answer is 4.",
            "Hm.",
            "The answer is 4.",
        ),
        ("<|channel|>analysis<|message|>Hm.<|end|><|channel|>analysis So.", "Hm.\nSo.", ""),
        ("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant The answer is 4.", "Hm.", "The answer is 4."),
        ("<|channel|>analysis<|message|>Hm.<|end|><|channel|>final <|constrain|>json {}", "Hm.", "{}"),
        ("<|channel|>final<|message|>a <|channel|> b", "", "a <|channel|> b"),
        ("<|channel|>final<|message|>a <|channel|>", "", "a "),
        ("<|channel|>analysis<|message|>Hm.<|end|><|channel|>final<|mess", "Hm.", ""),
        ("<|channel|>analysis<|message|>Hm.<|end|><|channel|>fin", "Hm.", ""),
        ("<|channel|>analysis<|message|>Hm.<|end|><|channel|>commentary to=f <|constrain|>json", "Hm.", ""),
        # What is not in this format is text.
        ("<|channel|>" + "x" * 600, "", "<|channel|>" + "x" * 600),
        ("See <|channel|>analysis<|message|>Hm.<|end|>", "", "See <|channel|>analysis<|message|>Hm.<|end|>"),
    ],
)
def test_the_channels_decide_what_is_reasoning(content: str, reasoning: str, text: str) -> None:
    assert split_reasoning(a_reply(content)) == (reasoning, text)
    assert streamed([content]) == (reasoning, text)
    assert streamed(list(content)) == (reasoning, text)


TOKENS = [
    "<|channel|>",
    "<|message|>",
    "<|end|>",
    "<|start|>",
    "<|call|>",
    "analysis",
    "final",
    " to=f",
    "<|",
    "\n",
    "a",
]


@given(
    content=st.lists(st.sampled_from(TOKENS)).map(lambda parts: "<|channel|>" + "".join(parts)),
    cuts=st.lists(st.integers(0, 120)),
)
def test_a_reply_is_read_alike_wherever_it_is_cut(content: str, cuts: list[int]) -> None:
    bounds = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    assert streamed([content[start:end] for start, end in pairwise(bounds)]) == split_reasoning(a_reply(content))
