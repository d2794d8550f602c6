"""`lmbridge doctor`: tries everything that programs rely on, and says how to fix what does not work."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Annotated, Final

import typer

from lmbridge.cli.command_runner import CommandError, Signals, run
from lmbridge.cli.connection import ServerConnection, connect_to_server
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.findings import Finding, any_broken, findings_as_json, show_findings
from lmbridge.cli.mcp_checks import check_mcp_servers
from lmbridge.cli.options import ApiBase, Debug, Json, Local, Model, ServerOptions
from lmbridge.cli.security_checks import check_network, check_websites
from lmbridge.cli.server_checks import SERVER_CHECKS, check_model_switch, other_model
from lmbridge.cli.terminal import Terminal
from lmbridge.cli.tool_options import McpConfigFile, ToolOptions, TrustProject
from lmbridge.errors import LLMError

_CHECK_SECONDS: Final = 120.0
_SECURITY_CHECKS: Final = (("websites", check_websites), ("network", check_network))
_SWITCH_FIX: Final = "try it with --try-switch: it loads another model, which may unload the one that is in use"


def doctor(
    model: Model = None,
    api_base: ApiBase = None,
    local: Local = False,
    try_switch: Annotated[
        bool | None,
        typer.Option(
            "--try-switch/--no-try-switch",
            help="Whether to load another model, to see if that kills a generation. Default: ask.",
        ),
    ] = None,
    mcp_config: McpConfigFile = None,
    trust_project: TrustProject = False,
    seconds: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1, help="How long each check may take.")
    ] = _CHECK_SECONDS,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Checks the server, its model and its security, and the MCP servers.

    It asks the model a few short questions. The exit status is 1 if something is broken.
    """
    server = ServerOptions(api_base=api_base, local=local, model=model)
    tools = ToolOptions(config=mcp_config, trust_project=trust_project)

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        examination = Examination(terminal, seconds)
        # With --json, the output is for a program, which cannot be asked.
        switches = False if as_json and try_switch is None else try_switch
        try:
            async with connect_to_server(server, terminal) as connection:
                await examination.check_server(connection, try_switch=switches)
        except (CommandError, LLMError) as error:
            examination.findings.append(_no_server(error))
        with terminal.waiting("checking the MCP servers ..."):
            examination.findings += await check_mcp_servers(tools)
        if as_json:
            terminal.json(findings_as_json(examination.findings), indent=2)
        else:
            show_findings(examination.findings, terminal)
        return ExitStatus.FAILED if any_broken(examination.findings) else ExitStatus.OK

    run(work, debug=debug)


def _no_server(error: CommandError | LLMError) -> Finding:
    text = error.message if isinstance(error, LLMError) else str(error)
    return Finding.of_error("server", text, error.hint)


class Examination:
    """The findings of one run of `lmbridge doctor`.

    Args:
        terminal: Shows which check is running, and asks the person.
        seconds: How long each check may take.
    """

    def __init__(self, terminal: Terminal, seconds: float) -> None:
        self.findings: list[Finding] = []
        """The findings so far."""
        self._terminal = terminal
        self._seconds = seconds

    async def check_server(self, connection: ServerConnection, *, try_switch: bool | None) -> None:
        """Runs all checks on a server.

        Args:
            connection: The server and the model.
            try_switch: Whether another model may be loaded; None asks the person, if there is one.
        """
        info = connection.info
        version = f" {info.version}" if info.version else ""
        self.findings.append(
            Finding("server", "ok", f"{connection.kind_name}{version} at {connection.client.api_base}")
        )
        for name, check in SERVER_CHECKS:
            await self._run(name, check, connection)
            if name == "model" and any_broken(self.findings):
                # Nothing else can work without a model.
                return
            if name == "streaming":
                connection = await connection.after_answer()
        await self._check_switch(connection, try_switch)
        for name, check in _SECURITY_CHECKS:
            await self._run(name, check, connection)

    async def _check_switch(self, connection: ServerConnection, try_switch: bool | None) -> None:
        other = other_model(connection)
        if other is not None and try_switch is None:
            ask = self._terminal.ask
            question = f"Load {other.id}, to see whether that kills a generation of {connection.model}? [y]es, [n]o: "
            try_switch = ask is not None and (await ask(question)).strip().lower() in ("y", "yes")
        if other is not None and not try_switch:
            self.findings.append(Finding("model switch", "skipped", "it was not tried", _SWITCH_FIX))
            return
        await self._run("model switch", check_model_switch, connection)

    async def _run(
        self, name: str, check: Callable[[ServerConnection], Awaitable[Finding]], connection: ServerConnection
    ) -> None:
        with self._terminal.waiting(f"checking: {name} ..."):
            try:
                async with asyncio.timeout(self._seconds):
                    finding = await check(connection)
            except LLMError as error:
                finding = Finding.of_error(name, error.message, error.hint)
            except TimeoutError:
                text = f"it did not end within {self._seconds:g} s"
                finding = Finding(name, "broken", text, "try again when the server is idle, or raise --timeout")
        self.findings.append(finding)
