"""The line editor of `lmbridge chat`: several lines, history, completion of commands, and pasted text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from lmbridge._printable import one_line


class LineEditor:
    """Reads what the person types.

    Enter sends the text. Alt-Enter begins a new line, and line breaks in pasted text are kept. Ctrl-C clears the text,
    or leaves the conversation if the line is empty.

    Args:
        commands: The commands that Tab completes, such as "/help".
        history: What was typed before, oldest first, for the arrow keys.
        status: Returns the text of the line at the bottom.
    """

    def __init__(self, commands: Sequence[str], history: Iterable[str], status: Callable[[], str]) -> None:
        past = InMemoryHistory()
        for each in history:
            past.append_string(each)
        self._status = status
        self._session: PromptSession[str] = PromptSession(
            history=past,
            multiline=True,
            key_bindings=_key_bindings(),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            bottom_toolbar=self._toolbar,
            prompt_continuation="  ",
            enable_open_in_editor=True,
        )

    async def read(self) -> str:
        """Returns what was typed.

        Raises:
            EOFError: Ctrl-D was pressed.
            KeyboardInterrupt: Ctrl-C was pressed while there was no text.
        """
        return await self._session.prompt_async("> ", handle_sigint=False)

    def _toolbar(self) -> FormattedText:
        return FormattedText([("", one_line(self._status()))])


async def ask_person(question: str) -> str:
    """Asks a question, and returns the answer, which is a single line; an empty string after Ctrl-D.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
    """
    session: PromptSession[str] = PromptSession()
    try:
        return await session.prompt_async(question, handle_sigint=False)
    except EOFError:
        return ""


def _key_bindings() -> KeyBindings:
    bindings = KeyBindings()

    # An Enter that was typed while the model wrote arrives as Ctrl-J, because the terminal was not in raw mode then.
    @bindings.add("enter")
    @bindings.add("c-j")
    def _send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _clear_or_leave(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            leave: Any = KeyboardInterrupt
            event.app.exit(exception=leave, style="class:aborting")

    return bindings
