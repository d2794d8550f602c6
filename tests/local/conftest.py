"""Scripted child processes in place of llama.cpp, and a witness that notices when they start and end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from lmbridge.local import LocalServer, local_server

# The connection to the witness ends with the process, however the process ends.
_PRELUDE = """\
import json, os, signal, socket, sys
connection = socket.create_connection(("127.0.0.1", {port}))
def tell(word): connection.sendall(f"{{word}}\\n".encode())
def reply(text): os.write(1, text.encode())
def serve(): reply(json.dumps({{"address": "http://127.0.0.1:1"}}) + "\\n")
def read_on():
    while os.read(0, 1): pass
tell(os.getpid())
"""
SERVE = "sys.stdin.readline(); serve(); read_on()"
HANG = "signal.pause()"


class Witness:
    """A server that child processes connect to.

    Each sends its process id first, and then words. The end of its connection is the end of the process.
    """

    def __init__(self) -> None:
        self.port = 0
        self.pids: list[int] = []
        self._words: asyncio.Queue[str] = asyncio.Queue()
        self._connected = 0
        self._disconnected = asyncio.Condition()

    async def word(self) -> str:
        """Returns the next word that any of the processes sends."""
        async with asyncio.timeout(20):
            return await self._words.get()

    async def next_pid(self) -> int:
        """Returns the id of the next process that starts."""
        return int(await self.word())

    async def wait_until_all_ended(self) -> None:
        """Waits until none of the processes is running."""
        async with asyncio.timeout(20), self._disconnected:
            await self._disconnected.wait_for(lambda: not self._connected)

    def assert_reaped(self) -> None:
        """Checks that no process is left, not even as a zombie."""
        for pid in self.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connected += 1
        try:
            while line := await reader.readline():
                word = line.decode().strip()
                if word.isdigit():
                    self.pids.append(int(word))
                self._words.put_nowait(word)
        except ConnectionError:
            pass
        finally:
            writer.close()
            async with self._disconnected:
                self._connected -= 1
                self._disconnected.notify_all()


@pytest_asyncio.fixture
async def witness() -> AsyncIterator[Witness]:
    witness = Witness()
    listener = await asyncio.start_server(witness.accept, "127.0.0.1", 0)
    async with listener:
        witness.port = listener.sockets[0].getsockname()[1]
        yield witness
        await witness.wait_until_all_ended()


class Script:
    """Sets what the next child processes do in place of llama.cpp."""

    def __init__(self, path: Path, witness: Witness) -> None:
        self._path = path
        self._prelude = _PRELUDE.format(port=witness.port)

    def __call__(self, body: str) -> None:
        self._path.write_text(self._prelude + body)


@pytest.fixture
def script(tmp_path: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch) -> Script:
    path = tmp_path / "scripted.py"
    monkeypatch.setattr(LocalServer, "_child", path)
    monkeypatch.setattr(local_server, "_check_machine", lambda: None)
    return Script(path, witness)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file that begins like a model."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path
