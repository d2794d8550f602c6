"""How the programs that run in the foreground end, and what they write to stderr."""

from __future__ import annotations

import logging

import pytest

from lmbridge import LLMError, LLMValidationError
from lmbridge._foreground import log_to_stderr, run_program


async def failing(error: BaseException | None) -> None:
    if error is not None:
        raise error


@pytest.mark.parametrize(
    ("error", "expected", "written"),
    [
        (None, 0, ""),
        (LLMError("broken", hint="mend it"), 1, "program: broken; mend it\n"),
        (LLMError("it said:\n  \x1b[2J", hint="mend it"), 1, "program: it said:   ␛[2J mend it\n"),
        (LLMValidationError("no such port"), 2, "program: no such port\n"),
        (OSError(5, "broken"), 1, "program: [Errno 5] broken\n"),
        (ImportError("needs x"), 1, "program: needs x\n"),
        (
            RuntimeError("a \x1b bug"),
            1,
            "program: unexpected RuntimeError: a ␛ bug; run it again with --debug for the traceback\n",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_a_program_ends_with_a_status_and_one_line(
    error: BaseException | None, expected: int, written: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_program("program", failing(error), debug=False) == expected
    assert capsys.readouterr() == ("", written)


def test_debug_adds_the_traceback_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_program("program", failing(RuntimeError("a \x1b bug")), debug=True) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback (most recent call last)")
    assert errors.endswith("\nprogram: unexpected RuntimeError: a ␛ bug\n")
    assert "\x1b" not in errors


@pytest.mark.parametrize(("debug", "written"), [(False, "it said ␛[2J\n"), (True, "asked\nit said ␛[2J\n")])
def test_the_log_has_no_control_characters(
    debug: bool, written: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = logging.getLogger("lmbridge")
    monkeypatch.setattr(logging.root, "handlers", [])
    before = library.level, logging.root.level
    try:
        log_to_stderr("%(message)s", debug=debug)
        logging.getLogger("lmbridge.client").debug("asked")
        logging.getLogger("lmbridge.client").warning("it said \x1b[2J")
    finally:
        library.setLevel(before[0])
        logging.root.setLevel(before[1])
    assert capsys.readouterr().err == written
