"""`ask_user`: a tool with which a model asks a person."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Final, cast

from lmbridge._checks import check_callable
from lmbridge.agent.tools import Tool

_DESCRIPTION: Final = (
    "Asks the user a question and returns the answer. Use it only if you cannot find out the answer yourself."
)


def ask_user(callback: Callable[[str], str | Awaitable[str]], *, timeout: float | None = None) -> Tool:
    """Returns a tool with which the model asks a person.

    The name of the tool is `ask_user`::

        async def ask(question: str) -> str:
            return await asyncio.to_thread(input, f"{question} ")


        agent = Agent(client, tools=[delete, ask_user(ask)])

    Args:
        callback: An async or plain function that is called with the question, and returns the answer. A plain function
            runs in a thread. If the function raises an exception, the model gets the text of the exception.
        timeout: How many seconds the person has to answer. Default: no limit.

    Raises:
        LLMValidationError: An argument is invalid.
    """
    check_callable("callback", callback, hint="it is called with a question and returns the answer")

    async def ask(question: str) -> str:
        return await cast("Awaitable[str]", callback(question))

    def ask_in_thread(question: str) -> str | Awaitable[str]:
        return callback(question)

    function = ask if inspect.iscoroutinefunction(callback) else ask_in_thread
    return Tool.from_function(function, name="ask_user", description=_DESCRIPTION, timeout=timeout)
