"""Errors of the SDK in words."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ValidationError

from lmbridge.mcp.sdk import describe_error


class Model(BaseModel):
    number: int
    text: str


def test_an_error_of_pydantic_is_described_by_its_first_problem() -> None:
    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"number": "x"})
    described = describe_error(ExceptionGroup("", [ExceptionGroup("", [caught.value])]))
    assert described.startswith("its answer is not valid: number: Input should be a valid integer")
    assert "\n" not in described


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (FileNotFoundError(2, "No such file", "npx"), "'npx' was not found"),
        (PermissionError(13, "Permission denied", "/x"), "Permission denied: /x"),
        (ConnectionResetError(104, "Connection reset"), "Connection reset"),
        (KeyError(), "KeyError"),
    ],
)
def test_other_errors_are_described_by_their_reason(error: Exception, described: str) -> None:
    assert describe_error(error) == described
