"""The agent of lmbridge, which asks for an answer at its limits, as docs/small-models.md recommends."""

from __future__ import annotations

from benchmarks.solving_peers import lmbridge


class Solver(lmbridge.Solver):
    on_limit = "answer"
