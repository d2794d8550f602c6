"""The log of conversations: who can read it, and what happens if it cannot be used."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from lmbridge.cli.command_runner import CommandError
from lmbridge.cli.conversation_log import ConversationLog, data_folder

SERVER = "http://127.0.0.1:1234/v1"
QUESTION = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Hi 👋 \ud83d"}


async def save(log: ConversationLog, *messages: dict[str, Any], number: int | None = None) -> int:
    return await log.save(number, messages, server=SERVER, model="qwen3-4b")


async def test_nobody_else_can_read_it(data_home: Path) -> None:
    before = os.umask(0)
    try:
        await save(ConversationLog(), QUESTION, ANSWER)
    finally:
        os.umask(before)
    assert data_home.stat().st_mode & 0o777 == 0o700
    (file,) = data_home.iterdir()
    assert file.name == "conversations.sqlite3"
    assert file.stat().st_mode & 0o777 == 0o600


async def test_a_file_that_others_can_read_is_closed_to_them(data_home: Path) -> None:
    log = ConversationLog()
    await save(log, QUESTION)
    log.path.chmod(0o644)
    await log.last()
    assert log.path.stat().st_mode & 0o777 == 0o600


async def test_the_last_conversation_is_the_one_that_was_changed_last() -> None:
    log = ConversationLog()
    first = await save(log, QUESTION)
    await save(log, {"role": "user", "content": "Another one"})
    await save(log, QUESTION, ANSWER, number=first)
    last = await log.last()
    assert last is not None
    assert (last.id, last.model, last.messages) == (first, "qwen3-4b", [QUESTION, ANSWER])


async def test_there_is_nothing_before_the_first_conversation(data_home: Path) -> None:
    log = ConversationLog()
    assert await log.last() is None
    assert await log.prompts() == []
    assert not data_home.exists()


async def test_the_prompts_are_those_that_were_typed_oldest_first() -> None:
    log = ConversationLog()
    parts = [{"type": "text", "text": "with an image"}]
    await save(log, {"role": "system", "content": "Be brief."}, QUESTION, ANSWER, {"role": "user", "content": parts})
    await save(log, {"role": "user", "content": "Second"})
    assert await log.prompts() == ["Hello", "Second"]
    assert await log.prompts(limit=1) == ["Second"]


async def test_two_processes_may_create_it_at_the_same_time() -> None:
    numbers = await asyncio.gather(*(save(ConversationLog(), QUESTION) for _ in range(4)))
    assert sorted(numbers) == [1, 2, 3, 4]


async def test_a_file_that_is_no_log_is_an_error_that_names_it(data_home: Path) -> None:
    data_home.mkdir()
    (data_home / "conversations.sqlite3").write_text("not a database, but long enough to be looked at " * 20)
    with pytest.raises(CommandError, match=r"conversations\.sqlite3: file is not a database") as caught:
        await ConversationLog().last()
    assert "--no-log" in str(caught.value.hint)


async def test_a_log_of_a_newer_version_is_left_alone() -> None:
    log = ConversationLog()
    await save(log, QUESTION)
    with sqlite3.connect(log.path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CommandError, match="written by a newer version of lmbridge"):
        await save(log, QUESTION)


def test_the_folder_is_where_the_system_keeps_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMBRIDGE_DATA_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert data_folder() == Path("/data/lmbridge")
    monkeypatch.delenv("XDG_DATA_HOME")
    assert data_folder() == Path.home() / ".local/share/lmbridge"
    monkeypatch.setattr("sys.platform", "darwin")
    assert data_folder() == Path.home() / "Library/Application Support/lmbridge"
