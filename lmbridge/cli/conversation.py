"""The conversation of `lmbridge chat`: prompts and answers in turn, until the person leaves.

Ctrl-C while the model writes closes the stream, so that the server stops. The part of the answer that has arrived stays
in the conversation. Ctrl-C at an empty prompt leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import attrs

from lmbridge.cli.answer_view import AnswerView, ReasoningMode
from lmbridge.cli.chat_messages import begin_messages, last_conversation, save, user_message, with_past_model
from lmbridge.cli.chat_options import ChatOptions
from lmbridge.cli.command_runner import CommandError, Signals, UsageError, split_hint
from lmbridge.cli.connection import ServerConnection
from lmbridge.cli.conversation_log import ConversationLog, LoggedConversation
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.line_editor import LineEditor
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_access import ToolAccess
from lmbridge.cli.turns import ChatTurn
from lmbridge.errors import LLMError

_WELCOME: Final = "/help lists the commands; Alt-Enter begins a new line; Ctrl-C stops an answer, Ctrl-D leaves"


class Conversation:
    """A conversation with a model, and the commands that change it.

    Args:
        options: The arguments of the command.
        connection: The server and the model.
        terminal: Where the conversation takes place.
        tools: The MCP servers whose tools the model may use.
        log: The log, or None if nothing is written to it.
        past: The conversation to continue, or None for a new one.
    """

    def __init__(
        self,
        options: ChatOptions,
        connection: ServerConnection,
        terminal: Terminal,
        tools: ToolAccess,
        log: ConversationLog | None,
        past: LoggedConversation | None,
    ) -> None:
        self.terminal = terminal
        self.tools = tools
        self.reasoning: ReasoningMode = options.reasoning
        """Whether the reasoning of the model is shown."""
        self.images: list[Path] = list(options.images)
        """The images that are shown with the next question."""
        self.connection: ServerConnection = with_past_model(connection, past, options.server.model)
        """The server and the model that answers."""
        self.messages: list[dict[str, Any]] = begin_messages(past, options.system)
        """The messages so far, with the system message first if there is one."""
        self._number = None if past is None else past.id
        self._params = options.params
        self._log = log
        self._status = ""

    @classmethod
    async def hold(
        cls, options: ChatOptions, connection: ServerConnection, terminal: Terminal, signals: Signals
    ) -> ExitStatus:
        """Holds the conversation until the person leaves it.

        Raises:
            CommandError: The log has no conversation to continue.
        """
        log = ConversationLog() if options.logs else None
        async with ToolAccess(options.tools, terminal.ask) as tools:
            past = await last_conversation(log) if options.continues else None
            conversation = cls(options, connection, terminal, tools, log, past)
            return await conversation._take_turns(signals)

    async def _take_turns(self, signals: Signals) -> ExitStatus:
        # Imported here because that module imports this one.
        from lmbridge.cli.chat_commands import COMMANDS, run_command  # noqa: PLC0415 - see above

        editor = LineEditor([f"/{name}" for name in COMMANDS], await self._past_prompts(), self._status_line)
        self.terminal.notice(self.connection.describe())
        self.terminal.notice(_WELCOME)
        while True:
            try:
                text = (await editor.read()).strip()
            except EOFError:
                return ExitStatus.OK
            except KeyboardInterrupt:
                return ExitStatus.INTERRUPTED
            if not text:
                continue
            if text.startswith("/"):
                if not await self._guarded(run_command(self, text), signals):
                    return ExitStatus.OK
            else:
                await self._guarded(self._ask(text), signals)

    async def _guarded(self, work: Any, signals: Signals) -> bool:
        """Runs a turn or a command, and shows its error. Ctrl-C ends only the turn or command.

        Returns:
            Whether the conversation goes on.
        """
        task: asyncio.Task[bool | None] = asyncio.ensure_future(work)
        try:
            with signals.interrupting(task):
                return await task is not False
        except asyncio.CancelledError:
            if signals.status is not None or not task.cancelled():
                raise
            self.terminal.notice("[stopped]")
        except (CommandError, UsageError) as error:
            self.terminal.problem(str(error), error.hint)
        except LLMError as error:
            self.terminal.problem(*split_hint(error))
        except (ImportError, OSError) as error:
            self.terminal.problem(str(error))
        return True

    async def _ask(self, text: str) -> None:
        turn = ChatTurn([*self.messages, await user_message(text, self.images)])
        try:
            with AnswerView(self.terminal, self.reasoning) as view:
                await turn.take(self.connection, view, self._params, self.tools)
        finally:
            self.messages = turn.messages
            self._status = turn.status_line(self.connection.context_length)
            self._number = await save(self._log, self._number, self.messages, self.connection, self.terminal)
        self.images = []
        turn.exit_status(self.terminal)
        # This comes last, because Ctrl-C may interrupt it, and everything else is done by then.
        self.connection = await self.connection.after_answer()
        self._status = turn.status_line(self.connection.context_length)

    async def _past_prompts(self) -> Sequence[str]:
        if self._log is None:
            return ()
        try:
            return await self._log.prompts()
        except CommandError as error:
            self.terminal.problem(str(error), error.hint, kind="warning")
            return ()

    def _status_line(self) -> str:
        tools = f" · tools: {', '.join(self.tools.names)}" if self.tools.names else ""
        model = self.connection.model or "the model of the server"
        return f"{model}{tools}{f' · {self._status}' if self._status else ''}"

    # The commands of the conversation use the following methods.

    @property
    def system(self) -> str | None:
        """The system message, or None."""
        return next((each["content"] for each in self.messages if each.get("role") == "system"), None)

    def set_system(self, text: str | None) -> None:
        """Sets the system message, or removes it."""
        rest = [each for each in self.messages if each.get("role") != "system"]
        self.messages = rest if text is None else [{"role": "system", "content": text}, *rest]

    def set_model(self, model: str) -> None:
        """Lets another model answer from now on."""
        client = self.connection.client.with_options(model=model)
        self.connection = attrs.evolve(self.connection, client=client, model=model)

    def start_anew(self) -> None:
        """Begins a new conversation with the same system message. The log keeps the old one."""
        self.messages = [each for each in self.messages if each.get("role") == "system"]
        self._number, self._status = None, ""
