"""A scripted model that solves tasks, makes mistakes at a given rate, and obeys a clear error message.

It depends on the request alone, as a model at temperature 0 does: the same request gets the same reply. Whether it
makes a mistake, and which one, is a function of the seed, the task and the length of the conversation. After a message
that is neither the task nor a receipt, such as the error of a call or a hint of the loop, it does the right thing.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from benchmarks.solving.mistakes import MISTAKES, Mistake, Reply, arguments_of
from benchmarks.solving.tasks import Step, Task, make_task
from lmbridge.testing import Exchange, answer

_TASK = re.compile(r"Task (\d+):")


class FallibleModel:
    """A behaviour for a `ScriptedServer`, whose model makes mistakes.

    Args:
        rate: The probability of a mistake in a reply.
        groups: The groups of the mistakes that it makes.
        seed: Makes the choice of the mistakes repeatable.
    """

    def __init__(self, rate: float, groups: Sequence[str], seed: int) -> None:
        self._rate = rate
        self.mistakes = [each for each in MISTAKES if each.group in groups]
        """The mistakes that it makes."""
        self._seed = seed
        self.made: dict[int, list[str]] = {}
        """The names of the mistakes that were made, by the number of the task."""
        self.invalid_histories: dict[int, str] = {}
        """What is wrong with a conversation that no strict server would accept, by the number of the task."""

    async def __call__(self, exchange: Exchange) -> None:
        """Replies to a request."""
        messages: list[Mapping[str, Any]] = exchange.request.json["messages"]
        found = next(filter(None, (_TASK.search(text_of(each)) for each in messages if each["role"] == "user")))
        task = make_task(int(found[1]))
        if (problem := find_problem(messages)) is not None:
            self.invalid_histories.setdefault(task.number, problem)
        reply = self._reply(task, messages, offered_tools(exchange.request.json))
        await send_reply(reply, exchange)

    def _reply(self, task: Task, messages: Sequence[Mapping[str, Any]], tools: Collection[str]) -> Reply:
        conversation = "\n".join(text_of(each) for each in messages if each["role"] != "assistant")
        step = next((each for each in task.steps if task.receipt(each) not in conversation), None)
        right = (
            make_answer(f"All steps are done. The last receipt is {task.receipt(task.steps[-1])}.", tools)
            if step is None
            else Reply(calls=((step.tool, arguments_of(step)),))
        )
        last = text_of(messages[-1])
        is_told = not (_TASK.search(last) or "receipt-" in last)
        chance = random.Random(f"{self._seed} {task.number} {len(messages)}")
        if is_told or chance.random() >= self._rate:
            return right
        mistake = self._choose(chance, step)
        if mistake is None:
            return right
        self.made.setdefault(task.number, []).append(mistake.name)
        return mistake.spoil(task.steps[-1] if step is None else step)

    def _choose(self, chance: random.Random, step: Step | None) -> Mistake | None:
        possible = [each for each in self.mistakes if step is not None or each.for_answers]
        return chance.choice(possible) if possible else None


def offered_tools(request: Mapping[str, Any]) -> list[str]:
    """Returns the names of the tools in a request."""
    return [each["function"]["name"] for each in request.get("tools") or ()]


def make_answer(text: str, tools: Collection[str]) -> Reply:
    """Returns a reply with an answer, which is the call of the tool `respond` if there is one."""
    return Reply(calls=(("respond", json.dumps({"message": text})),)) if "respond" in tools else Reply(text=text)


async def send_reply(reply: Reply, exchange: Exchange, usage: Mapping[str, int] | None = None) -> None:
    """Sends a reply as a chat completion."""
    number = len(exchange.request.json["messages"])
    ids = reply.ids or tuple(f"call_{number}_{place}" for place in range(len(reply.calls)))
    calls = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, (name, arguments) in zip(ids, reply.calls, strict=True)
    ]
    finish_reason = reply.finish_reason or ("tool_calls" if calls else "stop")
    counted = None if usage is None else {**usage, "total_tokens": sum(usage.values())}
    await answer(
        reply.text, tool_calls=calls, reasoning=reply.reasoning or None, finish_reason=finish_reason, usage=counted
    )(exchange)


def find_problem(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Returns why a strict server would refuse a conversation, or None."""
    pending: set[str] = set()
    for place, message in enumerate(messages):
        role = message["role"]
        if role in ("system", "developer") and place:
            return "a system message that is not the first one"
        if role == "tool":
            if message.get("tool_call_id") not in pending:
                return "a result without a call"
            pending.discard(message["tool_call_id"])
            continue
        if pending:
            return "a call without a result"
        for call in message.get("tool_calls") or ():
            if not _is_valid_call(call):
                return "a call with a bad name or bad arguments"
            pending.add(call["id"])
    return "a call without a result" if pending else None


def _is_valid_call(call: Mapping[str, Any]) -> bool:
    try:
        is_object = isinstance(json.loads(call["function"]["arguments"]), dict)
    except ValueError:
        return False
    return is_object and re.fullmatch(r"[A-Za-z0-9_-]{1,64}", call["function"]["name"]) is not None


def text_of(message: Mapping[str, Any]) -> str:
    """Returns the text of a message."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part.get("text") or "" for part in content)
