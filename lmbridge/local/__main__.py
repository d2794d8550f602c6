"""The command `python -m lmbridge.local`: runs the embedded server in the foreground, for any OpenAI client."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
from typing import Any

from lmbridge._foreground import log_to_stderr, run_program
from lmbridge._tasks import run_until_signal
from lmbridge.errors import LLMConnectionError
from lmbridge.local.local_server import LocalServer

API_KEY_VARIABLE = "LMBRIDGE_LOCAL_API_KEY"
_EXAMPLE_MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
_USAGE = """\
{model} is served at {base}, until Ctrl-C.

With curl:

    curl {base}/chat/completions -H 'Content-Type: application/json'{header} -d {body}

With openai-python:

{import_os}    from openai import OpenAI

    client = OpenAI(base_url="{base}", api_key={openai_key})
    messages = {messages}
    reply = client.chat.completions.create(model={name}, messages=messages, temperature=0, max_tokens=50)
    print(reply.choices[0].message.content)

With lmbridge:

    import asyncio
{import_os}    from lmbridge import LLMClient

    async def main():
        async with LLMClient("{base}", {name}{lmbridge_key}) as client:
            messages = {messages}
            reply = await client.chat_completion(messages, temperature=0, max_tokens=50)
            print(reply["choices"][0]["message"]["content"])

    asyncio.run(main())

"""


def main(argv: list[str] | None = None) -> int:
    """Runs the server until SIGINT or SIGTERM, and returns the exit status.

    The exit status is 0 after a signal, 1 after an error, 2 if the arguments make no sense, or 130 if Ctrl-C is pressed
    before the signal handlers are installed. A traceback is shown only with `--debug`.
    """
    options = vars(_parser().parse_args(argv))
    debug = options.pop("debug", False)
    logging.getLogger("lmbridge").setLevel(logging.INFO)
    log_to_stderr("%(message)s", debug=debug)
    work = serve(options, os.environ.get(API_KEY_VARIABLE) or None)
    return run_program("lmbridge.local", run_until_signal(work), debug=debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lmbridge.local",
        description="Runs a real llama.cpp server on the loopback interface, for any OpenAI client, until Ctrl-C.",
        epilog=f"To require an API key, set {API_KEY_VARIABLE}. There is no option for it, because other users of the"
        " machine can see the options of a running command.",
        # Options that are not given are not passed on, so that the defaults are those of LocalServer.
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--model", metavar="PATH", help="a GGUF file (default: a small model that is downloaded once)")
    parser.add_argument("--port", type=int, metavar="N", help="the port to listen on (default: any free one)")
    parser.add_argument(
        "--n-ctx", type=int, metavar="N", help="the length of the context in tokens, which all requests share"
    )
    parser.add_argument("--n-parallel", type=int, metavar="N", help="how many requests generate at the same time")
    parser.add_argument("--threads", type=int, metavar="N", help="how many threads the model runs on")
    parser.add_argument("--chat-template", metavar="PATH", help="a Jinja template that replaces the one of the model")
    parser.add_argument("--embeddings", action="store_true", help="also serve /v1/embeddings")
    parser.add_argument("--debug", action="store_true", help="log everything, and show tracebacks of errors")
    return parser


async def serve(options: dict[str, Any], api_key: str | None) -> None:
    """Runs a server until it is cancelled, and prints how to use it.

    Args:
        options: Options of `LocalServer`.
        api_key: The key that each request has to send, or None.

    Raises:
        ImportError: The extra `local` is not installed.
        LLMError: The server did not start, or has ended unexpectedly.
    """
    progress = _show_progress if sys.stderr.isatty() else None
    async with LocalServer(**options, api_key=api_key, progress=progress) as server:
        sys.stdout.write(_usage(server, with_key=api_key is not None))
        sys.stdout.flush()
        await server.wait()
    raise LLMConnectionError(f"the server of {server.model} has ended unexpectedly")


def _show_progress(done: int, total: int) -> None:
    # The carriage return moves the cursor back, so that the next text overwrites this one.
    sys.stderr.write(f"{done / 1e6:4.0f} of {total / 1e6:.0f} MB\r")
    sys.stderr.flush()


def _usage(server: LocalServer, *, with_key: bool) -> str:
    body = {"model": server.model, "messages": _EXAMPLE_MESSAGES, "temperature": 0, "max_tokens": 50}
    key = f'os.environ["{API_KEY_VARIABLE}"]'
    return _USAGE.format(
        model=server.model,
        name=json.dumps(server.model),
        base=server.api_base,
        messages=json.dumps(_EXAMPLE_MESSAGES),
        body=shlex.quote(json.dumps(body)),
        header=f' -H "Authorization: Bearer ${API_KEY_VARIABLE}"' if with_key else "",
        import_os="    import os\n" if with_key else "",
        openai_key=key if with_key else '"none"',
        lmbridge_key=f", {key}" if with_key else "",
    )


if __name__ == "__main__":
    sys.exit(main())
