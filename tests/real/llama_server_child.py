"""The program of the child process of `LocalServer`, with a `llama-server` binary in place of the Python binding.

It takes the same line of options on stdin, and answers with the same line, as `lmbridge/local/child.py`. So the tests
with real servers run on any build of llama.cpp: `LMBRIDGE_TEST_LLAMA_SERVER` is the path of the binary.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

LLAMA_SERVER_VARIABLE = "LMBRIDGE_TEST_LLAMA_SERVER"
"""The environment variable with the path of the binary."""
_ADDRESS_LINE = re.compile(rb"listening on (http://127\.0\.0\.1:\d+)")
_POOLING = {1: "mean"}


def main() -> None:
    """Runs the server until stdin ends."""
    # As in child.py, the parent decides what a signal of the terminal means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    options = json.loads(sys.stdin.buffer.readline())
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(options["chat_template"])
        template.flush()
        process = _started(
            _command(os.environ[LLAMA_SERVER_VARIABLE], options, Path(template.name)), options["api_key"]
        )
        is_asked_to_end = threading.Event()
        threading.Thread(target=_end_with_stdin, args=(process, is_asked_to_end), daemon=True).start()
        _serve(process)
    sys.exit(0 if is_asked_to_end.is_set() else 1)


def _started(command: list[str], api_key: str | None) -> subprocess.Popen[bytes]:
    # The server must not outlive this program, even if it is killed, and gets no signals of the terminal.
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command],
        env=os.environ | ({"LLAMA_API_KEY": api_key} if api_key else {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _end_with_stdin(process: subprocess.Popen[bytes], is_asked_to_end: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    is_asked_to_end.set()
    process.kill()


def _serve(process: subprocess.Popen[bytes]) -> None:
    """Copies the log of the server until it ends, and replies with its address, or that it did not get that far."""
    assert process.stdout is not None
    has_replied = False
    for line in process.stdout:
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()
        if not has_replied and (found := _ADDRESS_LINE.search(line)):
            _reply({"address": found[1].decode()})
            has_replied = True
    process.wait()
    if not has_replied:
        _reply({"error": "llama-server ended before it listened"})


def _command(binary: str, options: dict[str, Any], template: Path) -> list[str]:
    """Returns the command line for the options that `lmbridge/local/child.py` sets, which gives the reasons."""
    given: dict[str, object] = {
        "model": options["model"],
        "alias": options["alias"],
        "host": "127.0.0.1",
        "port": options["port"],
        "threads": options["threads"],
        "threads-batch": options["threads"],
        "ctx-size": options["n_ctx"],
        "parallel": options["n_parallel"],
        "batch-size": 512,
        "cache-ram": 256,
        "threads-http": 64,
        "sse-ping-interval": 1,
        "cors-origins": "localhost",
    }
    if options["chat_template"]:
        given["chat-template-file"] = template
    if options["pooling"] in _POOLING:
        given["pooling"] = _POOLING[options["pooling"]]
    switches = ["--kv-unified", "--metrics", "--slots", "--no-ui", "--no-warmup", "--offline"]
    if options["embeddings"]:
        switches.append("--embeddings")
    return [binary, *(text for name, value in given.items() for text in (f"--{name}", str(value))), *switches]


def _reply(message: dict[str, str]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
