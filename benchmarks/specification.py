"""The classes that describe a table of the benchmarks.

A table is data: everything that differs between two tables is a field here, so that one runner measures them all and
one command prints them. Only a table whose measurements are not numbers brings a function that formats them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import attrs

from benchmarks.results import Results

OURS: Final = "lmbridge"
"""The peer that the bars apply to."""
IMPORT: Final = "import"
"""The workload of a row that measures the import of each peer in a new interpreter."""

TableLines = list[list[str]]
"""The heading and the rows of a formatted table, as cells."""


def _nothing_missing() -> str | None:
    return None


@attrs.frozen
class PeerInfo:
    """Facts about something that is compared, which are known without importing it."""

    title: str
    """The heading of its column."""
    module: str = ""
    """The name of the module that uses it, in `peers/` or in the folder of the other peers of its table."""
    imports: str = ""
    """The modules that a program imports to use it, separated by commas. The first one has to be installed."""
    distributions: tuple[str, ...] = ()
    """The packages whose versions are listed below the table."""
    few_rounds: bool = attrs.field(default=False, kw_only=True)
    """True if it is so far from the baseline that three rounds are enough."""
    python: tuple[int, int] = attrs.field(default=(3, 11), kw_only=True)
    """The first version of Python for which it can be installed."""

    def needs_newer_python(self) -> bool:
        """Returns whether it cannot be installed in this environment."""
        return sys.version_info < self.python

    def is_installed(self) -> bool:
        """Returns whether it can be measured in this environment."""
        return not self.imports or importlib.util.find_spec(self.imports.partition(",")[0]) is not None


@attrs.frozen(kw_only=True)
class Row:
    """One workload, which all peers of the table do in turn."""

    key: str
    """The name of the row on the command line and in JSON files."""
    title: str
    """The heading of the row in the table."""
    unit: str
    """The unit of its figures, for example "µs CPU"."""
    workload: str
    """The method of the table's worker that measures it, or `IMPORT`."""
    full: Mapping[str, Any] = attrs.field(factory=dict)
    """The arguments of the method."""
    tiny: Mapping[str, Any] = attrs.field(factory=dict)
    """Arguments that replace some of these if `--tiny` is given, which only shows that everything works."""
    reduced: Mapping[str, Any] = attrs.field(factory=dict)
    """Arguments that replace some of these for peers with `few_rounds`, which would take minutes otherwise."""
    bar: float | None = None
    """The most that lmbridge may cost: a multiple of the baseline, or the difference to it in an absolute row."""
    is_absolute: bool = False
    """True if all peers are shown by their figures instead of their ratios to the baseline."""
    fresh_process: bool = False
    """True if each figure needs a new process. Otherwise the rows of a round share one."""
    renews_client: bool = True
    """True if a shared process makes a new client before the row, so that no row finds another's idle connections."""
    baseline: str = ""
    """The peer that the others are compared with, if it is not that of the table."""
    server: str = ""
    """The server that the worker starts. If it is set, one worker for each server measures all peers in turn."""
    peers: tuple[str, ...] | None = None
    """The peers that the row is limited to. Default: all."""
    bound: float = 60.0
    """The seconds that a peer may spend on the row, for one figure and for all rounds together."""
    why_missing: Callable[[], str | None] = _nothing_missing
    """Returns what this machine lacks to measure the row, or None."""


@attrs.frozen(kw_only=True)
class Growth:
    """A row that divides the figures of one row by those of another, to show how the cost grows."""

    title: str
    """The heading of the row in the table."""
    first: str
    """The key of the row to divide by."""
    last: str
    """The key of the row that is divided."""
    bar: float
    """The most that lmbridge may grow, as a multiple of the growth of the baseline."""


@attrs.frozen(kw_only=True)
class Table:
    """A table: what is measured, how, and where in the documentation it goes."""

    name: str
    """The name on the command line and of the section in the documentation."""
    about: str
    """One sentence for the help of the command."""
    peers: Mapping[str, PeerInfo]
    """The columns, in their order."""
    baseline: str
    """The peer that the others are compared with."""
    rows: Sequence[Row]
    """The rows, in their order."""
    worker: str
    """The module that does the work in a separate process."""
    growths: Sequence[Growth] = ()
    """Further rows, which show how the cost grows."""
    rounds: int = 9
    """The number of rounds without `--rounds`."""
    uses_stub: bool = True
    """True if the workers get the port of the stub server."""
    requires: tuple[str, ...] = ()
    """Modules without which nothing in the table can be measured."""
    page: str = "performance.md"
    """The page in docs/ that contains the table."""
    chart: str = ""
    """The file in docs/ for the chart, or an empty text."""
    draw: Callable[[Table, Results], str] | None = None
    """Returns the chart as SVG."""
    format: Callable[[Table, Sequence[Row], Results], TableLines] | None = None
    """Formats the table, in place of ratios to the baseline."""
    notes: Callable[[Table, Sequence[Row], Results], list[str]] | None = None
    """Returns additional lines that are shown below the table."""

    def why_missing(self) -> str | None:
        """Returns what this environment lacks to measure anything in the table, or None."""
        missing = [each for each in self.requires if importlib.util.find_spec(each) is None]
        return f"{', '.join(missing)} is not installed" if missing else None

    def installed_peers(self) -> list[str]:
        return [name for name, info in self.peers.items() if info.is_installed()]
