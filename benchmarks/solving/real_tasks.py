"""Sixty small tasks for real models, in ten groups. Each has tools, and an end state that can be checked."""

from __future__ import annotations

import functools
import re
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, Final, Literal

import attrs
from typing_extensions import TypedDict

Tool = Callable[..., Any]

_CALL: Final = re.compile(r'"name"\s*:.*"(?:arguments|parameters)"\s*:', re.DOTALL)
_CITIES: Final = ("Oslo", "Lima", "Kyoto", "Accra", "Riga", "Turin")
_ITEMS: Final = ("lamp", "chair", "table", "clock", "mirror", "shelf")
_NAMES: Final = ("Ada", "Bela", "Carl", "Dora", "Egon", "Fritz")
PER_GROUP: Final = 6
MAX_TOKENS: Final = 128
"""The most tokens of one reply. A small model that has lost its way would otherwise write until the context is full."""


@attrs.define
class RealTask:
    """A task for a real model."""

    group: str
    prompt: str
    make_tools: Callable[[RealTask], Sequence[Tool]] = attrs.field(repr=False)
    check: Callable[[RealTask, str], bool] = attrs.field(repr=False)
    calls: list[tuple[Any, ...]] = attrs.field(factory=list)
    """The name and the arguments of each call that was made, in order."""
    state: dict[str, Any] = attrs.field(factory=dict)
    """What the tools have changed."""
    max_rounds: int = 6
    context_length: int | None = None

    def tools(self) -> list[Tool]:
        """Returns the tools for this task, as async functions, which all agents accept."""
        return [_as_async(tool) for tool in self.make_tools(self)]

    def is_solved(self, answer: str) -> bool:
        """Returns whether the answer and the end state are right. The text of a call is no answer."""
        return self.check(self, "" if _CALL.search(answer) else answer)


def _as_async(tool: Tool) -> Tool:
    @functools.wraps(tool)
    async def call(*args: Any, **kwargs: Any) -> Any:
        return tool(*args, **kwargs)

    return call


def _has_number(answer: str, number: int) -> bool:
    return re.search(rf"(?<![\d.]){number}(?!\d|\.\d)", answer.replace(",", "")) is not None


def _answers(number: int) -> Callable[[RealTask, str], bool]:
    """Returns a check of the answer alone, after at least one call."""
    return lambda task, answer: bool(task.calls) and _has_number(answer, number)


# Tools. Each group has its own, and a task needs one or two of them.


def _calculator(task: RealTask) -> Sequence[Tool]:
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        task.calls.append(("add", a, b))
        return a + b

    def subtract(a: int, b: int) -> int:
        """Subtracts the second number from the first one."""
        task.calls.append(("subtract", a, b))
        return a - b

    def multiply(a: int, b: int) -> int:
        """Multiplies two numbers."""
        task.calls.append(("multiply", a, b))
        return a * b

    return add, subtract, multiply


def _shop(task: RealTask) -> Sequence[Tool]:
    def get_price(item: str) -> str:
        """Returns the price of an item in the shop."""
        task.calls.append(("get_price", item))
        return f"{_price(item)} dollars" if item.lower() in _ITEMS else f"There is no item {item!r}."

    return (get_price,)


def _price(item: str) -> int:
    return 131 + 17 * _ITEMS.index(item.lower())


def _database(task: RealTask) -> Sequence[Tool]:
    rows = [(number, _NAMES[number % 4], 10 * number) for number in range(1, 24)]

    def query(sql: str) -> str:
        """Runs a SQL query on the table orders (id INTEGER, customer TEXT, amount INTEGER), and returns the rows."""
        task.calls.append(("query", sql))
        with closing(sqlite3.connect(":memory:")) as connection:
            connection.execute("CREATE TABLE orders (id INTEGER, customer TEXT, amount INTEGER)")
            connection.executemany("INSERT INTO orders VALUES (?, ?, ?)", rows)
            return str(connection.execute(sql).fetchall())

    return (query,)


def _files(task: RealTask) -> Sequence[Tool]:
    task.state.update(
        {f"/notes/{name.lower()}.txt": f"The code of {name} is {4000 + n}." for n, name in enumerate(_NAMES)}
    )

    def read_file(path: str) -> str:
        """Reads a file."""
        task.calls.append(("read_file", path))
        return str(task.state[path]) if path in task.state else f"There is no file {path!r}."

    def write_file(path: str, text: str) -> str:
        """Writes a text to a file."""
        task.calls.append(("write_file", path, text))
        task.state[path] = text
        return "written"

    return read_file, write_file


def _bank(task: RealTask) -> Sequence[Tool]:
    def find_customer(name: str) -> str:
        """Returns the id of a customer."""
        task.calls.append(("find_customer", name))
        return f"The id is {70 + _NAMES.index(name)}." if name in _NAMES else f"There is no customer {name!r}."

    def get_balance(customer_id: int) -> str:
        """Returns the balance of the customer with this id."""
        task.calls.append(("get_balance", customer_id))
        return f"The balance is {customer_id * 31} dollars."

    return find_customer, get_balance


def _weather(task: RealTask) -> Sequence[Tool]:
    def get_temperature(city: str) -> str:
        """Returns the temperature in a city."""
        task.calls.append(("get_temperature", city))
        return f"It is {_degrees(city)} degrees in {city}."

    return (get_temperature,)


def _degrees(city: str) -> int:
    return 11 + 3 * _CITIES.index(city) if city in _CITIES else 1


def _unreliable_weather(task: RealTask) -> Sequence[Tool]:
    def get_temperature(city: str) -> str:
        """Returns the temperature in a city. If the station is busy, it has to be called again."""
        task.calls.append(("get_temperature", city))
        if len(task.calls) == 1:
            raise RuntimeError("the station is busy, call again")
        return f"It is {_degrees(city)} degrees in {city}."

    return (get_temperature,)


class Clock(TypedDict):
    """A time of day."""

    hour: int
    minute: int


def _alarms(task: RealTask) -> Sequence[Tool]:
    def set_alarm(time: Clock, repeat: Literal["once", "daily"] = "once", label: str | None = None) -> str:
        """Sets an alarm."""
        task.calls.append(("set_alarm", dict(time), repeat, label))
        task.state["alarm"] = (time["hour"], time["minute"], repeat)
        return "The alarm is set."

    return (set_alarm,)


def _many(task: RealTask) -> Sequence[Tool]:
    def distractor(name: str, what: str) -> Tool:
        def tool(text: str) -> str:
            task.calls.append((name, text))
            return "done"

        tool.__name__, tool.__doc__ = name, what
        return tool

    others = [
        distractor("send_email", "Sends an email."),
        distractor("translate", "Translates a text into French."),
        distractor("play_song", "Plays a song."),
        distractor("search_web", "Searches the web."),
        distractor("add_reminder", "Adds a reminder."),
        distractor("open_door", "Opens a door."),
        distractor("order_pizza", "Orders a pizza."),
        distractor("count_words", "Counts the words of a text."),
        distractor("take_photo", "Takes a photo."),
        distractor("call_taxi", "Calls a taxi."),
    ]
    return [*others[:5], *_weather(task), *others[5:]]


# Tasks.


def _make_task(group: str, n: int) -> RealTask:
    a, b = 317 + 11 * n, 25 + 13 * n
    item, name, city, other = _ITEMS[n], _NAMES[n], _CITIES[n], _CITIES[(n + 2) % PER_GROUP]
    match group:
        case "arithmetic":
            words, result = (("plus", a + b), ("minus", a - b), ("times", a * b))[n % 3]
            return RealTask(group, f"What is {a} {words} {b}?", _calculator, _answers(result))
        case "lookup":
            return RealTask(group, f"What does the {item} cost?", _shop, _answers(_price(item)))
        case "database":
            return _database_task(n)
        case "files":
            return _file_task(n)
        case "two steps":
            prompt = f"What is the balance of the customer {name}? Find the id of the customer first."
            return RealTask(group, prompt, _bank, _answers((70 + n) * 31))
        case "two calls":
            prompt = f"What is the temperature in {city}, and what is it in {other}?"
            return RealTask(
                group,
                prompt,
                _weather,
                lambda _, answer: _has_number(answer, _degrees(city)) and _has_number(answer, _degrees(other)),
            )
        case "no tool":
            question, answer = (
                ("What is the capital of France?", "Paris"),
                ("Which colour does grass have?", "green"),
                ("What is the opposite of hot?", "cold"),
                ("Say hello.", "hello"),
                ("Which planet do we live on?", "Earth"),
                ("What do bees make?", "honey"),
            )[n]
            return RealTask(
                group, question, _shop, lambda task, text: not task.calls and answer.lower() in text.lower()
            )
        case "failing tool":
            return RealTask(group, f"What is the temperature in {city}?", _unreliable_weather, _answers(_degrees(city)))
        case "arguments":
            repeat = ("once", "daily")[n % 2]
            prompt = f"Set an alarm for {6 + n}:{10 + n}{', every day' if n % 2 else ''}."
            return RealTask(group, prompt, _alarms, lambda task, _: task.state.get("alarm") == (6 + n, 10 + n, repeat))
        case _:
            return RealTask(group, f"What is the temperature in {city}?", _many, _answers(_degrees(city)))


def _database_task(n: int) -> RealTask:
    question, result = (
        ("How many orders are there?", 23),
        ("How many orders does the customer Ada have?", 5),
        ("What is the largest amount of an order?", 230),
        ("What is the amount of the order with the id 7?", 70),
        ("What is the sum of the amounts of all orders?", 2760),
        ("What is the smallest id of an order?", 1),
    )[n]
    return RealTask("database", question, _database, _answers(result))


def _file_task(n: int) -> RealTask:
    name = _NAMES[n]
    if n % 2:
        path, text = f"/notes/new-{n}.txt", f"Buy {n} apples"
        return RealTask(
            "files", f"Write '{text}' to the file {path}", _files, lambda task, _: task.state.get(path) == text
        )
    return RealTask("files", f"Which code is in the file /notes/{name.lower()}.txt?", _files, _answers(4000 + n))


GROUPS: Final = (
    "arithmetic",
    "lookup",
    "database",
    "files",
    "two steps",
    "two calls",
    "no tool",
    "failing tool",
    "arguments",
    "ten distractors",
)


def make_real_tasks(per_group: int = PER_GROUP) -> list[RealTask]:
    """Makes the tasks, `per_group` of each group."""
    return [_make_task(group, number) for group in GROUPS for number in range(per_group)]
