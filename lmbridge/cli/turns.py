"""One turn of a conversation: a question, and its answer, with or without tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lmbridge.cli.answer_view import AnswerView
from lmbridge.cli.answering import StreamedAnswer, stream_answer
from lmbridge.cli.connection import ServerConnection
from lmbridge.cli.exit_status import OF_STOP_REASON, ExitStatus
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_access import ToolAccess

if TYPE_CHECKING:
    from lmbridge.agent.result import RunResult
    from lmbridge.agent.runs import RunStream
    from lmbridge.cli.run_view import RoundMeter

_CUT_HINT = "raise --max-tokens, or load the model with a longer context"


class ChatTurn:
    """A question that is being answered.

    Args:
        messages: The conversation, with the question at its end.
    """

    def __init__(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self._asked = [dict(each) for each in messages]
        self._stream: RunStream | None = None
        self._meter: RoundMeter | None = None
        self._result: RunResult | None = None
        self.answer: StreamedAnswer = StreamedAnswer()
        """The answer, or the part of it that has arrived. It stays empty if the turn has tools."""

    async def take(
        self, connection: ServerConnection, view: AnswerView, params: Mapping[str, Any], tools: ToolAccess | None
    ) -> None:
        """Asks the model, and shows the answer. If this coroutine is cancelled, `messages` has what had arrived.

        Args:
            connection: The server and the model.
            view: Shows the answer.
            params: Parameters of the requests.
            tools: The tools that the model may use, or None.

        Raises:
            LLMError: The model server or an MCP server failed.
        """
        if tools is None or not tools.names:
            await stream_answer(connection.client, self._asked, view, self.answer, params)
            return
        # Agents take a while to import, and most answers need no tools.
        from lmbridge.agent.agent import Agent  # noqa: PLC0415 - see above
        from lmbridge.cli.run_view import RoundMeter, show_events  # noqa: PLC0415 - see above

        self._meter = RoundMeter()
        agent = Agent(connection.client, open_tools=tools.open_tools, approve=tools.approve, **params)
        *past, question = self._asked
        async with agent.stream(question["content"], messages=past) as stream:
            self._stream = stream
            self._result = await show_events(stream, view, meter=self._meter)

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation after the turn. A question without any answer is left out, so that it can be asked again."""
        if self._stream is not None:
            messages = [dict(each) for each in self._stream.handle.messages]
        elif self.answer.text:
            messages = [*self._asked, {"role": "assistant", "content": self.answer.text}]
        else:
            messages = list(self._asked)
        while messages and messages[-1].get("role") == "user":
            messages.pop()
        return messages

    def status_line(self, context_length: int | None) -> str:
        """Returns what is known about the answer: its tokens, its speed, and how full the context is.

        With tools, the speed and the context are those of the last round that has ended.
        """
        if self._meter is None:
            return self.answer.status(context_length)
        parts = self._meter.describe_last(context_length)
        if self._result is not None:
            rounds = self._result.rounds
            tokens = self._result.usage["completion_tokens"]
            parts.insert(0, f"{tokens} tokens in {rounds} round{'' if rounds == 1 else 's'}")
        return " · ".join(parts)

    def exit_status(self, terminal: Terminal) -> ExitStatus:
        """Shows a warning if the answer is not complete, and returns the exit status for the turn."""
        reason = self.answer.finish_reason if self._result is None else self._result.stop_reason
        if reason == "length":
            terminal.problem("the answer was cut off", _CUT_HINT, kind="warning")
        elif self._result is not None and reason != "stop":
            from lmbridge.agent.result import ENDINGS  # noqa: PLC0415 - see `take`
            from lmbridge.cli.run_view import describe_ending  # noqa: PLC0415 - see `take`

            _, hint = ENDINGS[self._result.stop_reason]
            terminal.problem(describe_ending(self._result), hint, kind="warning")
        return OF_STOP_REASON.get(reason or "stop", ExitStatus.OK)
