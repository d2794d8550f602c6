"""Runs the official conformance suite against our client and our server, and prints what they score.

`make conformance` installs the suite, and a Node that is new enough for it, and runs this. The status is 1 if anything
fails that `scenarios.py` does not excuse, and if anything is excused that does not fail.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.mcp.conformance.scenarios import BOTH, EXCUSED, NOT_RUN, RUN, Role

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[2]
SUITE: Final = HERE / "node_modules" / "@modelcontextprotocol" / "conformance"
PATIENCE: Final = 60
"""Seconds for a scenario."""
OLDEST_NODE: Final = 22


class Outcome(NamedTuple):
    """What came of a scenario."""

    passed: int
    failed: frozenset[str]
    """The names of checks."""
    fault: str = ""
    """Why there are none, or too few."""


def node() -> str:
    """A Node that is new enough: the suite's own, or that of the system."""
    own = HERE / "node_modules" / ".bin" / "node"
    found = str(own) if own.exists() else shutil.which("node")
    told = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout if found else ""
    if not found or int(told.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        sys.exit(f"the suite needs Node {OLDEST_NODE} or newer; here is {told.strip() or 'none'}")
    return found


def suite(*args: str) -> subprocess.CompletedProcess[str]:
    """Runs the suite's program."""
    command = [node(), str(SUITE / "dist" / "index.js"), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE * 1.5, check=False)


@contextmanager
def our_server() -> Iterator[str]:
    """The URL of our server. Its socket is there before it is, so that nobody has to wait for it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        number = listening.fileno()
        command = [sys.executable, "-m", "tests.mcp.conformance.server", str(number)]
        with subprocess.Popen(command, cwd=ROOT, pass_fds=[number]) as process:
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
            finally:
                process.kill()


def run(role: Role, scenario: str, version: str, peer: Sequence[str]) -> Outcome:
    """Runs a scenario; `peer` says where the suite finds what it tests."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--scenario", scenario, "--spec-version", version, "--timeout", str(PATIENCE * 1000)]
        try:
            done = suite(role, *peer, *options, "--output-dir", folder)
        except subprocess.TimeoutExpired:
            return Outcome(0, frozenset(), "it came to no end")
        files = list(Path(folder).rglob("checks.json"))
        if len(files) != 1:
            return Outcome(0, frozenset(), f"it made no report: {(done.stdout + done.stderr)[-500:]}")
        return _outcome(json.loads(files[0].read_text()), done.returncode)


def _outcome(checks: Sequence[Mapping[str, Any]], status: int) -> Outcome:
    failed = frozenset(check["name"] for check in checks if check["status"] == "FAILURE")
    passed = sum(check["status"] == "SUCCESS" for check in checks)
    fault = (
        "no check passed" if not passed else f"the suite ended with status {status}" if status and not failed else ""
    )
    return Outcome(passed, failed, fault)


def complaints(scenario: str, outcome: Outcome) -> list[str]:
    """What is not as it should be."""
    excused = EXCUSED.get(scenario, {}).keys()
    wrong = [f"fails: {name}" for name in sorted(outcome.failed - excused)]
    stale = [f"is excused, and does not fail: {name}" for name in sorted(excused - outcome.failed)]
    return [outcome.fault] if outcome.fault else wrong + stale


def unknown(role: Role) -> set[str]:
    """Scenarios of the suite of which nothing is said, for the revisions that we speak."""
    listed = re.findall(r"^ +- (\S+) \[(.*)\]$", suite("list", f"--{role}").stdout, re.MULTILINE)
    known = {name for name, versions in listed if set(BOTH) & set(versions.split(","))}
    asked = {name for name in known if not name.startswith("auth/")}
    return asked ^ (RUN[role].keys() | NOT_RUN[role].keys())


def check(role: Role, peer: Sequence[str]) -> bool:
    """Runs all scenarios of a role and prints them; whether all is as it should be."""
    is_right, wholly, count, checks = True, 0, 0, 0
    for scenario, versions in RUN[role].items():
        for version in versions:
            outcome = run(role, scenario, version, peer)
            wrong = complaints(scenario, outcome)
            told = f", {len(outcome.failed)} excused" if outcome.failed and not wrong else ""
            verdict = "FAILED" if wrong else "ok"
            print(f"{role}  {scenario:34} {version}  {outcome.passed:3} checks passed{told}  {verdict}", flush=True)
            for line in wrong:
                print(f"        {line}")
            is_right &= not wrong
            wholly, count, checks = wholly + (not wrong and not outcome.failed), count + 1, checks + outcome.passed
    for name in sorted(unknown(role)):
        print(f"{role}  {name}: scenarios.py does not say what to do with it, or the suite has it no more")
        is_right = False
    left = len(NOT_RUN[role])
    print(f"{role}: {wholly} of {count} runs pass whole, {checks} checks in all; not run: {left} scenarios\n")
    return is_right


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("lmbridge", "mcp")}
    versions["conformance"] = json.loads((SUITE / "package.json").read_text())["version"]
    print(", ".join(f"{name} {version}" for name, version in versions.items()), "\n")
    is_right = check("client", ["--command", shlex.join([sys.executable, "-m", "tests.mcp.conformance.client"])])
    with our_server() as url:
        is_right &= check("server", ["--url", url])
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
