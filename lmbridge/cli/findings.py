"""What `lmbridge doctor` finds, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, Self

import attrs
from rich.text import Text

from lmbridge._printable import one_line
from lmbridge.cli.terminal import Terminal

FindingState = Literal["ok", "warning", "broken", "skipped"]
"""Whether something works, works with a reservation, does not work, or was not tried."""

_MARKS: Final[dict[FindingState, tuple[str, str]]] = {
    "ok": ("ok", "green"),
    "warning": ("warning", "yellow"),
    "broken": ("BROKEN", "bold red"),
    "skipped": ("skipped", "dim"),
}


_ERROR_FIX: Final = "look at the log of the server; lmbridge doctor --debug shows each request and its answer"
"""What to do about an error that has no hint."""


def _check_fix(finding: Finding, _attribute: attrs.Attribute[str | None], fix: str | None) -> None:
    if finding.state in ("warning", "broken") and not fix:
        raise ValueError(f"the finding about {finding.check!r} needs a fix")


@attrs.frozen
class Finding:
    """The outcome of one check. If its state is "warning" or "broken", it always has a fix."""

    check: str
    """What was checked, in one or two words."""
    state: FindingState
    """The result of the check."""
    text: str
    """A description of the result."""
    fix: str | None = attrs.field(default=None, validator=_check_fix)
    """What to do about it; None if there is nothing to do."""

    @classmethod
    def of_error(cls, check: str, text: str, hint: str | None, default: str = _ERROR_FIX) -> Self:
        """Returns the finding of a check that has failed with an error.

        Args:
            check: What was checked.
            text: The text of the error, without its hint.
            hint: The hint of the error, if it has one.
            default: What to do if the error has no hint.
        """
        return cls(check, "broken", text, hint or default)


def show_findings(findings: Sequence[Finding], terminal: Terminal) -> None:
    """Writes the findings as a table, and then what to do about them."""
    rows = [(each.check, Text(*_MARKS[each.state]), one_line(each.text)) for each in findings]
    terminal.table(("check", "state", "finding"), rows)
    fixes = [each for each in findings if each.fix]
    if fixes:
        terminal.line()
        terminal.line("What to do:", "bold")
    for each in fixes:
        terminal.line(f"  {each.check}: {each.fix}")


def findings_as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the findings for `--json`."""
    return {"broken": any_broken(findings), "findings": [attrs.asdict(each) for each in findings]}


def any_broken(findings: Sequence[Finding]) -> bool:
    """Returns whether something does not work."""
    return any(each.state == "broken" for each in findings)
