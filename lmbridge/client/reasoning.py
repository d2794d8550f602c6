"""What a model thinks, told apart from what it answers, wherever the server puts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

_OPEN: Final = "<think>"
_CLOSE: Final = "</think>"


class Piece(NamedTuple):
    """Some of a reply."""

    kind: Literal["reasoning", "text"]
    text: str


class SplitReply(NamedTuple):
    """A reply in two; either may be empty."""

    reasoning: str
    text: str


class ReasoningSplitter:
    """Tells reasoning from text while a reply arrives.

    Reasoning is what stands in `reasoning_content` (llama.cpp, LM Studio, DeepSeek) or `reasoning` (Ollama, newer
    vLLM, gpt-oss in LM Studio), and a `<think>` block at the very start of the content, cut anywhere between chunks.
    Further tags in the text are text; a block without an end is reasoning to the end. White space around the block is
    nobody's. Chunks are only read. Of several answers it is the first (`index` 0).

    Args:
        starts_in_reasoning: Whether the content begins inside a block: the templates of some models open it in the
            prompt, so that only the `</think>` is sent. It does not count once the server sends reasoning by itself.
    """

    __slots__ = ("_held", "_starts_inside", "_state")

    def __init__(self, *, starts_in_reasoning: bool = False) -> None:
        self._state: Literal["start", "inside", "behind", "text"] = "start"
        self._held = ""  # what may be half a tag, or the white space before it
        self._starts_inside = starts_in_reasoning

    def feed(self, chunk: Mapping[str, Any]) -> list[Piece]:
        """The pieces that a chunk adds; a whole reply is a chunk as well."""
        pieces: list[Piece] = []
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue
            part = choice.get("delta") or choice.get("message") or {}
            if len(part) == 1 and "tool_calls" in part:
                continue
            reasoning, content = part.get("reasoning_content") or part.get("reasoning"), part.get("content")
            if reasoning and isinstance(reasoning, str):
                self._starts_inside = False
                pieces.append(Piece("reasoning", reasoning))
            if content and isinstance(content, str):
                pieces += self._split(content)
        return pieces

    def close(self) -> list[Piece]:
        """The pieces that were held back, because they might have become a tag: call it when the reply has ended."""
        held, self._held = self._held, ""
        if not held:
            return []
        inside = self._state == "inside" or (self._state == "start" and self._starts_inside)
        return [Piece("reasoning" if inside else "text", held)]

    def _split(self, content: str) -> list[Piece]:
        if self._state == "text":
            return [Piece("text", content)]
        content = self._held + content
        self._held = ""
        if self._state == "start":
            return self._begin(content)
        if self._state == "inside":
            return self._think(content)
        return self._answer(content)

    def _begin(self, content: str) -> list[Piece]:
        begun = content.lstrip()
        if begun.startswith(_OPEN):
            self._state = "inside"
            return self._think(begun.removeprefix(_OPEN))
        if _OPEN.startswith(begun):
            self._held = content
            return []
        self._state = "inside" if self._starts_inside else "text"
        return self._think(content) if self._starts_inside else [Piece("text", content)]

    def _think(self, content: str) -> list[Piece]:
        reasoning, close, rest = content.partition(_CLOSE)
        if close:
            self._state = "behind"
        else:
            half = _half_a_tag(content)
            reasoning, self._held = content[: len(content) - half], content[len(content) - half :]
        pieces = [Piece("reasoning", reasoning)] if reasoning else []
        return pieces + self._answer(rest)

    def _answer(self, content: str) -> list[Piece]:
        text = content.lstrip()
        if not text:
            return []
        self._state = "text"
        return [Piece("text", text)]


def split_reasoning(reply: Mapping[str, Any]) -> SplitReply:
    """The reasoning and the text of a reply, be it of a plain call or out of `collect`; the reply is only read.

    It is what `ReasoningSplitter` makes of the chunks. In addition, what stands before a `</think>` that nothing
    opened is reasoning: of a whole reply that can be told, of a stream only if it is known before.

    Args:
        reply: A chat completion.
    """
    choices = reply.get("choices") or ()
    message = (choices[0].get("message") or {}) if choices else {}
    content = message.get("content")
    if not content and not (choices and choices[0].get("index")):
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        return SplitReply(reasoning if isinstance(reasoning, str) else "", "")
    before, close, _after = (content if isinstance(content, str) else "").partition(_CLOSE)
    splitter = ReasoningSplitter(starts_in_reasoning=bool(close) and _OPEN not in before)
    said: dict[str, str] = {"reasoning": "", "text": ""}
    for piece in (*splitter.feed(reply), *splitter.close()):
        said[piece.kind] += piece.text
    return SplitReply(**said)


def _half_a_tag(content: str) -> int:
    """How many characters at the end may be the beginning of the closing tag."""
    sizes = range(min(len(content), len(_CLOSE) - 1), 0, -1)
    return next((size for size in sizes if _CLOSE.startswith(content[-size:])), 0)
