"""The agent of lmbridge, which leaves out its oldest calls without shortening any results first."""

from __future__ import annotations

from benchmarks.solving_peers import lmbridge


class Solver(lmbridge.Solver):
    compaction = "drop"
