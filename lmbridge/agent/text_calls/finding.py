"""Finds the tool calls in a reply that a model wrote as text, because the server did not parse them.

A call in a text may be only quoted, and not meant to be made. `quotations` recognizes that by the text around the
call. If one call is quoted, the whole reply counts as an ordinary answer, because its other calls may depend on that
one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from lmbridge.agent.argument_json import decode_written_at
from lmbridge.agent.text_calls.call_reader import CallReader, Region, TextCall
from lmbridge.agent.text_calls.quotations import is_quoted, speaks_about_calls
from lmbridge.agent.text_calls.syntaxes import (
    MARKS,
    OPENING,
    OPENING_WITHOUT_WORDS,
    SYNTAX_OF,
    UNMARKED,
    WORDS,
    begins_line,
)
from lmbridge.client.reasoning import split_reasoning
from lmbridge.client.tool_call_accumulator import generated_call_id

# Matches tokens of chat templates, except for those with which a call begins, such as `<|python_tag|>`.
_TEMPLATE_TOKEN: Final = re.compile(
    r"<\|(?!python|tool|sep\|)[\w/-]{1,40}\|>|</?s>|<(?:end|start)_of_turn>|<\uff5c(?!tool)[^\uff5c<>\n]{1,40}\uff5c>"
)
_LONGEST_TOKEN: Final = 44
_MOST_TOKENS: Final = 1_000
"""The largest number of tokens of a chat template that are removed from the end of a text."""
_SPACES_AT_ONCE: Final = 1_000
"""How many characters are searched for white space at a time, so that the whole text need not be copied."""
_FENCE_LINE: Final = re.compile(r"^[ \t]{0,3}(`{3,}+|~{3,}+)[ \t]*+([^\n`]*+)$", re.MULTILINE)
_FENCES_OF_CALLS: Final = ("", "json", "jsonc", "json5", "xml", "text", "txt", "plaintext", "tool", "python", "py")
_NEXT_OBJECT: Final = re.compile(r"\s*\{")
_BEGINNING_OF_HARMONY: Final = re.compile(
    r"(?:<\|start\|>)?(?:assistant)?\s{0,20}+(?:<\|channel\|>)?\s{0,20}+(?:commentary|analysis)?\s{0,20}+\Z"
)
LONGEST_TEXT_OF_CALLS: Final = 500_000
"""The number of characters beyond which a reply is not searched for calls. It has more than 100,000 tokens."""
_MOST_MISTAKEN_CANDIDATES: Final = 50
"""After this many pieces of JSON or code that turned out not to be calls, no more of them are read."""


class TextCalls(NamedTuple):
    """The calls in a reply."""

    text: str
    """The text before the calls. The text after them is left out: it was written before there were any results."""
    calls: list[TextCall]
    """The calls, in order."""
    has_prose: bool
    """Whether there is any text before, between or after the calls."""
    ends_text: bool
    """Whether the reply ends with these calls."""
    is_bare: bool
    """Whether at least one of the calls has no tags or other marks of a call."""


class _Fence(NamedTuple):
    """A fenced code block."""

    start: int
    """The position of the line that opens the block."""
    content: int
    """The position of the content."""
    content_end: int
    """The position after the content."""
    end: int
    """The position after the line that closes the block."""
    info: str
    """The text after the opening fence, such as "json", in lower case."""


class _Fences:
    """Finds the fenced code block around a position of a text. Positions have to be passed in ascending order."""

    def __init__(self, text: str) -> None:
        self._text = text
        # No block that matters opens before this position.
        self._position = 0 if "```" in text or "~~~" in text else len(text)
        # The last position for which `around` found no block. It is on the same line as `_position`, or at its end.
        self._asked = self._position
        self._fence: _Fence | None = None

    def around(self, position: int) -> _Fence | None:
        """Returns the block whose content contains a position, or None."""
        while self._fence is None or self._fence.content_end <= position:
            opening = self._next_opening(position)
            if opening is None:
                return None
            self._fence = self._find_end(opening)
            self._position = self._asked = self._fence.end
        return self._fence if self._fence.content <= position else None

    def skip_to(self, position: int) -> None:
        """Skips the blocks before a position, because the text up to there has been read as calls."""
        self._position = self._asked = max(self._position, position)
        self._fence = None

    def _next_opening(self, position: int) -> re.Match[str] | None:
        """Returns the next line that opens a block and ends before a position, or None.

        No line is searched twice. Otherwise the time would grow with the square of the length of a reply that is full
        of openings of calls.
        """
        line_break = self._text.rfind("\n", self._asked, position)
        if line_break < 0:
            # This position is on the same line as the last one, so only this line can open a block.
            opening = _FENCE_LINE.match(self._text, self._position, position)
        else:
            opening = _FENCE_LINE.search(self._text, self._position, position)
        if opening is None:
            self._asked = max(self._asked, position)
            if line_break >= 0:
                self._position = line_break + 1
        return opening

    def _find_end(self, opening: re.Match[str]) -> _Fence:
        """Returns the block that a line opens. A block that is never closed extends to the end of the text."""
        content, info = opening.end() + 1, opening[2].strip().lower()
        for line in _FENCE_LINE.finditer(self._text, content):
            if line[1].startswith(opening[1]) and not line[2].strip():
                return _Fence(opening.start(), content, line.start(), line.end(), info)
        return _Fence(opening.start(), content, len(self._text), len(self._text), info)


def may_have_calls(text: str) -> bool:
    """Returns False if a quick check shows that a text has no calls."""
    return any(mark in text for mark in MARKS) or any(words in text for words in UNMARKED)


def read_text_calls(text: str, *, repairs: bool = True, may_be_cut: bool = False) -> TextCalls | None:
    """Returns the calls in a reply, or None if it counts as an ordinary answer.

    It does if it has no calls, or if one of them is quoted or cannot be read.

    Args:
        text: The whole reply. It may begin with the model's reasoning.
        repairs: Whether JSON with small mistakes is read as well.
        may_be_cut: Whether the end of the reply may have been cut off.
    """
    if not may_have_calls(text):
        return None
    text = without_template_tokens(text.strip())
    first = _opening_pattern_for(text).search(text)
    if first is None:
        return None
    if first.start() > 0:
        # A text that begins with a call is not split, because tags of reasoning in the arguments of a call must stay.
        text = split_reasoning({"choices": [{"message": {"content": text}}]}).text.strip()
    reader = CallReader(text, repairs=repairs, may_be_cut=may_be_cut)
    try:
        regions = list(_regions_in(text, reader))
    except ValueError:
        # One of the calls is quoted or cannot be read. None is made, because the others may depend on this one.
        return None
    return _calls_in_regions(text, regions) if regions else None


def read_calls_in_reasoning(reasoning: str, *, repairs: bool = True, may_be_cut: bool = False) -> TextCalls | None:
    """Returns the calls at the end of the reasoning of a reply without an answer, or None.

    Models also think about calls that they do not make. So the calls count only if nothing follows them.
    """
    if not may_have_calls(reasoning):
        return None
    found = read_text_calls(reasoning, repairs=repairs, may_be_cut=may_be_cut)
    return found if found is not None and found.ends_text else None


def has_quoted_calls(text: str) -> bool:
    """Returns whether a text has calls that can be read, but are only quoted."""
    text = without_template_tokens(text.strip())
    if not may_have_calls(text) or len(text) > LONGEST_TEXT_OF_CALLS:
        return False
    try:
        regions = list(_regions_in(text, CallReader(text, repairs=False, may_be_cut=True)))
    except _QuotedCallError:
        return True
    except ValueError:
        return False
    return bool(regions) and _calls_in_regions(text, regions) is None


class _QuotedCallError(ValueError):
    """A call is not meant to be made."""


def _regions_in(text: str, reader: CallReader) -> Iterator[Region]:
    """Yields the parts of a text that consist of calls.

    Raises:
        ValueError: A call cannot be read, or is not meant to be made.
    """
    position, mistakes = 0, 0
    fences = _Fences(text)
    pattern = _opening_pattern_for(text)
    while (opening := pattern.search(text, position)) is not None:
        start = opening.start()
        is_bare = opening[0] not in SYNTAX_OF
        fence = fences.around(start)
        if is_bare and not (begins_line(text, start) or _begins_fence(text, start, fence)):
            position = opening.end()
            continue
        if text[start - 1 : start] == "`" and not text.startswith("`", start):
            # The opening is only mentioned, as in "`<tool_call>`".
            position = opening.end()
            continue
        region = reader.read(start) if mistakes < _MOST_MISTAKEN_CANDIDATES or not is_bare else None
        if region is None:
            mistakes += is_bare
            position = opening.end()
            continue
        if fence is not None:
            region = _whole_fence(text, region, fence)
        yield region
        position = region.end
        fences.skip_to(position)


def _opening_pattern_for(text: str) -> re.Pattern[str]:
    return OPENING if any(word in text for word in WORDS) else OPENING_WITHOUT_WORDS


def _begins_fence(text: str, start: int, fence: _Fence | None) -> bool:
    """Returns whether a position is the beginning of the content of a fenced block."""
    return fence is not None and not text[fence.content : start].strip()


def _whole_fence(text: str, region: Region, fence: _Fence) -> Region:
    """Returns the region of calls in a fenced block, extended to the whole block.

    Raises:
        _QuotedCallError: The block contains something else as well, or is in a language in which calls are not written.
    """
    is_whole = not text[fence.content : region.start].strip() and not text[region.end : fence.content_end].strip()
    if not is_whole or not (fence.info in _FENCES_OF_CALLS or fence.info.startswith("tool")):
        raise _QuotedCallError
    return region._replace(start=fence.start, end=max(fence.end, region.end), is_bare=True)


def _calls_in_regions(text: str, regions: Sequence[Region]) -> TextCalls | None:
    """Returns the calls of all regions, or None if the text around them shows that they are not meant to be made."""
    prose = [text[: regions[0].start]]
    prose += [text[one.end : other.start] for one, other in pairwise(regions)]
    prose.append(text[regions[-1].end :])
    if regions[0].calls and "to=" in text[regions[0].start : regions[0].start + 60]:
        prose[0] = _BEGINNING_OF_HARMONY.sub("", prose[0])
    for before, region, after in zip(prose, regions, prose[1:], strict=False):
        if is_quoted(before, after, is_bare=region.is_bare):
            return None
    if any(speaks_about_calls(each) for each in prose):
        return None
    has_prose = any(each.strip() for each in prose)
    calls = [call for region in regions for call in region.calls]
    is_bare = any(region.is_bare for region in regions)
    return TextCalls(prose[0].strip(), calls, has_prose, not prose[-1].strip(), is_bare)


def without_template_tokens(text: str) -> str:
    """Returns a text after the removal of chat template tokens, such as `<|im_end|>`, and white space from its end."""
    end = _end_before_spaces(text, len(text))
    for _ in range(_MOST_TOKENS):
        begin = text.rfind("<", max(0, end - _LONGEST_TOKEN), end)
        if begin < 0 or not _TEMPLATE_TOKEN.fullmatch(text, begin, end):
            break
        end = _end_before_spaces(text, begin)
    return text[:end]


def _end_before_spaces(text: str, end: int) -> int:
    """Returns the position after the last character before `end` that is not white space."""
    while end:
        begin = max(0, end - _SPACES_AT_ONCE)
        if rest := text[begin:end].rstrip():
            return begin + len(rest)
        end = begin
    return 0


def without_repetition(arguments: str) -> str:
    """Returns the arguments of a call without the repetitions, if they consist of the same JSON object several times.

    Servers send the arguments twice if they repeat all of them at the end of a stream (vLLM, Mistral). Any other text
    is returned unchanged.
    """
    text = arguments.strip()
    try:
        first, end = decode_written_at(text)
        position = end
        while (more := _NEXT_OBJECT.match(text, position)) is not None:
            again, position = decode_written_at(text, more.end() - 1)
            if again != first:
                return arguments
    except (ValueError, RecursionError):
        return arguments
    return text[:end] if isinstance(first, dict) and end < position == len(text) else arguments


def to_wire_call(name: str, arguments: str | None, *, is_repaired: bool = False) -> Mapping[str, Any]:
    """Returns a call in the form of an entry of a message's `tool_calls`, with a new id.

    Args:
        name: The name of the tool in requests.
        arguments: The arguments as JSON. None means a call without arguments, which becomes an empty text:
            `Toolset.read` decides whether the tool can be called without any.
        is_repaired: Whether the call was repaired. The entry then has `"repaired": True`.
    """
    function = {"name": name, "arguments": "" if arguments is None else without_repetition(arguments)}
    call = {"id": generated_call_id(), "type": "function", "function": function}
    return {**call, "repaired": True} if is_repaired else call
