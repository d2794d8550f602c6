"""Answers to typed questions: their class, and how they are read from what servers send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs

from lmbridge._checks import is_number
from lmbridge.client.questions import Choice, Question, Score


@attrs.frozen(kw_only=True)
class DecisionAnswer:
    """The answer to one question."""

    winner: str | bool | None
    """The option or level with the highest probability; True or False for a `TrueFalse`. None if the model declined to
    answer, which local models never do."""
    probabilities: Mapping[str | bool, float]
    """The probability of each option or level, or of True and False. They add up to 1. Empty if the model declined."""
    expected: float | None = None
    """For a `Score`, the expected level as a number: 0 is the lowest level. For a `TrueFalse`, the probability of True.
    None for a `Choice`."""
    confidence: float
    """How clear the answer is, from 0 (all options are equally likely) to 1. The server computes it; if it does not, it
    is computed from the highest probability."""


@attrs.frozen(kw_only=True)
class Decisions:
    """The answers to all questions of a call."""

    answers: Mapping[str, DecisionAnswer]
    """The answers, by the names of their questions."""
    calibrated: bool
    """Whether a decision model has answered, whose probabilities are meant to be frequencies. If it is False, an
    ordinary chat model has answered, and its probabilities only rank the options."""
    model: str | None
    """The model that has answered, as the server names it."""
    prompt_tokens: int | None = None
    """The number of tokens that the model has read for all questions, if the server reports it."""


class UnreadableAnswerError(ValueError):
    """An answer that does not fit its question."""


def answer_from(question: Question, probabilities: Sequence[float], confidence: object = None) -> DecisionAnswer:
    """Returns the answer to a question.

    Args:
        question: The question.
        probabilities: The probability of each option in the order of the question, or of true and false.
        confidence: The confidence that the server reports, if it does.

    Raises:
        UnreadableAnswerError: The probabilities do not have a positive sum.
    """
    total, count = sum(probabilities), len(probabilities)
    if not total > 0:
        raise UnreadableAnswerError("no option has a probability")
    shares = [each / total for each in probabilities]
    names = _names_of(question)
    best = max(range(count), key=shares.__getitem__)
    expected: float | None = None
    if isinstance(question, Score):
        expected = sum(level * share for level, share in enumerate(shares))
    elif not isinstance(question, Choice):
        expected = shares[0]
    return DecisionAnswer(
        winner=names[best],
        probabilities=dict(zip(names, shares, strict=True)),
        expected=expected,
        confidence=float(confidence) if is_number(confidence) else (shares[best] * count - 1) / (count - 1),
    )


def _names_of(question: Question) -> list[str | bool]:
    match question:
        case Choice():
            return list(question.options)
        case Score():
            return list(question.levels)
    return [True, False]


def read_systemone(questions: Mapping[str, Question], answers: Any) -> dict[str, DecisionAnswer]:
    """Reads the `answers` of `/v1/systemone`: a mapping from names to answers.

    Raises:
        UnreadableAnswerError: An answer is missing, or does not fit its question.
    """
    if not isinstance(answers, Mapping):
        raise UnreadableAnswerError("it has no answers")
    return {name: _read_systemone_answer(name, question, answers.get(name)) for name, question in questions.items()}


def _read_systemone_answer(name: str, question: Question, answer: Any) -> DecisionAnswer:
    fields: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}
    match question:
        case Choice():
            keys: list[str] = list(question.options)
        case Score():
            # Levels are named by their index.
            keys = [str(index) for index in range(len(question.levels))]
        case _:
            return answer_from(question, _true_and_false(name, fields.get("noul")), fields.get("confidence"))
    found = fields.get("probabilities")
    if not isinstance(found, Mapping) or not all(is_number(found.get(key)) for key in keys):
        raise UnreadableAnswerError(f"the answer to {name!r} has no probability of each option")
    return answer_from(question, [found[key] for key in keys], fields.get("confidence"))


def read_decisions(questions: Mapping[str, Question], answers: Any) -> dict[str, DecisionAnswer]:
    """Reads the `answers` of `/v1/decisions`: a list in the order of the questions.

    Raises:
        UnreadableAnswerError: An answer is missing, or does not fit its question.
    """
    if not isinstance(answers, list) or len(answers) != len(questions):
        raise UnreadableAnswerError("it does not have an answer to each question")
    named = zip(questions.items(), answers, strict=True)
    return {name: _read_listed_answer(name, question, answer) for (name, question), answer in named}


def _read_listed_answer(name: str, question: Question, answer: Any) -> DecisionAnswer:
    fields: Mapping[str, Any] = answer if isinstance(answer, Mapping) else {}
    if fields.get("type") == "refusal":
        return DecisionAnswer(winner=None, probabilities={}, confidence=0.0)
    match question:
        case Choice():
            keys: list[Any] = list(question.options)
        case Score():
            keys = list(range(len(question.levels)))
        case _:
            return answer_from(question, _true_and_false(name, fields.get("probability")), fields.get("confidence"))
    listed = fields.get("probabilities")
    entries = [each for each in listed if isinstance(each, Mapping)] if isinstance(listed, list) else []
    named = [each for each in entries if isinstance(each.get("value"), str | int)]
    found: dict[Any, Any] = {each["value"]: each.get("probability") for each in named}
    if not all(is_number(found.get(key)) for key in keys):
        raise UnreadableAnswerError(f"the answer to {name!r} has no probability of each option")
    return answer_from(question, [found[key] for key in keys], fields.get("confidence"))


def _true_and_false(name: str, probability: Any) -> list[float]:
    if not is_number(probability) or not 0 <= probability <= 1:
        raise UnreadableAnswerError(f"the answer to {name!r} has no probability")
    return [probability, 1 - probability]
