"""What the bridge's tools answer: replies, runs and errors, for a model to read and for a program.

What a model reads is in the text, and again in the structured content: hosts show their model one of them or both.
Something that is not whole says so in both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmbridge.agent.result import ENDINGS, RunResult
from lmbridge.client.names import is_same_model
from lmbridge.errors import LLMError, MaxRoundsExceededError
from lmbridge.mcp.sdk.server_session import Answer

_CUT: Final = (
    "[This is not the whole answer: it was cut off by the limit of tokens. Ask again with a larger {limit}, "
    "or for a shorter answer.]"
)
_ODD: Final = "[This may not be the whole answer: it ended because of {reason!r}.]"
_EMPTY: Final = "[The model gave an empty answer.]"
_FOR_PROGRAMS: Final = "; what had arrived is in .partial"
"""What a hint says to those who have the error itself. A host's model has not; it is shown what had arrived."""


def completion(reply: Mapping[str, Any]) -> Answer:
    """The answer of a chat or a text completion."""
    text = _completed_text(reply)
    reason = reply["choices"][0].get("finish_reason")
    facts = {"model": reply.get("model"), "finish_reason": reason, "usage": reply.get("usage")}
    return _answer(text, [_note(text, reason, "max_tokens")], facts)


def response(reply: Mapping[str, Any], most: int | None) -> Answer:
    """The answer of a response; its id is for the model as well, which may go on from it.

    Args:
        reply: The server's.
        most: The tokens that it was allowed.
    """
    text = _output_text(reply)
    reason = None
    if reply.get("status") == "incomplete":
        reason = (reply.get("incomplete_details") or {}).get("reason") or "incomplete"
    elif most is not None and (reply.get("usage") or {}).get("output_tokens") == most:
        reason = "max_output_tokens"  # llama.cpp calls that "completed"
    number = reply.get("id")
    going_on = (
        f"[To go on from this, give previous_response_id={number!r}; LM Studio can, llama.cpp cannot.]"
        if number
        else ""
    )
    facts = {"model": reply.get("model"), "response_id": number, "status": reply.get("status")}
    notes = [_note(text, reason, "max_output_tokens"), going_on]
    return _answer(text, notes, {**facts, "usage": reply.get("usage")})


def embeddings(reply: Mapping[str, Any]) -> Answer:
    """Vectors, one a line."""
    vectors = [each["embedding"] for each in reply["data"]]
    facts = {"embeddings": vectors, "model": reply.get("model"), "usage": reply.get("usage")}
    return Answer(["\n".join(map(json.dumps, vectors))], _known(facts))


def names(key: str, values: Sequence[str], none: str) -> Answer:
    """Names, one a line.

    Args:
        key: What they are called in the structured content.
        values: The names.
        none: What is said if there are none.
    """
    return Answer(["\n".join(values) or none], {key: list(values)})


def run(result: RunResult) -> Answer:
    """The answer of an agent's run; an error, if it came to none."""
    if result.stop_reason != "stop":
        meaning, hint = ENDINGS[result.stop_reason]
        return Answer([f"The run ended without an answer: {meaning}; {hint}", *_arrived(result)], is_error=True)
    missing = {name: str(error) for name, error in result.errors.items()}
    told = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
    note = f"[The tools of these MCP servers were missing, because they could not be started: {told}]" if told else ""
    facts = {
        "model": result.log[-1].model if result.log else result.model,
        "rounds": result.rounds,
        "tool_calls": [call.name for call in result.tool_calls],
        "usage": result.usage or None,
        "missing": missing or None,
    }
    return _answer(result.text, ["" if result.text else _EMPTY, note], facts)


def compared(answer: Answer, asked: str | None) -> Answer:
    """The answer, which says so if it is that of another model: servers with one loaded model take any name for it.

    Args:
        answer: That of a call.
        asked: The model that the call named.
    """
    facts = answer.structured or {}
    served = facts.get("model")
    if not asked or not served or is_same_model(asked, served):
        return answer
    note = f"[Another model answered: {served!r}, not {asked!r}.]"
    return Answer([*answer.texts, note], {**facts, "notes": [*facts.get("notes", ()), note]})


def failure(error: LLMError) -> Answer:
    """An error with its hint, and what had arrived before it."""
    if isinstance(error, MaxRoundsExceededError):
        return run(error.result)
    return Answer([str(error).replace(_FOR_PROGRAMS, ""), *_arrived(error.partial)], is_error=True)


def _answer(text: str, notes: Sequence[str], facts: Mapping[str, Any]) -> Answer:
    notes = [note for note in notes if note]
    return Answer([*([text] if text else []), *notes], _known({"text": text, "notes": notes or None, **facts}))


def _known(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None}


def _note(text: str, reason: str | None, limit: str) -> str:
    """What has to be said of an answer that ended for a reason."""
    if reason in ("length", "max_output_tokens"):
        return _CUT.format(limit=limit)
    if reason not in (None, "stop"):
        return _ODD.format(reason=reason)
    return "" if text else _EMPTY


def _completed_text(reply: Mapping[str, Any]) -> str:
    choice = reply["choices"][0]
    return (choice["message"].get("content") if "message" in choice else choice.get("text")) or ""


def _output_text(reply: Mapping[str, Any]) -> str:
    items = [item for item in reply.get("output") or () if item.get("type") == "message"]
    parts = [part for item in items for part in item.get("content") or ()]
    return "".join(part.get("text") or part.get("refusal") or "" for part in parts)


def _arrived(partial: Any) -> list[str]:
    """What there was of an answer before it failed, under headings that cannot be missed."""
    called = ""
    if isinstance(partial, RunResult):
        text, called = partial.text, ", ".join(call.name for call in partial.tool_calls)
    elif isinstance(partial, Mapping):
        text = _completed_text(partial) if "choices" in partial else _output_text(partial)
    else:
        text = ""
    return [
        *([f"[What had arrived before that is not the whole answer:]\n{text}"] if text else []),
        *([f"[Tools that it had called by then, and that may have done something: {called}]"] if called else []),
    ]
