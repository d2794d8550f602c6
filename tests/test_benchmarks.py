"""The benchmarks run. How fast anything is, is none of a test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


def test_every_row_of_the_benchmarks_yields_a_figure(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--tiny", "--rounds=1", "--peers=limit,lmbridge", "--json", str(figures)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(figures.read_text())
    assert {key: each["failed"] for key, each in results.items() if each["failed"]} == {}
    assert [key for key, each in results.items() if not each["figures"] or None in each["figures"].values()] == []
    rows = {key.partition(" / ")[0].partition(" ")[0] for key in results}
    assert rows >= {"stream", "request", "request-1000", "first", "memory", "import", "leave-break", "length", "age"}
    assert {key.partition(" / ")[2] for key in results} == {"limit", "lmbridge"}


def test_the_benchmark_of_model_swaps_yields_whole_answers_and_their_losses(tmp_path: Path) -> None:
    outcomes = tmp_path / "outcomes.json"
    options = ["--only=killing", "--rounds=1", "--requests=12", "--json", str(outcomes)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.model_swaps", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(outcomes.read_text())
    whole = {key: sum(kind == "whole" for kind, *_ in run[0]) for key, (run,) in results.items()}
    assert whole["killing / at once / lmbridge"] == whole["killing / callers / lmbridge"] == 12
    assert whole["killing / at once / openai-once"] < 12


def test_every_row_of_the_agent_benchmarks_yields_a_figure(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--tiny", "--rounds=1", "--peers=limit,plain,lmbridge", "--json", str(figures)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.agents", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(figures.read_text())
    assert {key: each["failed"] for key, each in results.items() if each["failed"]} == {}
    names, rows = ("limit", "plain", "lmbridge"), ("calls-1", "calls-20", "calls-100", "memory")
    assert set(results) == {f"{row} / {name}" for row in rows for name in names}
    assert all(each["figures"] for each in results.values())


def test_every_row_of_the_benchmark_of_mcp_calls_yields_a_figure(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    options = ["--tiny", "--rounds=1", "--servers=stub,time", "--json", str(figures)]
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.mcp_calls", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(figures.read_text())
    assert {key: each["failed"] for key, each in results.items() if each["failed"]} == {}
    ways, rows = ("sdk", "again", "lmbridge", "agent"), ("cpu", "wall", "cpu-100", "cpu-long", "cpu-time", "wall-time")
    assert set(results) == {f"{row} / {way}" for row in rows for way in ways}
    assert all(each["figures"] for each in results.values())
