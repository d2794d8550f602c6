"""Tasks that need several times the context of their model, and a scripted model for them.

The model reads the pages of a report, one after the other, and answers with what it has found there. It knows nothing
but its prompt: a page counts as read if the call for it is in the prompt, and a code is known if it is in the prompt.
Asked for notes, it writes down all codes that it sees. The server refuses a prompt that is longer than the context.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import attrs

from benchmarks.solving.mistakes import Reply
from benchmarks.solving.model import find_problem, make_answer, offered_tools, send_reply, text_of
from lmbridge.testing import Exchange, reply

CONTEXT_LENGTH: Final = 8_192
PAGE_CHARACTERS: Final = 3_000
_BYTES_PER_TOKEN: Final = 3
_TASK: Final = re.compile(r"Long task (\d+) \((\w+), (\d+) pages\)")
_CODE: Final = re.compile(r"page (\d+) has the code (\w+)")
_TICKET: Final = re.compile(r"ticket-\w+")
_READ: Final = re.compile(r'read_page\((?:\{"number": ?|number=)?(\d+)')
_ASKS_FOR_NOTES: Final = re.compile(r"Write notes that are enough|extract the (?:most important|highest quality)")

Kind = Literal["recall", "ticket", "total"]
"""What the answer needs: the code of an early page, which can be read again; a ticket that can be drawn only once,
before the pages are read; or the codes of all pages."""


@attrs.define
class LongTask:
    """A task of many calls with long results."""

    number: int
    kind: Kind
    pages: int
    max_rounds: int = 100
    context_length: int | None = CONTEXT_LENGTH
    is_drawn: bool = False
    """Whether the ticket has been drawn."""

    @property
    def prompt(self) -> str:
        """The text for the model. The scripted model finds the number of the task in it."""
        wanted = {
            "recall": f"report the code of page {self.recalled}",
            "ticket": "report the ticket that you have drawn before",
            "total": "report the codes of all pages",
        }[self.kind]
        return (
            f"Long task {self.number} ({self.kind}, {self.pages} pages): read all pages in their order, and {wanted}."
        )

    @property
    def recalled(self) -> int:
        """The page whose code is wanted."""
        return 1 + self.number % 3

    @property
    def ticket(self) -> str:
        """The ticket, which is known to nobody before it is drawn."""
        return f"ticket-{random.Random(f'ticket {self.number}').randrange(16**6):06x}"

    def code(self, page: int) -> str:
        """Returns the code of a page."""
        return f"c{random.Random(f'{self.number} {page}').randrange(16**5):05x}"

    def is_solved(self, answer: str) -> bool:
        """Returns whether the answer has what was wanted."""
        wanted = {
            "recall": [self.code(self.recalled)],
            "ticket": [self.ticket],
            "total": [self.code(page) for page in range(self.pages)],
        }[self.kind]
        return all(each in answer for each in wanted)

    def tools(self) -> list[Callable[..., Any]]:
        """Returns the tools for this task."""

        async def read_page(number: int) -> str:
            """Reads a page of the report."""
            filling = random.Random(f"{self.number} {number}").choices(("lorem", "ipsum", "dolor", "amet"), k=600)
            fact = f"page {number} has the code {self.code(number)}."
            text = " ".join(filling)[: PAGE_CHARACTERS - len(fact) - 2]
            # The fact is at the beginning, in the middle or at the end of a page.
            place = (0, len(text) // 2, len(text))[(number + self.number) % 3]
            return f"{text[:place]} {fact} {text[place:]}"

        async def draw_ticket() -> str:
            """Draws the ticket, which works only once."""
            if self.is_drawn:
                return "The ticket has been drawn already."
            self.is_drawn = True
            return f"You have drawn {self.ticket}."

        return [read_page, *([draw_ticket] if self.kind == "ticket" else [])]


def make_long_task(number: int, pages: int) -> LongTask:
    """Makes the task with this number."""
    kinds: tuple[Kind, ...] = ("recall", "ticket", "total")
    return LongTask(number, kinds[number % 3], pages)


class ForgetfulModel:
    """A behaviour for a `ScriptedServer`, whose model knows nothing but its prompt."""

    def __init__(self) -> None:
        self.invalid_histories: dict[int, str] = {}
        """What is wrong with a conversation that no strict server would accept, by the number of the task."""
        self.overflows = 0
        """How many prompts were refused because they were too long."""
        self.notes = 0
        """How many times the model was asked for notes."""

    async def __call__(self, exchange: Exchange) -> None:
        """Replies to a request."""
        request = exchange.request.json
        messages: list[Mapping[str, Any]] = request["messages"]
        tokens = len(json.dumps([messages, request.get("tools")], ensure_ascii=False).encode()) // _BYTES_PER_TOKEN
        if tokens > CONTEXT_LENGTH:
            self.overflows += 1
            error = {"type": "exceed_context_size_error", "n_prompt_tokens": tokens, "n_ctx": CONTEXT_LENGTH}
            message = f"request ({tokens} tokens) exceeds the available context size ({CONTEXT_LENGTH} tokens)"
            await reply(400, {"error": {"code": 400, "message": message, **error}})(exchange)
            return
        texts = [text_of(each) for each in messages]
        if (found := _TASK.search("\n".join(texts))) is not None:
            task = LongTask(int(found[1]), found[2], int(found[3]))  # type: ignore[arg-type]  # it is one of them
            if (problem := find_problem(messages)) is not None:
                self.invalid_histories.setdefault(task.number, problem)
            answer = self._work(task, messages, texts, offered_tools(request))
        else:
            answer = Reply(text="I do not know what to do.")
        if _ASKS_FOR_NOTES.search(texts[-1]) or _ASKS_FOR_NOTES.search(texts[0]):
            self.notes += 1
            answer = Reply(text=_notes(texts))
        await send_reply(answer, exchange, usage={"prompt_tokens": tokens, "completion_tokens": 50})

    def _work(
        self, task: LongTask, messages: Sequence[Mapping[str, Any]], texts: Sequence[str], tools: Sequence[str]
    ) -> Reply:
        seen = "\n".join(texts)
        codes = {int(page): code for page, code in _CODE.findall(seen)}
        calls = [call["function"] for message in messages for call in message.get("tool_calls") or ()]
        read = {json.loads(call["arguments"]).get("number") for call in calls if call["name"] == "read_page"}
        read |= {int(page) for page in _READ.findall(seen)} | codes.keys()
        ticket = _TICKET.search(seen)
        has_drawn = ticket is not None or "draw_ticket(" in seen or any(call["name"] == "draw_ticket" for call in calls)
        if task.kind == "ticket" and not has_drawn:
            return Reply(calls=(("draw_ticket", "{}"),))
        missing = [page for page in range(task.pages) if page not in read]
        if not missing and task.kind != "ticket":
            wanted = range(task.pages) if task.kind == "total" else [task.recalled]
            missing = [page for page in wanted if page not in codes]
        if missing:
            return Reply(calls=(("read_page", json.dumps({"number": missing[0]})),))
        if task.kind == "ticket":
            return make_answer(f"The ticket is {ticket[0] if ticket else 'lost'}.", tools)
        return make_answer("The codes are " + ", ".join(codes[page] for page in sorted(codes)) + ".", tools)


def _notes(texts: Sequence[str]) -> str:
    """Returns the notes of a model that overlooks nothing."""
    seen = "\n".join(texts)
    task = _TASK.search(seen)
    facts = [f"The task is: {LongTask(int(task[1]), task[2], int(task[3])).prompt}"] if task else []  # type: ignore[arg-type]  # it is one of them
    facts += [f"page {page} has the code {code}." for page, code in dict(_CODE.findall(seen)).items()]
    return " ".join([*facts, *dict.fromkeys(_TICKET.findall(seen))]) or "Nothing yet."
