"""`Node`: one of several servers, as the pool sees it: its models, its load, and whether it works.

The rules of the choice between servers, `choose_node`, are pure functions of nodes, so they can be tested without a
server. The cost of a server is counted in *rounds*: the time in which a server finishes the requests that fill its
slots.

- A request that has to wait until a slot is free costs the part of a round that the requests before it take.
- A server that has not read the beginning of the conversation yet, while another one has, costs a round more.
- A server that has to load the model first costs 8 rounds more, and one whose models are not known costs 4.

So while slots are free, the order is the expected one. First come the servers that have loaded the model: among them,
the one that has the conversation in its cache, and then the one with the smallest share of its slots taken. A server
that would have to load the model comes last. When the preferred server is full, the costs decide how long it is worth
waiting for it. A conversation leaves its server when more than about one round of requests waits there and another
server is idle. A model is loaded on a second server when 8 rounds of requests wait for it on the first.

There were two alternatives. A strict order sends all requests for a model, or of one long conversation, to one server
while the others are idle. A random choice between two servers ignores which server has the prompt in its cache, and
makes every server load every model.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Final, Literal, Protocol, TypeAlias

import attrs

from lmbridge.transport.retry import server_backoff

if TYPE_CHECKING:
    from lmbridge.transport.transport import Transport

logger: logging.Logger = logging.getLogger("lmbridge.transport")

ModelState = Literal["loaded", "listed", "missing", "unknown"]
"""What is known about a model on a server. If the server does not say which models are loaded, all of them count as
"loaded"."""

COLD_PROMPT_ROUNDS: Final = 1.0
"""The cost, in rounds, of processing again a conversation that another server has in its cache."""
LOADING_ROUNDS: Final = 8.0
"""The cost, in rounds, of loading a model."""
UNKNOWN_MODELS_ROUNDS: Final = 4.0
"""The cost, in rounds, of a server whose models are not known."""


class ModelDirectory(Protocol):
    """The models of a server at one moment."""

    def state_of(self, model: str) -> ModelState:
        """Returns what is known about a model. It may be named in any of the ways that the server accepts."""
        ...


FindModels: TypeAlias = "Callable[[Transport], Awaitable[ModelDirectory]]"
"""An async function that asks the server of a transport which models it has. It raises an `LLMError` if it cannot."""


@attrs.define(eq=False)
class Node:
    """One of several servers."""

    transport: Transport
    """The connections to the server, and its schedule."""
    underway: int = 0
    """The number of requests that were given to the server and whose answer has not begun."""
    last_chosen: int = 0
    """A number that is higher for servers that were chosen later."""

    # Health

    is_down: bool = False
    """Whether the last request or check has failed. Then the server gets no requests until it answers again, unless all
    servers that may have the model are down."""
    failures: int = 0
    """How often the server has failed in a row."""
    failed_at: float = -math.inf
    """The time of the last failure, by the clock of the event loop."""
    check_at: float = -math.inf
    """The time at which a server that is down is asked whether it works again."""
    restarts: int = 0
    """How often the server has come back after a failure. Its cache may have lost the prompts from before."""

    # Models

    models: ModelDirectory | None = None
    """What the server has reported about its models, or None if it has not been asked, or does not list them."""
    listed_at: float = -math.inf
    """The time at which the server last answered the question about its models, or minus infinity if it has to be asked
    again."""
    look_up: asyncio.Task[None] | None = None
    """The task that is asking the server at the moment."""
    look_up_at: float = -math.inf
    """The time at which the last such task was started."""
    _expected: set[str] = attrs.field(factory=set)
    _refused: set[str] = attrs.field(factory=set)

    @property
    def slots(self) -> int:
        """The number of requests that the server works on at the same time, as far as the client knows."""
        return self.transport.limits.max_concurrency

    @property
    def load(self) -> int:
        """The number of requests that were given to the server and have not ended, including those that still wait."""
        return max(self.transport.in_flight + self.transport.queued, self.underway)

    def note_success(self) -> None:
        """Records that the server has answered, whatever the answer is."""
        if self.is_down:
            logger.info("%s answers again", self.transport.api_base)
            self.restarts += 1
            self.is_down = False
        self.failures = 0

    def note_failure(self, now: float, reason: str) -> None:
        """Records that the server could not be reached, or failed to answer.

        Requests that were in flight together fail together. They count as one failure.
        """
        if not self.is_down:
            logger.warning(
                "%s has failed (%s); other servers get its requests until it answers again",
                self.transport.api_base,
                reason,
            )
        if not self.is_down or now >= self.check_at:
            self.failures += 1
            self.check_at = now + server_backoff(self.failures)
        self.is_down = True
        self.failed_at = now

    def set_models(self, models: ModelDirectory | None, now: float) -> None:
        """Records what the server has reported about its models; None stands for a server that does not list them."""
        self.models = models
        self.listed_at = now
        self._expected.clear()
        self._refused.clear()

    def expect(self, model: str | None) -> None:
        """Records that the server gets a request for a model, so that the model will soon be loaded there."""
        if model is not None:
            self._expected.add(model)

    def refuse(self, model: str | None) -> None:
        """Records that the server has refused a request for a model, so its list of models may be wrong."""
        if model is not None:
            self._refused.add(model)
            self._expected.discard(model)
        self.listed_at = -math.inf

    def state_of(self, model: str | None) -> ModelState:
        """Returns what is known about a model on this server."""
        if model is None:
            return "loaded"
        if model in self._refused:
            return "missing"
        state: ModelState = "unknown" if self.models is None else self.models.state_of(model)
        if state in ("unknown", "missing"):
            return state
        # The schedule knows better than an old list, because it decides which model the server loads next.
        active = self.transport.active_models or ()
        if model not in active and len(active) >= (self.transport.limits.max_loaded_models or math.inf):
            return "listed"
        return "loaded" if model in active or model in self._expected else state


def choose_node(nodes: Sequence[Node], model: str | None, warm: Node | None = None) -> Node:
    """Returns the server that gets a request.

    A server that is down is chosen only if all servers that may have the model are down. Then it is the one whose
    failure is longest ago. So no request is refused without an attempt.

    Args:
        nodes: The servers to choose from, at least one.
        model: The model, or None if the request leaves the choice to the server.
        warm: The server that has the conversation in its cache, if it is known.
    """
    states: dict[Node, ModelState] = {node: node.state_of(model) for node in nodes}
    candidates = with_model(nodes, model) or list(nodes)
    working = [node for node in candidates if not node.is_down]
    if not working:
        return min(candidates, key=lambda node: (node.failed_at, node.last_chosen))
    is_warm = warm is not None and warm in working
    return min(
        working,
        key=lambda node: (
            _cost(node, states[node], is_cold=is_warm and node is not warm),
            node.load / node.slots,
            node.last_chosen,
        ),
    )


def with_model(nodes: Sequence[Node], model: str | None) -> list[Node]:
    """Returns those servers that have a model, or may have it because they have not said which models they have."""
    return [node for node in nodes if node.state_of(model) != "missing"]


def _cost(node: Node, state: ModelState, *, is_cold: bool) -> float:
    cost = max(0, node.load + 1 - node.slots) / node.slots
    if is_cold:
        cost += COLD_PROMPT_ROUNDS
    if state == "listed":
        cost += LOADING_ROUNDS
    elif state == "unknown":
        cost += UNKNOWN_MODELS_ROUNDS
    return cost
