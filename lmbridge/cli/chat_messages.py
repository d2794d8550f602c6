"""The messages of a conversation: making them, and keeping them in the log."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from lmbridge.cli.command_runner import CommandError, UsageError
from lmbridge.cli.connection import ServerConnection
from lmbridge.cli.conversation_log import ConversationLog, LoggedConversation
from lmbridge.cli.terminal import Terminal
from lmbridge.client.images import image_part
from lmbridge.client.server_info import entries_named


async def user_message(text: str, images: Sequence[Path]) -> dict[str, Any]:
    """Returns the message of the person, with images.

    Raises:
        UsageError: An image cannot be read.
    """
    if not images:
        return {"role": "user", "content": text}
    try:
        parts = [await asyncio.to_thread(image_part, each) for each in images]
    except OSError as exc:
        raise UsageError(f"cannot read the image: {exc}") from exc
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def begin_messages(past: LoggedConversation | None, system: str | None) -> list[dict[str, Any]]:
    """Returns the messages before the first new one: those of the continued conversation, if there is one.

    If `system` is given, it is the system message, in place of that of the continued conversation.
    """
    messages = [] if past is None else past.messages
    if system is None:
        return list(messages)
    return [{"role": "system", "content": system}, *(each for each in messages if each.get("role") != "system")]


async def last_conversation(log: ConversationLog | None) -> LoggedConversation:
    """Returns the last conversation of the log.

    Raises:
        CommandError: The log has no conversation, or cannot be read.
    """
    past = None if log is None else await log.last()
    if past is None:
        raise CommandError("the log has no conversation to continue", 'begin one: lmbridge chat "your question"')
    return past


def with_past_model(
    connection: ServerConnection, past: LoggedConversation | None, model: str | None
) -> ServerConnection:
    """Returns the connection, with the model of the continued conversation if the server has it.

    If a model was named, or the server is the embedded one, the connection keeps its model.
    """
    if past is None or past.model is None or model is not None or connection.is_local:
        return connection
    if not entries_named(connection.info.models, past.model):
        return connection
    return attrs.evolve(connection, client=connection.client.with_options(model=past.model), model=past.model)


async def save(
    log: ConversationLog | None,
    number: int | None,
    messages: Sequence[Mapping[str, Any]],
    connection: ServerConnection,
    terminal: Terminal,
) -> int | None:
    """Writes a conversation to the log, and returns its number there.

    If the log cannot be written, a warning is shown and no error is raised, because the answer has been shown already.
    """
    if log is None:
        return None
    try:
        return await log.save(number, messages, server=connection.client.api_base, model=connection.model)
    except CommandError as error:
        terminal.problem(str(error), error.hint, kind="warning")
        return number
