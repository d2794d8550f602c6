"""The commands of `lmbridge`, and their entry point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final

import typer

from lmbridge._version import __version__
from lmbridge.cli.agent_run import run_agent
from lmbridge.cli.bench import bench
from lmbridge.cli.chat import chat
from lmbridge.cli.doctor import doctor
from lmbridge.cli.help_examples import examples
from lmbridge.cli.models import models
from lmbridge.cli.resume import resume
from lmbridge.cli.serving import gateway, mcp, serve

app: Final = typer.Typer(
    name="lmbridge",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Errors of usage are one line and a hint, without a frame around them.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(is_set: bool) -> None:
    if is_set:
        typer.echo(f"lmbridge {__version__}")
        raise typer.Exit


@app.callback(epilog=examples(""))
def _about(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Talks to the language models on your own machine.

    Without an address, a command uses the server that the environment names (LMBRIDGE_API_BASE), or the first one that
    it finds: LM Studio, llama.cpp, Ollama or vLLM. With --local it starts one.
    """


app.command(epilog=examples("chat"))(chat)
app.command("run", epilog=examples("run"))(run_agent)
app.command(epilog=examples("resume"))(resume)
app.add_typer(models, name="models", epilog=examples("models"))
app.command(epilog=examples("doctor"))(doctor)
app.command(epilog=examples("bench"))(bench)
app.command(epilog=examples("serve"))(serve)
app.command(epilog=examples("gateway"))(gateway)
app.command(epilog=examples("mcp"))(mcp)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line, and ends the process with an exit status.

    Args:
        arguments: The arguments. Default: those of the process.
    """
    app(args=None if arguments is None else list(arguments), prog_name="lmbridge")
