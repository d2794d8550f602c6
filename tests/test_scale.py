"""The simulation of many servers keeps the rules of the library, and gives figures that can be calculated by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.scale import draw_chart, format_table, scenarios
from benchmarks.scale_simulation import GATEWAY_CHUNK, Outcome, Scenario, Simulation


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
    free, limited = simulate(servers=20, speed=200.0), simulate(servers=20, speed=200.0, has_gateway=True)
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
