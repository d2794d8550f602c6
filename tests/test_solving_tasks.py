"""The tasks of the benchmark of solved tasks: each can be solved, and is not solved by an agent that does nothing."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from benchmarks.solving.leaderboard import CATEGORIES, make_leaderboard_tasks
from benchmarks.solving.real_tasks import GROUPS, PER_GROUP, RealTask, make_real_tasks
from benchmarks.solving.recording_proxy import RecordingProxy
from benchmarks.tables.solving_real import wilson_interval
from lmbridge import LLMClient, LLMResponseError, collect, text_of
from lmbridge.testing import ScriptedServer, answer, reply

Tools = Mapping[str, Callable[..., Any]]


def _numbers(text: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", text)]


def _calculate(tools: Tools, prompt: str) -> str:
    operation = {"plus": "add", "minus": "subtract", "times": "multiply"}[prompt.split()[3]]
    return f"It is {tools[operation](*_numbers(prompt)):,}."


def _query(tools: Tools, prompt: str) -> str:
    what = {
        "How many orders are there?": "count(*) FROM orders",
        "How many orders does the customer Ada have?": "count(*) FROM orders WHERE customer = 'Ada'",
        "What is the largest amount of an order?": "max(amount) FROM orders",
        "What is the amount of the order with the id 7?": "amount FROM orders WHERE id = 7",
        "What is the sum of the amounts of all orders?": "sum(amount) FROM orders",
        "What is the smallest id of an order?": "min(id) FROM orders",
    }[prompt]
    return str(tools["query"](f"SELECT {what}"))


def _use_file(tools: Tools, prompt: str) -> str:
    if (writes := re.fullmatch(r"Write '(.*)' to the file (.*)", prompt)) is not None:
        return str(tools["write_file"](writes[2], writes[1]))
    return str(tools["read_file"](re.findall(r"/\S+\.txt", prompt)[0]))


def _find_balance(tools: Tools, prompt: str) -> str:
    (customer,) = _numbers(tools["find_customer"](prompt.split("customer ")[1].split("?", maxsplit=1)[0]))
    return str(tools["get_balance"](customer))


def _look_up_both(tools: Tools, prompt: str) -> str:
    return " ".join(tools["get_temperature"](city) for city in re.findall(r"in (?:it in )?([A-Z]\w+)", prompt))


def _know(_: Tools, prompt: str) -> str:
    known = {
        "France": "Paris",
        "colour": "Green",
        "opposite": "Cold",
        "hello": "Hello",
        "planet": "Earth",
        "bees": "Honey",
    }
    return next(answer for word, answer in known.items() if word in prompt)


def _try_twice(tools: Tools, prompt: str) -> str:
    city = prompt.rstrip("?").split()[-1]
    with pytest.raises(RuntimeError):
        tools["get_temperature"](city)
    return str(tools["get_temperature"](city))


def _set_alarm(tools: Tools, prompt: str) -> str:
    hour, minute = _numbers(prompt)
    return str(
        tools["set_alarm"]({"hour": hour, "minute": minute}, repeat="daily" if "every day" in prompt else "once")
    )


SOLUTIONS: Mapping[str, Callable[[Tools, str], str]] = {
    "arithmetic": _calculate,
    "lookup": lambda tools, prompt: str(tools["get_price"](prompt.split()[3])),
    "database": _query,
    "files": _use_file,
    "two steps": _find_balance,
    "two calls": _look_up_both,
    "no tool": _know,
    "failing tool": _try_twice,
    "arguments": _set_alarm,
    "ten distractors": lambda tools, prompt: str(tools["get_temperature"](prompt.rstrip("?").split()[-1])),
}


def test_there_are_sixty_tasks_in_ten_groups() -> None:
    tasks = make_real_tasks()
    assert len(tasks) == 60
    assert [task.group for task in tasks] == [group for group in GROUPS for _ in range(PER_GROUP)]


@pytest.mark.parametrize("task", make_real_tasks(), ids=lambda task: f"{task.group}: {task.prompt}")
def test_a_task_is_solved_by_the_right_calls_and_not_without_them(task: RealTask) -> None:
    assert not task.is_solved("")
    assert not task.is_solved("I do not know, perhaps 12.5.")
    tools = {tool.__name__: tool for tool in task.make_tools(task)}
    answer = SOLUTIONS[task.group](tools, task.prompt)
    assert task.is_solved(answer)


def test_a_task_of_the_leaderboard_needs_exactly_the_right_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "bfcl_eval" / "data"
    (data / "possible_answer").mkdir(parents=True)
    (tmp_path / "bfcl_eval" / "__init__.py").touch()
    number = {"type": "integer", "description": "A number."}
    parameters = {"type": "dict", "properties": {"unit": {"type": "string"}, "n": number}, "required": ["n"]}
    function = {"name": "math.double", "description": "Doubles.", "parameters": parameters}
    entry = {"id": "x", "question": [[{"role": "user", "content": "Double 4."}]], "function": [function]}
    wanted = {"id": "x", "ground_truth": [{"math.double": {"n": [4], "unit": ["", "m"]}}]}
    for category in CATEGORIES.values():
        (data / f"BFCL_v4_{category}.json").write_text(json.dumps(entry))
        if category != "irrelevance":
            (data / "possible_answer" / f"BFCL_v4_{category}.json").write_text(json.dumps(wanted))
    monkeypatch.syspath_prepend(tmp_path)

    def is_solved(place: int, *calls: Mapping[str, Any]) -> bool:
        task = make_leaderboard_tasks(1)[place]
        (tool,) = task.make_tools(task)
        assert str(inspect.signature(tool)) == "(*, n: int, unit: str | None = None) -> str"
        for call in calls:
            tool(**call)
        return task.is_solved("")

    assert is_solved(0, {"n": 4})
    assert is_solved(1, {"n": 4, "unit": "M"}, {"n": 4})
    assert is_solved(2)
    assert not is_solved(0)
    assert not is_solved(0, {"n": 4}, {"n": 5})
    assert not is_solved(0, {"n": 4, "unit": "km"})
    assert not is_solved(2, {"n": 4})


async def test_the_proxy_limits_replies_and_counts_what_the_server_did() -> None:
    usage = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}
    orphan = [{"role": "user", "content": "Hi."}, {"role": "tool", "tool_call_id": "1", "content": "3"}]
    async with ScriptedServer() as server, ScriptedServer() as front, aiohttp.ClientSession() as session:
        server.script(
            answer("One two", usage=usage), answer("Three", usage=usage), reply(400, {"error": {"message": "no"}})
        )
        front.default = proxy = RecordingProxy(session, server.api_base, 128)
        async with LLMClient(front.api_base, "m", max_retries=0) as client:
            plain = await client.chat_completion([{"role": "user", "content": "Hi."}], max_completion_tokens=9)
            assert plain["choices"][0]["message"]["content"] == "One two"
            stream = await client.chat_completion([{"role": "user", "content": "Hi."}], max_tokens=9_000, stream=True)
            assert text_of(await collect(stream)) == "Three"
            with pytest.raises(LLMResponseError):
                await client.chat_completion(orphan)
    bodies = [request.json for request in server.requests]
    assert [body["max_tokens"] for body in bodies] == [128] * 3
    assert not any("max_completion_tokens" in body for body in bodies)
    assert proxy.counts == {
        "requests": 3,
        "invalid": 1,
        "refused": 1,
        "prompt_tokens": 22,
        "completion_tokens": 6,
    }


def test_the_interval_of_a_share_is_wilsons() -> None:
    # The values of Agresti and Coull (1998), rounded.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_interval(60, 60)[1] == pytest.approx(1.0)
