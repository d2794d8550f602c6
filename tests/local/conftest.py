"""Scripted children, and a witness that sees when they come and go."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from lmbridge.local import LocalServer, server

# Its connection to the witness ends when the process does, by whatever way.
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
    """Processes connect to it, begin with their id, and go on with words; the end of a connection is their end."""

    def __init__(self) -> None:
        self.port = 0
        self.pids: list[int] = []
        self._words: asyncio.Queue[str] = asyncio.Queue()
        self._present = 0
        self._left = asyncio.Condition()

    async def word(self) -> str:
        """The next word that any of them says."""
        async with asyncio.timeout(20):
            return await self._words.get()

    async def come(self) -> int:
        """The id of the next process."""
        return int(await self.word())

    async def gone(self) -> None:
        """Returns once none of them is there any more."""
        async with asyncio.timeout(20), self._left:
            await self._left.wait_for(lambda: not self._present)

    def assert_reaped(self) -> None:
        """None of them is left, not even as a zombie."""
        for pid in self.pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    async def attend(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._present += 1
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
            async with self._left:
                self._present -= 1
                self._left.notify_all()


@pytest_asyncio.fixture
async def witness() -> AsyncIterator[Witness]:
    witness = Witness()
    listener = await asyncio.start_server(witness.attend, "127.0.0.1", 0)
    async with listener:
        witness.port = listener.sockets[0].getsockname()[1]
        yield witness
        await witness.gone()


class Script:
    """Says what the next children do, in place of llama.cpp."""

    def __init__(self, path: Path, witness: Witness) -> None:
        self._path = path
        self._prelude = _PRELUDE.format(port=witness.port)

    def __call__(self, body: str) -> None:
        self._path.write_text(self._prelude + body)


@pytest.fixture
def script(tmp_path: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch) -> Script:
    path = tmp_path / "scripted.py"
    monkeypatch.setattr(LocalServer, "_child", path)
    monkeypatch.setattr(server, "_check_machine", lambda: None)
    return Script(path, witness)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A file that looks like a model from outside."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path
