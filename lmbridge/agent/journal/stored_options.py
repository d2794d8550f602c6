"""Converts the options of a run into the form in which a journal keeps them, and back when the run is resumed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final

import attrs
import msgspec

from lmbridge._checks import check_text
from lmbridge._version import __version__
from lmbridge.agent.journal.database import Database
from lmbridge.agent.journal.journal import Journal, begun_model, find_run, read_journal, read_start
from lmbridge.agent.journal.recorder import RunRecorder
from lmbridge.agent.journal.run_store import FileStore, RunStore
from lmbridge.agent.journal.steps import RunStart
from lmbridge.agent.settings import Settings
from lmbridge.client.json_codec import encode_body
from lmbridge.client.structured import answer_format_of
from lmbridge.errors import JournalError

_NOT_STORED: Final = ("approve", "observers", "output_type")
"""The options of a run that are functions, objects or types, which a journal cannot keep."""


def _as_journal(journal: Journal | str | os.PathLike[str]) -> Journal:
    return journal if isinstance(journal, Journal) else Journal(journal)


@attrs.frozen
class JournalEntry:
    """One run of a journal, which `journal=` accepts instead of a path.

    If the journal already has a run with this id, that run is resumed, or its result is returned if it is finished. So
    a program that is started again can simply make the same call::

        result = await agent.run(order.text, journal=JournalEntry("orders.db", run_id=f"order-{order.number}"))

    Raises:
        LLMValidationError: The journal is neither a journal nor a path, or the id is invalid.
    """

    journal: Journal = attrs.field(converter=_as_journal)
    """The journal, or its path."""
    run_id: str | None = attrs.field(default=None, kw_only=True)
    """The id of the run. Default: a new random one."""
    extra: Mapping[str, Any] = attrs.field(factory=dict, kw_only=True)
    """Data that the program needs to open the tools of the run again. They are kept with the run, and must be JSON.
    Default: none."""

    def __attrs_post_init__(self) -> None:
        check_text("run_id", self.run_id, optional=True)

    def open_store(self) -> RunStore:
        """Returns the store that writes the steps of the run."""
        return FileStore(self.journal.path)


@attrs.frozen(kw_only=True)
class FoundRun:
    """A run of a journal that is to be resumed."""

    entry: JournalEntry
    """The journal, and the id of the run in it."""
    start: RunStart
    """The task and the options with which the run began."""
    model: str | None
    """The model of the run, which has to stay the same."""

    def settings(self, given: Settings) -> Settings:
        """Returns the options of the run.

        Args:
            given: The options of the agent that resumes the run. Its functions and types are used, because a journal
                cannot keep them.

        Raises:
            JournalError: The run needs a function or a type that is not given, or has options that this version of
                lmbridge does not know.
        """
        if self.start.has_approve and given.approve is None:
            raise self._mismatch("its calls have to be approved", "pass the approve= or the gate= with which it began")
        schema = None if given.output_type is None else answer_format_of(given.output_type).schema
        if mismatch := self.start.output_mismatch(_through_json(schema)):
            raise self._mismatch(*mismatch)
        try:
            return attrs.evolve(given, **self.start.settings)
        except TypeError as exc:
            hint = f"resume it with lmbridge {self.start.version}, which began it"
            raise self._mismatch(f"its options are unknown: {exc}", hint) from exc

    def _mismatch(self, reason: str, hint: str) -> JournalError:
        message = f"the run {self.entry.run_id!r} cannot be resumed: {reason}"
        return JournalError(message, problem="mismatch", hint=hint, path=self.entry.journal.path)


async def find(journal: Journal | str | os.PathLike[str], run_id: str | None) -> FoundRun:
    """Returns the run that is to be resumed.

    Args:
        journal: The journal, or its path.
        run_id: The id of the run. None means the only run that has no result, or the only run at all.

    Raises:
        JournalError: The run does not exist, or several runs can be meant.
    """
    opened = _as_journal(journal)

    def read(database: Database) -> FoundRun:
        run = find_run(database, run_id)
        entry = JournalEntry(opened, run_id=run.id)
        return FoundRun(entry=entry, start=read_start(database, run), model=begun_model(database, run))

    return await read_journal(opened, read)


def new_recorder(
    journal: JournalEntry | Journal | str | os.PathLike[str],
    *,
    task: Any,
    messages: Sequence[Mapping[str, Any]] | None,
    model: str | None,
    settings: Settings,
) -> RunRecorder:
    """Returns the recorder of a run.

    Raises:
        LLMValidationError: The journal is neither a journal nor a path, or an option of the run cannot be kept as JSON.
    """
    entry = journal if isinstance(journal, JournalEntry) else JournalEntry(journal)
    start = RunStart(
        task=_through_json(task),
        messages=None if messages is None else _through_json(list(messages)),
        model=model,
        settings=_through_json(attrs.asdict(settings, recurse=False, filter=_is_stored)),
        has_approve=settings.approve is not None,
        output_schema=None
        if settings.output_type is None
        else _through_json(answer_format_of(settings.output_type).schema),
        extra=_through_json(entry.extra),
        version=__version__,
    )
    return RunRecorder(entry.open_store(), entry.run_id or os.urandom(16).hex(), start)


def _is_stored(attribute: attrs.Attribute[Any], _value: Any) -> bool:
    return attribute.name not in _NOT_STORED


def _through_json(value: Any) -> Any:
    """Returns what a value becomes when it is written as JSON and read again."""
    return msgspec.json.decode(encode_body({"value": value}))["value"]
