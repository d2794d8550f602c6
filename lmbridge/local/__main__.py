"""`python -m lmbridge.local`: the embedded server in the foreground, for any OpenAI client."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shlex
import signal
import sys
from collections.abc import Coroutine
from typing import Any

from lmbridge.errors import LLMConnectionError, LLMError
from lmbridge.local.server import LocalServer

_KEY = "LMBRIDGE_LOCAL_API_KEY"
_MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]
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
    """Serves until SIGINT or SIGTERM, and returns the exit status: 0, or 1 after an error."""
    options = vars(_parser().parse_args(argv))
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lmbridge").setLevel(logging.INFO)
    try:
        asyncio.run(_until_signal(_serve(options, os.environ.get(_KEY) or None)))
    except (LLMError, ImportError, OSError) as error:
        sys.stderr.write(f"lmbridge.local: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lmbridge.local",
        description="Runs a real llama.cpp server on the loopback interface, for any OpenAI client, until Ctrl-C.",
        epilog=f"A key that requests must bring is taken from {_KEY}: what stands in a command, others can see.",
        argument_default=argparse.SUPPRESS,  # the defaults are those of LocalServer
    )
    parser.add_argument("--model", metavar="PATH", help="a GGUF file; else a small model, which is fetched once")
    parser.add_argument("--port", type=int, metavar="N", help="else any that is free")
    parser.add_argument("--n-ctx", type=int, metavar="N", help="tokens of context, for all requests together")
    parser.add_argument("--n-parallel", type=int, metavar="N", help="requests that generate at a time")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that compute")
    parser.add_argument("--chat-template", metavar="PATH", help="a Jinja template in place of the model's own")
    parser.add_argument("--embeddings", action="store_true", help="serve /v1/embeddings as well")
    return parser


async def _until_signal(work: Coroutine[Any, Any, None]) -> None:
    """Does the work, which SIGINT and SIGTERM cancel: that is its regular end."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(task.cancel))
    await asyncio.wait({task})
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the end has begun: one more of them is no news
    if not task.cancelled():
        task.result()


async def _serve(options: dict[str, Any], api_key: str | None) -> None:
    progress = _show_progress if sys.stderr.isatty() else None
    async with LocalServer(**options, api_key=api_key, progress=progress) as server:
        sys.stdout.write(_usage(server, with_key=api_key is not None))
        sys.stdout.flush()
        await server.wait()
    raise LLMConnectionError(f"the server of {server.model} has ended by itself")


def _show_progress(done: int, total: int) -> None:
    # The cursor goes back to the start of the line: whatever comes next is written over it.
    sys.stderr.write(f"{done / 1e6:4.0f} of {total / 1e6:.0f} MB\r")
    sys.stderr.flush()


def _usage(server: LocalServer, *, with_key: bool) -> str:
    body = {"model": server.model, "messages": _MESSAGES, "temperature": 0, "max_tokens": 50}
    key = f'os.environ["{_KEY}"]'
    return _USAGE.format(
        model=server.model,
        name=json.dumps(server.model),
        base=server.api_base,
        messages=json.dumps(_MESSAGES),
        body=shlex.quote(json.dumps(body)),
        header=f' -H "Authorization: Bearer ${_KEY}"' if with_key else "",
        import_os="    import os\n" if with_key else "",
        openai_key=key if with_key else '"none"',
        lmbridge_key=f", {key}" if with_key else "",
    )


if __name__ == "__main__":
    sys.exit(main())
