"""Runs the official conformance suite against our client and our server, and prints the scores.

`make conformance` installs the suite, and a version of Node that is new enough for it, and runs this program. The exit
status is 1 if a check fails that `scenarios.py` does not excuse, or if an excused check does not fail.
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

from tests.mcp.conformance.scenarios import BOTH_REVISIONS, EXCUSED, NOT_RUN, RUN, Role

HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[2]
SUITE: Final = HERE / "node_modules" / "@modelcontextprotocol" / "conformance"
SCENARIO_SECONDS: Final = 60
"""Seconds that a scenario may take."""
OLDEST_NODE: Final = 22


class ScenarioOutcome(NamedTuple):
    """The result of a scenario."""

    passed: int
    """How many checks passed."""
    failed: frozenset[str]
    """The names of the checks that failed."""
    fault: str = ""
    """Why the scenario could not be run to its end, or ""."""


def find_node() -> str:
    """Returns the path of a Node that is new enough: the one installed with the suite, or that of the system."""
    installed = HERE / "node_modules" / ".bin" / "node"
    found = str(installed) if installed.exists() else shutil.which("node")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout if found else ""
    if not found or int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        sys.exit(f"the suite needs Node {OLDEST_NODE} or newer, but found {version.strip() or 'none'}")
    return found


def run_suite(*args: str) -> subprocess.CompletedProcess[str]:
    """Runs the program of the suite."""
    command = [find_node(), str(SUITE / "dist" / "index.js"), *args]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=SCENARIO_SECONDS * 1.5, check=False
    )


@contextmanager
def our_server() -> Iterator[str]:
    """Starts our server and yields its URL.

    The server inherits a socket that is already listening, so that requests may be sent before it has started.
    """
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        descriptor = listening.fileno()
        command = [sys.executable, "-m", "tests.mcp.conformance.server", str(descriptor)]
        with subprocess.Popen(command, cwd=ROOT, pass_fds=[descriptor]) as process:
            try:
                yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
            finally:
                process.kill()


def run(role: Role, scenario: str, version: str, peer: Sequence[str]) -> ScenarioOutcome:
    """Runs a scenario. `peer` holds the options that say what the suite tests: a command, or a URL."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--scenario", scenario, "--spec-version", version, "--timeout", str(SCENARIO_SECONDS * 1000)]
        try:
            done = run_suite(role, *peer, *options, "--output-dir", folder)
        except subprocess.TimeoutExpired:
            return ScenarioOutcome(0, frozenset(), "it did not end in time")
        files = list(Path(folder).rglob("checks.json"))
        if len(files) != 1:
            return ScenarioOutcome(0, frozenset(), f"it wrote no report: {(done.stdout + done.stderr)[-500:]}")
        return _outcome(json.loads(files[0].read_text()), done.returncode)


def _outcome(checks: Sequence[Mapping[str, Any]], status: int) -> ScenarioOutcome:
    failed = frozenset(check["name"] for check in checks if check["status"] == "FAILURE")
    passed = sum(check["status"] == "SUCCESS" for check in checks)
    fault = (
        "no check passed" if not passed else f"the suite ended with status {status}" if status and not failed else ""
    )
    return ScenarioOutcome(passed, failed, fault)


def find_problems(scenario: str, outcome: ScenarioOutcome) -> list[str]:
    """Returns the checks that fail without an excuse, and the excuses that are not needed."""
    excused = EXCUSED.get(scenario, {}).keys()
    wrong = [f"fails: {name}" for name in sorted(outcome.failed - excused)]
    stale = [f"is excused, but does not fail: {name}" for name in sorted(excused - outcome.failed)]
    return [outcome.fault] if outcome.fault else wrong + stale


def unlisted_scenarios(role: Role) -> set[str]:
    """Returns the scenarios that are either only in the suite or only in `scenarios.py`."""
    listed = re.findall(r"^ +- (\S+) \[(.*)\]$", run_suite("list", f"--{role}").stdout, re.MULTILINE)
    known = {name for name, versions in listed if set(BOTH_REVISIONS) & set(versions.split(","))}
    applicable = {name for name in known if not name.startswith("auth/")}
    return applicable ^ (RUN[role].keys() | NOT_RUN[role].keys())


def check_role(role: Role, peer: Sequence[str]) -> bool:
    """Runs and prints all scenarios of a role; returns whether there are no problems."""
    is_good, whole, runs, checks = True, 0, 0, 0
    for scenario, versions in RUN[role].items():
        for version in versions:
            outcome = run(role, scenario, version, peer)
            problems = find_problems(scenario, outcome)
            excused = f", {len(outcome.failed)} excused" if outcome.failed and not problems else ""
            verdict = "FAILED" if problems else "ok"
            print(f"{role}  {scenario:34} {version}  {outcome.passed:3} checks passed{excused}  {verdict}", flush=True)
            for line in problems:
                print(f"        {line}")
            is_good &= not problems
            whole += not problems and not outcome.failed
            runs, checks = runs + 1, checks + outcome.passed
    for name in sorted(unlisted_scenarios(role)):
        print(f"{role}  {name}: scenarios.py does not list it, or the suite no longer has it")
        is_good = False
    print(
        f"{role}: {whole} of {runs} runs pass whole, {checks} checks in all; not run: {len(NOT_RUN[role])} scenarios\n"
    )
    return is_good


def main() -> None:
    versions = {name: importlib.metadata.version(name) for name in ("lmbridge", "mcp")}
    versions["conformance"] = json.loads((SUITE / "package.json").read_text())["version"]
    print(", ".join(f"{name} {version}" for name, version in versions.items()), "\n")
    is_good = check_role("client", ["--command", shlex.join([sys.executable, "-m", "tests.mcp.conformance.client"])])
    with our_server() as url:
        is_good &= check_role("server", ["--url", url])
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
