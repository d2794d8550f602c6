"""Typed questions for decisions, and their two forms on the wire.

`POST /v1/systemone` takes a mapping from names to questions with `criteria` (https://docs.typesafe.ai/api, and the
section about the TypeSafe-compatible System One API in llama.cpp's tools/server/README.md). `POST /v1/decisions` takes
a list of questions with `name`, as OpenAI's API does (openai-python, `types/decision_create_params.py`). A question can
be given as one of the classes of this module, or as a dict in either of these forms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs

from lmbridge._checks import check_text, wrong_type
from lmbridge.errors import LLMValidationError

_MOST_LEVELS: Final = 10
"""The most levels of a score, which is the limit of System One."""
_QUESTIONS_HINT: Final = "for example {'urgent': TrueFalse('Does this have to be answered today?')}"


def _check_question(_instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    check_text(attribute.name, value, hint="ask something, such as 'Which team should handle this?'")


def _check_meaning(_instance: Any, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise wrong_type(attribute.name, "a string or None", value, f"say what {attribute.name!r} means")


def _as_options(options: Any) -> dict[str, str | None]:
    """Returns options with their descriptions, from a mapping or from a list of names."""
    if isinstance(options, Mapping):
        named: dict[str, str | None] = dict(options)
    elif isinstance(options, Sequence) and not isinstance(options, str | bytes):
        named = {each: None for each in options if isinstance(each, str)}
        if len(named) != len(options):
            raise LLMValidationError("options must be different strings", hint="leave out what occurs twice")
    else:
        hint = "give a list of names, or a dict of names and descriptions"
        raise wrong_type("options", "a list or a dict", options, hint)
    if len(named) < 2:
        raise LLMValidationError("options has fewer than two options", hint="give at least two options to choose from")
    for name, description in named.items():
        check_text("the name of an option", name, hint="give each option a name")
        check_text(f"the description of {name!r}", description, optional=True, hint="describe it, or give None")
    return named


def _as_levels(levels: Any) -> tuple[str, ...]:
    if not isinstance(levels, Sequence) or isinstance(levels, str | bytes):
        raise wrong_type("levels", "a list of strings", levels, "the lowest level comes first")
    for level in levels:
        check_text("each level", level, hint="describe each level, such as 'can wait'")
    if not 2 <= len(levels) <= _MOST_LEVELS or len(set(levels)) != len(levels):
        raise LLMValidationError(f"levels must be 2 to {_MOST_LEVELS} different strings", hint="join similar levels")
    return tuple(levels)


@attrs.frozen
class Question:
    """The base class of the three types of questions. It cannot be asked itself."""

    question: str = attrs.field(validator=_check_question)
    """The question."""


@attrs.frozen
class Choice(Question):
    """A question with one answer out of several options.

    ::

        Choice("Which team should handle this?", ["billing", "shipping", "technical"])
    """

    options: Mapping[str, str | None] | Sequence[str] = attrs.field(converter=_as_options)
    """The options: a list of names, or a dict of names and descriptions, which may be None."""


@attrs.frozen
class Score(Question):
    """A question that is answered by a level of an ordered scale.

    ::

        Score("How urgent is this?", ["can wait", "this week", "today"])
    """

    levels: Sequence[str] = attrs.field(converter=_as_levels)
    """The descriptions of 2 to 10 levels, the lowest one first."""


@attrs.frozen
class TrueFalse(Question):
    """A question that is answered by true or false.

    ::

        TrueFalse("Is the customer angry?")
    """

    true: str | None = attrs.field(default=None, validator=_check_meaning)
    """What the answer "true" means, if the question does not say it."""
    false: str | None = attrs.field(default=None, validator=_check_meaning)
    """What the answer "false" means, if the question does not say it."""


def check_questions(questions: Any) -> dict[str, Question]:
    """Returns the questions of a call by their names.

    Raises:
        LLMValidationError: No question was given, or one of them is not valid; the text names it.
    """
    if not isinstance(questions, Mapping):
        raise wrong_type("questions", "a dict of names and questions", questions, _QUESTIONS_HINT)
    if not questions:
        raise LLMValidationError("questions is empty", hint=_QUESTIONS_HINT)
    return {name: _check_named(name, question) for name, question in questions.items()}


def _check_named(name: Any, question: Any) -> Question:
    check_text("the name of a question", name, hint=_QUESTIONS_HINT)
    if isinstance(question, Choice | Score | TrueFalse):
        return question
    if not isinstance(question, Mapping):
        hint = "give a Choice, a Score, a TrueFalse, or a dict"
        raise wrong_type(f"questions[{name!r}]", "a question", question, hint)
    try:
        return _from_wire(question)
    except LLMValidationError as error:
        raise LLMValidationError(f"questions[{name!r}]: {error.message}", error, hint=error.hint) from error


def _from_wire(fields: Mapping[str, Any]) -> Question:
    """Returns the question that a dict stands for, in the form of System One or in that of OpenAI's decisions."""
    kind, text, criteria = fields.get("type"), fields.get("instructions"), fields.get("criteria")
    if kind == "choice":
        if criteria is None and "choices" in fields:
            criteria = _options_from(fields["choices"])
        return Choice(text, criteria)  # type: ignore[arg-type]  # the class checks it
    if kind == "score":
        if criteria is None and "levels" in fields:
            criteria = [each["label"] for each in _checked_items("levels", fields["levels"], "label")]
        return Score(text, criteria)  # type: ignore[arg-type]  # the class checks it
    if kind in ("noul", "predicate"):
        meanings = criteria if isinstance(criteria, Mapping) else {}
        return TrueFalse(text, meanings.get("true"), meanings.get("false"))  # type: ignore[arg-type]  # as above
    raise LLMValidationError(f"unknown type {kind!r}", hint="the types are 'choice', 'score', 'noul' and 'predicate'")


def _options_from(choices: Any) -> dict[str, Any]:
    """Returns the `choices` of OpenAI's form as the options of a `Choice`."""
    items = _checked_items("choices", choices, "value")
    options = {each["value"]: each.get("description") for each in items}
    if len(options) != len(items):
        raise LLMValidationError("choices must be different strings", hint="leave out what occurs twice")
    return options


def _checked_items(name: str, items: Any, key: str) -> Sequence[Mapping[str, Any]]:
    """Returns the items of a list in OpenAI's form.

    Raises:
        LLMValidationError: It is not a list of dicts that have a text in the field `key`.
    """
    hint = f"for example [{{{key!r}: 'low'}}, {{{key!r}: 'high'}}]; a list of names can be given as 'criteria'"
    if not isinstance(items, Sequence) or isinstance(items, str | bytes):
        raise wrong_type(name, "a list of dicts", items, hint)
    for number, each in enumerate(items):
        if not isinstance(each, Mapping):
            raise wrong_type(f"{name}[{number}]", "a dict", each, hint)
        check_text(f"{name}[{number}][{key!r}]", each.get(key), hint=hint)
    return items


def systemone_form(question: Question) -> dict[str, Any]:
    """Returns a question in the form of `/v1/systemone`."""
    match question:
        case Choice():
            return {"type": "choice", "instructions": question.question, "criteria": question.options}
        case Score():
            return {"type": "score", "instructions": question.question, "criteria": list(question.levels)}
    fields: dict[str, Any] = {"type": "noul", "instructions": question.question}
    given = {key: text for key, text in meanings_of(question).items() if text is not None}
    return {**fields, "criteria": given} if given else fields


def decisions_form(name: str, question: Question) -> dict[str, Any]:
    """Returns a question in the form of `/v1/decisions`.

    This form has no field for the meanings of true and false, so they are added to the text of the question.
    """
    match question:
        case Choice(text, options) if isinstance(options, Mapping):
            choices = [{"value": each} | ({"description": about} if about else {}) for each, about in options.items()]
            return {"type": "choice", "name": name, "instructions": text, "choices": choices}
        case Score(text, levels):
            return {"type": "score", "name": name, "instructions": text, "levels": [{"label": each} for each in levels]}
    meanings = meanings_of(question).items()
    lines = [question.question, *(f"It is {value} if: {text}" for value, text in meanings if text)]
    return {"type": "predicate", "name": name, "instructions": "\n".join(lines)}


def meanings_of(question: Question) -> dict[str, str | None]:
    """Returns what true and false mean as the answer to a `TrueFalse`."""
    if not isinstance(question, TrueFalse):
        raise TypeError(f"{question!r} is neither a Choice, a Score nor a TrueFalse")
    return {"true": question.true, "false": question.false}
