"""Separates the reasoning of a model from its answer, wherever the server puts it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from lmbridge._checks import wrong_type
from lmbridge.client.content import sort_content, text_of_part

_OPENING_TAG: Final = "<think>"
_CLOSING_TAG: Final = "</think>"


class Piece(NamedTuple):
    """A piece of a reply that belongs to its reasoning or to its text."""

    kind: Literal["reasoning", "text"]
    """The part of the reply to which the piece belongs."""
    text: str
    """The characters of the piece, which are never empty."""


class SplitReply(NamedTuple):
    """The two parts of a whole reply."""

    reasoning: str
    """The reasoning, without its tags. It is empty if the model did not reason."""
    text: str
    """The answer. It is empty if the model did not answer, for example because it called a tool."""


class ReasoningSplitter:
    """Separates the reasoning from the text while a reply arrives.

    For example::

        splitter = ReasoningSplitter()
        async for chunk in stream:
            for kind, text in splitter.feed(chunk):
                print(kind, text)
        for kind, text in splitter.close():
            print(kind, text)

    Reasoning is whatever arrives as `reasoning_content` (llama.cpp, LM Studio, DeepSeek), as `reasoning` (Ollama,
    newer vLLM, gpt-oss in LM Studio), as `thinking` or as a part of the content of that type (Mistral), and a `<think>`
    block at the very start of the content, even if chunks cut its tags in two. A block that is never closed is
    reasoning to the end; tags further on are text. White space around the block is dropped. Of several answers, only
    the first (`index` 0) is split. The chunks are not changed.

    Args:
        starts_in_reasoning: Set this if the content begins inside a block. The chat templates of some models open the
            block in the prompt, so that the reply has only the `</think>`. The option has no effect once the server
            has sent reasoning in a separate field. Default: False.
    """

    __slots__ = ("_held_back", "_leading_space", "_starts_in_reasoning", "_state")

    def __init__(self, *, starts_in_reasoning: bool = False) -> None:
        self._state: Literal["start", "in_block", "after_block", "in_text"] = "start"
        # The end of the content so far, if it may be the beginning of a tag, or the white space before one.
        self._held_back = ""
        # The white space at the start, as it arrived: joining it for each of its pieces would take quadratic time.
        self._leading_space: list[str] = []
        self._starts_in_reasoning = starts_in_reasoning

    def feed(self, chunk: Mapping[str, Any]) -> list[Piece]:
        """Returns the pieces that a chunk adds. A whole reply can be fed as if it were a single chunk."""
        pieces: list[Piece] = []
        for choice in _choices_in(chunk):
            if choice.get("index"):
                continue
            part = choice.get("delta") or choice.get("message")
            if not isinstance(part, Mapping) or (len(part) == 1 and "tool_calls" in part):
                continue
            reasoning, content = _texts_in(part)
            if reasoning:
                self._starts_in_reasoning = False
                pieces.append(Piece("reasoning", reasoning))
            if content:
                pieces += self._split_content(content)
        return pieces

    def close(self) -> list[Piece]:
        """Returns the pieces that were held back because they could have become a tag. Call it after the last chunk."""
        held_back, self._held_back = "".join([*self._leading_space, self._held_back]), ""
        self._leading_space.clear()
        if not held_back:
            return []
        in_block = self._state == "in_block" or (self._state == "start" and self._starts_in_reasoning)
        return [Piece("reasoning" if in_block else "text", held_back)]

    def _split_content(self, content: str) -> list[Piece]:
        if self._state == "in_text":
            return [Piece("text", content)]
        if self._state == "start" and not self._held_back and content.isspace():
            self._leading_space.append(content)
            return []
        content = "".join([*self._leading_space, self._held_back, content])
        self._leading_space.clear()
        self._held_back = ""
        if self._state == "start":
            return self._split_start(content)
        if self._state == "in_block":
            return self._split_block(content)
        return self._split_text(content)

    def _split_start(self, content: str) -> list[Piece]:
        start = content.lstrip()
        if start.startswith(_OPENING_TAG):
            self._state = "in_block"
            return self._split_block(start.removeprefix(_OPENING_TAG))
        if _OPENING_TAG.startswith(start):
            self._held_back = content
            return []
        if self._starts_in_reasoning:
            self._state = "in_block"
            return self._split_block(content)
        self._state = "in_text"
        return [Piece("text", content)]

    def _split_block(self, content: str) -> list[Piece]:
        reasoning, closing_tag, rest = content.partition(_CLOSING_TAG)
        if closing_tag:
            self._state = "after_block"
        else:
            kept = len(content) - _length_of_partial_tag(content)
            reasoning, self._held_back = content[:kept], content[kept:]
        pieces = [Piece("reasoning", reasoning)] if reasoning else []
        return pieces + self._split_text(rest)

    def _split_text(self, content: str) -> list[Piece]:
        text = content.lstrip()
        if not text:
            return []
        self._state = "in_text"
        return [Piece("text", text)]


def split_reasoning(reply: Mapping[str, Any]) -> SplitReply:
    """Returns the reasoning and the text of a whole reply, of a plain call or from `collect`.

    For example::

        reasoning, text = split_reasoning(await client.chat_completion(messages))

    The rules are those of `ReasoningSplitter`, with one more: content before a `</think>` that was never opened is
    reasoning. A `ReasoningSplitter` cannot apply that rule, because a stream has handed out that content as text by the
    time the tag arrives.

    Args:
        reply: A chat completion. It is not changed. What is not of the shape that a reply has counts as missing.

    Raises:
        LLMValidationError: The argument is not a dict.
    """
    if not isinstance(reply, Mapping):
        raise wrong_type("reply", "the dict of a chat completion", reply, "give what chat_completion() returned")
    choice: Mapping[str, Any] = next(iter(_choices_in(reply)), {})
    message = choice.get("message")
    reasoning, content = _texts_in(message) if isinstance(message, Mapping) else ("", "")
    if not content and not choice.get("index"):
        return SplitReply(reasoning, "")
    before, closing_tag, _ = content.partition(_CLOSING_TAG)
    splitter = ReasoningSplitter(starts_in_reasoning=bool(closing_tag) and _OPENING_TAG not in before)
    parts: dict[str, str] = {"reasoning": "", "text": ""}
    for piece in (*splitter.feed(reply), *splitter.close()):
        parts[piece.kind] += piece.text
    return SplitReply(**parts)


def _choices_in(chunk: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    choices = chunk.get("choices")
    return [choice for choice in choices if isinstance(choice, Mapping)] if isinstance(choices, list | tuple) else []


def _texts_in(part: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the reasoning and the content of a message, or of a piece of one."""
    content = part.get("content")
    reasoning = text_of_part(part.get("reasoning_content") or part.get("reasoning") or part.get("thinking"))
    if isinstance(content, str):
        return reasoning, content
    sorted_content = sort_content(content)
    return reasoning + sorted_content.reasoning, sorted_content.text


def _length_of_partial_tag(content: str) -> int:
    """Returns how many characters at the end of the content may be the beginning of a closing tag."""
    lengths = range(min(len(content), len(_CLOSING_TAG) - 1), 0, -1)
    return next((length for length in lengths if _CLOSING_TAG.startswith(content[-length:])), 0)
