"""`Observer`, the interface, and `Observers`, which passes an event to several of them."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, runtime_checkable

from lmbridge._checks import wrong_type
from lmbridge.errors import LLMValidationError

if TYPE_CHECKING:
    from lmbridge.observe.events import ObservedEvent

logger: logging.Logger = logging.getLogger("lmbridge.observe")

# Observers are called synchronously, so a `CancelledError` never means that the task which calls them was cancelled. It
# comes from a bug of the observer, for example a call of `result()` on a cancelled future.
_FAILURES: Final = (Exception, asyncio.CancelledError)
_HINT = "pass a list of objects with a method on_event(event), such as [TimelineObserver()]"


@runtime_checkable
class Observer(Protocol):
    """An object that is notified of what happens to requests and runs.

    ::

        class Printer:
            def on_event(self, event: ObservedEvent) -> None:
                if isinstance(event, RequestEnded):
                    print(event.outcome, event.attempts)

        client = LLMClient(observers=[Printer()])
    """

    def on_event(self, event: ObservedEvent) -> None:
        """Handles an event.

        The method is called synchronously where the event happens, mostly in the thread of the event loop, so it must
        return at once, and cannot be an `async def`. If it raises an exception, the exception is logged, and the client
        or agent in question does not notify this observer again; nothing else is affected.
        """
        ...


@runtime_checkable
class ContextPropagator(Protocol):
    """An observer that also adds the context of a trace to requests, as `OpenTelemetryObserver` does."""

    def trace_context(self, request_id: int | None) -> Mapping[str, str]:
        """Returns what is added to a request, such as `{"traceparent": "00-..."}`.

        The entries become headers of a request to a model server, or metadata of a request to an MCP server. The method
        is called like `on_event`, once for each attempt.

        Args:
            request_id: The id of a request to a model server. None stands for the tool call that the current task
                makes.
        """
        ...


class Observers:
    """The observers of a client or an agent.

    Args:
        observers: The observers, in the order in which they are notified.
    """

    __slots__ = ("_active",)

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._active = tuple(observers)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._active!r}>"

    def notify(self, event: ObservedEvent) -> None:
        """Passes an event to each observer. An observer that raises an exception is switched off."""
        for observer in self._active:
            try:
                observer.on_event(event)
            except _FAILURES as error:
                # A bug of an observer must not break what it observes.
                self._switch_off(observer, error)

    def trace_context(self, request_id: int | None) -> dict[str, str]:
        """Returns what the observers add to a request. An observer that raises an exception is switched off."""
        context: dict[str, str] = {}
        for observer in self._active:
            if isinstance(observer, ContextPropagator):
                try:
                    context.update(observer.trace_context(request_id))
                except _FAILURES as error:
                    self._switch_off(observer, error)
        return context

    def _switch_off(self, observer: Observer, error: BaseException) -> None:
        self._active = tuple(each for each in self._active if each is not observer)
        text = "%r has raised an exception, and is not notified of any further events"
        logger.error(text, observer, exc_info=error)


def as_observers(observers: Sequence[Observer]) -> Observers | None:
    """Returns the observers to notify, or None for an empty list.

    Raises:
        LLMValidationError: The argument is not a list of observers, or a method of an observer is a coroutine function.
    """
    given: Any = observers
    is_list = isinstance(given, Sequence | set | frozenset) and not isinstance(given, str | bytes)
    if not is_list or not all(isinstance(each, Observer) and not isinstance(each, type) for each in given):
        raise wrong_type("observers", "a list of observers", observers, _HINT)
    for observer in given:
        for name in ("on_event", "trace_context"):
            if inspect.iscoroutinefunction(getattr(observer, name, None)):
                raise LLMValidationError(
                    f"the method {name} of the observer {observer!r} must not be a coroutine function",
                    hint=f"define it with `def {name}`; to await something, put events into a queue for a task",
                )
    return Observers(given) if given else None
