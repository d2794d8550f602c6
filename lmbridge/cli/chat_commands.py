"""The commands of a conversation, such as `/model`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from lmbridge._printable import one_line
from lmbridge.cli.command_runner import CommandError, UsageError
from lmbridge.cli.conversation import Conversation
from lmbridge.cli.tool_access import ALL_SERVERS
from lmbridge.client.images import image_part
from lmbridge.client.server_info import entries_named

Handler = Callable[[Conversation, str], Awaitable[None]]
"""Runs a command in a conversation. It is called with the text after the name of the command."""


class ChatCommand(NamedTuple):
    """A command of a conversation."""

    arguments: str
    """Its arguments, as the help shows them."""
    meaning: str
    """A description of the command, in a few words."""
    handler: Handler
    """Runs the command. It is called with the text after the name of the command."""


async def run_command(conversation: Conversation, line: str) -> bool:
    """Runs a line that begins with a slash.

    Returns:
        Whether the conversation goes on.

    Raises:
        UsageError: The command is unknown, or its arguments make no sense.
        CommandError, LLMError, OSError: The command failed.
    """
    name, _, argument = line.removeprefix("/").partition(" ")
    if name in ("exit", "quit", "bye"):
        return False
    command = COMMANDS.get(name)
    if command is None:
        raise UsageError(f"unknown command /{name}", "/help lists the commands")
    await command.handler(conversation, argument.strip())
    return True


async def _help(conversation: Conversation, _argument: str) -> None:
    lines = [(f"/{name} {command.arguments}".rstrip(), command.meaning) for name, command in COMMANDS.items()]
    conversation.terminal.table(("command", ""), lines)


async def _model(conversation: Conversation, argument: str) -> None:
    info = await conversation.connection.client.server_info()
    if not argument:
        rows = [
            ("*" if each.id == conversation.connection.model else "", each.id, "loaded" if each.loaded else "")
            for each in info.models
        ]
        conversation.terminal.table(("", "model", ""), rows)
        return
    if info.models and not entries_named(info.models, argument):
        raise UsageError(f"the server has no model {argument!r}", "/model lists the models")
    conversation.set_model(argument)
    conversation.terminal.notice(conversation.connection.describe())


async def _system(conversation: Conversation, argument: str) -> None:
    if argument == "-":
        conversation.set_system(None)
    elif argument:
        conversation.set_system(argument)
    conversation.terminal.notice(conversation.system or "no system message is set")


async def _save(conversation: Conversation, argument: str) -> None:
    if not argument:
        raise UsageError("/save needs the name of a file", "for example /save notes.md, or notes.json")
    path = _path(argument)
    if path.suffix == ".json":
        text = json.dumps(conversation.messages, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "\n\n".join(_as_markdown(each) for each in conversation.messages) + "\n"
    try:
        await asyncio.to_thread(_write_new_file, path, text)
    except FileExistsError as exc:
        raise CommandError(f"{path} exists already", "choose another name") from exc
    conversation.terminal.notice(f"saved to {path}")


def _write_new_file(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8", errors="replace") as file:
        file.write(text)


def _path(argument: str) -> Path:
    return Path(argument).expanduser()


def _as_markdown(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "\n\n".join(part.get("text") or f"[{part.get('type')}]" for part in content)
    calls = [
        f"`{each['function']['name']}({each['function']['arguments']})`" for each in message.get("tool_calls") or ()
    ]
    return "\n\n".join([f"**{message.get('role')}**", *([content] if content else []), *calls])


async def _tools(conversation: Conversation, argument: str) -> None:
    available = await conversation.tools.available()
    if argument == "off":
        conversation.tools.names = []
    elif argument:
        names = argument.replace(",", " ").split()
        if ALL_SERVERS in names:
            names = available
        if unknown := [name for name in names if name not in available]:
            raise UsageError(f"the configuration has no MCP server {unknown[0]!r}", "/tools lists the servers")
        conversation.tools.names = names
    rows = [("*" if name in conversation.tools.names else "", name) for name in available]
    conversation.terminal.table(("", "MCP server"), rows)


async def _image(conversation: Conversation, argument: str) -> None:
    if not argument:
        raise UsageError("/image needs the name of a file", "for example /image photo.jpg")
    path = _path(argument)
    # The image is read now, so that an error is reported at once and not with the next question.
    await asyncio.to_thread(image_part, path)
    conversation.images.append(path)
    conversation.terminal.notice(f"{one_line(str(path))} is shown with the next question")


async def _reasoning(conversation: Conversation, argument: str) -> None:
    match argument:
        case "show" | "hide":
            conversation.reasoning = argument
        case "":
            conversation.reasoning = "hide" if conversation.reasoning == "show" else "show"
        case _:
            raise UsageError("/reasoning takes show or hide")
    conversation.terminal.notice("reasoning is shown" if conversation.reasoning == "show" else "reasoning is hidden")


async def _new(conversation: Conversation, _argument: str) -> None:
    conversation.start_anew()
    conversation.terminal.notice("a new conversation")


async def _leave(_conversation: Conversation, _argument: str) -> None:
    """Does nothing. `run_command` handles the command; the table lists it only for the help and the completion."""


COMMANDS: Final[dict[str, ChatCommand]] = {
    "help": ChatCommand("", "lists the commands", _help),
    "model": ChatCommand("[NAME]", "lists the models, or changes the model", _model),
    "system": ChatCommand("[TEXT]", "shows or sets the system message; - removes it", _system),
    "tools": ChatCommand(
        "[NAME ...]", "lists the MCP servers, or gives the model their tools; off removes them", _tools
    ),
    "image": ChatCommand("FILE", "shows an image with the next question", _image),
    "reasoning": ChatCommand("[show|hide]", "shows or hides the reasoning of the model", _reasoning),
    "save": ChatCommand("FILE", "saves the conversation as Markdown, or as JSON if the name ends with .json", _save),
    "new": ChatCommand("", "begins a new conversation with the same system message", _new),
    "exit": ChatCommand("", "leaves; so does Ctrl-D", _leave),
}
"""The commands, in the order of the help."""
