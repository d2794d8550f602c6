"""`lmbridge resume`: resumes a run that `lmbridge run --journal` has begun."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import attrs
import typer

from lmbridge.cli.answer_view import ReasoningMode
from lmbridge.cli.command_runner import Signals, run
from lmbridge.cli.connection import connect_to_server
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.options import ApiBase, Debug, Json, Local, ServerOptions
from lmbridge.cli.queue_times import QueueTimes
from lmbridge.cli.run import LOCAL_MODEL, MCP_SERVERS, RunOutput, make_agent, open_tools, show_run
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_options import Approval, McpConfigFile, ToolOptions, TrustProject

if TYPE_CHECKING:
    from lmbridge.agent.journal import JournaledRun


def resume(
    journal: Annotated[Path, typer.Argument(metavar="FILE", help="The journal.")],
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="The run. Default: the only one that has no result yet.")
    ] = None,
    lists: Annotated[bool, typer.Option("--list", help="List the runs of the journal, and do nothing else.")] = False,
    api_base: ApiBase = None,
    local: Local = False,
    approve: Approval = "ask",
    mcp_config: McpConfigFile = None,
    trust_project: TrustProject = False,
    reasoning: Annotated[ReasoningMode, typer.Option(help="Whether reasoning is shown.")] = "show",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Resumes a run whose program was interrupted.

    The run keeps its model, its options and its MCP servers. Calls that had ended are not made again. The model learns
    which calls may or may not have happened. If the run is finished already, its answer is printed. The output is like
    that of `lmbridge run`; with --json, each event is a line of JSON.
    """
    options = ToolOptions(config=mcp_config, trust_project=trust_project, approval=approve)
    server = ServerOptions(api_base=api_base, local=local)

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        # Agents take a while to import.
        from lmbridge.agent.journal import Journal  # noqa: PLC0415 - see above

        if lists:
            _show_runs(await Journal(journal).runs(), terminal, as_json=as_json)
            return ExitStatus.OK
        view = RunOutput(terminal=terminal, as_json=as_json, reasoning=reasoning)
        return await _resume_run(journal, run_id, server, options, view)

    run(work, debug=debug)


async def _resume_run(
    journal: Path, run_id: str | None, server: ServerOptions, options: ToolOptions, view: RunOutput
) -> ExitStatus:
    """Resumes the run, and shows it until its end.

    Raises:
        JournalError: The journal cannot be used, or does not have the run.
        LLMError: The run failed.
    """
    from lmbridge.agent.journal.stored_options import find  # noqa: PLC0415 - agents take a while to import
    from lmbridge.agent.runs import RunStream  # noqa: PLC0415 - as above

    found = await find(str(journal), run_id)
    names: Sequence[str] = found.start.extra.get(MCP_SERVERS) or ()
    queue = QueueTimes()
    # The embedded server is started with the file of its model, and not with the name that it gives the model.
    model = found.start.extra.get(LOCAL_MODEL) if server.local else found.model
    async with AsyncExitStack() as stack:
        model_server = attrs.evolve(server, model=model)
        connection = await stack.enter_async_context(connect_to_server(model_server, view.terminal, observers=[queue]))
        access = await stack.enter_async_context(open_tools(attrs.evolve(options, names=names), view))
        agent = make_agent(connection, access, {"observers": [queue]})
        # `Agent.resume` returns only the result, but the events are shown as well.
        handle = await agent._start_again(str(journal), found.entry.run_id, is_muted=False)  # noqa: SLF001 - see above
        async with RunStream(handle, owns_run=True) as events:
            return await show_run(events, view, queue)


def _show_runs(runs: Sequence[JournaledRun], terminal: Terminal, *, as_json: bool) -> None:
    if as_json:
        terminal.json([attrs.asdict(each) for each in runs], indent=2)
        return
    rows = [
        (each.id, each.state, each.updated.strftime("%Y-%m-%d %H:%M"), each.model or "", str(each.task)[:80])
        for each in runs
    ]
    terminal.table(("run", "state", "updated (UTC)", "model", "task"), rows)
