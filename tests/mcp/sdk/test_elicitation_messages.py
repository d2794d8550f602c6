"""`Questions`: calls that a server refuses until the user has visited a URL."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from lmbridge.mcp.sdk.elicitation_messages import Questions
from lmbridge.mcp.sdk.sent_requests import CallListener

VISIT = {"message": "Log in", "url": "https://a.example/login", "elicitationId": "e1"}


class Person:
    """Answers questions with the given actions, and is waited for until as many questions have been asked."""

    def __init__(self, *actions: str) -> None:
        self._actions = list(actions)
        self.has_been_asked_everything = asyncio.Event()

    async def __call__(self, _: Mapping[str, Any]) -> dict[str, Any]:
        action = self._actions.pop(0)
        if not self._actions:
            self.has_been_asked_everything.set()
        return {"action": action}


def questions_for(person: Person) -> Questions:
    async def reply(_: Any, __: Mapping[str, Any]) -> None: ...

    return Questions(person, lambda _: None, lambda _, __: None, reply)


def refused_call(questions: Questions) -> asyncio.Task[bool]:
    listener = CallListener(lambda *_: None, lambda _: None)
    return asyncio.ensure_future(questions.have_urls_visited([VISIT], listener))


async def test_one_report_ends_the_wait_of_all_calls_that_were_refused_with_its_id() -> None:
    person = Person("accept", "accept")
    questions = questions_for(person)
    calls = [refused_call(questions), refused_call(questions)]
    await person.has_been_asked_everything.wait()
    questions.on_visited("e1")
    assert await asyncio.gather(*calls) == [True, True]


async def test_the_end_of_one_refused_call_does_not_affect_another_with_the_same_id() -> None:
    person = Person("accept", "decline")
    questions = questions_for(person)
    stays, declined = refused_call(questions), refused_call(questions)
    assert await declined is False
    questions.on_visited("e1")
    assert await stays is True


async def test_a_cancelled_call_does_not_affect_another_with_the_same_id() -> None:
    person = Person("accept", "accept")
    questions = questions_for(person)
    stays, leaves = refused_call(questions), refused_call(questions)
    await person.has_been_asked_everything.wait()
    leaves.cancel()
    await asyncio.wait({leaves})
    questions.on_visited("e1")
    assert leaves.cancelled()
    assert await stays is True
