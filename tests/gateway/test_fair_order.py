"""`FairOrder`: each client in turn."""

from __future__ import annotations

import pytest

from lmbridge.gateway.fair_order import FairOrder, FairPosition


def serve(
    order: FairOrder, waiting: list[tuple[int, int, str]], count: int, positions: dict[int, FairPosition]
) -> list[str]:
    """Admits requests in their order, and returns the clients that they belong to."""
    served = []
    for _ in range(count):
        waiting.sort()
        _, number, client = waiting.pop(0)
        order.admitted(positions[number])
        served.append(client)
    return served


def test_a_client_with_many_requests_does_not_hold_up_another_one() -> None:
    order = FairOrder()
    positions = {number: order.enter(client, 0) for number, client in enumerate("aaaabc")}
    waiting = [(position.number, number, "aaaabc"[number]) for number, position in positions.items()]
    assert "".join(serve(order, waiting, 6, positions)) == "abcaaa"


def test_a_client_that_was_idle_has_saved_up_nothing() -> None:
    order = FairOrder()
    first = order.enter("busy", 0)
    order.admitted(first)
    for _ in range(10):
        order.admitted(order.enter("busy", 0))
    assert order.enter("idle", 0).number == order.enter("busy", 0).number


def test_priorities_are_kept_apart() -> None:
    order = FairOrder()
    for _ in range(5):
        order.enter("a", -1)
    assert order.enter("a", 0).number == 1


@pytest.mark.parametrize(("priority", "model"), [(1, "m"), (0, "other"), (1, "other")])
def test_what_another_group_is_admitted_does_not_hold_up_a_client(priority: int, model: str) -> None:
    order = FairOrder()
    waiting = [order.enter("many", 0, "m") for _ in range(20)]
    for position in [order.enter("elsewhere", priority, model) for _ in range(20)]:
        order.admitted(position)
    assert order.enter("new", 0, "m").number == waiting[0].number


def test_a_group_without_waiting_requests_begins_again_at_the_latest_round() -> None:
    order = FairOrder()
    for position in [order.enter("a", 0, "m") for _ in range(20)]:
        order.admitted(position)
    # Otherwise, all requests of the group that begins would go before the next one of the other group.
    assert order.enter("b", 0, "other").number == order.enter("a", 0, "m").number == 21


def test_the_wait_is_bounded_however_many_clients_arrive() -> None:
    order = FairOrder()
    positions = {number: order.enter("patient", 0) for number in range(10)}
    waiting = [(position.number, number, "patient") for number, position in positions.items()]
    served: list[str] = []
    # A new client arrives for each request that is served.
    while "patient" in {client for _, _, client in waiting}:
        number = len(positions)
        positions[number] = order.enter(f"new {number}", 0)
        waiting.append((positions[number].number, number, f"new {number}"))
        served += serve(order, waiting, 1, positions)
    assert len(served) <= 55


def test_clients_with_nothing_in_the_queue_are_forgotten() -> None:
    order = FairOrder()
    for number in range(5000):
        position = order.enter(f"client {number}", 0)
        order.leave(position)
        order.leave(position)
    assert not order._groups


def test_a_client_that_has_left_the_queue_does_not_wait_for_what_it_gave_up() -> None:
    order = FairOrder()
    positions = [order.enter("notebook", 0) for _ in range(100)]
    other = order.enter("other", 0)
    for position in positions[1:]:
        order.leave(position)
    assert order.enter("notebook", 0).number == positions[0].number + 1 == other.number + 1


def test_leaving_again_does_not_remove_a_later_request_of_the_client() -> None:
    order = FairOrder()
    count = order.enter("x", 0)
    order.leave(count)
    waiting = order.enter("x", 0)
    order.leave(count)
    assert order.enter("x", 0).number == waiting.number + 1
