"""What runs in the child process: llama.cpp's server, until stdin ends. It is run by path and imports no lmbridge.

The parent writes one line of JSON, the options (argv would show the key to everybody by `ps`). It gets one line back,
`{"address": "http://127.0.0.1:35981"}` once the model is loaded, or `{"error": "..."}` if it cannot be. From then on
the end of stdin is the end of the process, whether the parent closed it or died.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import IO, Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serves until stdin ends."""
    # A terminal sends Ctrl-C, and a service manager SIGTERM, to the parent as well, which decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    reply = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints from here on goes to the log: nobody takes it for the reply
    options = json.loads(sys.stdin.buffer.readline())
    _die_with_parent(options["parent"])
    import xllamacpp  # noqa: PLC0415 - its import may print

    try:
        # Holds the GIL until the model is loaded: no thread of Python could watch stdin meanwhile.
        server = xllamacpp.Server(_params(xllamacpp.CommonParams(), options))
    except RuntimeError as exc:
        _say(reply, {"error": str(exc)})
        sys.exit(1)  # properly: a thread of llama.cpp may still have to write why
    _survive_thread_of_parent()
    _say(reply, {"address": server.listening_address})
    while os.read(0, 1024):
        pass
    os._exit(0)  # the library's own shutdown waits for streams in flight, up to 30 s


def _params(params: Any, options: dict[str, Any]) -> Any:
    params.model.path = options["model"]
    params.model_alias = {options["alias"]}
    params.port = options["port"]
    params.chat_template = options["chat_template"]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
    params.n_ctx = options["n_ctx"]
    params.n_parallel = options["n_parallel"]
    params.kv_unified = True  # one request alone may use all of n_ctx, not its n-th part
    params.n_batch = 512  # a client that went away is noticed between batches, not within one
    params.cache_ram_mib = 256  # prompts of requests gone by; the default is 8 GiB, filled without a word
    params.n_threads_http = 64  # an open request holds one; with fewer, /health waits behind requests that queue
    params.sse_ping_interval = 1
    params.embedding = options["embeddings"]
    params.pooling_type = options["pooling"]
    params.api_keys = [options["api_key"]] if options["api_key"] else []
    params.cors_origins = "localhost"  # by default any web page may read the slots, which show what others ask
    params.endpoint_metrics = params.endpoint_slots = True
    params.ui = params.warmup = False
    params.verbosity = 1  # errors
    return params


def _say(reply: IO[str], message: dict[str, str]) -> None:
    reply.write(json.dumps(message) + "\n")
    reply.flush()


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        _set_death_signal(signal.SIGKILL)
        if os.getppid() != parent:  # it died before the signal was set
            sys.exit("the parent has gone")


def _survive_thread_of_parent() -> None:
    # The signal comes at the end of the thread that started us, not of its process; stdin is watched from now on.
    if sys.platform == "linux":
        _set_death_signal(0)


def _set_death_signal(number: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


if __name__ == "__main__":
    main()
