"""`lmbridge models`: lists, loads, unloads and downloads the models of the servers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Annotated, Any, Final

import attrs
import msgspec
import typer

from lmbridge.cli.command_runner import Signals, UsageError, run, split_hint
from lmbridge.cli.connection import DISCOVERY_SECONDS, KIND_NAMES, find_server, is_server_in_environment, open_client
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.help_examples import examples
from lmbridge.cli.options import ApiBase, Debug, Json, Local, ServerOptions
from lmbridge.cli.terminal import Terminal
from lmbridge.client.discovery import FoundServer, discover
from lmbridge.client.model_backends import DownloadProgress
from lmbridge.client.server_info import ModelInfo

models: Final = typer.Typer(rich_markup_mode=None, invoke_without_command=True, no_args_is_help=False)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The name of the model, as the server lists it.")]


@models.callback(epilog=examples("models"))
def list_models(
    context: typer.Context, api_base: ApiBase = None, local: Local = False, as_json: Json = False, debug: Debug = False
) -> None:
    """Lists, loads, unloads and downloads models.

    Without a command, it lists the models of all servers on this machine, or of the one that is named.
    """
    options = ServerOptions(api_base=api_base, local=local)
    if context.invoked_subcommand is not None:
        context.obj = options
        return

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        servers = await _described_servers(options, terminal)
        if as_json:
            terminal.json([_as_json(each) for each in servers], indent=2)
        else:
            for each in servers:
                _show(each, terminal)
        return ExitStatus.OK

    run(work, debug=debug)


async def _described_servers(options: ServerOptions, terminal: Terminal) -> list[FoundServer]:
    if options.api_base is None and not options.local and not is_server_in_environment():
        with terminal.waiting("looking for servers ..."):
            servers = await discover(timeout=DISCOVERY_SECONDS)
        return servers or [await find_server(None, terminal)]
    async with open_client(options, terminal) as client:
        return [FoundServer(api_base=client.api_base, info=await client.server_info())]


def _as_json(server: FoundServer) -> dict[str, Any]:
    described = attrs.asdict(server.info)
    error = None if server.error is None else str(server.error)
    return {"api_base": server.api_base, **described, "error": error}


def _show(server: FoundServer, terminal: Terminal) -> None:
    info = server.info
    version = f" {info.version}" if info.version else ""
    terminal.line(f"{KIND_NAMES[info.kind]}{version} at {server.api_base}", "bold")
    if server.error is not None:
        terminal.problem(*split_hint(server.error), kind="warning")
    elif not info.models:
        terminal.line("no models")
    else:
        terminal.table(("model", "state", "context", "slots", "size", "kind"), [_row(each) for each in info.models])
    terminal.line()


def _row(model: ModelInfo) -> tuple[str, ...]:
    state = model.status or {True: "loaded", False: "", None: "?"}[model.loaded]
    kinds = {"embedding": model.embeds, "vision": model.vision, "tools": model.tools}
    kind = ", ".join(name for name, applies in kinds.items() if applies)
    return model.id, state, str(model.context_length or ""), str(model.slots or ""), _size(model.size_bytes), kind


def _size(size: int | None) -> str:
    """Returns a size with the unit that suits models, or an empty text if it is unknown."""
    if size is None:
        return ""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


@models.command("load", epilog=examples("models load"))
def load_model(
    context: typer.Context,
    model: ModelName,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="An option of the server, such as context_length=8192."),
    ] = None,
    api_base: ApiBase = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Loads a model."""

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        given = _settings(settings or ())
        async with AsyncExitStack() as stack:
            client = await stack.enter_async_context(open_client(_server(context, api_base), terminal))
            with terminal.waiting(f"loading {model} ...") as show:

                def show_progress(fraction: float | None) -> None:
                    show(f"loading {model} ..." if fraction is None else f"loading {model}: {fraction:.0%}")

                loaded = await client.models.load(model, progress=show_progress, **given)
        if as_json:
            terminal.json(attrs.asdict(loaded), indent=2)
        else:
            terminal.line(
                f"loaded {loaded.id}" + (f", context {loaded.context_length}" if loaded.context_length else "")
            )
        return ExitStatus.OK

    run(work, debug=debug)


@models.command("unload", epilog=examples("models unload"))
def unload_model(
    context: typer.Context, model: ModelName, api_base: ApiBase = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Unloads a model at once, even if it is generating."""

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        async with open_client(_server(context, api_base), terminal) as client:
            await client.models.unload(model)
        if as_json:
            terminal.json({"unloaded": model}, indent=2)
        else:
            terminal.line(f"unloaded {model}")
        return ExitStatus.OK

    run(work, debug=debug)


@models.command("pull", epilog=examples("models pull"))
def pull_model(
    context: typer.Context, model: ModelName, api_base: ApiBase = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Lets the server download a model, and shows the progress."""

    async def work(terminal: Terminal, _signals: Signals) -> ExitStatus:
        async with open_client(_server(context, api_base), terminal) as client:
            with terminal.waiting(f"downloading {model} ...") as show:
                async for progress in client.models.download(model):
                    if as_json:
                        terminal.json(attrs.asdict(progress))
                    show(f"downloading {model}: {_describe_progress(progress)}")
        if not as_json:
            terminal.line(f"downloaded {model}")
        return ExitStatus.OK

    run(work, debug=debug)


def _describe_progress(progress: DownloadProgress) -> str:
    done, total = progress.downloaded_bytes, progress.total_bytes
    if done is None or not total:
        return progress.status
    return f"{done / 1e6:.0f} of {total / 1e6:.0f} MB ({done / total:.0%})"


def _server(context: typer.Context, api_base: str | None) -> ServerOptions:
    """Returns the server of a subcommand, whose address may be given before or after the name of the subcommand."""
    before: ServerOptions = context.obj
    return attrs.evolve(before, api_base=api_base or before.api_base)


def _settings(given: Sequence[str]) -> dict[str, Any]:
    """Returns the options of `--set`. A value that is not valid JSON is taken as a text."""
    settings: dict[str, Any] = {}
    for each in given:
        name, equals, text = each.partition("=")
        if not name or not equals:
            raise UsageError(f"--set takes NAME=VALUE, not {each!r}", "for example --set context_length=8192")
        try:
            settings[name] = msgspec.json.decode(text)
        except msgspec.DecodeError:
            settings[name] = text
    return settings
