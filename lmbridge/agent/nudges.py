"""Finds replies that are neither an answer nor a call, and writes the messages that ask the model again.

Small models often stop without having done anything: the reply is empty, it has only reasoning, or it announces a call
that does not follow. Sending the same request again gives the same reply at temperature 0, and ending the run gives up
a task that one sentence can save. So the model is asked again, with its reply and one sentence about it.

The sentence is a user message after the model's reply, because this is what all chat templates accept: some refuse two
user messages in a row, some a second system message, and some a user message directly after a tool's result. Both
messages are removed as soon as the model has replied, so that it does not take its mistake for an example, and the
conversation that the user sees has only what matters.

A model that writes its calls as text is also asked again after two kinds of well-formed replies. The first is a call
that it has made before. Such a model does not know the form in which its template shows results, so it often repeats a
call as if there were no result. If the call were made again, this would go on until the run ends without an answer. A
model whose calls the server recognizes may repeat a call for a reason, so it is only warned. The second is an answer
that it may have made up, although only a tool can give it. A model counts as one that writes its calls as text once a
call was read from its text, in any run of the agent, so other models are never asked whether they need a tool.

A false alarm costs a generation, and may replace a good answer by a worse one. So a promise is recognized only in the
last sentence of a reply, only in English, and only if tools were offered.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, Final

import attrs
import msgspec

from lmbridge.agent.model_reply import ModelReply
from lmbridge.agent.result import Nudge, NudgeKind
from lmbridge.agent.text_calls.finding import has_quoted_calls
from lmbridge.agent.text_calls.unread_calls import find_unread_call, repeats_its_call
from lmbridge.agent.toolset import Toolset

_EXAMINED_CHARACTERS: Final = 400
"""How many characters at the end of a reply are searched for its last sentence."""
_EMPTY_REPLY: Final = "..."
"""Stands for a reply without text, because some servers refuse a message without content.

A sentence would be an example: asked again after "(The reply was empty.)", a small model answers "The reply was empty."
"""
AFTER_CALLS: Final = "I have called the tools."
"""Replaces the model's own reply when it is asked to answer without tools. The sentence is true, so it does no harm if
the model repeats it."""
_LONGEST_TASK: Final = 500
"""The number of characters up to which a task is repeated at the end of the conversation."""

_MESSAGES: Final[Mapping[NudgeKind, str]] = {
    "empty": "Your reply was empty. Now {action}.",
    "only_reasoning": "Your reply had only reasoning. Now {action}.",
    "cut_reasoning": "Your reasoning reached the limit of {max_tokens} tokens. Reason only briefly, then {action}.",
    "promise": "You have not called a tool. If you need one, call it now. Otherwise give your final answer.",
    "missing_call": "Your reply announced a tool call, but had none. Now {action}.",
    "unreadable_call": "Your tool call could not be read. {again}",
    "cut_call": "Your tool call was cut off at {max_tokens} tokens, so it was not made. Make a shorter call, or several"
    " short ones.",
    "no_call": "You have not called a tool. If you need one, call it now. Otherwise give your final answer.",
}

_SENTENCE_END: Final = re.compile(r"[.!?](?=\s)|\n")
_ADVERBS: Final = (
    r"(?:(?:now|first|next|then|also|just|quickly|immediately|directly|go ahead and|proceed to|try to|start by"
    r"|begin by),?\s+)*"
)
_WORK: Final = (
    r"(?:call|check|look|search|fetch|get|retrieve|query|run|read|find|open|list|execute|invoke|calculate|compute"
    r"|convert|gather|inspect|examine|verify|request|perform|determine|take a look|do (?:that|this|so)"
    r"|calling|checking|looking|searching|fetching|getting|retrieving|querying|running|reading|finding|listing)\b"
)
_FUTURE: Final = (
    r"(?:I[^\w\s]ll|I will|I am going to|I[^\w\s]m going to|I[^\w\s]m about to|let me|let[^\w\s]s|let us)\s+"
)
_FIRST_PERSON: Final = re.compile(r"\b(?:I|let)\b", re.IGNORECASE)
"""Matches every sentence that one of the next three patterns matches, and is faster."""
_PROMISE: Final = re.compile(rf"\b{_FUTURE}{_ADVERBS}{_WORK}", re.IGNORECASE)
"""Matches, for example, "I will now check the weather"."""
_ANNOUNCEMENT: Final = re.compile(rf"\b{_FUTURE}.*:\W*$", re.IGNORECASE)
"""Matches, for example, "Let me do it step by step:"."""
_USE: Final = re.compile(
    rf"\b(?:{_FUTURE}|I (?:need|have|should) (?:to )?){_ADVERBS}(?:use|call|try|invoke)\b", re.IGNORECASE
)
"""Matches, for example, "I need to use it". It counts only in a sentence about a tool."""
_PROGRESS: Final = re.compile(
    r"^\W*(?:now\s+)?(?:calling|checking|searching|fetching|looking|running|getting|retrieving|querying)\b"
    r".*(?:\u2026|\.\.|:)\W*$",
    re.IGNORECASE,
)
"""Matches, for example, "Checking the weather..."."""
_WAIT: Final = re.compile(r"\b(?:one moment|please wait|just a (?:moment|second)|hold on a)\b", re.IGNORECASE)
_TOOL: Final = re.compile(r"\b(?:tool|function)\b", re.IGNORECASE)
_TO_THE_READER: Final = re.compile(
    r"\?|\blet me know\b|\b(?:if|when|once|whenever|unless|until|should|would|could) you\b", re.IGNORECASE
)
"""Matches a sentence that leaves the next step to the reader, such as "I can check that if you like"."""


def _most_in_run(nudges: Nudges) -> int:
    return 3 * nudges._most_per_round  # noqa: SLF001 - it is the default of a field of the same class


@attrs.define
class Nudges:
    """Decides whether the model of one run is asked again, and with which message.

    Args:
        toolset: The tools of the run.
        most_per_round: The option `max_nudges` of the run.
        reads_text_calls: Whether calls that the model writes as text are read.
    """

    _toolset: Toolset
    _most_per_round: int
    _reads_text_calls: bool
    _left: int = attrs.field(init=False, default=attrs.Factory(_most_in_run, takes_self=True))
    _given: list[NudgeKind] = attrs.field(init=False, factory=list)

    def begin_round(self) -> None:
        """Allows each kind of nudge once more."""
        self._given.clear()

    def has_given(self, kind: NudgeKind) -> bool:
        """Returns whether the model was already asked again for this reason in this round."""
        return kind in self._given

    def next(
        self, kind: NudgeKind, reply: ModelReply, *, task: str, max_tokens: int, has_results: bool, is_repetition: bool
    ) -> Nudge | None:
        """Returns the nudge for a flawed reply; None if the limits are reached, or if this kind has not helped before.

        A model that has results of tools, and still writes or promises calls, rarely stops by itself. So if a nudge has
        not helped, or if the reply begins with a call whose result the model already has, the next nudge asks for an
        answer without tools.

        Args:
            kind: What is wrong with the reply.
            reply: The reply.
            task: The task of the run, or an empty text if it is not a text.
            max_tokens: The limit on the tokens of the reply.
            has_results: Whether a tool has returned a result in this run, without an error.
            is_repetition: Whether the reply begins with a call whose result the model already has.
        """
        has_failed = kind in self._given
        goes_on_calling = has_results and has_failed and _wants_to_call(kind, reply)
        asks_to_answer = reply.may_call and (is_repetition or goes_on_calling)
        if (has_failed and not asks_to_answer) or len(self._given) >= self._most_per_round or not self._left:
            return None
        self._given.append(kind)
        self._left -= 1
        if asks_to_answer:
            written = reply.written_calls or reply.text
            return Nudge(kind=kind, message=request_answer(task), reply=written, without_tools=True)
        message = _MESSAGES[kind].format(
            action="call a tool or give your answer" if reply.may_call else "give your answer",
            again=self._way_to_call(reply.text or reply.reasoning) if kind == "unreadable_call" else "",
            max_tokens=_tokens_at_limit(reply, max_tokens),
        )
        return Nudge(kind=kind, message=message, reply=reply.text)

    def _way_to_call(self, text: str) -> str:
        if not self._reads_text_calls:
            return "Calls in your text are never read. Make it again with the tools of this conversation."
        return f"Make it again, in exactly this form:\n{self._example(text)}"

    def _example(self, text: str) -> str:
        """Returns an example of a call that can be read, for the tool that a text mentions last."""
        name = max(self._toolset.names, key=text.rfind)
        definition = next(each["function"] for each in self._toolset.definitions if each["function"]["name"] == name)
        properties = definition.get("parameters", {}).get("properties", {})
        arguments = {each: _placeholder(schema) for each, schema in properties.items()}
        return f"<tool_call>\n{msgspec.json.encode({'name': name, 'arguments': arguments}).decode()}\n</tool_call>"


def _wants_to_call(kind: NudgeKind, reply: ModelReply) -> bool:
    """Returns whether the model wants to call further tools. If it does so again, it is asked for its answer.

    A call that was cut off counts only if the reply repeats an earlier one. Otherwise the model may be writing a long
    file, and must not be led to say that it has done so.
    """
    return kind in ("unreadable_call", "promise") or (kind == "cut_call" and repeats_its_call(reply.text))


def request_answer(task: str) -> str:
    """Returns the message that asks a model for its answer, in a request without tools.

    A small model that writes call after call has usually lost sight of its task, and answers when it is reminded of it.

    Args:
        task: The task of the run, or an empty text if it is not a text.
    """
    if 0 < len(task.strip()) <= _LONGEST_TASK:
        return f"Now answer from the results above, without tools: {task.strip()}"
    return "Now give the best answer that you can from the results above, without tools, and say what is missing in it."


def _tokens_at_limit(reply: ModelReply, max_tokens: int) -> int:
    """Returns at how many tokens a reply was cut off. The server may have a smaller limit than the request."""
    tokens = (reply.usage or {}).get("completion_tokens")
    return min(tokens, max_tokens) if tokens else max_tokens


def text_or_placeholder(reply: ModelReply) -> str:
    """Returns the text of a flawed reply, or a placeholder if it has none."""
    return reply.text if reply.text.strip() else _EMPTY_REPLY


def find_flaw(reply: ModelReply, toolset: Toolset) -> NudgeKind | None:
    """Returns why a reply is neither an answer nor a complete call; None if it is one of the two.

    An answer that was cut off at the limit on tokens counts as an answer. The stop reason of the run, "length", reports
    that it was cut off.
    """
    is_cut = reply.finish_reason == "length"
    if reply.calls:
        return "cut_call" if reply.has_cut_call else None
    if reply.announces_calls:
        return "missing_call"
    if reply.may_call and find_unread_call(reply.text or reply.reasoning, toolset.names):
        # A call that can be read, but was not made, is quoted. The nudge must not ask the model to make it.
        unread: NudgeKind = "promise" if has_quoted_calls(reply.text) else "unreadable_call"
        return "cut_call" if is_cut else unread
    if reply.text.strip():
        return "promise" if reply.may_call and not is_cut and is_promise(reply.text, toolset.names) else None
    if reply.reasoning.strip():
        return "cut_reasoning" if is_cut else "only_reasoning"
    return None if is_cut else "empty"


def is_promise(text: str, tool_names: Collection[str]) -> bool:
    """Returns whether the last sentence of a text announces work or the call of a tool, which does not follow."""
    end = text[-_EXAMINED_CHARACTERS:].strip()
    sentence = _SENTENCE_END.split(end)[-1]
    if _TO_THE_READER.search(sentence):
        return False
    if _PROGRESS.search(sentence) or _WAIT.search(sentence):
        return True
    if not _FIRST_PERSON.search(sentence):
        return False
    if _PROMISE.search(sentence) or _ANNOUNCEMENT.search(sentence):
        return True
    names_tool = _TOOL.search(sentence) is not None or any(name in sentence for name in tool_names)
    return names_tool and _USE.search(sentence) is not None


def _placeholder(schema: Any) -> Any:
    """Returns a value that shows the type of a parameter."""
    if not isinstance(schema, Mapping):
        return "..."
    if schema.get("enum"):
        return schema["enum"][0]
    return {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}, "null": None}.get(
        str(schema.get("type")), "..."
    )
