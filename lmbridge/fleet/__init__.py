"""Fleets: thousands of agent runs in one process, or on a Ray cluster, with the same call.

Ray is imported when a fleet uses it (extra `ray`).
"""

from lmbridge.fleet.fleet import map_runs
from lmbridge.fleet.outcome import FleetProgress, Outcome
from lmbridge.fleet.progress_bar import ProgressBar

__all__ = ["FleetProgress", "Outcome", "ProgressBar", "map_runs"]
