"""The choice between several servers, and their health, in random histories."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import hypothesis.strategies as st
import pytest
from hypothesis import assume, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lmbridge import Limits
from lmbridge.transport.node import COLD_PROMPT_ROUNDS, LOADING_ROUNDS, ModelState, Node, choose_node
from lmbridge.transport.retry import MAX_SERVER_BACKOFF


class Listed:
    """A `ModelDirectory` that gives the same answer for every model."""

    def __init__(self, state: ModelState) -> None:
        self.state: ModelState = state

    def state_of(self, model: str) -> ModelState:
        return self.state


def node(
    *,
    slots: int = 2,
    load: int = 0,
    state: ModelState = "loaded",
    down_since: float | None = None,
    active: frozenset[str | None] | None = None,
    max_loaded_models: int | None = None,
) -> Node:
    limits = Limits(max_concurrency=slots, max_loaded_models=max_loaded_models)
    transport = SimpleNamespace(in_flight=load, queued=0, limits=limits, active_models=active, api_base="http://a.test")
    made = Node(cast("Any", transport))
    if state != "unknown":
        made.set_models(Listed(state), 0.0)
    if down_since is not None:
        # `note_failure` draws a random back-off, which a strategy must not do.
        made.is_down, made.failed_at = True, down_since
    return made


states: st.SearchStrategy[ModelState] = st.sampled_from(["loaded", "listed", "missing", "unknown"])
nodes = st.lists(
    st.builds(
        node,
        slots=st.integers(1, 8),
        load=st.integers(0, 30),
        state=states,
        down_since=st.none() | st.floats(0, 100),
    ),
    min_size=1,
    max_size=5,
)


@given(nodes, st.data())
def test_a_server_that_works_and_may_have_the_model_is_never_passed_over_for_another(
    nodes: list[Node], data: st.DataObject
) -> None:
    chosen = choose_node(nodes, "m", data.draw(st.none() | st.sampled_from(nodes)))
    able = [each for each in nodes if each.state_of("m") != "missing"]
    assert not able or chosen in able
    working = [each for each in able or nodes if not each.is_down]
    assert not working or chosen in working
    if not working:
        assert chosen.failed_at == min(each.failed_at for each in able or nodes)


@given(nodes, st.data())
def test_the_warm_server_is_not_left_while_it_has_a_free_slot_nor_kept_while_others_are_idle(
    nodes: list[Node], data: st.DataObject
) -> None:
    warm = data.draw(st.sampled_from(nodes))
    assume(not warm.is_down and warm.state_of("m") == "loaded")
    chosen = choose_node(nodes, "m", warm)
    if warm.load < warm.slots:
        assert chosen is warm
    idle = [each for each in nodes if not each.is_down and each.state_of("m") == "loaded" and each.load < each.slots]
    if chosen is warm and any(each is not warm for each in idle):
        assert (warm.load + 1 - warm.slots) / warm.slots <= COLD_PROMPT_ROUNDS


def test_among_equals_the_smallest_part_of_the_slots_decides_and_then_the_turn() -> None:
    small, large = node(slots=2, load=1), node(slots=8, load=3)
    assert choose_node([small, large], "m") is large
    first, second = node(), node()
    first.last_chosen = 1
    assert choose_node([first, second], "m") is second


@pytest.mark.parametrize("slots", [1, 4])
def test_a_model_is_loaded_a_second_time_when_eight_rounds_wait_for_it(slots: int) -> None:
    other = node(slots=slots, state="listed")
    limit = int(slots * LOADING_ROUNDS) + slots - 1
    assert choose_node([node(slots=slots, load=limit - 1), other], "m") is not other
    assert choose_node([node(slots=slots, load=limit + 1), other], "m") is other


def test_a_model_that_the_schedule_would_have_to_swap_in_counts_as_not_loaded() -> None:
    assert node(active=frozenset({"m"}), max_loaded_models=1).state_of("m") == "loaded"
    assert node(active=frozenset({"x"}), max_loaded_models=1).state_of("m") == "listed"
    assert node(active=frozenset({"x"}), max_loaded_models=2, state="listed").state_of("m") == "listed"
    has_room = node(active=frozenset({"x"}), max_loaded_models=2, state="listed")
    has_room.expect("m")
    assert has_room.state_of("m") == "loaded"


def test_what_a_server_is_asked_for_and_what_it_refuses_is_known_before_its_next_list() -> None:
    expecting = node(state="listed")
    expecting.expect("m")
    assert expecting.state_of("m") == "loaded"
    expecting.refuse("m")
    assert expecting.state_of("m") == "missing"
    expecting.set_models(Listed("listed"), 1.0)
    assert expecting.state_of("m") == "listed"


class HealthMachine(RuleBasedStateMachine):
    """A server that fails and answers at any moment."""

    def __init__(self) -> None:
        super().__init__()
        self.node = node()
        self.now = 100.0
        self.is_down = False

    @rule(seconds=st.floats(0, 200))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def fail(self) -> None:
        failures, check_at, was_down = self.node.failures, self.node.check_at, self.node.is_down
        self.node.note_failure(self.now, "refused")
        self.is_down = True
        if was_down and self.now < check_at:
            assert (self.node.failures, self.node.check_at) == (failures, check_at), "they failed together"
        else:
            assert self.node.failures == failures + 1
            ceiling = min(2.0**failures, MAX_SERVER_BACKOFF)
            assert ceiling / 2 <= self.node.check_at - self.now <= ceiling + 1e-6

    @rule()
    def answer(self) -> None:
        restarts = self.node.restarts
        self.node.note_success()
        assert self.node.restarts == restarts + self.is_down
        self.is_down = False

    @precondition(lambda self: not self.is_down)
    @rule()
    def choose_beside_a_server_that_failed(self) -> None:
        assert choose_node([node(down_since=0.0), self.node], None) is self.node

    @invariant()
    def it_is_down_from_its_failure_to_its_next_answer(self) -> None:
        assert self.node.is_down == self.is_down
        assert (self.node.failures > 0) == self.is_down


TestHealth = HealthMachine.TestCase
TestHealth.settings = settings(max_examples=50, deadline=None)
