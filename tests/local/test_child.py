"""The program of the child process, with a stand-in for llama.cpp: its handshake, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmbridge.local.local_server import _FOLDER
from tests.local.conftest import Witness
from tests.support import replaced

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

_CHILD = [sys.executable, "-P", str(_FOLDER / "child.py")]
_OPTIONS = {
    "parent": os.getpid(),
    "model": "/some/where.gguf",
    "alias": "tiny",
    "port": 8123,
    "n_ctx": 512,
    "n_parallel": 2,
    "threads": 3,
    "chat_template": "{{ messages }}",
    "embeddings": True,
    "pooling": 1,
    "api_key": "a secret",
}
_STAND_IN = """\
import ctypes, json, os, signal, socket, types
print("noise of the import", flush=True)
connection = socket.create_connection(("127.0.0.1", int(os.environ["WITNESS"])))
def tell(word): connection.sendall(f"{word}\\n".encode())
class CommonParams:
    def __init__(self):
        self.model, self.cpuparams, self.cpuparams_batch = (types.SimpleNamespace() for _ in range(3))
class Server:
    listening_address = "http://127.0.0.1:1"
    def __init__(self, params):
        os.write(1, b"noise of the library\\n")
        tell(os.getpid())
        BODY
"""
_SEND_PARAMS = (
    "tell(json.dumps(vars(params), default=lambda value: sorted(value) if type(value) is set else vars(value)))"
)
_HOLD_THE_GIL = "ctypes.PyDLL(None).pause()"

StandIn = Callable[[str], dict[str, str]]


@pytest.fixture
def stand_in(tmp_path: Path, witness: Witness) -> StandIn:
    """Writes an `xllamacpp` module whose server runs the given code, and returns the environment that imports it."""

    def write(body: str) -> dict[str, str]:
        (tmp_path / "xllamacpp.py").write_text(replaced(_STAND_IN, "BODY", body))
        return os.environ | {"PYTHONPATH": str(tmp_path), "WITNESS": str(witness.port)}

    return write


async def _start(env: dict[str, str], **options: Any) -> Process:
    process = await asyncio.create_subprocess_exec(*_CHILD, stdin=PIPE, stdout=PIPE, stderr=PIPE, env=env)
    assert process.stdin is not None
    process.stdin.write(json.dumps(_OPTIONS | options).encode() + b"\n")
    return process


async def _end(process: Process) -> tuple[bytes, bytes]:
    """Closes the stdin of a process, if that is a pipe, and waits for the end of the process."""
    async with asyncio.timeout(20):
        return await process.communicate(b"" if process.stdin else None)


async def _reply(process: Process) -> Any:
    assert process.stdout is not None
    async with asyncio.timeout(20):
        return json.loads(await process.stdout.readline())


async def test_output_of_libraries_does_not_disturb_the_handshake(stand_in: StandIn) -> None:
    process = await _start(stand_in("pass"))
    assert await _reply(process) == {"address": "http://127.0.0.1:1"}
    out, err = await _end(process)
    assert out == b""
    assert err == b"noise of the import\nnoise of the library\n"
    assert process.returncode == 0


async def test_options_reach_llama_cpp(stand_in: StandIn, witness: Witness) -> None:
    process = await _start(stand_in(_SEND_PARAMS))
    await witness.next_pid()
    params = json.loads(await witness.word())
    assert params.pop("model") == {"path": "/some/where.gguf"}
    assert params.pop("cpuparams") == params.pop("cpuparams_batch") == {"n_threads": 3}
    expected = {
        "model_alias": ["tiny"],
        "port": 8123,
        "chat_template": "{{ messages }}",
        "n_ctx": 512,
        "n_parallel": 2,
        "embedding": True,
        "pooling_type": 1,
        "api_keys": ["a secret"],
        "sse_ping_interval": 1,
        "ui": False,
    }
    assert params.items() >= expected.items()
    await _end(process)


async def test_a_model_that_cannot_be_loaded_is_reported_in_the_reply(stand_in: StandIn) -> None:
    process = await _start(stand_in("raise RuntimeError('torn')"))
    assert await _reply(process) == {"error": "torn"}
    await _end(process)
    assert process.returncode == 1


async def test_a_library_that_cannot_be_imported_is_reported_in_the_reply(tmp_path: Path) -> None:
    (tmp_path / "xllamacpp.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    process = await _start(os.environ | {"PYTHONPATH": str(tmp_path)})
    assert await _reply(process) == {"import_error": "libgomp.so.1: cannot open shared object file"}
    await _end(process)
    assert process.returncode == 1


async def test_it_ends_if_the_parent_died_before_the_handshake(stand_in: StandIn) -> None:
    process = await _start(stand_in("pass"), parent=os.getppid())
    out, _ = await _end(process)
    assert out == b""
    assert process.returncode == (1 if sys.platform == "linux" else 0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_whole_process_group_are_left_to_the_parent(
    stand_in: StandIn, number: signal.Signals
) -> None:
    process = await _start(stand_in("pass"))
    await _reply(process)
    process.send_signal(number)
    await _end(process)
    assert process.returncode == 0


_PARENT = """\
import asyncio, sys
from lmbridge.local import LocalServer, local_server
local_server._check_machine = lambda: None
async def main():
    async with LocalServer(sys.argv[1], start_timeout=None):
        print("ready", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_a_running_child_ends_when_its_parent_is_killed(stand_in: StandIn, gguf: Path, witness: Witness) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, str(gguf), stdout=PIPE, env=stand_in("pass")
    )
    await witness.next_pid()
    assert parent.stdout is not None
    async with asyncio.timeout(20):
        assert await parent.stdout.readline() == b"ready\n"
    parent.kill()
    await _end(parent)
    await witness.wait_until_all_ended()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")
async def test_a_loading_child_ends_when_its_parent_is_killed(stand_in: StandIn, gguf: Path, witness: Witness) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _PARENT, str(gguf), stdout=PIPE, env=stand_in(_HOLD_THE_GIL)
    )
    await witness.next_pid()
    parent.kill()
    await _end(parent)
    await witness.wait_until_all_ended()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")
async def test_a_running_child_survives_the_thread_that_started_it(stand_in: StandIn) -> None:
    env = stand_in("pass")
    started: list[tuple[int, subprocess.Popen[bytes]]] = []

    def start() -> None:
        process = subprocess.Popen(_CHILD, stdin=PIPE, stdout=PIPE, env=env)
        started.append((threading.get_native_id(), process))
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(_OPTIONS).encode() + b"\n")
        process.stdin.flush()
        process.stdout.readline()

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(20)
    [(thread_id, process)] = started
    with process:
        # `join` returns a moment before the kernel is done with the thread and sends the signal.
        deadline = time.monotonic() + 20
        while Path(f"/proc/self/task/{thread_id}").exists():
            assert time.monotonic() < deadline
    # It ended because its stdin was closed, and not by a signal.
    assert process.returncode == 0
