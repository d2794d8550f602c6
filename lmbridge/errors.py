"""Everything that lmbridge raises.

::

    LLMError
      LLMConnectionError                 nothing answers, or the connection broke before a reply
      LLMTimeoutError                    a limit ran out: `.phase` says which
      LLMResponseError                   an HTTP error, or a 200 that is not a reply
        LLMAuthenticationError           401, 403
        LLMRateLimitError                429
        ContextLengthExceededError       the prompt does not fit
        ModelLoadError                   out of memory, crashed, unloaded, no model loaded
      LLMStreamError                     a stream broke after it had begun, and the server did not say why
      LLMValidationError                 an invalid argument, or a reply that is not what was asked for
        ModelNotFoundError               the server does not have that model
        ModelMismatchError               another model answered
      TaskCancelledError                 cancelled through lmbridge, not by the caller
        ModelChangedDuringExecutionError
      RunIncompleteError                 an agent's run ended for a reason other than "stop"
        MaxRoundsExceededError
      JournalError                       a journal of agent runs cannot be used: `.problem` says why
      ToolError
      MCPError
        MCPConnectionError
        MultiMCPError

A missing response (`LLMConnectionError`, `LLMTimeoutError`) and a response that reports an error (`LLMResponseError`)
are separate branches, because a program reacts to them differently. The body of the response decides the class of an
`LLMResponseError`, not the status alone; see `client/failures.py`. An error carries its facts as attributes, so that no
program has to parse a message. Where a builtin exception fits (`ConnectionError`, `TimeoutError`, `ValueError`), the
class inherits from it, too.

No class here is an `asyncio.CancelledError`: a cancellation by the caller stays the exception that asyncio raises.

No error contains an API key: `transport/credentials.py` takes it out of everything that an error quotes.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, Self, TypedDict, Unpack

from lmbridge._similar_names import close_matches
from lmbridge._text import shorten

_NAMES_SHOWN: Final = 20
"""The number of models that the text of a `ModelNotFoundError` names."""
_NAME_CHARACTERS: Final = 200
"""The number of characters of a model's name, as a server gives it, that the text of an error quotes."""


class ErrorDetails(TypedDict, total=False):
    """Keyword arguments that every error accepts. Each becomes an attribute of the same name; see `LLMError`."""

    hint: str | None
    context: Mapping[str, Any] | None
    status: int | None
    body: str | None
    partial: Any


class LLMError(Exception):
    """The base class of all errors of this package.

    Its text is one sentence: what was attempted, with which model and on which URL, what went wrong, after how many
    attempts and seconds, and what to do next. It never contains a key or a header. Errors can be pickled; a part that
    cannot be pickled is replaced by its text.

    Args:
        message: What went wrong, in a few words.
        original_exception: The exception that caused this one. It becomes `__cause__`.
        hint: What the user can do about the error.
        context: What was attempted: `operation`, `url`, `model`, `attempts`, `seconds`, and whatever else is known.
        status: The status of the HTTP response that reported the error, or None if there was no response.
        body: The text of that response, or of the event in a stream that reported the error. If the reply broke off, it
            is the part that had arrived. If the text has more than 250,000 bytes, it is only the beginning.
        partial: What had arrived before the error. For a stream it is the dict that `collect` would have returned (None
            before the first chunk), for an agent's run it is the `RunResult` so far.

    Attributes:
        message: What went wrong, without the context and the hint.
        timestamp: When the error was created, in UTC.
    """

    def __init__(
        self,
        message: str = "the request failed",
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message)
        self.message: str = message
        self.hint = details.get("hint")
        self.context: dict[str, Any] = dict(details.get("context") or {})
        self.status = details.get("status")
        self.body = details.get("body")
        self.partial: Any = details.get("partial")
        self.timestamp: datetime = datetime.now(UTC)
        # Setting `__cause__` to None would hide the exception that is being handled.
        if original_exception is not None:
            self.__cause__: BaseException | None = original_exception

    def completed(self, message: str | None = None, **details: Unpack[ErrorDetails]) -> Self:
        """Adds what the caller knows about this error, and returns the error itself.

        An error is often created where only half of the facts are known: a decoder does not know the URL, a scheduler
        does not know how much of an answer had arrived. Each layer that it passes completes it with this method::

            except LLMError as error:
                error.completed(context={"operation": "chat completion", "url": url})
                raise

        The layer closest to the failure knows most about it, so `hint`, `status` and `body` are set only if the error
        has none yet, and `context` adds only the keys that the error does not have. `partial` works the other way
        round: a value replaces the previous one, because a higher layer knows more about the result. A run, for
        example, knows all its rounds, and not only the reply that failed.

        Args:
            message: A text that replaces the message of the error, for example because the message contains a secret.
            **details: The same keyword arguments that the constructor takes.
        """
        if message is not None:
            self.message = message
            self.args: tuple[Any, ...] = (message, *self.args[1:])
        self.context = {**(details.get("context") or {}), **self.context}
        if self.hint is None:
            self.hint = details.get("hint")
        if self.status is None:
            self.status = details.get("status")
        if self.body is None:
            self.body = details.get("body")
        if (partial := details.get("partial")) is not None:
            self.partial = partial
        return self

    @property
    def original_exception(self) -> BaseException | None:
        """The exception that caused this one: the same as `__cause__`."""
        return self.__cause__

    def __str__(self) -> str:
        """Returns one sentence: what was attempted, what went wrong, how long it took, and what to do."""
        text = self._text_without_hint()
        # A message of several lines quotes the output of a program. On the same line, the hint would look quoted as
        # well.
        separator = "\n" if "\n" in text else "; "
        return f"{text}{separator}{self.hint}" if self.hint else text

    def _text_without_hint(self) -> str:
        return self._describe_request() + self.message + self._describe_duration()

    def _describe_request(self) -> str:
        operation, model, url = (self.context.get(key) for key in ("operation", "model", "url"))
        words = [str(operation or ("request" if model or url else ""))]
        if model:
            words.append(f"with model {model!r}")
        if url:
            words.append(f"at {url}")
        request = " ".join(filter(None, words))
        return f"{request}: " if request else ""

    def _describe_duration(self) -> str:
        attempts, seconds, tried = (self.context.get(key) for key in ("attempts", "seconds", "tried"))
        parts = []
        if attempts is not None:
            servers = len({str(each).partition(" ")[0] for each in tried}) if isinstance(tried, list) else 1
            at_servers = f" at {servers} servers" if servers > 1 else ""
            parts.append(f"{attempts} attempt{'' if attempts == 1 else 's'}{at_servers}")
        if seconds is not None:
            parts.append(f"{seconds:.2f} s")
        return f" (after {', '.join(parts)})" if parts else ""

    def __reduce__(self) -> tuple[Any, ...]:
        state = _picklable(self.args), _picklable(self.__dict__), _picklable(self.__cause__)
        return _rebuild, (type(self), *state)

    def __copy__(self) -> LLMError:
        return _rebuild(type(self), self.args, self.__dict__, self.__cause__)


def _rebuild(
    error_class: type[LLMError], args: tuple[Any, ...], state: dict[str, Any], cause: BaseException | None
) -> LLMError:
    # The constructor is not called, because a subclass, which may be a user's, can require arguments that are not in
    # `args`.
    error = error_class.__new__(error_class, *args)
    error.args = args
    error.__dict__.update(state)
    if cause is not None:
        error.__cause__ = cause
    return error


def _picklable(value: Any) -> Any:
    """Returns the value if it can be pickled, and otherwise a copy in which texts replace the parts that cannot."""
    if isinstance(value, LLMError) and type(value).__module__ == __name__:
        # LLMError.__reduce__ makes the error's own parts picklable.
        return value
    try:
        pickle.loads(pickle.dumps(value))  # noqa: S301 - the bytes come from this line
    except Exception:  # noqa: BLE001 - a foreign class may raise anything here
        if isinstance(value, BaseException):
            return Exception(_describe_exception(value))
        if isinstance(value, dict):
            return {key: _picklable(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            parts = map(_picklable, value)
            return list(parts) if isinstance(value, list) else tuple(parts)
        return repr(value)
    return value


def _describe_exception(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class LLMConnectionError(LLMError, ConnectionError):
    """No server answers at this address, or the connection broke before a stream had begun or a reply was complete."""


class LLMTimeoutError(LLMError, TimeoutError):
    """A limit of `Timeouts`, or `Limits.max_queue`, ran out.

    Attributes:
        phase: The limit that ran out: "connect", "load", "first_byte", "idle" or "total" for a field of `Timeouts`, and
            "queue" for `Limits.max_queue`.
    """

    def __init__(
        self,
        message: str = "timed out",
        original_exception: BaseException | None = None,
        *,
        phase: str | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)
        self.phase = phase


class LLMResponseError(LLMError):
    """The server answered with an error, or with a 200 whose body is not a reply.

    Attributes:
        status: The HTTP status of the response.
        body: The text of the response.
        retry_after: The number of seconds that the server asked the client to wait before the next request, or None if
            it did not ask.
    """

    def __init__(
        self,
        message: str = "the server answered with an error",
        original_exception: BaseException | None = None,
        *,
        retry_after: float | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)
        self.retry_after = retry_after


class LLMAuthenticationError(LLMResponseError):
    """The server refused the API key, or requires one (401, 403)."""


class LLMRateLimitError(LLMResponseError):
    """The server refused the request because it receives too many requests (429); see `retry_after`."""


class ContextLengthExceededError(LLMResponseError):
    """The prompt, or the prompt and the answer together, do not fit into the model's context.

    Attributes:
        prompt_tokens: The number of tokens in the prompt, or None if the server does not report it.
        context_length: The number of tokens that fit into the context, or None if the server does not report it.
    """

    def __init__(
        self,
        message: str = "the prompt does not fit into the model's context",
        original_exception: BaseException | None = None,
        *,
        prompt_tokens: int | None = None,
        context_length: int | None = None,
        retry_after: float | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, retry_after=retry_after, **details)
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class ModelLoadError(LLMResponseError):
    """The model cannot answer: it does not fit into memory, has crashed or was unloaded, or no model is loaded."""


class LLMStreamError(LLMError):
    """A stream broke after it had begun, and the server did not report an error for which there is another class."""

    def __init__(
        self,
        message: str = "the stream broke",
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)


class LLMValidationError(LLMError, ValueError):
    """An argument is not valid, or a reply is not what was asked for."""


class ModelNotFoundError(LLMValidationError):
    """The server does not have the model.

    Attributes:
        model_name: The name that was asked for.
        available_models: The names of the models that the server has, as far as they are known.
    """

    def __init__(
        self,
        model_name: str | None,
        available_models: Sequence[str] = (),
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        self.model_name = model_name
        self.available_models: list[str] = list(available_models)
        super().__init__(self._describe(), original_exception, **details)

    def add_available_models(self, names: Iterable[str]) -> None:
        """Adds models that the server has, after those that are known already, and describes the error again."""
        self.available_models = list(dict.fromkeys([*self.available_models, *names]))
        self.completed(self._describe())

    def _describe(self) -> str:
        text = f"model {self.model_name!r} not found" if self.model_name else "model not found"
        if self.model_name in self.available_models:
            text += ", although the server lists it"
        elif close := close_matches(self.model_name or "", self.available_models):
            text += f" (did you mean {' or '.join(repr(name) for name in close)}?)"
        if self.available_models:
            names = [shorten(name, _NAME_CHARACTERS) for name in self.available_models[:_NAMES_SHOWN]]
            rest = len(self.available_models) - len(names)
            text += f"; the server has: {', '.join(names)}{f' and {rest} more' if rest else ''}"
        return text


class ModelMismatchError(LLMValidationError):
    """The reply names a different model than the request.

    Attributes:
        asked: The name of the model in the request.
        served: The name of the model in the reply.
    """

    def __init__(
        self,
        message: str | None = None,
        original_exception: BaseException | None = None,
        *,
        asked: str | None = None,
        served: str | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        answered = shorten(served or "", _NAME_CHARACTERS)
        super().__init__(
            message or f"asked for model {asked!r}, but {answered!r} answered", original_exception, **details
        )
        self.asked = asked
        self.served = served


class TaskCancelledError(LLMError):
    """A request, a stream or a run was ended by `aclose`, `close` or `cancel`, not by cancelling the caller's task."""

    def __init__(
        self,
        message: str = "cancelled",
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)


class ModelChangedDuringExecutionError(TaskCancelledError):
    """The model changed in the middle of a reply or a run. The output of two models is never joined into one reply.

    Attributes:
        old_model: The model at the beginning.
        new_model: The model that took its place.
    """

    def __init__(
        self,
        message: str | None = None,
        old_model: str | None = None,
        new_model: str | None = None,
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(
            message or f"the model changed from {old_model!r} to {new_model!r}", original_exception, **details
        )
        self.old_model = old_model
        self.new_model = new_model


class RunIncompleteError(LLMError):
    """An agent's run ended for a reason other than "stop", so it has no final answer.

    Attributes:
        result: The `RunResult` so far; the same as `partial`.
    """

    def __init__(
        self,
        message: str = "the run ended without a final answer",
        original_exception: BaseException | None = None,
        *,
        result: Any = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        details.setdefault("partial", result)
        super().__init__(message, original_exception, **details)
        self.result = result


class MaxRoundsExceededError(RunIncompleteError):
    """An agent's run reached `max_rounds` without a final answer."""


JournalProblem = Literal[
    "missing", "foreign", "version", "damaged", "unwritable", "full", "busy", "run", "in_use", "mismatch"
]
"""Why a journal cannot be used.

"missing": the file does not exist. "foreign": it is a file of another program. "version": it was written by another
version of lmbridge. "damaged": a part of the file is missing or was overwritten. "unwritable": it cannot be opened or
written. "full": the disk is full. "busy": another process holds the file. "run": the journal does not have the run, or
has several, one of which must be named. "in_use": the run is in progress. "mismatch": the run cannot be resumed,
because its task, its model, its tools or its options are missing or different.
"""


class JournalError(LLMError):
    """A journal of agent runs cannot be read or written, or a run cannot be resumed from it.

    Attributes:
        problem: Why the journal cannot be used, as one of the words of `JournalProblem`.
        path: The path of the journal.
    """

    def __init__(
        self,
        message: str = "the journal cannot be used",
        original_exception: BaseException | None = None,
        *,
        problem: JournalProblem = "damaged",
        path: str | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)
        self.problem: JournalProblem = problem
        self.path = path


class ToolError(LLMError):
    """A tool failed, or was called with arguments that it does not accept.

    A tool that raises it can show the model images as well, such as a screenshot of what went wrong::

        raise ToolError("the button is missing", images=[image_part("screen.png")])

    Attributes:
        images: Images for the model, as content parts. Default: none.
    """

    def __init__(
        self,
        message: str = "the tool failed",
        original_exception: BaseException | None = None,
        *,
        images: Sequence[Mapping[str, Any]] = (),
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)
        self.images: tuple[Mapping[str, Any], ...] = tuple(images)


class MCPError(LLMError):
    """Something went wrong with an MCP server or its configuration."""


class MCPConnectionError(MCPError):
    """An MCP server could not be started or reached.

    Attributes:
        server: The name of the server in the configuration.
    """

    def __init__(
        self,
        message: str = "could not connect to the MCP server",
        original_exception: BaseException | None = None,
        *,
        server: str | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)
        self.server = server


class MultiMCPError(MCPError):
    """One or more of several MCP servers failed.

    Without a `message`, the text describes the errors of the servers, and their hints become the `hint`.

    Attributes:
        errors: The exception of each server that failed, by the server's name.
    """

    def __init__(
        self,
        message: str | None = None,
        original_exception: BaseException | None = None,
        *,
        errors: Mapping[str, BaseException] | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        self.errors: dict[str, BaseException] = dict(errors or {})
        if message is None:
            details = {"hint": self._join_hints(), **details}
            reasons = [f"{server}: {_describe_without_hint(error)}" for server, error in self.errors.items()]
            # Reasons that quote the stderr of a server have several lines.
            separator = "\n" if any("\n" in reason for reason in reasons) else "; "
            message = f"MCP servers failed: {separator.join(reasons)}"
        super().__init__(message, original_exception, **details)

    def _join_hints(self) -> str | None:
        errors = self.errors.items()
        hints = {server: error.hint for server, error in errors if isinstance(error, LLMError) and error.hint}
        if len(self.errors) == 1:
            return next(iter(hints.values()), None)
        return "; ".join(f"for {server}: {hint}" for server, hint in hints.items()) or None


def _describe_without_hint(error: BaseException) -> str:
    text = error._text_without_hint() if isinstance(error, LLMError) else str(error)  # noqa: SLF001 - of this module
    return text or _describe_exception(error)
