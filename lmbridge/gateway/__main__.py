"""`python -m lmbridge.gateway`: a gateway that runs until a signal stops it."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from typing import Final

from lmbridge._foreground import log_to_stderr, run_program
from lmbridge._tasks import calling_on_signal
from lmbridge._version import __version__
from lmbridge.config import Limits
from lmbridge.gateway.gateway import Gateway

_DESCRIPTION = """\
Puts lmbridge's schedule in front of model servers, for every program on the machine. Point the programs at the URL that
this command prints, in place of the server's own.

The first SIGTERM or Ctrl-C lets the requests in flight finish and refuses new ones; a second one ends the gateway at
once."""
KEY_VARIABLE: Final = "LMBRIDGE_GATEWAY_KEY"
"""The environment variable with the key that clients have to send, unless `--api-key` is given."""


def main(argv: list[str] | None = None) -> None:
    """Runs a gateway until a signal arrives.

    After an error the process ends with one line on stderr and status 1, or status 2 if the arguments are not valid.
    A traceback is shown only with `--debug`.
    """
    options = _parser().parse_args(argv)
    level = logging.DEBUG if options.verbose else logging.WARNING
    log_to_stderr("%(asctime)s %(levelname)s %(name)s: %(message)s", level=level, debug=options.debug)
    if status := run_program("lmbridge gateway", _open_and_serve(options), debug=options.debug):
        sys.exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmbridge gateway", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"lmbridge {__version__}")
    parser.add_argument(
        "upstreams", nargs="*", metavar="URL", help="the URL of a server (default: that of an LLMClient)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="the port to listen on (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        help=f"the key that clients have to send. Other users of the machine can see arguments, so it is"
        f" better to set {KEY_VARIABLE} in the environment",
    )
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="another name of the gateway, such as my-pc"
    )
    # `Limits` are given as a whole or asked for as a whole, so the server is asked only if neither option is given.
    parser.add_argument(
        "--max-concurrency",
        type=int,
        help="how many generations each server gets at a time (default: ask it; 10 if --max-loaded-models is given)",
    )
    parser.add_argument(
        "--max-loaded-models",
        type=int,
        help="how many models each server holds at a time (default: ask it; no limit if --max-concurrency is given)",
    )
    parser.add_argument("--verbose", action="store_true", help="log every request to stderr")
    parser.add_argument("--debug", action="store_true", help="log everything, and show tracebacks of errors")
    return parser


async def _open_and_serve(options: argparse.Namespace) -> None:
    await serve(_gateway(options))


def _gateway(options: argparse.Namespace) -> Gateway:
    given = {
        name: value
        for name in ("max_concurrency", "max_loaded_models")
        if (value := getattr(options, name)) is not None
    }
    return Gateway(
        options.upstreams or None,
        host=options.host,
        port=options.port,
        api_key=options.api_key or os.environ.get(KEY_VARIABLE) or None,
        allowed_hosts=options.allow_host,
        limits=Limits(**given) if given else "auto",
    )


async def serve(gateway: Gateway) -> None:
    """Runs a gateway until SIGINT or SIGTERM has arrived and the requests in flight have finished.

    A second signal ends the gateway at once. This function must be called in the main thread, and it replaces the
    handlers of both signals. Afterwards the signals are ignored.

    Raises:
        LLMError: The gateway cannot listen.
    """
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (second if first.is_set() else first).set()

    with calling_on_signal(on_signal):
        async with gateway:
            sys.stdout.write(f"lmbridge gateway: {gateway.api_base}, status page: {gateway.origin}/status\n")
            sys.stdout.flush()
            await first.wait()
            draining = asyncio.create_task(gateway.drain())
            at_once = asyncio.create_task(second.wait())
            await asyncio.wait({draining, at_once}, return_when=asyncio.FIRST_COMPLETED)
            for task in (draining, at_once):
                task.cancel()


if __name__ == "__main__":
    main()
