"""Decisions by an ordinary chat model: each option gets a label, and the probabilities of the labels are read.

The model is asked for a JSON object that has only a label, with a schema that allows nothing else, and the server
reports the most likely tokens at each place (`logprobs`, `top_logprobs`). At the place of the label, these are the
labels and how likely the model finds each of them. vLLM's `/v1/systemone` does the same on the server's side
(vllm/entrypoints/generate/structured_decisions). The alternatives were to let the model write a number, which small
models make up, and to ask several times, which is both slow and imprecise.

These probabilities rank the options, but they are not frequencies: nothing has calibrated the model for them, and most
models prefer some labels over others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from string import ascii_uppercase
from typing import Any, Final

from lmbridge._checks import is_number
from lmbridge.client.decisions import DecisionAnswer, UnreadableAnswerError, answer_from
from lmbridge.client.questions import Choice, Question, Score, meanings_of
from lmbridge.errors import LLMValidationError

MOST_OPTIONS: Final = 20
"""The most options of a question, because servers report at most that many of the most likely tokens."""
_MAX_TOKENS: Final = 64
_INSTRUCTIONS: Final = "You answer a question about a text. Reply with the label of one answer, and nothing else."
_LABEL_FIELD: Final = re.compile(r'"label"\s*:\s*"')


def label_params(question: Question) -> dict[str, Any]:
    """Returns the parameters of a chat completion that make the reply a label with its probability."""
    label = {"type": "string", "enum": list(_labels_of(question))}
    schema = {"type": "object", "properties": {"label": label}, "required": ["label"], "additionalProperties": False}
    return {
        "temperature": 0,
        "max_tokens": _MAX_TOKENS,
        "logprobs": True,
        "top_logprobs": MOST_OPTIONS,
        "stream_options": {"include_usage": True},
        "response_format": {"type": "json_schema", "json_schema": {"name": "label", "strict": True, "schema": schema}},
    }


def label_messages(state: str, question: Question) -> list[dict[str, Any]]:
    """Returns the messages that ask for a label. The state comes first, so that all questions share a prompt cache."""
    lines = [f"{label}: {text}" for label, text in _labels_of(question).items() if text]
    asked = "\n".join([f"Question: {question.question}", *lines, f"Reply with {_alternatives(question)}."])
    return [
        {"role": "system", "content": _INSTRUCTIONS},
        {"role": "user", "content": f"Text:\n{state}\n\n{asked}"},
    ]


def check_option_counts(questions: Mapping[str, Question]) -> None:
    """Checks that no question has more than `MOST_OPTIONS` options.

    Raises:
        LLMValidationError: A question has more.
    """
    for name, question in questions.items():
        if isinstance(question, Choice) and len(question.options) > MOST_OPTIONS:
            raise LLMValidationError(
                f"the model is not a decision model, and questions[{name!r}] has {len(question.options)} options",
                hint=f"a chat model can tell at most {MOST_OPTIONS} options apart; use a decision model, or fewer",
            )


def _labels_of(question: Question) -> dict[str, str | None]:
    """Returns the labels of a question, and what they stand for.

    For a `Choice`, the labels are the names of the options if they differ in their first tokens, because small models
    choose a word far better than a letter that stands for it. Otherwise they are letters, each of them a single token.
    For a `Score`, they are the numbers of the levels, and for a `TrueFalse`, they are "yes" and "no".
    """
    match question:
        case Choice(_, options) if isinstance(options, Mapping):
            if _have_different_beginnings(options):
                return dict(options)
            texts = [f"{name} ({about})" if about else name for name, about in options.items()]
            return dict(zip(ascii_uppercase, texts, strict=False))
        case Score(_, levels):
            return {str(index): level for index, level in enumerate(levels)}
    meanings = meanings_of(question)
    return {"yes": meanings["true"], "no": meanings["false"]}


def _have_different_beginnings(names: Iterable[str]) -> bool:
    """Returns whether names differ in their first tokens: their first letters differ, and are single bytes."""
    beginnings = [name[:1].lower() for name in names]
    return len(set(beginnings)) == len(beginnings) and all(each.isascii() and each.isalnum() for each in beginnings)


def _alternatives(question: Question) -> str:
    labels = list(_labels_of(question))
    return f"{', '.join(labels[:-1])} or {labels[-1]}"


def read_label(question: Question, reply: Mapping[str, Any]) -> DecisionAnswer:
    """Reads the answer from a chat completion that was asked for with `label_params`.

    Raises:
        UnreadableAnswerError: The reply has no label, or no log probabilities.
    """
    logprobs = reply["choices"][0].get("logprobs")
    tokens = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(tokens, list) or not tokens:
        raise UnreadableAnswerError("the server sends no log probabilities")
    entries = [each for each in tokens if isinstance(each, Mapping) and isinstance(each.get("token"), str)]
    text = "".join(each["token"] for each in entries)
    fields = list(_LABEL_FIELD.finditer(text))
    if not fields:
        raise UnreadableAnswerError("the reply has no label")
    entry, prefix = _token_at(entries, fields[-1].end())
    labels, likelihoods = list(_labels_of(question)), dict[str, float]()
    listed = entry.get("top_logprobs")
    candidates = [each for each in listed if _has_logprob(each)] if isinstance(listed, list) else []
    for candidate in filter(_has_logprob, (entry, *candidates)):
        if (label := _label_in(candidate["token"], prefix, labels)) is not None:
            # The chosen token is usually among the candidates as well. It counts once.
            likelihoods[label] = max(likelihoods.get(label, 0.0), _likelihood(candidate))
    if not likelihoods or not candidates:
        raise UnreadableAnswerError("the server sends no log probabilities of the labels")
    # A label that the server does not list is at most as likely as the least likely token that it does list.
    most = min(*map(_likelihood, candidates), *likelihoods.values())
    return answer_from(question, [likelihoods.get(label, most) for label in labels])


def _has_logprob(candidate: Any) -> bool:
    return (
        isinstance(candidate, Mapping)
        and is_number(candidate.get("logprob"))
        and isinstance(candidate.get("token"), str)
    )


def _likelihood(candidate: Mapping[str, Any]) -> float:
    return math.exp(min(0.0, candidate["logprob"]))


def _token_at(entries: Sequence[Mapping[str, Any]], position: int) -> tuple[Mapping[str, Any], str]:
    """Returns the token that contains the character at a position of the text, and its part before that character."""
    start = 0
    for entry in entries:
        end = start + len(entry["token"])
        if position < end:
            return entry, entry["token"][: position - start]
        start = end
    raise UnreadableAnswerError("the reply ends before its label")


def _label_in(token: str, prefix: str, labels: Sequence[str]) -> str | None:
    """Returns the label that a token is, or is the beginning of; None unless exactly one label is possible."""
    if not token.startswith(prefix):
        return None
    written, quote, _ = token[len(prefix) :].partition('"')
    if not written:
        return None
    possible = [each for each in labels if each == written or (not quote and each.startswith(written))]
    return possible[0] if len(possible) == 1 else None
