"""`Questions`: the questions that a server asks the user (elicitation), in all revisions of the protocol.

In the revision 2026-07-28, a question is part of the result of a call, and reaches `ask_in_call` through the SDK. In
earlier revisions, it is a request of the server that does not say to which call it belongs. So the question stays open
until all calls that were in flight when it arrived have ended. A server can also refuse a call until the user has
visited URLs; such a call is made again after the visit.

The specification: https://modelcontextprotocol.io/specification/2026-07-28/client/elicitation
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import attrs

from lmbridge._tasks import end_task
from lmbridge.mcp.jsonrpc import INTERNAL_ERROR
from lmbridge.mcp.sdk.sent_requests import CallListener, SentRequest, current_request
from lmbridge.mcp.sdk.session_errors import InvalidQuestionError, RefusedError, UrlsRequiredError

logger: logging.Logger = logging.getLogger("lmbridge.mcp")

AskUser = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]
"""Asks the user a question, and returns the result as the protocol specifies it. An invalid question raises
`InvalidQuestionError`."""

_INVALID_PARAMS: Final = -32602
_URLS_REQUIRED: Final = -32042
"""The code with which a server refuses a call until the user has visited URLs, in the revision 2025-11-25."""
_MOST_OPEN_QUESTIONS: Final = 16
"""How many questions of a session may be open. Further ones are declined, because a person could not answer them."""
_MOST_URLS: Final = 8
"""How many URLs a server may ask the user to visit for one refused call."""
_VISIT_SECONDS: Final = 300.0
"""How long a refused call waits for the server to report that the user has finished at a URL, in seconds. Servers need
not report it."""
_REMEMBERED_VISITS: Final = 64
"""How many of the server's reports that the user has finished at a URL are remembered."""
_CLOSE_SECONDS: Final = 1.0
"""How long a cancelled question may take to end, in seconds."""
_DECLINED: Final[Mapping[str, Any]] = {"result": {"action": "decline"}}
_CANCELLED: Final[Mapping[str, Any]] = {"result": {"action": "cancel"}}


@attrs.define(eq=False)
class _OpenQuestion:
    """A question that the server has sent as a request."""

    task: asyncio.Task[None]
    """The task that asks the user and replies."""
    calls: tuple[SentRequest, ...]
    """The calls in flight when the question arrived."""
    open_calls: set[SentRequest]
    """The calls among them that are not over yet."""
    is_answered: bool = False
    """Whether the user has answered, so that the question is not cancelled while its reply is being sent."""


class Questions:
    """Asks the user what the server wants to know, and cancels questions that are no longer needed.

    Args:
        ask: Asks the user. With None, every question is declined.
        on_visited: Called with the id of a question when the server reports that the user has finished at its URL.
        report: Called with the kind and the description of something unexpected.
        reply: Sends the reply to a request: its id, and the result or error.
    """

    def __init__(
        self,
        ask: AskUser | None,
        on_visited: Callable[[str], None],
        report: Callable[[str, Any], None],
        reply: Callable[[Any, Mapping[str, Any]], Awaitable[None]],
    ) -> None:
        self._ask_user, self._on_visited, self._report, self._reply = ask, on_visited, report, reply
        self._open: dict[str | int, _OpenQuestion] = {}
        # Each refused call that waits has its own dict, because several calls may wait for a visit with the same id.
        self._visits: list[Mapping[str, asyncio.Future[None]]] = []
        self._visited: deque[str] = deque(maxlen=_REMEMBERED_VISITS)
        self._replies: set[asyncio.Task[None]] = set()

    @property
    def can_ask(self) -> bool:
        """Whether the user can be asked."""
        return self._ask_user is not None

    # Questions that are requests of the server.

    def open(self, request_id: str | int, params: Any, in_flight: Iterable[SentRequest]) -> None:
        """Asks the user a question in a separate task, or declines it if the user cannot be asked now.

        A second request with the id of an open one is only reported.

        Args:
            request_id: The id of the request.
            params: The question as the server sent it.
            in_flight: The requests to the server that have not been answered.
        """
        params = params if isinstance(params, dict) else {}
        calls = tuple(request for request in in_flight if request.method == "tools/call")
        if request_id in self._open:
            self._report("a request with the id of another open request", request_id)
        elif self._ask_user is not None and calls and len(self._open) < _MOST_OPEN_QUESTIONS:
            task = asyncio.get_running_loop().create_task(self._answer(request_id, params))
            self._open[request_id] = _OpenQuestion(task, calls, set(calls))
            for call in calls:
                call.note_question(is_open=True)
            task.add_done_callback(partial(self._on_closed, request_id))
        else:
            if self.can_ask:
                kind = "more questions than a person can answer" if calls else "a question outside of a call"
                self._report(f"{kind}, which is declined", params.get("message", ""))
            self._start_reply(request_id, _DECLINED if self.can_ask else self._decline(params))

    async def _answer(self, request_id: str | int, params: Mapping[str, Any]) -> None:
        outcome = await self._ask(params)
        self._open[request_id].is_answered = True
        await self._reply(request_id, outcome)

    def _on_closed(self, request_id: str | int, _: asyncio.Task[None]) -> None:
        for call in self._open.pop(request_id).calls:
            call.note_question(is_open=False)

    def _start_reply(self, request_id: str | int, outcome: Mapping[str, Any]) -> None:
        task = asyncio.ensure_future(self._reply(request_id, outcome))
        self._replies.add(task)
        task.add_done_callback(self._replies.discard)

    def on_request_over(self, request: SentRequest) -> None:
        """Cancels the open questions that can only have belonged to calls that are over by now."""
        for request_id, question in self._open.items():
            if request in question.open_calls:
                question.open_calls.discard(request)
                if not question.open_calls and not question.is_answered:
                    question.task.cancel()
                    self._start_reply(request_id, _CANCELLED)

    def cancel(self, request_id: Any) -> None:
        """Cancels a question that the server has withdrawn."""
        question = self._open.get(request_id) if isinstance(request_id, str | int) else None
        if question is not None and not question.is_answered:
            question.open_calls.clear()
            question.task.cancel()

    async def close(self) -> None:
        """Cancels all questions, and the replies that the server has not read."""
        tasks = [*(question.task for question in self._open.values()), *self._replies]
        if tasks:
            # Cancelling the future that gathers them cancels all of them at once.
            await end_task(asyncio.gather(*tasks, return_exceptions=True), grace=_CLOSE_SECONDS)

    # Questions within a call.

    async def ask_in_call(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """Asks the user a question that belongs to the call of this task, and returns the result or the error."""
        call = current_request("tools/call")
        call.note_question(is_open=True)
        try:
            return await self._ask(params)
        finally:
            call.note_question(is_open=False)

    async def have_urls_visited(self, questions: list[Any], listener: CallListener) -> bool:
        """Asks the user to visit the URLs that the server requires before it processes a call.

        Afterwards it waits, for some minutes at most, until the server reports that the user has finished there.

        Args:
            questions: The questions as the server sent them.
            listener: The listener of the call.

        Returns:
            Whether the user agreed to visit all of them, so that the call can be made again.
        """
        asked = [{**each, "mode": "url"} for each in questions if isinstance(each, dict)]
        if not self.can_ask or not 0 < len(questions) <= _MOST_URLS or len(asked) < len(questions):
            return False
        ids = {each["elicitationId"] for each in asked if isinstance(each.get("elicitationId"), str)}
        # A report may arrive while the user is still being asked about another URL, or even before that.
        visits = {each: asyncio.get_running_loop().create_future() for each in ids if each not in self._visited}
        self._visits.append(visits)
        listener.on_question(True)
        try:
            for each in asked:
                outcome = await self._ask(each)
                if outcome.get("result", {}).get("action") != "accept":
                    return False
            if visits:
                await asyncio.wait(visits.values(), timeout=_VISIT_SECONDS)
            return True
        finally:
            listener.on_question(False)
            self._visits.remove(visits)

    def on_visited(self, elicitation_id: Any) -> None:
        """Handles the report of the server that the user has finished at a URL."""
        if isinstance(elicitation_id, str):
            self._visited.append(elicitation_id)
            for visits in self._visits:
                if (visit := visits.get(elicitation_id)) is not None and not visit.done():
                    visit.set_result(None)
            self._on_visited(elicitation_id)

    async def _ask(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        if self._ask_user is None:
            return self._decline(params)
        try:
            return {"result": await self._ask_user(params)}
        except InvalidQuestionError as exc:
            self._report("a question to the user that is not valid", exc)
            return {"error": {"code": _INVALID_PARAMS, "message": str(exc)}}
        except Exception:
            # Whatever is wrong, the server must not wait for an answer that never comes.
            logger.exception("the user could not be asked a question of an MCP server, so the server gets an error")
            return {"error": {"code": INTERNAL_ERROR, "message": "the client failed to ask the user"}}

    def _decline(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        kind = "a question to the user, which is declined because on_elicitation is not set"
        self._report(kind, params.get("message", ""))
        return _DECLINED


def refusal_error(refusal: str, error: Mapping[str, Any] | None) -> RefusedError:
    """Returns the error for the caller of a request that the server has refused.

    Args:
        refusal: The code and the message of the server's error.
        error: That error, or None if the answer had none.
    """
    data = None if error is None or error.get("code") != _URLS_REQUIRED else error.get("data")
    questions = data.get("elicitations") if isinstance(data, dict) else None
    return UrlsRequiredError(refusal, questions) if isinstance(questions, list) else RefusedError(refusal)
