from __future__ import annotations

import asyncio
import copy
import pickle
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, cast

import pytest

from lmbridge import errors
from lmbridge.errors import (
    ContextLengthExceededError,
    ErrorDetails,
    JournalError,
    LLMAuthenticationError,
    LLMConnectionError,
    LLMError,
    LLMRateLimitError,
    LLMResponseError,
    LLMStreamError,
    LLMTimeoutError,
    LLMValidationError,
    MaxRoundsExceededError,
    MCPConnectionError,
    MCPError,
    ModelChangedDuringExecutionError,
    ModelLoadError,
    ModelMismatchError,
    ModelNotFoundError,
    MultiMCPError,
    RunIncompleteError,
    TaskCancelledError,
    ToolError,
)

BASES: dict[type[LLMError], tuple[type[BaseException], ...]] = {
    LLMError: (Exception,),
    LLMConnectionError: (LLMError, ConnectionError),
    LLMTimeoutError: (LLMError, TimeoutError),
    LLMResponseError: (LLMError,),
    LLMAuthenticationError: (LLMResponseError,),
    LLMRateLimitError: (LLMResponseError,),
    ContextLengthExceededError: (LLMResponseError,),
    ModelLoadError: (LLMResponseError,),
    LLMStreamError: (LLMError,),
    LLMValidationError: (LLMError, ValueError),
    ModelNotFoundError: (LLMValidationError,),
    ModelMismatchError: (LLMValidationError,),
    TaskCancelledError: (LLMError,),
    ModelChangedDuringExecutionError: (TaskCancelledError,),
    RunIncompleteError: (LLMError,),
    MaxRoundsExceededError: (RunIncompleteError,),
    JournalError: (LLMError,),
    ToolError: (LLMError,),
    MCPError: (LLMError,),
    MCPConnectionError: (MCPError,),
    MultiMCPError: (MCPError,),
}
# The arguments of a class besides the message, the cause and the details that all classes have.
OWN: dict[type[LLMError], dict[str, Any]] = {
    LLMTimeoutError: {"phase": "idle"},
    LLMResponseError: {"retry_after": 3.0},
    LLMAuthenticationError: {"retry_after": 3.0},
    LLMRateLimitError: {"retry_after": 3.0},
    ModelLoadError: {"retry_after": 3.0},
    ContextLengthExceededError: {"prompt_tokens": 9000, "context_length": 4096, "retry_after": 3.0},
    ModelNotFoundError: {"model_name": "lama", "available_models": ["llama", "qwen"]},
    ModelMismatchError: {"asked": "a", "served": "b"},
    ModelChangedDuringExecutionError: {"old_model": "a", "new_model": "b"},
    RunIncompleteError: {"result": {"text": "so far", "rounds": 3}},
    MaxRoundsExceededError: {"result": {"text": "so far", "rounds": 3}},
    MCPConnectionError: {"server": "files"},
    MultiMCPError: {"errors": {"files": MCPConnectionError("no such program", server="files"), "web": OSError(2, "x")}},
}
DETAILS: ErrorDetails = {
    "hint": "try again",
    "context": {"operation": "chat completion", "url": "http://x/v1", "model": "m", "attempts": 2, "seconds": 1.25},
    "status": 503,
    "body": '{"error": "crashed"}',
    "partial": {"choices": [{"message": {"content": "Hel"}}]},
}

every_class = pytest.mark.parametrize("kind", BASES, ids=lambda kind: kind.__name__)
Copier = Callable[[LLMError], LLMError]


def pickled(error: LLMError) -> LLMError:
    return cast("LLMError", pickle.loads(pickle.dumps(error)))


every_copy = pytest.mark.parametrize("copied", [pickled, copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"])


def make(kind: type[LLMError], cause: BaseException | None = None) -> LLMError:
    """Returns an error with a value for every argument of its class."""
    own = OWN.get(kind, {})
    if kind is ModelNotFoundError:
        return ModelNotFoundError(**own, original_exception=cause, **DETAILS)
    return kind("it broke", original_exception=cause, **own, **DETAILS)


class Unpicklable:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def __reduce__(self) -> str:
        raise TypeError("not to be pickled")


class OfTwoArgumentsError(Exception):
    """An exception that can be pickled, but not unpickled."""

    def __init__(self, what: str, where: str) -> None:
        super().__init__(f"{what} at {where}")


class OfAUserError(ToolError):
    """A subclass whose constructor takes other arguments."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"code {code}", hint="look it up")
        self.code = code


# The tree


def test_the_classes_and_their_bases_are_those_of_the_design() -> None:
    found = {
        kind: kind.__bases__
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, BaseException)
    }
    assert found == BASES


@every_class
def test_no_error_is_a_cancellation_and_each_is_an_ordinary_exception(kind: type[LLMError]) -> None:
    assert issubclass(kind, Exception)
    assert not issubclass(kind, asyncio.CancelledError)


def test_errors_can_be_caught_as_the_builtin_exceptions_that_fit() -> None:
    for kind, builtin in (
        (LLMConnectionError, OSError),
        (LLMTimeoutError, asyncio.TimeoutError),
        (LLMValidationError, ValueError),
    ):
        with pytest.raises(builtin, match="it broke"):
            raise kind("it broke")


@every_class
def test_every_class_is_in_the_tree_in_the_docstring(kind: type[LLMError]) -> None:
    assert f" {kind.__name__}" in (errors.__doc__ or "")


# Attributes


@every_class
def test_the_arguments_of_every_error_become_attributes(kind: type[LLMError]) -> None:
    cause = ValueError("deeper")
    before = datetime.now(UTC)
    error = make(kind, cause)
    assert before <= error.timestamp <= datetime.now(UTC)
    assert error.__cause__ is error.original_exception is cause
    for name, value in {**DETAILS, **OWN.get(kind, {})}.items():
        assert getattr(error, name) == value
    assert error.message == error.args[0]
    if kind is not ModelNotFoundError:
        assert error.message == "it broke"


@every_class
def test_every_error_can_be_created_without_details(kind: type[LLMError]) -> None:
    error = ModelNotFoundError("lama") if kind is ModelNotFoundError else kind()
    assert str(error) == error.message != ""
    assert (error.hint, error.context, error.status, error.body, error.partial) == (None, {}, None, None, None)
    assert error.__cause__ is None


def test_the_second_argument_is_the_cause() -> None:
    cause = OSError("no route")
    assert LLMError("it broke", cause).__cause__ is cause
    assert ModelNotFoundError("lama", ["llama"], cause).__cause__ is cause
    assert ModelChangedDuringExecutionError("it broke", "a", "b", cause).__cause__ is cause


def test_the_cause_of_raise_from_is_the_original_exception() -> None:
    cause = ValueError("deeper")
    with pytest.raises(ToolError) as caught:
        raise ToolError("it broke") from cause
    assert caught.value.original_exception is cause


def test_an_error_raised_in_a_handler_does_not_hide_the_handled_exception() -> None:
    def handle() -> None:
        try:
            raise ValueError("deeper")
        except ValueError:
            raise ToolError("it broke")  # noqa: B904 - this is what the test is about

    with pytest.raises(ToolError) as caught:
        handle()
    assert "ValueError: deeper" in "".join(traceback.format_exception(caught.value))


def test_the_context_is_a_copy() -> None:
    given = {"model": "m"}
    error = LLMError("it broke", context=given)
    error.context["attempts"] = 1
    assert given == {"model": "m"}


@every_class
def test_every_error_can_be_completed(kind: type[LLMError]) -> None:
    error = ModelNotFoundError("lama") if kind is ModelNotFoundError else kind()
    message = error.message
    assert error.completed(**DETAILS) is error
    assert {name: getattr(error, name) for name in DETAILS} == DETAILS
    assert error.message == error.args[0] == message


def test_completing_an_error_does_not_replace_its_own_facts() -> None:
    error = LLMError("it broke", hint="mine", status=503, body="mine", context={"model": "mine"})
    error.completed(hint="theirs", status=500, body="theirs", context={"model": "theirs", "url": "http://x/v1"})
    assert (error.hint, error.status, error.body) == ("mine", 503, "mine")
    assert error.context == {"model": "mine", "url": "http://x/v1"}


def test_completing_an_error_replaces_partial() -> None:
    error = LLMError("it broke", partial={"choices": []})
    assert error.completed(partial=None).partial == {"choices": []}
    assert error.completed(partial="the run so far").partial == "the run so far"


def test_completing_an_error_can_replace_its_message() -> None:
    error = LLMError("the key hunter2 is wrong", hint="pass another").completed("the key [api_key] is wrong")
    assert str(error) == "the key [api_key] is wrong; pass another"
    assert "hunter2" not in repr(error)


@pytest.mark.parametrize("kind", [RunIncompleteError, MaxRoundsExceededError])
def test_the_result_of_an_incomplete_run_is_also_its_partial(kind: type[RunIncompleteError]) -> None:
    result = object()
    assert kind(result=result).partial is kind(result=result).result is result
    assert kind(result=result, partial="other").partial == "other"
    assert kind().partial is None


def test_the_errors_of_several_servers_are_stored_by_name() -> None:
    failed: dict[str, BaseException] = {"files": MCPConnectionError("no such program"), "web": TimeoutError()}
    error = MultiMCPError(errors=failed)
    assert error.errors == failed
    assert error.errors is not failed
    assert str(error) == "MCP servers failed: files: no such program; web: TimeoutError"
    assert str(MultiMCPError("nothing started", errors=failed)) == "nothing started"


def test_the_hints_of_the_errors_of_several_servers_are_one_hint() -> None:
    missing = MCPConnectionError("no such program", hint="install it")
    refused = MCPConnectionError("it answered with 401", hint="give it a token")
    alone = MultiMCPError(errors={"files": missing})
    assert alone.hint == "install it"
    assert str(alone) == "MCP servers failed: files: no such program; install it"
    both = MultiMCPError(errors={"files": missing, "web": refused, "slow": TimeoutError()})
    assert both.hint == "for files: install it; for web: give it a token"
    assert both.message == "MCP servers failed: files: no such program; web: it answered with 401; slow: TimeoutError"
    assert MultiMCPError(errors={"slow": TimeoutError()}).hint is None
    assert MultiMCPError(errors={"files": missing}, hint="another").hint == "another"


# Texts


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({}, "it broke"),
        ({"hint": "try again"}, "it broke; try again"),
        ({"context": {"operation": "chat completion"}}, "chat completion: it broke"),
        ({"context": {"model": "m"}}, "request with model 'm': it broke"),
        ({"context": {"url": "http://x/v1"}}, "request at http://x/v1: it broke"),
        (
            {"context": {"operation": "chat completion", "model": "m", "url": "http://x/v1"}},
            "chat completion with model 'm' at http://x/v1: it broke",
        ),
        ({"context": {"attempts": 1}}, "it broke (after 1 attempt)"),
        ({"context": {"attempts": 3}}, "it broke (after 3 attempts)"),
        ({"context": {"attempts": 0}}, "it broke (after 0 attempts)"),
        ({"context": {"seconds": 0.0}}, "it broke (after 0.00 s)"),
        ({"context": {"seconds": 61.238}}, "it broke (after 61.24 s)"),
        ({"context": {"operation": None, "model": None, "url": None, "attempts": None, "seconds": None}}, "it broke"),
        ({"context": {"holders": ["secret"]}, "status": 401, "body": "secret", "partial": "secret"}, "it broke"),
        (
            DETAILS,
            "chat completion with model 'm' at http://x/v1: it broke (after 2 attempts, 1.25 s); try again",
        ),
    ],
)
def test_an_error_reads_as_one_sentence(details: ErrorDetails, text: str) -> None:
    assert str(LLMError("it broke", **details)) == text


@every_class
def test_every_error_reads_as_one_sentence(kind: type[LLMError]) -> None:
    error = make(kind)
    start = "chat completion with model 'm' at http://x/v1: "
    assert str(error) == f"{start}{error.message} (after 2 attempts, 1.25 s); try again"


@pytest.mark.parametrize(
    ("name", "models", "text"),
    [
        ("lama", [], "model 'lama' not found"),
        ("gpt-4o", ["llama", "qwen"], "model 'gpt-4o' not found; the server has: llama, qwen"),
        ("lama", ["qwen", "llama"], "model 'lama' not found (did you mean 'llama'?); the server has: qwen, llama"),
        ("LLAMA", ["qwen", "llama"], "model 'LLAMA' not found (did you mean 'llama'?); the server has: qwen, llama"),
        ("phi-4", ["PHI-4"], "model 'phi-4' not found (did you mean 'PHI-4'?); the server has: PHI-4"),
        ("ab1", ["ab2", "ab3"], "model 'ab1' not found (did you mean 'ab3' or 'ab2'?); the server has: ab2, ab3"),
        (None, ["llama"], "model not found; the server has: llama"),
    ],
)
def test_model_not_found_lists_close_matches_and_all_models(name: str | None, models: list[str], text: str) -> None:
    assert str(ModelNotFoundError(name, models)) == text


def test_a_mismatch_and_a_change_name_both_models() -> None:
    assert str(ModelMismatchError(asked="a", served="b")) == "asked for model 'a', but 'b' answered"
    changed = ModelChangedDuringExecutionError(old_model="a", new_model="b")
    assert str(changed) == "the model changed from 'a' to 'b'"


# Copies


@every_class
@every_copy
def test_a_copy_has_all_attributes(kind: type[LLMError], copied: Copier) -> None:
    error = make(kind, ValueError("deeper"))
    error.add_note("noted")
    other = copied(error)
    assert other is not error
    assert type(other) is kind
    assert (str(other), repr(other), other.args) == (str(error), repr(error), error.args)
    assert repr(other.__cause__) == "ValueError('deeper')"
    theirs, ours = vars(other).copy(), vars(error).copy()
    assert ours["__notes__"] == ["noted"]
    assert repr(theirs.pop("errors", None)) == repr(ours.pop("errors", None))
    assert theirs == ours


@every_class
@every_copy
def test_a_copy_without_a_cause_has_none(kind: type[LLMError], copied: Copier) -> None:
    other = copied(make(kind))
    assert other.__cause__ is None
    assert not other.__suppress_context__


@every_copy
def test_a_change_to_a_copy_does_not_change_the_original(copied: Copier) -> None:
    error = make(LLMError)
    copied(error).hint = "another"
    assert error.hint == "try again"


def test_a_shallow_copy_shares_what_cannot_be_pickled() -> None:
    cause, partial = OfTwoArgumentsError("it broke", "x"), Unpicklable("so far")
    other = copy.copy(LLMError("it broke", cause, partial=partial))
    assert other.__cause__ is cause
    assert other.partial is partial


def test_the_causes_of_causes_survive_pickling() -> None:
    deepest = LLMTimeoutError("no answer", OSError(110, "timed out"), phase="idle")
    error = pickled(LLMError("it broke", LLMConnectionError("cut off", deepest)))
    causes = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(repr(cause))
        cause = cause.__cause__
    assert causes == [
        "LLMError('it broke')",
        "LLMConnectionError('cut off')",
        "LLMTimeoutError('no answer')",
        "TimeoutError(110, 'timed out')",
    ]


@pytest.mark.parametrize(
    ("cause", "text"),
    [
        (OfTwoArgumentsError("it broke", "x"), "OfTwoArgumentsError: it broke at x"),
        (ValueError(Unpicklable("this")), "ValueError: this"),
        (type("LocalError", (Exception,), {})(), "LocalError"),
    ],
)
def test_a_cause_that_cannot_be_pickled_is_replaced_by_its_text(cause: BaseException, text: str) -> None:
    other = pickled(LLMError("it broke", cause)).__cause__
    assert type(other) is Exception
    assert str(other) == text


@every_class
def test_parts_that_cannot_be_pickled_are_replaced_by_their_text(kind: type[LLMError]) -> None:
    error = make(kind)
    error.partial = Unpicklable("so far")
    error.context["tools"] = {"now": [1, (2, Unpicklable("a function"))]}
    error.__cause__ = ValueError(Unpicklable("this"))
    other = pickled(error)
    assert other.partial == "so far"
    assert other.context == {**error.context, "tools": {"now": [1, (2, "a function")]}}
    assert str(other.__cause__) == "ValueError: this"
    assert (str(other), other.status, other.body) == (str(error), error.status, error.body)


def test_the_errors_of_several_servers_are_pickled_one_by_one() -> None:
    failed = {"a": OfTwoArgumentsError("it broke", "x"), "b": MCPConnectionError("no such program", server="b")}
    other = pickled(MultiMCPError(errors=failed))
    assert isinstance(other, MultiMCPError)
    assert str(other.errors["a"]) == "OfTwoArgumentsError: it broke at x"
    assert cast("MCPConnectionError", other.errors["b"]).server == "b"


def test_an_error_can_be_pickled_although_its_result_cannot() -> None:
    other = pickled(MaxRoundsExceededError("25 rounds", result=Unpicklable("RunResult(...)")))
    assert isinstance(other, MaxRoundsExceededError)
    assert other.result == other.partial == "RunResult(...)"


@every_copy
def test_an_error_of_a_users_subclass_can_be_copied(copied: Copier) -> None:
    error = OfAUserError(code=7)
    assert vars(copied(error)) == vars(error)
    assert str(copied(error)) == "code 7; look it up"


def test_a_long_chain_of_causes_does_not_take_exponential_time() -> None:
    error = LLMError("0")
    for number in range(1, 60):
        error = LLMError(str(number), error)
    assert str(pickled(error)) == "59"
