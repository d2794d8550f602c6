"""The program of the child process: llama.cpp's server, which runs until stdin ends.

It is run by its path and imports nothing from lmbridge. The parent writes the options to stdin, as one line of JSON,
because command lines are visible to every user of the machine and the options contain the API key. The child answers
with one line: `{"address": "http://127.0.0.1:35981"}` when the model is loaded, `{"error": "..."}` if it cannot be
loaded, or `{"import_error": "..."}` if llama.cpp itself cannot be loaded. After that it exits when stdin ends, which
happens when the parent closes it and also when the parent dies.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from typing import IO, Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Runs the server until stdin ends."""
    # A terminal sends SIGINT to the parent as well, and a service manager SIGTERM. The parent decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reply = os.fdopen(os.dup(1), "w")
    # From now on, everything that a library prints goes to the log, so that the parent does not take it for the reply.
    os.dup2(2, 1)
    options = json.loads(sys.stdin.buffer.readline())
    _die_with_parent(options["parent"])
    # llama.cpp is imported only now, because the import may print something.
    try:
        bindings: Any = importlib.import_module("xllamacpp")
    except ImportError as exc:
        _send_reply(reply, {"import_error": str(exc)})
        sys.exit(1)

    try:
        # This call holds the GIL until the model is loaded, so a Python thread could not watch stdin in the meantime.
        server = bindings.Server(_params(bindings.CommonParams(), options))
    except RuntimeError as exc:
        _send_reply(reply, {"error": str(exc)})
        # This is a regular exit, because a thread of llama.cpp may still have to log the reason.
        sys.exit(1)
    _survive_thread_of_parent()
    _send_reply(reply, {"address": server.listening_address})
    while os.read(0, 1024):
        pass
    # The library's own shutdown would wait for up to 30 s for streams in flight.
    os._exit(0)


def _params(params: Any, options: dict[str, Any]) -> Any:
    params.model.path = options["model"]
    params.model_alias = {options["alias"]}
    params.port = options["port"]
    params.chat_template = options["chat_template"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.n_ctx = options["n_ctx"]
    params.n_parallel = options["n_parallel"]
    # With this, a single request may use the whole context. Otherwise the context would be divided by n_parallel.
    params.kv_unified = True
    # The batches are small, because only between two batches does the server notice that a client has disconnected.
    params.n_batch = 512
    # The size of the cache for the prompts of earlier requests, whose default is 8 GiB.
    params.cache_ram_mib = 256
    # Each open request occupies one of these threads. With fewer threads, /health would wait for queued requests.
    params.n_threads_http = 64
    params.sse_ping_interval = 1
    params.embedding = options["embeddings"]
    params.pooling_type = options["pooling"]
    params.api_keys = [options["api_key"]] if options["api_key"] else []
    # By default, any web page could read /slots, which contains the prompts of other users.
    params.cors_origins = "localhost"
    params.endpoint_metrics = params.endpoint_slots = True
    params.ui = params.warmup = False
    # At this level, only errors are logged.
    params.verbosity = 1
    return params


def _send_reply(reply: IO[str], message: dict[str, str]) -> None:
    reply.write(json.dumps(message) + "\n")
    reply.flush()


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        _set_death_signal(signal.SIGKILL)
        # The parent may have died before the signal was set.
        if os.getppid() != parent:
            sys.exit("the parent process has ended")


def _survive_thread_of_parent() -> None:
    # Linux sends the signal when the thread that started this process ends, and not when the parent process ends. From
    # now on, the child watches stdin instead.
    if sys.platform == "linux":
        _set_death_signal(0)


def _set_death_signal(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


if __name__ == "__main__":
    main()
