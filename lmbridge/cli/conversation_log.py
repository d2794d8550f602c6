"""The log of conversations: a SQLite file in the user's data folder, which other users cannot read.

SQLite was chosen over a file for each conversation because `chat -c` has to find the last one at once, and because two
terminals may write at the same time.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import attrs

from lmbridge._tasks import settle
from lmbridge.cli.command_runner import CommandError

_VERSION: Final = 1
_TABLES: Final = """
CREATE TABLE IF NOT EXISTS conversations (
    id INTEGER PRIMARY KEY,
    created REAL NOT NULL,
    changed REAL NOT NULL,
    server TEXT,
    model TEXT
);
CREATE TABLE IF NOT EXISTS messages (
    conversation INTEGER NOT NULL REFERENCES conversations (id),
    position INTEGER NOT NULL,
    message TEXT NOT NULL,
    PRIMARY KEY (conversation, position)
);
"""
_BUSY_SECONDS: Final = 5.0
"""How long a write waits for another process that uses the file, in seconds."""


def data_folder() -> Path:
    """Returns the folder for the data of the command line, which need not exist.

    It is `$LMBRIDGE_DATA_HOME`, or else the folder `lmbridge` in the place where the system keeps the data of programs:
    `$XDG_DATA_HOME` or `~/.local/share`, `~/Library/Application Support` on macOS, `%LOCALAPPDATA%` on Windows.
    """
    if own := os.environ.get("LMBRIDGE_DATA_HOME"):
        return Path(own)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Application Support")
    else:
        base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "lmbridge"


@attrs.frozen(kw_only=True)
class LoggedConversation:
    """A conversation of the log."""

    id: int
    """The number of the conversation in the log."""
    model: str | None
    """The model that answered last, or None if it is not known."""
    messages: list[dict[str, Any]]
    """The messages, as they were sent and received."""


class ConversationLog:
    """The log of conversations.

    Args:
        path: The file. Default: `conversations.sqlite3` in the data folder.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path: Final = data_folder() / "conversations.sqlite3" if path is None else path
        """The file of the log."""

    async def last(self) -> LoggedConversation | None:
        """Returns the conversation that was changed last, or None.

        Raises:
            CommandError: The log cannot be read.
        """
        return await settle(asyncio.to_thread(self._last))

    def _last(self) -> LoggedConversation | None:
        if not self.path.exists():
            return None
        with self._connection() as connection:
            row = connection.execute("SELECT id, model FROM conversations ORDER BY changed DESC, id DESC").fetchone()
            if row is None:
                return None
            messages = connection.execute(
                "SELECT message FROM messages WHERE conversation = ? ORDER BY position", (row[0],)
            ).fetchall()
        return LoggedConversation(id=row[0], model=row[1], messages=[json.loads(each) for (each,) in messages])

    async def save(
        self, conversation: int | None, messages: Sequence[Mapping[str, Any]], *, server: str, model: str | None
    ) -> int:
        """Writes a conversation, and replaces what the log already contains of it.

        Args:
            conversation: The number of the conversation; None for a new one.
            messages: All its messages.
            server: The URL of the server.
            model: The model that has answered, or None if it is not known.

        Returns:
            The number of the conversation.

        Raises:
            CommandError: The log cannot be written.
        """
        return await settle(asyncio.to_thread(self._save, conversation, messages, server, model))

    def _save(
        self, conversation: int | None, messages: Sequence[Mapping[str, Any]], server: str, model: str | None
    ) -> int:
        now = time.time()
        with self._connection() as connection:
            if conversation is None:
                row = (now, now, server, model)
                cursor = connection.execute(
                    "INSERT INTO conversations (created, changed, server, model) VALUES (?, ?, ?, ?)", row
                )
                conversation = cursor.lastrowid
            else:
                connection.execute(
                    "UPDATE conversations SET changed = ?, server = ?, model = ? WHERE id = ?",
                    (now, server, model, conversation),
                )
                connection.execute("DELETE FROM messages WHERE conversation = ?", (conversation,))
            rows = [(conversation, position, json.dumps(each)) for position, each in enumerate(messages)]
            connection.executemany("INSERT INTO messages (conversation, position, message) VALUES (?, ?, ?)", rows)
        if conversation is None:
            raise CommandError(f"the log {self.path} did not number the conversation")
        return conversation

    async def prompts(self, limit: int = 200) -> list[str]:
        """Returns the last texts that were typed, oldest first, for the history of the line editor.

        Args:
            limit: The maximum number of texts.

        Raises:
            CommandError: The log cannot be read.
        """
        return await settle(asyncio.to_thread(self._prompts, limit))

    def _prompts(self, limit: int) -> list[str]:
        if not self.path.exists():
            return []
        with self._connection() as connection:
            rows = connection.execute(
                "SELECT message FROM messages JOIN conversations ON conversation = id"
                " WHERE json_extract(message, '$.role') = 'user' ORDER BY changed DESC, id DESC, position DESC LIMIT ?",
                (limit,),
            ).fetchall()
        contents = [json.loads(each).get("content") for (each,) in reversed(rows)]
        return [each for each in contents if isinstance(each, str)]

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """Yields a connection in a transaction, which is committed at the end of the block."""
        try:
            self._create_file()
            with closing(sqlite3.connect(self.path, timeout=_BUSY_SECONDS)) as connection, connection:
                self._prepare(connection)
                yield connection
        except (OSError, sqlite3.Error) as exc:
            raise CommandError(
                f"cannot use the log of conversations {self.path}: {exc}",
                "use --no-log to chat without it, or set LMBRIDGE_DATA_HOME to another folder",
            ) from exc

    def _create_file(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # SQLite would create the file with the permissions that the umask leaves.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        if self.path.stat().st_mode & 0o077:
            self.path.chmod(0o600)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == _VERSION:
            return
        if version > _VERSION:
            raise sqlite3.DatabaseError("it was written by a newer version of lmbridge")
        connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
