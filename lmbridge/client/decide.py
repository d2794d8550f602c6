"""`LLMClient.decide`: asks a decision model, or an ordinary chat model in its place.

Three ways are tried, in this order:

1. `POST /v1/systemone`, which llama.cpp, LM Studio, vLLM and Ollama (since 0.35) have for decision models. It is
   described in tools/server/README.md of llama.cpp, in `developer/typesafe-compat/systemone` of LM Studio's
   documentation, and in vllm/entrypoints/generate/structured_decisions. For a model that is not a decision model,
   llama.cpp answers 501 (recorded from the embedded server), and so does vLLM.
2. `POST /v1/decisions`, the same in the form of OpenAI's API, which LM Studio documents as `openai-compat/decisions`.
3. A chat completion for each question; see `label_probabilities`.

The way that worked is remembered for each server and model, so that later calls send no request in vain. If the caller
names no model, the server chooses one. What is remembered then counts only until another model answers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from functools import cache
from typing import Any, Final, Literal, TypeAlias
from weakref import WeakKeyDictionary

import attrs
import msgspec

from lmbridge._checks import is_integer
from lmbridge.client.api_requests import ServerApi, is_unknown_path
from lmbridge.client.chat_stream import ChatStream
from lmbridge.client.collecting import collect
from lmbridge.client.decisions import DecisionAnswer, Decisions, UnreadableAnswerError, read_decisions, read_systemone
from lmbridge.client.json_codec import encode_body
from lmbridge.client.label_probabilities import check_option_counts, label_messages, label_params, read_label
from lmbridge.client.questions import Question, decisions_form, systemone_form
from lmbridge.errors import LLMError, LLMResponseError, ModelMismatchError
from lmbridge.transport import BaseTransport, Reply

logger: logging.Logger = logging.getLogger("lmbridge.client")

_Way: TypeAlias = Literal["systemone", "decisions", "chat"]
_DECISION_ENDPOINTS: Final[tuple[_Way, ...]] = ("systemone", "decisions")
_NO_DECISION_MODEL: Final = re.compile(r"not a decision model|does not support .{0,60}decision", re.IGNORECASE)
"""What llama.cpp and vLLM say of a model that is not a decision model."""
_NOT_IMPLEMENTED: Final = 501
_MODEL_HINT: Final = "ask a decision model, such as openjev, or leave out fallback=False"
_NO_ENDPOINT_HINT: Final = "update the server: LM Studio, llama.cpp, vLLM and Ollama have had one since autumn 2026"
_LOGPROBS_HINT: Final = (
    "use a decision model, or a chat model of a server that reports log probabilities; LM Studio's chat completions do"
    " not"
)


@attrs.frozen
class _KnownWay:
    way: _Way
    served_model: str | None
    """The model that has answered in this way, as the server names it."""


@cache
def _known_ways() -> WeakKeyDictionary[BaseTransport, dict[str | None, _KnownWay]]:
    """The way that has worked for each model of each server. The model None is the one that the server chooses."""
    return WeakKeyDictionary()


async def decide(
    server: ServerApi,
    ask: Callable[..., Awaitable[ChatStream]],
    state: Any,
    questions: Mapping[str, Question],
    body: Mapping[str, Any],
    *,
    fallback: bool,
) -> Decisions:
    """Answers questions about a state; see `LLMClient.decide`.

    Args:
        server: The server, with the options of the call.
        ask: Opens a stream of a chat completion with the options of the call. It takes messages and parameters.
        state: What the questions are about.
        questions: The questions by their names.
        body: Further fields of the request: `model`, and those of `extra_body`.
        fallback: Whether a chat model may answer.

    Raises:
        LLMError: The model cannot answer, or a request failed.
    """
    state = msgspec.json.decode(encode_body({"state": state}))["state"]
    transport, model = server.transport, body.get("model")
    known = _known_ways().setdefault(transport, {})
    before = known.get(model)
    way = None if before is None else before.way
    refusal: LLMError | None = None
    if way != "chat" or not fallback:
        # The endpoint that has worked comes first. Another server may run by now, which has only the other one.
        for each in sorted(_DECISION_ENDPOINTS, key=lambda endpoint: endpoint != way):
            answered = await _ask_decision_model(server, each, state, questions, body)
            if isinstance(answered, Decisions):
                known[model] = _KnownWay(each, answered.model)
                return answered
            refusal = answered
            if isinstance(refusal, ModelMismatchError):
                break
    if refusal is not None:
        known.pop(model, None)
        if not fallback:
            raise refusal
    check_option_counts(questions)
    decisions = await _ask_chat_model(ask, state, questions, model)
    if refusal is not None:
        logger.warning(
            "model %r is asked for its log probabilities, and its decisions are not calibrated: %s",
            decisions.model,
            refusal.message,
        )
    if model is None and before is not None and refusal is None and before.served_model != decisions.model:
        # The server has chosen another model meanwhile, which may be a decision model.
        known.pop(model, None)
    else:
        known[model] = _KnownWay("chat", decisions.model)
    return decisions


async def _ask_decision_model(
    server: ServerApi, way: _Way, state: Any, questions: Mapping[str, Question], body: Mapping[str, Any]
) -> Decisions | LLMError:
    """Returns the answers of a decision model, or the error that says why the server gives none.

    Raises:
        LLMError: The request failed for another reason.
    """
    if way == "systemone":
        asked: Any = {name: systemone_form(question) for name, question in questions.items()}
        sent = {"state": state, "questions": asked, **body}
    else:
        asked = [decisions_form(name, question) for name, question in questions.items()]
        sent = {"input": state_text(state), "questions": asked, **body}
    model = sent.get("model")
    reply = await server.request(server.build_post("decision", f"/{way}", sent, model))
    try:
        value = server.json_object(reply)
    except LLMError as error:
        refusal = _refusal_in(error, reply, model)
        if refusal is not None:
            return refusal
        await server.complete_error(error)
        raise
    read = read_systemone if way == "systemone" else read_decisions
    try:
        answers = read(questions, value.get("answers"))
    except UnreadableAnswerError as exc:
        message = f"the server answered {reply.status} with something that is not a decision: {exc}"
        raise server.unexpected_reply(reply, "a decision", message=message) from exc
    server.check_served_model(reply, value)
    return _decisions(answers, value, calibrated=True)


def _refusal_in(error: LLMError, reply: Reply, model: str | None) -> LLMError | None:
    """Returns the error to report if the model is not a decision model or the server has no such endpoint, or None."""
    text = (error.body or "")[:10_000]
    if reply.status == _NOT_IMPLEMENTED or _NO_DECISION_MODEL.search(text):
        subject = "the server's model" if model is None else f"model {model!r}"
        return ModelMismatchError(
            f"{subject} is not a decision model",
            error,
            asked=model,
            hint=_MODEL_HINT,
            status=reply.status,
            body=error.body,
            context=reply.call.context(),
        )
    if is_unknown_path(error, reply):
        return LLMResponseError(
            "the server has no endpoint for decisions",
            error,
            hint=_NO_ENDPOINT_HINT,
            status=reply.status,
            body=error.body,
            context=reply.call.context(),
        )
    return None


async def _ask_chat_model(
    ask: Callable[..., Awaitable[ChatStream]], state: Any, questions: Mapping[str, Question], model: str | None
) -> Decisions:
    """Asks a chat model one question after another, so that each finds the state in the server's prompt cache."""
    text, answers, tokens = state_text(state), {}, 0
    reply: Mapping[str, Any] = {}
    for name, question in questions.items():
        stream = await ask(label_messages(text, question), **label_params(question))
        reply = await collect(stream)
        try:
            answers[name] = read_label(question, reply)
        except UnreadableAnswerError as exc:
            raise LLMResponseError(
                f"the answer to {name!r} cannot be read: {exc}",
                exc,
                hint=_LOGPROBS_HINT,
                context={"operation": "decision", "model": model},
                partial=reply,
            ) from exc
        usage = reply.get("usage") or {}
        tokens += usage.get("prompt_tokens") or 0
    return Decisions(answers=answers, calibrated=False, model=reply.get("model") or model, prompt_tokens=tokens or None)


def _decisions(answers: Mapping[str, DecisionAnswer], value: Mapping[str, Any], *, calibrated: bool) -> Decisions:
    usage, model = value.get("usage"), value.get("model")
    tokens = usage.get("input_tokens") if isinstance(usage, Mapping) else None
    return Decisions(
        answers=answers,
        calibrated=calibrated,
        model=model if isinstance(model, str) else None,
        prompt_tokens=tokens if is_integer(tokens) else None,
    )


def state_text(state: Any) -> str:
    """Returns a state as the text that a model reads."""
    return state if isinstance(state, str) else msgspec.json.format(msgspec.json.encode(state), indent=1).decode()
