"""The inputs that `make fuzz` has found, a few new ones in every run, and the growth of time with the input."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.growth import check_growth
from tests.fuzz.inputs import CORPUS, corpus_of, inputs_of
from tests.fuzz.targets import TARGETS, Target

BY_NAME = {each.name: each for each in TARGETS}
FOUND = [(target.name, name, data) for target in TARGETS for name, data in corpus_of(target)]


@pytest.mark.parametrize(
    ("target", "data"), [pytest.param(name, data, id=f"{name}-{file}") for name, file, data in FOUND]
)
def test_what_was_found_once_is_mended(target: str, data: bytes) -> None:
    BY_NAME[target].run(data)


def test_every_folder_of_the_corpus_belongs_to_a_target() -> None:
    assert {each.name for each in CORPUS.iterdir()} <= set(BY_NAME)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(data=st.data())
def test_any_input_is_read_or_refused_by_a_named_error(target: Target, data: st.DataObject) -> None:
    target.run(data.draw(inputs_of(target)))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_longer_input_takes_proportionally_longer(target: Target) -> None:
    first, second = target.fragments[0], target.fragments[-1]
    if target.as_json:
        name = first.decode()
        check_growth(target, f'{{"{name}": "{second.decode()}"}},'.encode(), b"[", b"null]")
    else:
        for unit in (first, second, first + second):
            check_growth(target, unit)


@pytest.mark.parametrize(("power", "is_noticed"), [(1, False), (2, True)])
def test_a_quadratic_target_is_noticed(power: int, is_noticed: bool) -> None:
    used = 0.0

    def use_time(data: bytes) -> None:
        nonlocal used
        used += (len(data) / 10_000) ** power

    target = Target("target", use_time, [b"x"])
    noticed = pytest.raises(AssertionError, match="64 times as long for 8 times n")
    with noticed if is_noticed else contextlib.nullcontext():
        check_growth(target, b"x", clock=lambda: used)
