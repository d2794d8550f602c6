"""Tasks whose end state can be checked, and the tools for them.

Each tool returns a receipt, which depends on the task and on the exact arguments. So a conversation shows which steps
of a task have been done properly, whatever loop has written it, and the scripted model knows what to do next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import attrs
from typing_extensions import TypedDict

STEPS: Final = 4
"""The number of calls that each task needs."""
_WORDS: Final = ("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "inlet", "juniper")
_CITIES: Final = ("Paris", "Lima", "Oslo", "Kyoto", "Accra", "Quito", "Turin", "Riga")


class Guest(TypedDict):
    """A guest of a hotel."""

    name: str
    nights: int


@attrs.frozen
class Step:
    """A call that a task needs."""

    tool: str
    arguments: Mapping[str, Any]


@attrs.define
class Task:
    """A task, and what the tools have done for it so far."""

    number: int
    steps: Sequence[Step]
    receipts: list[str] = attrs.field(factory=list)
    """The receipts of all calls that were made, in order."""

    max_rounds: int = 25
    """How many times the model may be asked."""
    context_length: int | None = None
    """The tasks are small enough for any context."""

    @property
    def prompt(self) -> str:
        """The text for the model. The scripted model finds the number of the task in it."""
        return (
            f"Task {self.number}: do the {len(self.steps)} steps of the plan, and report the receipt of the last one."
        )

    def receipt(self, step: Step) -> str:
        """Returns the receipt of a call."""
        text = json.dumps([self.number, step.tool, step.arguments], sort_keys=True)
        return f"receipt-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    def is_solved(self, answer: str) -> bool:
        """Returns whether all steps were done, none with wrong arguments, and the answer reports the last receipt."""
        wanted = [self.receipt(step) for step in self.steps]
        return set(self.receipts) == set(wanted) and wanted[-1] in answer

    def tools(self) -> list[Callable[..., Any]]:
        """Returns the tools for this task."""

        def record(tool: str, **arguments: Any) -> str:
            receipt = self.receipt(Step(tool, arguments))
            self.receipts.append(receipt)
            return f"Done. The receipt is {receipt}."

        async def get_weather(city: str, unit: Literal["celsius", "fahrenheit"] = "celsius") -> str:
            """Returns the weather in a city."""
            return record("get_weather", city=city, unit=unit)

        async def add_numbers(first: int, second: int) -> str:
            """Adds two numbers."""
            return record("add_numbers", first=first, second=second)

        async def write_note(title: str, text: str, tags: list[str]) -> str:
            """Writes a note."""
            return record("write_note", title=title, text=text, tags=tags)

        async def book_room(guest: Guest, breakfast: bool, floor: int = 1) -> str:
            """Books a room in a hotel."""
            return record("book_room", guest=dict(guest), breakfast=breakfast, floor=floor)

        return [get_weather, add_numbers, write_note, book_room]


def make_task(number: int) -> Task:
    """Makes the task with this number."""
    word, city = _WORDS[number % len(_WORDS)], _CITIES[number % len(_CITIES)]
    text = f"First line.\nSecond line: {word}."
    guest = {"name": word.title(), "nights": 1 + number % 5}
    steps = [
        Step("get_weather", {"city": city, "unit": "celsius" if number % 2 else "fahrenheit"}),
        Step("add_numbers", {"first": number, "second": 2 * number + 1}),
        Step("write_note", {"title": f"About {word}", "text": text, "tags": [word, city]}),
        Step("book_room", {"guest": guest, "breakfast": number % 3 == 0, "floor": 1 + number % 4}),
    ]
    turn = number % STEPS
    return Task(number, steps[turn:] + steps[:turn])
