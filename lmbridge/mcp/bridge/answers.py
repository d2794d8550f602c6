"""Turns replies, runs and errors into the answers that the bridge sends to its host.

A host shows its model the text of an answer, or its structured content, or both. Everything that matters is therefore
in both, and an answer that is incomplete says so in both.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmbridge.agent.result import ENDINGS, RunResult
from lmbridge.client.served_model import is_same_model
from lmbridge.errors import LLMError, MaxRoundsExceededError
from lmbridge.mcp.sdk.server_session import HostAnswer

_CUT_OFF_NOTE: Final = (
    "[This is not the whole answer: it was cut off at the token limit. Ask again with a larger {limit}, "
    "or ask for a shorter answer.]"
)
_UNUSUAL_END_NOTE: Final = "[This may not be the whole answer: the server ended it with the finish reason {reason!r}.]"
_EMPTY_ANSWER_NOTE: Final = "[The model gave an empty answer.]"
_NAMES_ATTRIBUTE: Final = re.compile(r"(?<!\w)\.(partial|result|body|errors)\b")
"""Matches a clause of a hint that helps only Python code, because the clause names an attribute of the error."""


def from_completion(reply: Mapping[str, Any]) -> HostAnswer:
    """Returns the answer for a chat completion or a text completion."""
    text = _completion_text(reply)
    reason = reply["choices"][0].get("finish_reason")
    fields = {"model": reply.get("model"), "finish_reason": reason, "usage": reply.get("usage")}
    return _text_answer(text, [_completeness_note(text, reason, "max_tokens")], fields)


def from_response(reply: Mapping[str, Any], max_output_tokens: int | None) -> HostAnswer:
    """Returns the answer for a response of `/v1/responses`, with the id that a later call needs to continue from it.

    Args:
        reply: The response as the server sent it.
        max_output_tokens: The token limit of the request, or None if it had none.
    """
    text = _response_text(reply)
    reason = None
    if reply.get("status") == "incomplete":
        reason = (reply.get("incomplete_details") or {}).get("reason") or "incomplete"
    elif max_output_tokens is not None and (reply.get("usage") or {}).get("output_tokens") == max_output_tokens:
        # llama.cpp reports the status "completed" for a response that was cut off at the limit.
        reason = "max_output_tokens"
    response_id = reply.get("id")
    continuation = (
        f"[To continue from this response, pass previous_response_id={response_id!r}. "
        "LM Studio supports this, llama.cpp does not.]"
        if response_id
        else ""
    )
    fields = {"model": reply.get("model"), "response_id": response_id, "status": reply.get("status")}
    notes = [_completeness_note(text, reason, "max_output_tokens"), continuation]
    return _text_answer(text, notes, {**fields, "usage": reply.get("usage")})


def from_embeddings(reply: Mapping[str, Any]) -> HostAnswer:
    """Returns the answer for embeddings: one vector on each line."""
    vectors = [each["embedding"] for each in reply["data"]]
    fields = {"embeddings": vectors, "model": reply.get("model"), "usage": reply.get("usage")}
    return HostAnswer(["\n".join(map(json.dumps, vectors))], _without_none(fields))


def from_names(key: str, names: Sequence[str], if_empty: str) -> HostAnswer:
    """Returns the answer for a list of names: one name on each line.

    Args:
        key: The field of the structured content that holds the list.
        names: The names.
        if_empty: The text to send if there are no names.
    """
    return HostAnswer(["\n".join(names) or if_empty], {key: list(names)})


def from_run(result: RunResult) -> HostAnswer:
    """Returns the answer for an agent's run. A run without a final answer is an error."""
    if not result.has_answer:
        meaning, hint = ENDINGS[result.stop_reason]
        text = f"The run ended without an answer: {meaning}; {hint}"
        return HostAnswer([text, *_partial_texts(result)], is_error=True)
    missing = {name: str(error) for name, error in result.errors.items()}
    note = ""
    if missing:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        note = f"[The tools of these MCP servers were missing because the servers could not be started: {reasons}]"
    fields = {
        "model": result.log[-1].model if result.log else result.model,
        "rounds": result.rounds,
        "tool_calls": [call.name for call in result.tool_calls],
        "usage": result.usage or None,
        "missing": missing or None,
    }
    return _text_answer(result.text, ["" if result.text else _EMPTY_ANSWER_NOTE, note], fields)


def from_error(error: LLMError) -> HostAnswer:
    """Returns the answer for an error: its text and hint, and the part of the answer that arrived before it."""
    if isinstance(error, MaxRoundsExceededError):
        return from_run(error.result)
    # The error is copied before its hint is changed, because the original may be logged as well. Clauses about the
    # attributes of the error are removed: the host's model gets the partial answer as text.
    shown = copy.copy(error)
    clauses = [each for each in (error.hint or "").split("; ") if not _NAMES_ATTRIBUTE.search(each)]
    shown.hint = "; ".join(clauses) or None
    return HostAnswer([str(shown), *_partial_texts(error.partial)], is_error=True)


def with_model_note(answer: HostAnswer, asked: str | None) -> HostAnswer:
    """Returns the answer, with a note if it comes from another model than the one that was asked for.

    Servers that have one model loaded, such as LM Studio, accept any model name and answer with the loaded one.

    Args:
        answer: The answer of a call.
        asked: The model that the call named, or None if it named none.
    """
    fields = answer.structured or {}
    served = fields.get("model")
    if not asked or not served or is_same_model(asked, served):
        return answer
    note = f"[Another model answered: {served!r} instead of {asked!r}.]"
    return HostAnswer([*answer.texts, note], {**fields, "notes": [*fields.get("notes", ()), note]})


def _text_answer(text: str, notes: Sequence[str], fields: Mapping[str, Any]) -> HostAnswer:
    """Returns an answer whose text and structured content both contain the text and all notes that are not empty."""
    notes = [note for note in notes if note]
    structured = _without_none({"text": text, "notes": notes or None, **fields})
    return HostAnswer([*([text] if text else []), *notes], structured)


def _without_none(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value is not None}


def _completeness_note(text: str, reason: str | None, limit: str) -> str:
    """Returns a note if the answer was cut off, ended in an unusual way, or is empty; otherwise an empty string.

    Args:
        text: The answer.
        reason: The finish reason, or None if the server gave none.
        limit: The name of the argument that limits the tokens of the answer.
    """
    if reason in ("length", "max_output_tokens"):
        return _CUT_OFF_NOTE.format(limit=limit)
    if reason not in (None, "stop"):
        return _UNUSUAL_END_NOTE.format(reason=reason)
    return "" if text else _EMPTY_ANSWER_NOTE


def _completion_text(reply: Mapping[str, Any]) -> str:
    choice = reply["choices"][0]
    return (choice["message"].get("content") if "message" in choice else choice.get("text")) or ""


def _response_text(reply: Mapping[str, Any]) -> str:
    items = [item for item in reply.get("output") or () if item.get("type") == "message"]
    parts = [part for item in items for part in item.get("content") or ()]
    return "".join(part.get("text") or part.get("refusal") or "" for part in parts)


def _partial_texts(partial: Any) -> list[str]:
    """Returns what arrived before a failure, as texts that cannot be mistaken for an answer.

    Args:
        partial: The `.partial` of an error, or the result of a run that has no answer.
    """
    called = ""
    if isinstance(partial, RunResult):
        text, called = partial.text, ", ".join(call.name for call in partial.tool_calls)
    elif isinstance(partial, Mapping):
        text = _completion_text(partial) if "choices" in partial else _response_text(partial)
    else:
        text = ""
    return [
        *([f"[Text that arrived before the failure. It is not the whole answer:]\n{text}"] if text else []),
        *(
            [f"[Tools that the model had called before the failure, which may have had effects: {called}]"]
            if called
            else []
        ),
    ]
