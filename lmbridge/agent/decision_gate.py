"""`Gate`: a decision about each call before it is made, and `pick_tools`: decisions about which tools a task needs.

Both ask typed questions (`LLMClient.decide`), preferably of a small decision model beside the model of the run. The
loop of a run knows nothing about gates: it asks `approve` about one call after another, and `GatedApproval` is an
`approve` that asks a gate.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import attrs

from lmbridge._checks import as_validator, check_callable, check_integer, check_model_name, invalid_argument, is_number
from lmbridge.agent.client_source import ClientSource
from lmbridge.agent.settings import Approve
from lmbridge.agent.tools import Tool, ToolCall
from lmbridge.client.decisions import Decisions
from lmbridge.client.questions import Question, TrueFalse
from lmbridge.errors import LLMValidationError

_QUESTIONS_AT_A_TIME: Final = 32
"""The number of questions in one request. Every server accepts that many."""
_CLIENT_HINT: Final = "pass an LLMClient, or a pool of them"


@runtime_checkable
class Decides(Protocol):
    """A client that answers typed questions, such as `LLMClient`."""

    async def decide(
        self, state: Any, questions: Mapping[str, Question], *, model: str | None, fallback: bool
    ) -> Decisions:
        """Returns the answers to questions about a state."""
        ...


def _as_question(question: Any) -> TrueFalse:
    if isinstance(question, TrueFalse):
        return question
    if not isinstance(question, str):
        raise invalid_argument("question", "a TrueFalse or a string", question, "for example 'Is this call harmless?'")
    return TrueFalse(question)


def _check_threshold(_instance: Any, _attribute: Any, value: Any) -> None:
    if not is_number(value) or not 0 <= value <= 1:
        raise invalid_argument("threshold", "a probability from 0 to 1", value)


@attrs.frozen
class Gate:
    """A question about each call of a run. The call is made only if the answer is true with a high enough probability.

    ::

        Agent(client, tools=[...], gate=Gate("Is this call free of harm?", threshold=0.8, model="openjev"))

    Raises:
        LLMValidationError: An argument is invalid.
    """

    question: TrueFalse = attrs.field(converter=_as_question)
    """The question, or its text. The model reads it with the task of the run, and with the name, the description and
    the arguments of the call."""
    threshold: float = attrs.field(default=0.5, validator=_check_threshold, kw_only=True)
    """The call is made only if the answer "true" has at least this probability. Default: 0.5."""
    model: str | None = attrs.field(default=None, kw_only=True)
    """The model that decides. Default: that of the client."""
    fallback: bool = attrs.field(default=True, kw_only=True)
    """Whether an ordinary chat model may decide, although its probabilities are not calibrated. Default: True."""

    def __attrs_post_init__(self) -> None:
        check_model_name(self.model)


def as_gate(gate: Gate | TrueFalse | str) -> Gate:
    """Returns the gate that an option stands for: a `Gate`, or the question of one."""
    return gate if isinstance(gate, Gate) else Gate(gate)


@attrs.frozen
class GatedApproval:
    """An `approve` that asks the gate first, and then the `approve` of the user, if there is one."""

    source: ClientSource
    """Lends the client that decides."""
    gate: Gate
    """The question, the threshold and the model of the decision."""
    approve: Approve | None = attrs.field(validator=as_validator(check_callable, optional=True))
    """The option `approve` of the agent; None if the gate alone decides."""
    task: str = ""
    """The task of the run, without which nobody can say whether a call is the right one; empty if it is not a text."""

    @property
    def option_name(self) -> str:
        """The name of the option that the error mentions if a decision raises an exception."""
        return "gate" if self.approve is None else "gate or approve"

    async def __call__(self, call: ToolCall) -> bool | str | ToolCall:
        """Decides about a call.

        Raises:
            LLMError: The client cannot decide, or a request failed.
        """
        tool = call.tool
        state = {
            "task": self.task,
            "tool": call.name,
            "description": "" if tool is None else tool.description,
            "arguments": call.arguments,
        }
        gate = self.gate
        decisions = await _decide(self.source, state, {"gate": gate.question}, model=gate.model, fallback=gate.fallback)
        probability = decisions.answers["gate"].expected or 0.0
        if probability < gate.threshold:
            question = gate.question.question
            needed = f"{gate.threshold:.2f} is needed"
            return f"the answer to {question!r} is true with probability {probability:.2f}, and {needed}"
        if self.approve is None:
            return True
        answer = self.approve(call)
        return await answer if inspect.isawaitable(answer) else answer


async def _decide(
    source: ClientSource, state: Any, questions: Mapping[str, Question], *, model: str | None, fallback: bool
) -> Decisions:
    async with source.lease(model) as client:
        if not isinstance(client, Decides):
            raise LLMValidationError(f"{type(client).__name__} has no decide()", hint=_CLIENT_HINT)
        return await client.decide(state, questions, model=model, fallback=fallback)


async def pick_tools(
    client: Any,
    task: str,
    tools: Sequence[Tool | Callable[..., Any]],
    *,
    limit: int = 10,
    model: str | None = None,
    fallback: bool = True,
) -> list[Tool]:
    """Returns the tools that a task most likely needs, by a decision about each of them.

    Use it where the definitions of all tools would take too much of the prompt::

        agent = Agent(client, tools=await pick_tools(client, task, all_tools, limit=5, model="openjev"))

    A decision model answers 32 questions in a single pass. A chat model is asked once for each tool.

    Args:
        client: An `LLMClient`, or a pool of them.
        task: What is to be done.
        tools: All tools, or functions from which tools can be made.
        limit: How many tools to return at most. Default: 10.
        model: The model that decides. Default: that of the client.
        fallback: Whether an ordinary chat model may decide. Default: True.

    Returns:
        The tools in the order in which they were given, so that the same tools make the same prompt.

    Raises:
        LLMValidationError: An argument is not valid; nothing was sent.
        LLMError: The same errors as `LLMClient.decide`.
    """
    check_integer("limit", limit)
    check_model_name(model)
    source = ClientSource(client)
    known = [each if isinstance(each, Tool) else Tool.from_function(each) for each in tools]
    if len(known) <= limit:
        return known
    chances: list[float] = []
    for start in range(0, len(known), _QUESTIONS_AT_A_TIME):
        batch = known[start : start + _QUESTIONS_AT_A_TIME]
        questions = {
            f"{number}": TrueFalse(f"Does the task need the tool {each.name!r}? It does this: {each.description}")
            for number, each in enumerate(batch)
        }
        decisions = await _decide(source, {"task": task}, questions, model=model, fallback=fallback)
        chances += [decisions.answers[name].expected or 0.0 for name in questions]
    best = sorted(range(len(known)), key=lambda index: -chances[index])[:limit]
    return [known[index] for index in sorted(best)]
