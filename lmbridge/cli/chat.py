"""`lmbridge chat`: one answer, or a conversation."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from lmbridge.cli.answer_schema import AnswerSchema
from lmbridge.cli.answer_view import AnswerView, ReasoningMode
from lmbridge.cli.chat_messages import begin_messages, last_conversation, save, user_message, with_past_model
from lmbridge.cli.chat_options import ChatOptions
from lmbridge.cli.command_runner import Signals, UsageError, run
from lmbridge.cli.connection import connect_to_server
from lmbridge.cli.conversation_log import ConversationLog
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.options import ApiBase, Debug, Local, MaxTokens, Model, ServerOptions, Temperature
from lmbridge.cli.prompt_input import has_terminal, whole_prompt
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_access import ToolAccess
from lmbridge.cli.tool_options import Approval, McpConfigFile, McpNames, ToolOptions, TrustProject
from lmbridge.cli.turns import ChatTurn


def chat(
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The question. Without it, a conversation begins.")
    ] = None,
    model: Model = None,
    api_base: ApiBase = None,
    local: Local = False,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="The system message.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", metavar="FILE", help="An image to show; may be repeated.")
    ] = None,
    schema: Annotated[
        Path | None,
        typer.Option("--schema", metavar="FILE", help="A JSON schema: the answer is JSON that follows it."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole reply of the server as JSON, when it is complete.")
    ] = False,
    continues: Annotated[bool, typer.Option("--continue", "-c", help="Continue the last conversation.")] = False,
    no_log: Annotated[bool, typer.Option("--no-log", help="Neither read nor write the log of conversations.")] = False,
    reasoning: Annotated[
        ReasoningMode | None,
        typer.Option(help="Whether reasoning is shown. Default: show on a terminal, hide in a pipe."),
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    mcp: McpNames = None,
    mcp_config: McpConfigFile = None,
    trust_project: TrustProject = False,
    approve: Approval = "ask",
    debug: Debug = False,
) -> None:
    """Asks a model, or begins a conversation with it.

    The answer appears while it is written. Ctrl-C stops it, on the server as well. Text that is piped into the
    command is appended to the prompt. In a conversation, /help lists the commands.
    """

    async def work(terminal: Terminal, signals: Signals) -> ExitStatus:
        default_reasoning: ReasoningMode = "show" if terminal.shows_answers else "hide"
        options = ChatOptions(
            server=ServerOptions(api_base=api_base, local=local, model=model),
            tools=ToolOptions(names=mcp or (), config=mcp_config, trust_project=trust_project, approval=approve),
            system=system,
            images=image or (),
            schema=None if schema is None else await asyncio.to_thread(AnswerSchema.from_file, schema),
            as_json=as_json,
            continues=continues,
            logs=not no_log,
            reasoning=reasoning or default_reasoning,
            params=_params(max_tokens, temperature),
        )
        _check(options)
        text = await whole_prompt(prompt)
        if text is None:
            return await _converse(options, terminal, signals)
        return await _answer_once(text, options, terminal)

    run(work, debug=debug)


def _params(max_tokens: int | None, temperature: float | None) -> dict[str, Any]:
    given = {"max_tokens": max_tokens, "temperature": temperature}
    return {name: value for name, value in given.items() if value is not None}


def _check(options: ChatOptions) -> None:
    if options.continues and not options.logs:
        raise UsageError("--continue needs the log of conversations", "leave out --no-log")
    if options.schema is not None and options.tools.names:
        raise UsageError("--schema and --mcp cannot be combined", "give only one of them")
    if options.as_json and options.tools.names:
        raise UsageError("--json and --mcp cannot be combined", "use `lmbridge run --json` for events")


async def _converse(options: ChatOptions, terminal: Terminal, signals: Signals) -> ExitStatus:
    if options.as_json or options.schema is not None:
        raise UsageError("--json and --schema need a prompt", 'lmbridge chat --json "your question"')
    if not has_terminal():
        raise UsageError("no prompt was given, and a conversation needs a terminal", 'lmbridge chat "your question"')
    # Imported here because prompt_toolkit takes a tenth of a second, and only conversations need it.
    from lmbridge.cli.conversation import Conversation  # noqa: PLC0415 - see above

    async with connect_to_server(options.server, terminal) as connection:
        return await Conversation.hold(options, connection, terminal, signals)


async def _answer_once(text: str, options: ChatOptions, terminal: Terminal) -> ExitStatus:
    log = ConversationLog() if options.logs else None
    past = await last_conversation(log) if options.continues else None
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(connect_to_server(options.server, terminal))
        connection = with_past_model(connection, past, options.server.model)
        tools = (
            await stack.enter_async_context(ToolAccess(options.tools, terminal.ask)) if options.tools.names else None
        )
        turn = ChatTurn([*begin_messages(past, options.system), await user_message(text, options.images)])
        is_whole = options.as_json or options.schema is not None
        params = dict(options.params)
        if options.schema is not None:
            params["response_format"] = options.schema.response_format
        with AnswerView(terminal, options.reasoning, silent=is_whole) as view:
            await turn.take(connection, view, params, tools)
        if options.as_json:
            terminal.json(turn.answer.reply)
        elif options.schema is not None:
            terminal.json(options.schema.read(turn.answer.text), indent=2)
        if terminal.shows_notices:
            terminal.notice(turn.status_line(connection.context_length))
        await save(log, past.id if past else None, turn.messages, connection, terminal)
    return turn.exit_status(terminal)
