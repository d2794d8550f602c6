"""Fleets: thousands of agent runs with one call, in this process or on a Ray cluster.

Ray needs the extra `ray`, and is imported only when a fleet uses it.
"""

from lmbridge.fleet.fleet import map_runs
from lmbridge.fleet.outcome import FleetProgress, Outcome
from lmbridge.fleet.progress_bar import ProgressBar

__all__ = ["FleetProgress", "Outcome", "ProgressBar", "map_runs"]
