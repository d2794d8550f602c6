"""Decides from the text around a tool call whether the call is only quoted, and not meant to be made.

An answer may explain the syntax of calls, quote a log, or show an example. The calls in it look exactly like others, so
only the text around them makes the difference: a call is quoted if it is within a sentence, a list, a quotation or a
structure, or next to a sentence that speaks about calls in general ("for example", "the server returns"). Only English
sentences of this kind are recognized; in other languages, only the form of the text decides.

A call that is taken for a quotation by mistake costs one more question to the model. A call that is made by mistake may
delete a file. One alternative was to make only calls that are the whole reply. That misses most calls of small models,
because they announce their calls. The other was to make every call that can be read.
"""

from __future__ import annotations

import re
from typing import Final

_EXAMINED_CHARACTERS: Final = 400
"""How many characters of the text next to calls are searched for words that speak about calls in general."""

_END_OF_SENTENCE: Final = re.compile(r"[.!?:;\u2026\u3002\uff01\uff1f\uff1a)\]>*_~`-]\s*\Z")
_LOG_OR_TRANSCRIPT: Final = re.compile(
    r"\d\d:\d\d|\b(?:DEBUG|INFO|WARNING|ERROR|TRACE)\b"
    r"|\b(?i:assistant|model|user|human|bot|ai|system|output|response|reply|content|prompt)\b"
    r"[\"'*]*\s*[:=]\s*[\"']?\Z"
)
_QUOTED_OR_LISTED: Final = re.compile(
    r"(?<!`)`\Z|[\"'\u201c\u2018\u00ab\u201e(|]\Z|[(|,][ \t]+\Z|\A[ \t]*(?:[-*+\u2022]|\d{1,3}[.)])[ \t]+\Z"
)
_IN_STRUCTURE: Final = re.compile(r"[\[{]\s*\Z|[}\]\"\d],\s*\Z|\"\s*:\s*\Z")
_IN_ELEMENT: Final = re.compile(r"<(?:pre|code|blockquote|samp|xmp)\b[^<>]{0,100}>\s*\Z", re.IGNORECASE)
_CONTINUES: Final = re.compile(
    r"\s*(?:[a-z\u00df-\u00f6\u00f8-\u00ff]|[,.;:!?)\]}|=+*/&%`'\"\u201d\u2019\u00bb\u2014\u2013-])"
)
_ACTORS: Final = (
    r"(?:models?|assistants?|servers?|clients?|llms?|agents?|parsers?|templates?|sdks?|librar(?:y|ies)|frameworks?"
    r"|runtimes?|loops?|prompts?|lmbridge|vllm|sglang|ollama|llama(?:\.cpp)?|lm studio|qwen\S*|hermes|mistral|gemma"
    r"|gpt\S*|deepseek\S*|claude|glm\S*|kimi\S*)"
)
_WRITES: Final = (
    r"(?:writes?|wrote|written|sends?|sent|emits?|emitted|returns?|returned|replies|replied|responds?|responded"
    r"|answers?|answered|produces?|produced|outputs?|generates?|generated|parses?|parsed|reads?|executes?|renders?"
    r"|rendered|expects?|turns?|receives?|sees?|recognizes?|understands?|would|should|must)"
)
_ABOUT_CALLS: Final = re.compile(
    r"\b(?:"
    r"for (?:example|instance)|e\.g\.|i\.e\.|examples?|snippets?|demonstrat\w+|illustrat\w+|hypothetical\w*"
    r"|placeholders?|markup|syntax(?! errors?)|verbatim|quoted|quotes?|chat template|notation|wire format|the form of"
    r"|pseudocode|(?:\w+'s|this|that|calling|native|hermes|qwen|mistral|json|tool[- ]call) formats?"
    rf"|{_ACTORS} (?:\w+ ){{0,2}}{_WRITES}"
    r"|(?:opening|closing|special|xml|these) (?:tags?|tokens?)"
    r"|(?:you|one|people|they|users|developers) (?:can|could|would|should|may|might|must|have to|need to) (?:\w+ ){0,2}"
    r"(?:write|send|call|use|invoke|put|paste|run|replace|copy|pass|express|post|say)"
    r"|(?:you|people|developers) (?:write|send|call|invoke|type|post)"
    r"|(?<!i )would (?:\w+ )?(?:look|write|call|use|send|emit|produce|output|generate|respond|reply)"
    r"|would have (?:written|called|sent|used)"
    r"|i (?:won['\u2019]t|will not|must not|refuse to|refused to) (?:\w+ ){0,2}"
    r"(?:call|run|make|execute|send|write)"
    r"|(?:is|are|be|been|was|were) (?:\w+ )?"
    r"(?:called like|written|represented|encoded|serialized|expressed|stored|invalid|wrong|malformed|incorrect)"
    r"|(?:is|are) called|such (?:a )?calls?|(?:from|in) the logs?(?! files?)"
    r"|(?:from|in) the (?:transcript|tutorial|article|paper|specification|test|fixture|data ?set|manual|readme)"
    r"|(?:equivalent|corresponding) (?:\w+ )?(?:call|json|request|message|object)"
    r"|(?:said|says|reads|read|wrote|written|logged|printed|showed|shows|contained|contains|got|received|saw)"
    r"(?: this| that| it)?\s*:\s*\Z"
    r")(?!\w)"
    r"|<\|im_start\|>|\blooks? (?:like|as|similar)[^.!?\n]{0,30}:?\s*\Z"
    r"|(?:^|[.!?:] )\W{0,3}(?:write|use|send|put|paste|replace|copy|post|include|append|insert|never|do not|don't|avoid"
    r"|note|store|compare|consider|suppose|imagine|given|see)\b",
    re.IGNORECASE | re.MULTILINE,
)


def speaks_about_calls(prose: str) -> bool:
    """Returns whether a text next to calls speaks about calls in general, as an explanation or an example does."""
    is_long = len(prose) > 2 * _EXAMINED_CHARACTERS
    parts = [prose[:_EXAMINED_CHARACTERS], prose[-_EXAMINED_CHARACTERS:]] if is_long else [prose]
    return any(_ABOUT_CALLS.search(part) for part in parts)


def is_quoted(before: str, after: str, *, is_bare: bool) -> bool:
    """Returns whether calls are part of a sentence, a list, a quotation, a log, or a larger structure.

    Args:
        before: The text before the calls, from the end of earlier calls on.
        after: The text after the calls, up to the next calls.
        is_bare: Whether the calls have no tags or other marks of a call.
    """
    line = before[before.rfind("\n") + 1 :]
    if line.lstrip().startswith(">") or _QUOTED_OR_LISTED.search(line) or _LOG_OR_TRANSCRIPT.search(line):
        return True
    if _IN_ELEMENT.search(before[-200:]) or (is_bare and _IN_STRUCTURE.search(before[-60:])):
        return True
    if len(line) - len(line.lstrip()) == len(line) >= 4:
        # An indented code block.
        return True
    is_in_line = bool(line.strip()) and not _END_OF_SENTENCE.search(line)
    if is_in_line and (is_bare or after.strip()):
        return True
    if not after.strip():
        return False
    rest = after[: after.find("\n")] if "\n" in after else after
    return bool(_CONTINUES.match(after)) or (is_bare and bool(rest.strip()))
