"""`lmbridge run`: an agent works on a task with the tools of MCP servers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import attrs
import typer

from lmbridge.cli.answer_view import AnswerView, ReasoningMode
from lmbridge.cli.command_runner import Signals, UsageError, run
from lmbridge.cli.connection import ServerConnection, connect_to_server
from lmbridge.cli.exit_status import OF_STOP_REASON, ExitStatus, exit_status_of
from lmbridge.cli.options import ApiBase, Debug, Local, MaxTokens, Model, ServerOptions, Temperature
from lmbridge.cli.prompt_input import whole_prompt
from lmbridge.cli.queue_times import QueueTimes
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_access import ToolAccess
from lmbridge.cli.tool_options import Approval, McpConfigFile, McpNames, ToolOptions, TrustProject
from lmbridge.errors import LLMError, RunIncompleteError

if TYPE_CHECKING:
    from lmbridge.agent.agent import Agent
    from lmbridge.agent.events import RunEvent
    from lmbridge.agent.journal import JournalEntry
    from lmbridge.agent.result import RunResult

_HINTS: Final[Mapping[str, str]] = {
    "length": "raise --max-tokens, or ask for less",
    "repetition": "describe the task in more detail",
    "bad_calls": "give the model fewer tools, or use another model",
    "budget": "raise --max-seconds",
    "max_rounds": "raise --max-rounds, or give it a smaller task",
}
"""What the user can do about a run that did not end with "stop", for each stop reason."""
MCP_SERVERS: Final = "mcp_servers"
"""The field of `JournalEntry.extra` with the names of the servers of a run."""
LOCAL_MODEL: Final = "local_model"
"""The field of `JournalEntry.extra` with the path of the model of a run with `--local`; None for the default model."""


@attrs.frozen(kw_only=True)
class RunOutput:
    """Where and how a command shows its run."""

    terminal: Terminal
    """The terminal that shows it."""
    as_json: bool
    """Whether each event is a line of JSON."""
    reasoning: ReasoningMode
    """Whether the reasoning of the model is shown."""


def run_agent(
    task: Annotated[
        str | None, typer.Argument(metavar="TASK", help="What to do. Text that is piped in is appended.")
    ] = None,
    mcp: McpNames = None,
    model: Model = None,
    api_base: ApiBase = None,
    local: Local = False,
    system: Annotated[str | None, typer.Option("--system", "-s", metavar="TEXT", help="The system message.")] = None,
    approve: Approval = "ask",
    mcp_config: McpConfigFile = None,
    trust_project: TrustProject = False,
    max_rounds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many times the model is asked. Default: 25.")
    ] = None,
    max_seconds: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=0, help="How long the run may take. Default: no limit.")
    ] = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    journal: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Record each step in this file, for `lmbridge resume`."),
    ] = None,
    reasoning: Annotated[ReasoningMode, typer.Option(help="Whether reasoning is shown.")] = "show",
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a line of JSON, for programs.")] = False,
    debug: Debug = False,
) -> None:
    """Lets a model work on a task with the tools of MCP servers.

    On a terminal, rounds, calls and their results appear while the model works; in a pipe, only the answer is printed.
    Calls that may change or delete something are made only if you approve them. Ctrl-C stops the run, the tools, and
    what the server is generating. The exit status says how the run ended.
    """
    # The run may be resumed in another folder.
    local_model = str(Path(model).absolute()) if local and model is not None else None

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        text = await whole_prompt(task)
        if text is None:
            raise UsageError("no task was given", 'lmbridge run "what to do"')
        tools = ToolOptions(names=mcp or (), config=mcp_config, trust_project=trust_project, approval=approve)
        queue = QueueTimes()
        settings = {
            "system_prompt": system,
            "max_rounds": max_rounds,
            "max_seconds": max_seconds,
            "max_tokens": max_tokens,
            "temperature": temperature,
            "observers": [queue],
        }
        view = RunOutput(terminal=terminal, as_json=as_json, reasoning=reasoning)
        server = ServerOptions(api_base=api_base, local=local, model=model)
        async with AsyncExitStack() as stack:
            connection = await stack.enter_async_context(connect_to_server(server, terminal, observers=[queue]))
            access = await stack.enter_async_context(open_tools(tools, view))
            if not access.names and terminal.shows_notices:
                terminal.notice(
                    "the model has no tools; give it those of a server with --mcp NAME, or all with --mcp all"
                )
            agent = make_agent(connection, access, {name: each for name, each in settings.items() if each is not None})
            async with agent.stream(text, journal=_entry(journal, access, local_model)) as events:
                return await show_run(events, view, queue)

    run(work, debug=debug)


def _entry(journal: Path | None, access: ToolAccess, local_model: str | None) -> JournalEntry | None:
    """Returns the journal entry of the run, which also records its MCP servers and the file of its model."""
    if journal is None:
        return None
    from lmbridge.agent.journal import JournalEntry  # noqa: PLC0415 - as in `make_agent`

    return JournalEntry(str(journal), extra={MCP_SERVERS: access.names, LOCAL_MODEL: local_model})


def open_tools(options: ToolOptions, view: RunOutput) -> ToolAccess:
    """Returns the tools of a run. With `--json`, nobody is asked for approval, because the output is for a program."""
    return ToolAccess(options, None if view.as_json else view.terminal.ask)


def make_agent(connection: ServerConnection, access: ToolAccess, settings: Mapping[str, Any]) -> Agent:
    """Returns the agent of a run."""
    # Agents take a while to import.
    from lmbridge.agent.agent import Agent  # noqa: PLC0415 - see above

    return Agent(connection.client, open_tools=access.open_tools, approve=access.approve, **settings)


async def show_run(events: AsyncIterator[RunEvent], view: RunOutput, queue: QueueTimes) -> ExitStatus:
    """Shows a run until its end.

    Args:
        events: The events of the run.
        view: How they are shown.
        queue: How long the requests of each round waited.

    Raises:
        LLMError: The run failed. With `--json`, the last line has reported the error.
    """
    if view.as_json:
        return await _print_events(events, view.terminal, queue)
    from lmbridge.cli.run_view import show_events  # noqa: PLC0415 - as in `make_agent`

    terminal = view.terminal
    is_shown = terminal.shows_answers
    try:
        with AnswerView(terminal, view.reasoning, silent=not is_shown) as answer_view:
            result = await show_events(events, answer_view, queue)
    except RunIncompleteError as error:
        # The hint of the error is about the Python API.
        return end_run(error.result, terminal)
    # If the run was resumed, its answer may have arrived before the interruption.
    if not is_shown or (result.text and not answer_view.has_shown_text):
        terminal.line(result.text)
    return end_run(result, terminal)


def end_run(result: RunResult[Any], terminal: Terminal) -> ExitStatus:
    """Shows warnings about what is missing in the answer of a run that has ended, and returns the exit status."""
    from lmbridge.cli.run_view import describe_ending  # noqa: PLC0415 - as in `make_agent`

    if result.stop_reason in _HINTS:
        terminal.problem(describe_ending(result), _HINTS[result.stop_reason], kind="warning")
    for name, error in result.errors.items():
        terminal.problem(f"without {name}: {error}", kind="warning")
    for warning in result.warnings:
        terminal.problem(warning, kind="warning")
    return OF_STOP_REASON.get(result.stop_reason, ExitStatus.FAILED)


async def _print_events(events: AsyncIterator[RunEvent], terminal: Terminal, queue: QueueTimes) -> ExitStatus:
    from lmbridge.agent.events import RoundFinished, RunFinished  # noqa: PLC0415 - as in `make_agent`
    from lmbridge.cli.event_json import error_as_json, event_as_json  # noqa: PLC0415 - as above

    status = ExitStatus.FAILED
    try:
        async for event in events:
            line = event_as_json(event)
            if isinstance(event, RoundFinished):
                line["queue_seconds"] = round(queue.seconds(event.round.number), 3)
            terminal.json(line)
            if isinstance(event, RunFinished):
                status = OF_STOP_REASON.get(event.result.stop_reason, ExitStatus.FAILED)
    except asyncio.CancelledError:
        terminal.json({"type": "error", "error": "CancelledError", "message": "the run was interrupted"})
        raise
    except LLMError as error:
        terminal.json(error_as_json(error))
        if isinstance(error, RunIncompleteError):
            return exit_status_of(error)
        raise
    return status
