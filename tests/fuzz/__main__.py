"""`make fuzz`: runs every target with new inputs for a while, and keeps an input that shows a fault.

    python -m tests.fuzz --minutes 10 --only schemas

The smallest input of each fault is written to `tests/fuzz/corpus/`, where the tests find it.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.growth import check_growth
from tests.fuzz.inputs import CORPUS, corpus_of, inputs_of
from tests.fuzz.targets import TARGETS, Target

_BATCH = 60
"""How many inputs are tried before the time is looked at, and how many growing ones are."""
_GROWING = 4


def main() -> int:
    """Runs the command, and returns its exit status: 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--minutes", type=float, default=1.0, help="the time for all targets together (default: 1)")
    parser.add_argument("--only", help="the name of one target")
    options = parser.parse_args()
    logging.disable()
    targets = [each for each in TARGETS if options.only in (None, each.name)]
    found = 0
    for target in targets:
        found += _fuzz(target, 60 * options.minutes / len(targets))
    print(f"{found} faults found" if found else "nothing found")
    return 1 if found else 0


def _fuzz(target: Target, seconds: float) -> int:
    for name, data in corpus_of(target):
        try:
            target.run(data)
        # Whatever it is, it is what fuzzing looks for.
        except Exception:
            print(f"{target.name}: the known input {name} fails", file=sys.stderr)
            traceback.print_exc()
            return 1
    deadline, tried, growths = time.monotonic() + seconds, 0, 0
    while time.monotonic() < deadline:
        fault = _try_inputs(target) or _try_growth(target)
        tried, growths = tried + _BATCH, growths + _GROWING
        if fault is not None:
            data, text = fault
            print(f"{target.name}: {text}\n{data!r}", file=sys.stderr)
            if data:
                folder = CORPUS / target.name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
            return 1
    print(f"{target.name}: {tried:,} inputs and {growths:,} growing ones")
    return 0


def _profile(examples: int) -> settings:
    return settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def _try_inputs(target: Target) -> tuple[bytes, str] | None:
    last = b""

    @_profile(_BATCH)
    @given(inputs_of(target))
    def run(data: bytes) -> None:
        nonlocal last
        last = data
        target.run(data)

    try:
        run()
    # Whatever it is, it is what fuzzing looks for.
    except Exception:
        return last, traceback.format_exc(limit=-6)
    return None


def _try_growth(target: Target) -> tuple[bytes, str] | None:
    pieces = st.lists(st.sampled_from(list(target.fragments)), min_size=1, max_size=4).map(b"".join)
    context = st.lists(st.sampled_from(list(target.fragments)), max_size=2).map(b"".join)

    @_profile(_GROWING)
    @given(pieces, context, context)
    def run(unit: bytes, before: bytes, after: bytes) -> None:
        if target.as_json:
            check_growth(target, *_as_json(unit, before))
        else:
            check_growth(target, unit, before, after)

    try:
        run()
    except AssertionError as error:
        return b"", str(error)
    return None


def _as_json(unit: bytes, name: bytes) -> tuple[bytes, bytes, bytes]:
    """Returns a repeated item of a list in JSON, what comes before it, and what comes after it."""
    word = f'"{unit.decode()}"'.encode()
    key = f'"{name.decode()}"'.encode()
    return b"{" + key + b": " + word + b"},", b"[", b"null]"


if __name__ == "__main__":
    sys.exit(main())
