"""Every table of the benchmarks can be measured. The figures themselves are not tested."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Container
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from benchmarks import journal_cost
from benchmarks.tables import TABLES

ROOT = Path(__file__).parent.parent


def measure(tmp_path: Path, table: str, *options: str, not_measured: Container[str] = ()) -> dict[str, Any]:
    """Measures a table in sizes that only show that it works, and returns the results, apart from cells without any."""
    path = tmp_path / "figures.json"
    command = [sys.executable, "-m", "benchmarks", table, "--tiny", "--rounds=1", "--json", str(path), *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    results: dict[str, Any] = json.loads(path.read_text())[table]
    assert {key: each["failure"] for key, each in results.items() if each["failure"]} == {}
    results = {key: each for key, each in results.items() if key not in not_measured}
    assert [key for key, each in results.items() if not each["figures"] or None in each["figures"].values()] == []
    return results


def cells(rows: list[str], peers: list[str]) -> set[str]:
    return {f"{row} / {peer}" for row in rows for peer in peers}


@pytest.mark.slow
def test_every_row_of_the_clients_has_a_figure(tmp_path: Path) -> None:
    results = measure(tmp_path, "clients", "--peers=limit,lmbridge")
    rows = {key.partition(" / ")[0] for key in results}
    assert rows >= {"stream", "request", "request-1000", "first", "memory", "import", "leave-break"}
    assert {key.partition(" / ")[2] for key in results} == {"limit", "lmbridge"}


@pytest.mark.slow
def test_every_row_of_the_growth_has_a_figure(tmp_path: Path) -> None:
    ages, lengths = ["age-100", "age-20000"], ["length-10", "length-1000", "length-100000"]
    waiters = ["waiters-100", "waiters-1000", "waiters-10000"]
    assert set(measure(tmp_path, "growth")) == cells([*ages, *lengths, *waiters], ["limit", "lmbridge"])


@pytest.mark.slow
def test_every_row_of_the_steps_has_a_figure(tmp_path: Path) -> None:
    results = measure(tmp_path, "steps")
    assert set(results) == cells([row.key for row in TABLES["steps"].rows], ["decoding", "lmbridge"])


@pytest.mark.slow
def test_every_row_of_the_agents_has_a_figure(tmp_path: Path) -> None:
    results = measure(tmp_path, "agents", "--peers=limit,plain,lmbridge")
    rows = ["calls-1", "calls-20", "calls-100", "memory"]
    assert set(results) == cells(rows, ["limit", "plain", "lmbridge"])


@pytest.mark.slow
def test_every_row_of_the_mcp_calls_has_a_figure(tmp_path: Path) -> None:
    results = measure(tmp_path, "mcp-calls")
    rows = ["stub-cpu", "stub-clock", "stub-cpu-100", "stub-cpu-long", "time-cpu", "time-clock"]
    assert set(results) >= cells(rows, ["sdk", "sdk-again", "lmbridge", "lmbridge-agent"])


@pytest.mark.slow
def test_model_swaps_lose_no_answer_with_lmbridge_and_some_without(tmp_path: Path) -> None:
    results = measure(tmp_path, "model-swaps", "--only=killing")

    def whole_answers(cell: str) -> int:
        (run,) = results[cell]["figures"].values()
        return sum(fate == "whole" for fate, *_ in run["outcomes"])

    assert whole_answers("killing-at-once / lmbridge") == whole_answers("killing-callers / lmbridge") == 12
    assert whole_answers("killing-at-once / openai-once") < 12


@pytest.mark.slow
def test_programs_lose_no_answer_with_the_gateway_and_some_without(tmp_path: Path) -> None:
    results = measure(tmp_path, "gateway-swaps", "--only=killing")
    whole = {
        cell: sum(fate == "whole" for fate, *_ in run["outcomes"])
        for cell, result in results.items()
        for run in result["figures"].values()
    }
    assert whole["killing / lmbridge"] == 12
    assert whole["killing / openai"] < 12


@pytest.mark.slow
def test_every_row_of_the_cost_of_the_gateway_has_a_figure(tmp_path: Path) -> None:
    rows = ["chunk", "chunk-100", "memory", "growth"]
    # Without anything in between, there is nothing whose CPU or memory could be measured.
    results = measure(tmp_path, "gateway-cost", "--peers=direct,bare,lmbridge", not_measured=cells(rows, ["direct"]))
    expected = cells(rows, ["bare", "lmbridge"]) | cells(["first-byte"], ["direct", "bare", "lmbridge"])
    assert set(results) == expected


@pytest.mark.slow
def test_every_row_of_the_load_has_a_figure(tmp_path: Path) -> None:
    kinds = ["streams", "queued", "through_gateway"]
    # The limit is a client, and has no agent.
    without_agent = ("runs / limit", "runs-growth / limit")
    results = measure(tmp_path, "load", "--peers=limit,lmbridge", not_measured=without_agent)
    rows = [*kinds, *(f"{kind}-growth" for kind in kinds)]
    assert set(results) == cells(rows, ["limit", "lmbridge"]) | cells(["runs", "runs-growth"], ["lmbridge"])


@pytest.mark.slow
def test_the_agent_solves_tasks_in_spite_of_mistakes(tmp_path: Path) -> None:
    results = measure(tmp_path, "solving", "--peers=lmbridge")
    assert [each["figures"]["0"]["solved"] for each in results.values()] == [4] * 5


@pytest.mark.slow
def test_long_tasks_are_solved_with_notes_and_not_without(tmp_path: Path) -> None:
    results = measure(tmp_path, "long-tasks", "--peers=lmbridge,lmbridge-drop")
    solved = {cell: result["figures"]["0"]["solved"] for cell, result in results.items()}
    assert set(solved.values()) == {0, 3}
    assert all((count == 3) == cell.endswith("/ lmbridge") for cell, count in solved.items())


def test_the_cost_of_a_journal_has_a_figure_for_each_number_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal_cost, "RUNS", (1, 2))
    heading, alone, one, two = journal_cost.measure(1)
    assert len(heading) == 3
    assert [row[0] for row in (one, two)] == ["a journal, one run", "a journal, 2 runs at once"]
    assert all(int(row[1].replace(",", "")) > 0 for row in (alone, one, two))
    assert all(int(row[2].replace(",", "")) > 2 * len(journal_cost.RESULT) for row in (one, two))
    assert list(tmp_path.iterdir()) == []


def test_every_table_has_its_sections_in_the_documentation() -> None:
    for table in TABLES.values():
        page = (ROOT / "docs" / table.page).read_text()
        for section in (table.name, f"{table.name}-notes", f"{table.name}-machine"):
            assert re.search(f"<!-- {section}: begin -->.*<!-- {section}: end -->", page, re.DOTALL), section


@pytest.mark.parametrize("source", ["pyproject.toml", "benchmarks/gateway.txt"])
def test_litellm_is_pinned_to_a_version_that_was_neither_compromised_nor_withdrawn(source: str) -> None:
    text = (ROOT / source).read_text()
    if source == "pyproject.toml":
        lines = tomllib.loads(text)["dependency-groups"]["bench"]
    else:
        lines = [line for line in text.splitlines() if not line.startswith("#")]
    (litellm,) = [each for each in map(Requirement, lines) if each.name == "litellm"]
    assert [each.operator for each in litellm.specifier].count("==") == 1
    for version in ("1.82.7", "1.82.8", "1.107.0", "1.107.5"):
        assert version not in litellm.specifier
