"""Everything that lmbridge raises.

::

    LLMError
      LLMConnectionError                 nobody there, or the connection broke before a reply
      LLMTimeoutError                    which limit ran out: `.phase`
      LLMResponseError                   an HTTP error, or a 200 that is no reply
        LLMAuthenticationError           401, 403
        LLMRateLimitError                429
        ContextLengthExceededError       the prompt does not fit
        ModelLoadError                   out of memory, crashed, unloaded, nothing loaded
      LLMStreamError                     a stream that began and broke in a way its body does not name
      LLMValidationError                 arguments, or a reply that is not what was asked for
        ModelNotFoundError               the server does not have that model
        ModelMismatchError               another model answered
      TaskCancelledError                 cancelled through lmbridge, not by the caller
        ModelChangedDuringExecutionError
      RunIncompleteError                 an agent's run that ended for another reason than "stop"
        MaxRoundsExceededError
      ToolError
      MCPError
        MCPConnectionError
        MultiMCPError

No class here is an `asyncio.CancelledError`: a cancel by the caller stays what asyncio makes of it.
Where a builtin fits (`ConnectionError`, `TimeoutError`, `ValueError`) the class inherits it as well.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Self, TypedDict, Unpack


class ErrorDetails(TypedDict, total=False):
    """Keyword arguments that every error takes; each becomes the attribute of its name."""

    hint: str | None
    context: Mapping[str, Any] | None
    status: int | None
    body: str | None
    partial: Any


class LLMError(Exception):
    """Base of all errors of this package.

    Args:
        message: What happened, in a few words.
        original_exception: The exception behind it; becomes `__cause__`.
        hint: What to do about it.
        context: What was tried: `operation`, `url`, `model`, `attempts`, `seconds`, and whatever else is known.
        status: The status of the HTTP response that the error came with.
        body: The text of that response, or of the event in a stream that reported the error.
        partial: What had arrived: of a stream the dict that `collect` would have made so far (None before the
            first chunk), of an agent's run its `RunResult` so far.

    Attributes:
        message: As given.
        timestamp: When the error was made, in UTC.
    """

    def __init__(
        self,
        message: str = "the request failed",
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = details.get("hint")
        self.context: dict[str, Any] = dict(details.get("context") or {})
        self.status = details.get("status")
        self.body = details.get("body")
        self.partial: Any = details.get("partial")
        self.timestamp = datetime.now(UTC)
        if original_exception is not None:  # to set None would hide the exception that is being handled
            self.__cause__ = original_exception

    def completed(self, message: str | None = None, **details: Unpack[ErrorDetails]) -> Self:
        """Adds what the caller knows about this error, and returns the error itself.

        An error is often created where only half of the facts are known: a decoder does not know the URL, a scheduler
        does not know how much of an answer had arrived. Each layer that it passes completes it with this method::

            except LLMError as error:
                error.completed(context={"operation": "chat completion", "url": url})
                raise

        `hint`, `status` and `body` are set only where they are missing, and `context` is merged with what is there,
        which wins: the layer closest to the failure knows best. `partial` is the exception. It replaces what is there
        unless it is None, because the layers above know more of the result: a run more than the reply that failed.

        Args:
            message: A text that replaces the error's own, for example one without a secret.
            **details: As for the constructor.
        """
        if message is not None:
            self.message = message
            self.args = (message, *self.args[1:])
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
        """The exception behind this one: the same as `__cause__`."""
        return self.__cause__

    def __str__(self) -> str:
        """One sentence: what was tried, where, what came of it, how long it took, and what to do."""
        text = self._tried() + self.message + self._effort()
        return f"{text}; {self.hint}" if self.hint else text

    def _tried(self) -> str:
        operation, model, url = (self.context.get(key) for key in ("operation", "model", "url"))
        words = [str(operation or ("request" if model or url else ""))]
        if model:
            words.append(f"with model {model!r}")
        if url:
            words.append(f"at {url}")
        tried = " ".join(filter(None, words))
        return f"{tried}: " if tried else ""

    def _effort(self) -> str:
        attempts, seconds = self.context.get("attempts"), self.context.get("seconds")
        parts = []
        if attempts is not None:
            parts.append(f"{attempts} attempt{'' if attempts == 1 else 's'}")
        if seconds is not None:
            parts.append(f"{seconds:.2f} s")
        return f" (after {', '.join(parts)})" if parts else ""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), _portable(self.args), _portable(self.__dict__), _portable(self.__cause__))

    def __copy__(self) -> LLMError:
        return _rebuild(type(self), self.args, self.__dict__, self.__cause__)


def _rebuild(
    kind: type[LLMError], args: tuple[Any, ...], state: dict[str, Any], cause: BaseException | None
) -> LLMError:
    # Not by calling the class: what its constructor takes differs from class to class.
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    if cause is not None:
        error.__cause__ = cause
    return error


def _portable(value: Any) -> Any:
    """The value; where it cannot be pickled, its parts that can, and of the others their text."""
    if isinstance(value, LLMError) and type(value).__module__ == __name__:
        return value  # which does the same for itself
    try:
        pickle.loads(pickle.dumps(value))  # noqa: S301 - our own bytes, made in the line itself
    except Exception:  # noqa: BLE001 - a foreign class may raise anything here; its text is kept
        if isinstance(value, BaseException):
            return Exception(_told(value))
        if isinstance(value, dict):
            return {key: _portable(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [_portable(part) for part in value] if isinstance(value, list) else tuple(map(_portable, value))
        return repr(value)
    return value


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class LLMConnectionError(LLMError, ConnectionError):
    """Nobody answers there, or the connection broke before a reply began."""


class LLMTimeoutError(LLMError, TimeoutError):
    """A limit of `Timeouts`, or `Limits.max_queue`, ran out.

    Attributes:
        phase: Which one: "connect", "queue", "load", "first_byte", "idle" or "total".
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
    """The server said no, or said 200 with something that is no reply.

    Attributes:
        status: The HTTP status.
        body: The text of the response.
        retry_after: Seconds that the server asked to wait, or None.
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
    """The server refused the key, or asks for one (401, 403)."""


class LLMRateLimitError(LLMResponseError):
    """The server has had enough for now (429); see `retry_after`."""


class ContextLengthExceededError(LLMResponseError):
    """The prompt, or prompt and answer together, do not fit into the model's context.

    Attributes:
        prompt_tokens: Tokens of the prompt, where the server says.
        context_length: Tokens that fit, where the server says.
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
    """The model is not there to answer: out of memory, crashed, unloaded, or none is loaded."""


class LLMStreamError(LLMError):
    """A stream that began and then broke in a way that its body does not name."""

    def __init__(
        self,
        message: str = "the stream broke",
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)


class LLMValidationError(LLMError, ValueError):
    """An argument that cannot be right, or a reply that is not what was asked for."""


class ModelNotFoundError(LLMValidationError):
    """The server does not have the model.

    Attributes:
        model_name: The name that was asked for.
        available_models: The names that there are, as far as known.
    """

    def __init__(
        self,
        model_name: str | None,
        available_models: Sequence[str] = (),
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        self.model_name = model_name
        self.available_models = list(available_models)
        super().__init__(self._describe(), original_exception, **details)

    def _describe(self) -> str:
        text = f"model {self.model_name!r} not found" if self.model_name else "model not found"
        names = {name.casefold(): name for name in self.available_models}
        import difflib  # noqa: PLC0415 - not needed until a model is missing

        if close := difflib.get_close_matches((self.model_name or "").casefold(), names):
            text += f" (did you mean {' or '.join(repr(names[match]) for match in close)}?)"
        if self.available_models:
            text += f"; there are: {', '.join(self.available_models)}"
        return text


class ModelMismatchError(LLMValidationError):
    """Another model answered than the one that was asked for.

    Attributes:
        asked: The name in the request.
        served: The name in the reply.
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
        super().__init__(
            message or f"asked for model {asked!r}, but {served!r} answered", original_exception, **details
        )
        self.asked = asked
        self.served = served


class TaskCancelledError(LLMError):
    """Cancelled through lmbridge (`aclose`, `close`, `cancel`), not by cancelling the caller's task."""

    def __init__(
        self,
        message: str = "cancelled",
        original_exception: BaseException | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        super().__init__(message, original_exception, **details)


class ModelChangedDuringExecutionError(TaskCancelledError):
    """The model changed under a reply or a run; nothing of two models is ever joined.

    Attributes:
        old_model: The model that it began with.
        new_model: The one that took its place.
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
    """An agent's run ended for another reason than "stop".

    Attributes:
        result: The `RunResult` so far; the same as `partial`.
    """

    def __init__(
        self,
        message: str = "the run did not come to an end of its own",
        original_exception: BaseException | None = None,
        *,
        result: Any = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        details.setdefault("partial", result)
        super().__init__(message, original_exception, **details)
        self.result = result


class MaxRoundsExceededError(RunIncompleteError):
    """An agent's run used up its rounds."""


class ToolError(LLMError):
    """A tool failed, or was called in a way that it cannot be called."""


class MCPError(LLMError):
    """Something about an MCP server."""


class MCPConnectionError(MCPError):
    """An MCP server that could not be started or reached.

    Attributes:
        server: Its name in the configuration.
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

    Attributes:
        errors: Server's name to its exception.
    """

    def __init__(
        self,
        message: str | None = None,
        original_exception: BaseException | None = None,
        *,
        errors: Mapping[str, BaseException] | None = None,
        **details: Unpack[ErrorDetails],
    ) -> None:
        self.errors = dict(errors or {})
        told = "; ".join(f"{server}: {str(error) or _told(error)}" for server, error in self.errors.items())
        super().__init__(message or f"MCP servers failed: {told}", original_exception, **details)
