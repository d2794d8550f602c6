"""The simulation of many servers keeps the rules of the library, and gives figures that can be calculated by hand."""

from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.processes import ROOT
from benchmarks.report import replace_section
from benchmarks.scale import describe_limit, draw_chart, format_table, scenarios
from benchmarks.scale_simulation import GATEWAY_CHUNK, GATEWAY_REQUEST, Outcome, Scenario, Simulation


def simulate(*, servers: int = 4, tasks: int = 400, **options: Any) -> Outcome:
    return Simulation(Scenario(servers=servers, tasks=tasks, **options)).run()


def test_a_run_on_its_own_takes_the_time_that_its_tokens_need() -> None:
    outcome = simulate(servers=1, tasks=1)
    assert outcome.fairness == pytest.approx(1.0)
    assert outcome.hits == 1.0
    # The run fills one of four slots, apart from the time of its tools.
    assert 0.2 < outcome.efficiency < 0.25


def test_the_same_seed_gives_the_same_figures() -> None:
    assert simulate() == simulate()
    assert simulate() != simulate(seed=1)


def test_conversations_stay_in_the_cache_if_they_prefer_their_server_and_old_runs_go_first() -> None:
    ours = simulate()
    assert ours.hits > 0.9
    assert simulate(prefers_warm=False).hits < ours.hits
    assert simulate(order="request").hits < ours.hits


def test_no_server_is_busy_for_longer_than_the_simulation_lasts() -> None:
    assert 0 < simulate().efficiency <= 1.0


def test_one_gateway_passes_no_more_than_its_process_can() -> None:
    options: dict[str, Any] = {"servers": 60, "tasks": 2000, "speed": 1000.0}
    free, limited = simulate(**options), simulate(**options, has_gateway=True)
    assert 0.9 < limited.gateway_load <= 1.0
    assert limited.tasks_per_second < free.tasks_per_second
    # Each run has at least three answers of 16 chunks.
    assert limited.tasks_per_second < 1 / (3 * 16 * GATEWAY_CHUNK)


def test_every_number_of_servers_has_a_row_in_the_table_and_a_bar_in_the_chart() -> None:
    results = [(name, scenario, Simulation(scenario).run()) for name, scenario in scenarios(10_000)]
    heading, *rows = format_table(results)
    assert {len(each) for each in rows} == {len(heading)}
    assert {each[0] for each in rows} == {"1", "10", "100"}
    assert draw_chart(results).count('<rect class="variant-') == len(rows)


def test_the_gateway_is_simulated_with_the_times_that_were_measured() -> None:
    """The two constants are typed in, so they have to follow the table whenever `make gateway-bench` writes it."""
    table = (ROOT / "docs" / "gateway.md").read_text()
    rows = {cells[1].strip(): [each.strip() for each in cells[2:]] for cells in _rows(table)}
    direct, _, gateway, *_ = rows["first byte, warm connection"]
    _, bare, ratio, *_ = rows["a chunk, 100 streams at a time"]
    request_seconds = (_number(gateway) - _number(direct)) * 1e-3
    chunk_seconds = _number(bare) * 1e-6 * _number(ratio)
    advice = "docs/gateway.md has other times: change the constants, and run `make scale WRITE=yes`"
    assert pytest.approx(request_seconds) == GATEWAY_REQUEST, advice
    assert pytest.approx(chunk_seconds) == GATEWAY_CHUNK, advice


def test_the_page_says_what_the_gateway_passes_with_these_times() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert replace_section(page, "scale-gateway", describe_limit()) == page, "run `make scale WRITE=yes`"


def _rows(page: str) -> list[list[str]]:
    return [line.split("|") for line in page.splitlines() if line.startswith("|")]


def _number(cell: str) -> float:
    """Returns the number at the beginning of a cell, without its unit."""
    found = re.match(r"[\d.,]+", cell)
    assert found, f"{cell!r} does not begin with a number"
    return float(found[0].replace(",", ""))
