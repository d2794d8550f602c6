"""`lmbridge serve`, `lmbridge gateway` and `lmbridge mcp`: the servers of lmbridge, in the foreground."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lmbridge._tasks import run_until_signal
from lmbridge.cli.command_runner import Signals, run
from lmbridge.cli.connection import DISCOVERY_SECONDS, find_server, is_server_in_environment
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.options import ApiBase, Debug, Model
from lmbridge.cli.terminal import Terminal
from lmbridge.client.discovery import DEFAULT_PORTS, discover
from lmbridge.config import Limits

_GATEWAY_PORT: Final = 8080


def serve(
    model: Annotated[
        Path | None,
        typer.Option(
            "--model", "-m", metavar="FILE", help="A GGUF file. Default: a small model that is downloaded once."
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(metavar="N", help="The port. Default: any free one.")] = None,
    context: Annotated[
        int | None, typer.Option("--context", metavar="N", help="The context in tokens, which all requests share.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option("--parallel", metavar="N", help="How many requests generate at the same time.")
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help="The number of threads.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Jinja template in place of the model's own.")
    ] = None,
    embeddings: Annotated[bool, typer.Option("--embeddings", help="Serve /v1/embeddings as well.")] = False,
    debug: Debug = False,
) -> None:
    """Runs the embedded llama.cpp server, for any program.

    It runs until Ctrl-C, and needs lmbridge[local].

    To require an API key, set LMBRIDGE_LOCAL_API_KEY. An option would be visible to other users of the machine.
    """
    options = {
        "model": model,
        "port": port,
        "n_ctx": context,
        "n_parallel": parallel,
        "threads": threads,
        "chat_template": chat_template,
        "embeddings": embeddings or None,
    }

    async def work(_terminal: Terminal, _signals: Signals) -> ExitStatus:
        from lmbridge.local.__main__ import API_KEY_VARIABLE  # noqa: PLC0415 - only this command needs it
        from lmbridge.local.__main__ import serve as serve_local  # noqa: PLC0415 - as above

        given = {name: value for name, value in options.items() if value is not None}
        await run_until_signal(serve_local(given, os.environ.get(API_KEY_VARIABLE) or None))
        return ExitStatus.OK

    run(work, debug=debug)


def gateway(
    upstreams: Annotated[
        list[str] | None,
        typer.Argument(metavar="URL", help="The servers. Default: that of the environment, or all that are found."),
    ] = None,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="The port to listen on.")] = _GATEWAY_PORT,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name of the gateway, such as my-pc.")
    ] = None,
    max_concurrency: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many generations each server gets at a time. Default: its limit."),
    ] = None,
    max_loaded_models: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many models each server holds at a time. Default: its limit."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Log every request to stderr.")] = False,
    debug: Debug = False,
) -> None:
    """Runs a gateway that schedules the requests of all programs.

    It runs until Ctrl-C, and needs lmbridge[gateway].

    Point the programs to the URL that this command prints, in place of the server's own. The first Ctrl-C lets the
    requests in flight finish; a second one ends the gateway at once. To require a key, set LMBRIDGE_GATEWAY_KEY.
    """
    limits = {"max_concurrency": max_concurrency, "max_loaded_models": max_loaded_models}
    given: dict[str, Any] = {name: value for name, value in limits.items() if value is not None}

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        from lmbridge.gateway.__main__ import KEY_VARIABLE  # noqa: PLC0415 - only this command needs it
        from lmbridge.gateway.__main__ import serve as serve_gateway  # noqa: PLC0415 - as above
        from lmbridge.gateway.gateway import Gateway  # noqa: PLC0415 - as above

        if verbose:
            logging.getLogger("lmbridge").setLevel(logging.DEBUG)
        await serve_gateway(
            Gateway(
                upstreams or await _found_upstreams(port, terminal),
                host=host,
                port=port,
                api_key=os.environ.get(KEY_VARIABLE) or None,
                allowed_hosts=allow_host or (),
                limits=Limits(**given) if given else "auto",
            )
        )
        return ExitStatus.OK

    run(work, debug=debug)


async def _found_upstreams(own_port: int, terminal: Terminal) -> list[str] | None:
    """Returns the servers that are found on this machine, or None for the one of the environment.

    Raises:
        CommandError: No server was found.
    """
    if is_server_in_environment():
        return None
    servers = await discover([port for port in DEFAULT_PORTS if port != own_port], DISCOVERY_SECONDS)
    return [each.api_base for each in servers or [await find_server(None, terminal)]]


def mcp(
    api_base: ApiBase = None,
    model: Model = None,
    config: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help="The configuration file with the MCP servers.")
    ] = None,
    eof_timeout: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0, help="How long requests are processed after stdin was closed."),
    ] = None,
    http: Annotated[bool, typer.Option("--http", help="Serve over streamable HTTP, for several hosts.")] = False,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="The address to listen on, with --http.")] = None,
    port: Annotated[int | None, typer.Option(metavar="N", help="The port to listen on, with --http.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Another name of this machine, with --http.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Offers the models to MCP hosts.

    Hosts are Claude Code, LM Studio, Cursor and others. It needs lmbridge[mcp].

    A host starts this command, and exchanges messages with it on stdin and stdout. With --http it serves any number of
    hosts until Ctrl-C. To require a token over HTTP, set LMBRIDGE_MCP_TOKEN.
    """
    from lmbridge.mcp.__main__ import main as serve_mcp  # noqa: PLC0415 - only this command needs it

    options = [("--api-base", api_base), ("--model", model), ("--config", config), ("--eof-timeout", eof_timeout)]
    options += [("--host", host), ("--port", port), *(("--allow-host", name) for name in allow_host or ())]
    given = [text for name, value in options if value is not None for text in (name, str(value))]
    switches = [name for name, is_set in (("--http", http), ("--debug", debug)) if is_set]
    serve_mcp([*given, *switches])
