"""The commands of `lmbridge`, and their entry point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from lmbridge._version import __version__
from lmbridge.cli.bench import bench
from lmbridge.cli.chat import chat
from lmbridge.cli.doctor import doctor
from lmbridge.cli.exit_status import ExitStatus
from lmbridge.cli.help_examples import examples
from lmbridge.cli.models import models
from lmbridge.cli.resume import resume
from lmbridge.cli.run import run_agent
from lmbridge.cli.serving import gateway, mcp, serve
from lmbridge.cli.terminal import Terminal

_WrongArguments: Final[Any] = typer.BadParameter.__mro__[1]
"""The base class of all usage errors. Typer does not export it, and where it is defined depends on the version."""


class _CommandLine(TyperGroup):
    """The group of all commands. It shows usage errors in the same form as all other errors: one line, and a hint."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Reads the options before the name of the command."""
        try:
            return super().make_context(*arguments, **options)
        except _WrongArguments as error:
            _show_wrong_arguments(error, "lmbridge")
            raise typer.Exit(ExitStatus.USAGE) from error

    def invoke(self, ctx: Any) -> Any:
        """Reads the name of the command and its arguments, and runs it."""
        try:
            return super().invoke(ctx)
        except _WrongArguments as error:
            _show_wrong_arguments(error, f"lmbridge {ctx.invoked_subcommand or ''}".rstrip())
            raise typer.Exit(ExitStatus.USAGE) from error


def _show_wrong_arguments(error: Any, command: str) -> None:
    """Shows a usage error.

    Args:
        error: The error.
        command: The command as it is typed. It is shown if the error does not name its command.
    """
    text = error.format_message().removesuffix(".")
    path = error.ctx.command_path if error.ctx else command
    is_group = error.ctx is not None and isinstance(error.ctx.command, TyperGroup)
    what = "the commands and options" if is_group else "the options"
    Terminal().problem(text[:1].lower() + text[1:], f"{path} --help lists {what}")


app: Final = typer.Typer(
    name="lmbridge",
    cls=_CommandLine,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _show_version(is_set: bool) -> None:
    if is_set:
        typer.echo(f"lmbridge {__version__}")
        raise typer.Exit


@app.callback(epilog=examples(""))
def _about(
    context: typer.Context,
    version: Annotated[  # noqa: ARG001 - its callback handles it
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Talks to the language models on your own machine.

    Without an address, a command uses the server that the environment names (LMBRIDGE_API_BASE), or the first one that
    it finds: LM Studio, llama.cpp, Ollama or vLLM. With --local it starts one.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(ExitStatus.USAGE)


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
