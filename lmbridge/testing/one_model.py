"""A server that holds one model, and drops it for another one that is asked for, whoever it is generating for."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Final, Literal, TypeAlias

import attrs

from lmbridge.testing.behaviours import answer, reply
from lmbridge.testing.exchange import Behaviour, Exchange
from lmbridge.testing.server import GENERATIONS, ScriptedServer
from lmbridge.testing.wire import Request

Ending: TypeAlias = Literal["error", "cut", "reset"]
"""How a generation is killed."""
ENDINGS: Final[tuple[Ending, ...]] = ("error", "cut", "reset")
_UNLOADED: Final = "Model unloaded."


@attrs.define(eq=False)
class _Instance:
    """A model that is loaded, or being loaded."""

    places: asyncio.Semaphore
    loaded: bool = False
    work: dict[asyncio.Task[None], Request] = attrs.field(factory=dict)


class OneModelServer(ScriptedServer):
    """A scripted server that holds one model, as LM Studio does with just-in-time loading and auto-evict.

    A request for another model drops the one that is there at once, loaded for nothing or not, and kills what it is
    generating (lmstudio-bug-tracker #671, #1796). Requests for a model that come while it is being loaded each load
    it once more (#1751). What answers is chosen as by any `ScriptedServer`; unless told otherwise, it is `text(model)`,
    a word every `token_seconds`.

    Args:
        models: The models that the server has.
        capacity: How many of them it holds at a time. With more than one, an idle one is dropped first, and of
            several the one that was asked for the longest ago, as llama.cpp's router does.
        load_seconds: How long a model takes to load.
        token_seconds: How long a token takes.
        tokens: How long an answer is.
        parallel: How many answers a model generates at a time; the rest of them queue.
        endings: How generations are killed, one of these each. "error" is LM Studio's: a 400, or an event in a stream
            that has begun; "cut" ends a stream without a finish reason or `[DONE]`, and answers nothing to a request
            that has no answer yet; "reset" breaks the connection.
        seed: What draws the endings.

    Attributes:
        loads: The model of each load, in order.
        double_loads: How many of these were of a model that was being loaded already.
        swaps: Loads that took the place of another model.
        kills: The requests that were killed.
    """

    def __init__(
        self,
        models: Iterable[str] = ("model-a", "model-b"),
        *,
        capacity: int = 1,
        load_seconds: float = 0.3,
        token_seconds: float = 0.002,
        tokens: int = 40,
        parallel: int = 4,
        endings: Sequence[Ending] = ENDINGS,
        seed: int = 0,
    ) -> None:
        super().__init__(models)
        self.default = self._speak
        self.loads: list[str] = []
        self.double_loads = 0
        self.swaps = 0
        self.kills: list[Request] = []
        self._capacity = capacity
        self._load_seconds = load_seconds
        self._token_seconds = token_seconds
        self._tokens = tokens
        self._parallel = parallel
        self._endings = endings
        self._random = random.Random(seed)
        self._instances: dict[str, _Instance] = {}  # the one that was asked for last is the last

    @property
    def loaded(self) -> list[str]:
        """The models that are loaded now."""
        return [model for model, instance in self._instances.items() if instance.loaded]

    def text(self, model: str) -> str:
        """The whole answer of a model."""
        return " ".join([model, *map(str, range(1, self._tokens))])

    async def _speak(self, exchange: Exchange) -> None:
        await answer(self.text(exchange.model), pace=self._token_seconds)(exchange)

    def _choose(self, request: Request) -> Behaviour:
        behaviour = super()._choose(request)
        generates = request.method != "GET" and request.path in GENERATIONS
        return partial(self._serve_by_model, behaviour) if generates else behaviour

    async def _serve_by_model(self, behaviour: Behaviour, exchange: Exchange) -> None:
        instance = self._instance(exchange.model)
        if not instance.loaded:
            self.loads.append(exchange.model)
            self.double_loads += bool(instance.work)
        work = asyncio.create_task(self._generate(instance, behaviour, exchange))
        instance.work[work] = exchange.request
        self._bell.ring()
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:  # the client left, or the server is being closed
            work.cancel()
            await asyncio.wait({work})
            raise
        finally:
            instance.work.pop(work, None)
        if exchange.request in self.kills:
            await self._kill(exchange)
        else:
            work.result()

    def _instance(self, model: str) -> _Instance:
        instance = self._instances.pop(model, None)
        if instance is None:
            instance = _Instance(asyncio.Semaphore(self._parallel))
            while len(self._instances) >= self._capacity:
                self._evict()
        self._instances[model] = instance
        return instance

    def _evict(self) -> None:
        model = min(self._instances, key=lambda model: bool(self._instances[model].work))
        self.swaps += 1
        for work, request in self._instances.pop(model).work.items():
            if work.cancel():
                self.kills.append(request)

    async def _generate(self, instance: _Instance, behaviour: Behaviour, exchange: Exchange) -> None:
        if not instance.loaded:
            await asyncio.sleep(self._load_seconds)
            instance.loaded = True
            self._bell.ring()
        async with instance.places:
            await behaviour(exchange)

    async def _kill(self, exchange: Exchange) -> None:
        ending = self._random.choice(self._endings)
        if exchange.ended:
            return
        if ending == "reset":
            exchange.reset()
        elif exchange.started and exchange.streamed:
            if ending == "error":
                await exchange.chunk({"error": {"message": _UNLOADED}, "message": _UNLOADED})
        elif ending == "error" and not exchange.started:
            await reply(400, {"error": _UNLOADED})(exchange)
        else:
            exchange.hang_up()
