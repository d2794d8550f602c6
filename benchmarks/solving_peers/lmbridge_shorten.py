"""The agent of lmbridge without summaries."""

from __future__ import annotations

from benchmarks.solving_peers import lmbridge


class Solver(lmbridge.Solver):
    compaction = "shorten"
