"""Child processes that cannot be started: each reason is an error of lmbridge with a hint."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import pytest

from lmbridge import LLMConnectionError
from lmbridge.local import LocalServer
from lmbridge.local.process import start_process
from tests.local.conftest import SERVE, Script


@pytest.mark.parametrize("executable", [None, ""])
async def test_an_interpreter_that_does_not_know_its_path_is_named(
    script: Script, gguf: Path, monkeypatch: pytest.MonkeyPatch, executable: Any
) -> None:
    script(SERVE)
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(LLMConnectionError, match=r"sys\.executable is not set") as caught:
        await LocalServer(gguf).__aenter__()
    assert "set sys.executable to the path" in (caught.value.hint or "")
    assert caught.value.context["operation"] == "start of a local server"


@pytest.mark.parametrize("reason", ["can't start new thread", "asyncio.get_child_watcher() is not activated"])
async def test_an_error_of_the_event_loop_is_quoted(monkeypatch: pytest.MonkeyPatch, reason: str) -> None:
    async def fail(*_: object, **__: object) -> NoReturn:
        raise RuntimeError(reason)

    monkeypatch.setattr(asyncio.get_running_loop(), "subprocess_exec", fail)
    with pytest.raises(LLMConnectionError) as caught:
        await start_process(sys.executable, "-c", "")
    assert caught.value.message == f"could not start {sys.executable}: {reason}"


async def test_an_event_loop_without_processes_is_named(
    script: Script, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def unsupported(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError

    script(SERVE)
    # The selector loop of Windows raises this, and so do many loops of other libraries.
    monkeypatch.setattr(asyncio.get_running_loop(), "subprocess_exec", unsupported)
    with pytest.raises(LLMConnectionError, match=r"because the event loop \(\w+\) does not support it") as caught:
        await LocalServer(gguf).__aenter__()
    assert "use the default event loop of asyncio" in (caught.value.hint or "")
    assert isinstance(caught.value.__cause__, NotImplementedError)


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOENT, "check that the file exists"),
        (errno.EACCES, "a program that this user may run"),
        (errno.ENOEXEC, "a program for this system and this CPU"),
        (errno.E2BIG, "the environment variables are too large"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENOMEM, "no memory left"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.EIO, "see the reason"),
    ],
)
async def test_the_reason_of_the_system_has_a_hint(
    script: Script, gguf: Path, monkeypatch: pytest.MonkeyPatch, code: int, hint: str
) -> None:
    async def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(code, "something")

    script(SERVE)
    monkeypatch.setattr(asyncio.get_running_loop(), "subprocess_exec", fail)
    with pytest.raises(LLMConnectionError) as caught:
        await LocalServer(gguf).__aenter__()
    assert caught.value.message == f"could not start {sys.executable}: {os.strerror(code)}"
    assert hint in (caught.value.hint or "")


async def test_files_that_are_not_programs_are_named(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(LLMConnectionError, match="may run" if os.geteuid() else "could not start"):
        await start_process(str(text))
    text.chmod(0o755)
    with pytest.raises(LLMConnectionError) as caught:
        await start_process(str(text))
    assert "a program for this system and this CPU" in (caught.value.hint or "")
    with pytest.raises(LLMConnectionError, match="could not start"):
        await start_process(str(tmp_path / "missing"))
    with pytest.raises(LLMConnectionError, match="could not start"):
        await start_process(sys.executable, "a\0b")
    with pytest.raises(LLMConnectionError) as caught:
        await start_process(sys.executable, env={"LARGE": "x" * 10_000_000})
    assert "the environment variables are too large" in (caught.value.hint or "")


async def test_a_log_that_cannot_be_created_is_named(
    script: Script, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> NoReturn:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    script(SERVE)
    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    with pytest.raises(LLMConnectionError, match="cannot create a temporary file") as caught:
        await LocalServer(gguf).__aenter__()
    assert "TMPDIR" in (caught.value.hint or "")
