"""Separates the reasoning of a model from its answer, wherever the server puts it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, ClassVar, Final, Literal, NamedTuple

from lmbridge._checks import MAPPING_TYPES, wrong_type
from lmbridge.client import harmony
from lmbridge.client.content_parts import sort_content, text_of_part
from lmbridge.errors import LLMValidationError


class ReasoningMarkers(NamedTuple):
    """The texts around the reasoning of a model, for servers that leave it in the content of a reply."""

    opening: str
    """The text before the reasoning."""
    closing: str
    """The text after the reasoning."""
    is_opened_by_prompt: bool = True
    """Whether chat templates open the block in the prompt, so that a reply may contain only the closing text. If so,
    `split_reasoning` takes everything before that closing text for reasoning. Default: True."""


HARMONY: Final = ReasoningMarkers("<|channel|>analysis<|message|>", "<|end|>", is_opened_by_prompt=False)
_DEFAULT_MARKERS: Final = (
    ReasoningMarkers("<think>", "</think>"),
    ReasoningMarkers("[THINK]", "[/THINK]", is_opened_by_prompt=False),
    HARMONY,
    ReasoningMarkers("<|channel>thought\n", "<channel|>", is_opened_by_prompt=False),
    ReasoningMarkers("<seed:think>", "</seed:think>"),
    ReasoningMarkers("<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningMarkers("<|inner_prefix|>", "<|inner_suffix|>"),
    ReasoningMarkers("◁think▷", "◁/think▷"),
)


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

    Reasoning is:

    - whatever arrives in the field `reasoning_content` (llama.cpp, LM Studio, DeepSeek), `reasoning` (Ollama, newer
      vLLM, gpt-oss in LM Studio) or `thinking`, or in a part of the content that has such a type (Mistral);
    - a block between two markers, such as `<think>` and `</think>`, at the very start of the content, even if chunks
      cut a marker in two. A block that is never closed is reasoning to the end. Markers further on are text. White
      space around the block is dropped.

    If the reply has several answers, only the first one (`index` 0) is split. The chunks are not changed.

    Args:
        starts_in_reasoning: Set this if the content begins inside a block. The chat templates of some models open the
            block in the prompt, so that the reply has only the `</think>`. The option has no effect once the server
            has sent reasoning in a separate field. Default: False.
        markers: The markers of the block: `ReasoningMarkers`, or pairs of an opening and a closing text. Default:
            `DEFAULT_MARKERS`.

    Raises:
        LLMValidationError: The markers are not pairs of texts.
    """

    DEFAULT_MARKERS: ClassVar[tuple[ReasoningMarkers, ...]] = _DEFAULT_MARKERS
    """The markers that are recognized by default, in this order: those of DeepSeek, Qwen and most other models; of
    Mistral's models; of gpt-oss, whose other channels are read as well; of Gemma 4; of Seed-OSS; of Cohere's models; of
    Apertus; and of Kimi's older models."""

    __slots__ = (
        "_blanks",
        "_block",
        "_harmony",
        "_has_begun",
        "_held_back",
        "_markers",
        "_pieces",
        "_starts_in_reasoning",
        "_state",
    )

    def __init__(
        self, *, starts_in_reasoning: bool = False, markers: Iterable[tuple[str, str] | ReasoningMarkers] | None = None
    ) -> None:
        self._markers = _markers_of(markers)
        self._state: Literal["start", "in_block", "after_block", "in_text", "in_harmony"] = "start"
        # The white space at the start of the content, in pieces.
        self._blanks: list[str] = []
        # The end of the content so far, if it may be the beginning of a marker.
        self._held_back = ""
        # The markers that may close the block.
        self._block: tuple[ReasoningMarkers, ...] = ()
        self._harmony: harmony.HarmonyReader | None = None
        self._pieces: list[Piece] = []
        self._starts_in_reasoning = starts_in_reasoning
        # Whether a piece of the answer has arrived.
        self._has_begun = False

    def feed(self, chunk: Mapping[str, Any]) -> list[Piece]:
        """Returns the pieces that a chunk adds.

        Args:
            chunk: A chunk of a chat completion, or a whole reply, which counts as a single chunk.
        """
        pieces: list[Piece] = []
        for choice in _choices_in(chunk):
            if choice.get("index"):
                continue
            # Some servers send the whole message in place of all deltas, and others repeat it after them.
            part = choice.get("delta") or (None if self._has_begun else choice.get("message"))
            if not isinstance(part, Mapping):
                continue
            if part.get("tool_calls"):
                self._has_begun = True
                if len(part) == 1:
                    continue
            reasoning, content = _texts_in(part)
            self._has_begun = self._has_begun or bool(reasoning or content)
            if reasoning:
                self._starts_in_reasoning = False
                pieces.append(Piece("reasoning", reasoning))
            if content:
                pieces += self._split_content(content)
        return pieces

    def close(self) -> list[Piece]:
        """Returns pieces that were held back because they could have become a marker. Call it after the last chunk."""
        if self._harmony is not None:
            self._harmony.close()
            return self._take_pieces()
        held_back, self._held_back = "".join([*self._blanks, self._held_back]), ""
        self._blanks.clear()
        if not held_back:
            return []
        in_block = self._state == "in_block" or (self._state == "start" and self._starts_in_reasoning)
        return [Piece("reasoning" if in_block else "text", held_back)]

    def _split_content(self, content: str) -> list[Piece]:
        if self._state == "in_text":
            return [Piece("text", content)]
        if self._harmony is not None:
            self._harmony.feed(content)
            return self._take_pieces()
        content = self._held_back + content
        self._held_back = ""
        if self._state == "start":
            return self._split_start(content)
        if self._state == "in_block":
            return self._split_block(content)
        return self._split_text(content)

    def _split_start(self, content: str) -> list[Piece]:
        start = content.lstrip()
        self._blanks.append(content[: len(content) - len(start)])
        if not start:
            return []
        if HARMONY in self._markers and start.startswith(harmony.OPENINGS):
            self._blanks.clear()
            self._state = "in_harmony"
            self._harmony = harmony.HarmonyReader(lambda kind, text: self._pieces.append(Piece(kind, text)))
            return self._split_content(start)
        for marker in self._markers:
            if start.startswith(marker.opening):
                self._blanks.clear()
                self._state, self._block = "in_block", (marker,)
                return self._split_block(start.removeprefix(marker.opening))
        if any(opening.startswith(start) for opening in _openings(self._markers)):
            self._held_back = start
            return []
        content = "".join([*self._blanks, start])
        self._blanks.clear()
        if self._starts_in_reasoning:
            self._state, self._block = "in_block", self._markers
            return self._split_block(content)
        self._state = "in_text"
        return [Piece("text", content)]

    def _split_block(self, content: str) -> list[Piece]:
        closings = _closings(self._block)
        begin, closing = _first_of(closings, content)
        if closing:
            reasoning, rest = content[:begin], content[begin + len(closing) :]
            self._state = "after_block"
        else:
            kept = len(content) - _length_of_partial_marker(content, closings)
            reasoning, rest, self._held_back = content[:kept], "", content[kept:]
        pieces = [Piece("reasoning", reasoning)] if reasoning else []
        return pieces + self._split_text(rest)

    def _split_text(self, content: str) -> list[Piece]:
        text = content.lstrip()
        if not text:
            return []
        self._state = "in_text"
        return [Piece("text", text)]

    def _take_pieces(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def split_reasoning(
    reply: Mapping[str, Any], *, markers: Iterable[tuple[str, str] | ReasoningMarkers] | None = None
) -> SplitReply:
    """Returns the reasoning and the text of a whole reply, which a plain call or `collect` has returned.

    For example::

        reasoning, text = split_reasoning(await client.chat_completion(messages))

    The rules are those of `ReasoningSplitter`, with one more: content before a `</think>` that was never opened is
    reasoning. A `ReasoningSplitter` cannot apply that rule, because a stream has handed out that content as text by the
    time the tag arrives.

    Args:
        reply: A chat completion. It is not changed. Parts that do not have the shape of a reply count as missing.
        markers: The markers around reasoning in the content: `ReasoningMarkers`, or pairs of an opening and a closing
            text. Default: `ReasoningSplitter.DEFAULT_MARKERS`.

    Raises:
        LLMValidationError: The reply is not a dict, or the markers are not pairs of texts.
    """
    if not isinstance(reply, MAPPING_TYPES):
        raise wrong_type("reply", "the dict of a chat completion", reply, "give what chat_completion() returned")
    known = _markers_of(markers)
    choice: Mapping[str, Any] = next(iter(_choices_in(reply)), {})
    message = choice.get("message")
    reasoning, content = _texts_in(message) if isinstance(message, MAPPING_TYPES) else ("", "")
    if not choice.get("index") and not any(sign in content for sign in _signs(known)):
        # The fast path: nearly every content is empty, or a text that cannot have a marker in it.
        return SplitReply(reasoning, content)
    splitter = ReasoningSplitter(starts_in_reasoning=_begins_in_block(content, known), markers=known)
    parts: dict[str, list[str]] = {"reasoning": [], "text": []}
    for piece in (*splitter.feed(reply), *splitter.close()):
        parts[piece.kind].append(piece.text)
    return SplitReply("".join(parts["reasoning"]), "".join(parts["text"]))


def _begins_in_block(content: str, markers: tuple[ReasoningMarkers, ...]) -> bool:
    """Returns whether the content has a closing marker whose opening marker may have been in the prompt instead."""
    openable = tuple(marker for marker in markers if marker.is_opened_by_prompt)
    begin, closing = _first_of(_closings(openable), content)
    return bool(closing) and all(
        content.find(marker.opening, 0, begin) < 0 for marker in openable if marker.closing == closing
    )


def _markers_of(markers: Iterable[tuple[str, str] | ReasoningMarkers] | None) -> tuple[ReasoningMarkers, ...]:
    """Returns markers in their checked form.

    Raises:
        LLMValidationError: They are not pairs of texts.
    """
    if markers is None or markers is _DEFAULT_MARKERS:
        return _DEFAULT_MARKERS
    pairs = tuple(markers)
    for number, pair in enumerate(pairs):
        texts = pair[:2] if isinstance(pair, tuple) else ()
        if len(texts) != 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise LLMValidationError(
                f"markers[{number}] must be a pair of an opening and a closing text, not {pair!r}",
                hint="for example markers=[*ReasoningSplitter.DEFAULT_MARKERS, ('<reasoning>', '</reasoning>')]",
            )
    return tuple(pair if isinstance(pair, ReasoningMarkers) else ReasoningMarkers(*pair) for pair in pairs)


@lru_cache(maxsize=64)
def _openings(markers: tuple[ReasoningMarkers, ...]) -> tuple[str, ...]:
    openings = tuple(marker.opening for marker in markers)
    return openings + (harmony.OPENINGS if HARMONY in markers else ())


@lru_cache(maxsize=64)
def _closings(markers: tuple[ReasoningMarkers, ...]) -> tuple[str, ...]:
    """Returns the markers that close a block."""
    return tuple(marker.closing for marker in markers if marker != HARMONY)


@lru_cache(maxsize=64)
def _signs(markers: tuple[ReasoningMarkers, ...]) -> tuple[str, ...]:
    """Returns the characters with which markers begin. A content without any of them has no marker."""
    return tuple({marker[0]: None for marker in _openings(markers) + _closings(markers)})


def _first_of(closings: tuple[str, ...], content: str) -> tuple[int, str]:
    """Returns where the first of these markers begins in the content, and the marker, or "" if none occurs.

    In a long text, a search for each marker is much faster than a regular expression for all of them.
    """
    first, found = len(content), ""
    for closing in closings:
        begin = content.find(closing, 0, first + len(closing) - 1)
        if begin >= 0:
            first, found = begin, closing
    return first, found


def _length_of_partial_marker(content: str, markers: tuple[str, ...]) -> int:
    """Returns how many characters at the end of the content may be the beginning of one of the markers."""
    longest = 0
    for marker in markers:
        start = len(content) - len(marker) + 1
        # The first character of a marker is rare in a text.
        while (start := content.find(marker[0], max(start, 0))) >= 0:
            if marker.startswith(content[start:]):
                longest = max(longest, len(content) - start)
                break
            start += 1
    return longest


def _choices_in(chunk: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    choices = chunk.get("choices")
    if not isinstance(choices, (list, tuple)):
        return []
    return [choice for choice in choices if isinstance(choice, MAPPING_TYPES)]


def _texts_in(part: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the reasoning and the content of a message, or of a piece of one."""
    content = part.get("content")
    reasoning = text_of_part(part.get("reasoning_content") or part.get("reasoning") or part.get("thinking"))
    if isinstance(content, str):
        return reasoning, content
    sorted_content = sort_content(content)
    return reasoning + sorted_content.reasoning, sorted_content.text
