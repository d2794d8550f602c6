"""Journals: files that keep the steps of agent runs, so that a run can be resumed after its program was interrupted."""

from lmbridge.agent.journal.journal import Journal, JournaledRun
from lmbridge.agent.journal.stored_options import JournalEntry

__all__ = ["Journal", "JournalEntry", "JournaledRun"]
