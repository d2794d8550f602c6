"""`OneModelServer`: a server that holds one model, and drops it as soon as a request names another one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import attrs

from lmbridge.testing import completions
from lmbridge.testing.behaviours import answer, reply
from lmbridge.testing.exchange import Behaviour, Exchange
from lmbridge.testing.scripted_server import GENERATIONS, ScriptedServer
from lmbridge.testing.wire import RecordedRequest

Ending: TypeAlias = Literal["error", "cut", "reset"]
"""A way in which a generation is killed; see `OneModelServer`."""
ENDINGS: Final[tuple[Ending, ...]] = ("error", "cut", "reset")
_UNLOADED_MESSAGE: Final = "Model unloaded."


@attrs.define(eq=False)
class _Instance:
    """A model that is loaded or being loaded, and the generations that are using it or waiting for it."""

    slots: asyncio.Semaphore
    loaded: bool = False
    generations: dict[asyncio.Task[None], Exchange] = attrs.field(factory=dict)


class OneModelServer(ScriptedServer):
    """A scripted server that holds one model, as LM Studio does with just-in-time loading and auto-evict.

    A request for another model drops the current one at once, even if it has just been loaded, and kills all its
    generations (lmstudio-bug-tracker #671, #1796). A request for a model that is still being loaded loads it a second
    time (#1751). `GET /api/v1/models` lists the models as LM Studio does, so clients recognize the server. Behaviours
    are chosen in the same way as by `ScriptedServer`. By default the answer is `text(model)`, which is generated at a
    rate of one word every `token_seconds`.

    Args:
        models: The names of the models that the server has.
        capacity: The number of models that the server holds at the same time. If it is more than one, idle models are
            dropped before busy ones, and of each kind the least recently used first, as in llama.cpp's router.
        load_seconds: The seconds that loading a model takes.
        token_seconds: The seconds that generating a token takes.
        tokens: The number of tokens in an answer.
        parallel: The number of answers that a model generates at the same time. Further requests wait.
        endings: The ways in which generations are killed. One of them is chosen at random for each generation. "error"
            replies as LM Studio does, with status 400 or, if a stream has begun, with an error event in it. "cut" ends
            a stream without a finish reason and without `[DONE]`, or closes the connection if no stream has begun.
            "reset" breaks the connection.
        seed: The seed of the random number generator that chooses the endings.

    Attributes:
        loads: The model of each load, in order.
        double_loads: The number of loads of a model that was already being loaded.
        swaps: The number of loads for which another model was dropped.
        kills: The requests whose generation was killed.
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
        self.default: Behaviour = self._generate_text
        self.loads: list[str] = []
        self.double_loads: int = 0
        self.swaps: int = 0
        self.kills: list[RecordedRequest] = []
        self._capacity = capacity
        self._load_seconds = load_seconds
        self._token_seconds = token_seconds
        self._tokens = tokens
        self._parallel = parallel
        self._endings = endings
        self._random = random.Random(seed)
        # The model that was asked for most recently comes last.
        self._instances: dict[str, _Instance] = {}

    @property
    def loaded(self) -> list[str]:
        """The names of the models that are loaded now."""
        return [model for model, instance in self._instances.items() if instance.loaded]

    def text(self, model: str) -> str:
        """Returns the whole answer that a model gives by default."""
        return " ".join([model, *map(str, range(1, self._tokens))])

    async def _generate_text(self, exchange: Exchange) -> None:
        await answer(self.text(exchange.model), pace=self._token_seconds)(exchange)

    def _answer_get(self, request: RecordedRequest) -> Behaviour:
        if request.path == "/v1/models":
            return reply(200, completions.model_list(self.models, owner="organization_owner"))
        if request.path == "/api/v1/models":
            return reply(200, {"models": [self._describe(model) for model in self.models]})
        return super()._answer_get(request)

    def _describe(self, model: str) -> dict[str, Any]:
        """Returns an entry of LM Studio's own list of models."""
        instance = {"id": model, "config": {"parallel": self._parallel}}
        return {"type": "llm", "key": model, "loaded_instances": [instance] if model in self.loaded else []}

    def _choose_behaviour(self, request: RecordedRequest) -> Behaviour:
        behaviour = super()._choose_behaviour(request)
        generates = request.method != "GET" and request.path in GENERATIONS
        return partial(self._serve_by_model, behaviour) if generates else behaviour

    async def _serve_by_model(self, behaviour: Behaviour, exchange: Exchange) -> None:
        instance = self._get_instance(exchange.model)
        if not instance.loaded:
            self.loads.append(exchange.model)
            self.double_loads += bool(instance.generations)
        generation = asyncio.create_task(self._generate(instance, behaviour, exchange))
        instance.generations[generation] = exchange
        self._changes.notify()
        try:
            await asyncio.wait({generation})
        except asyncio.CancelledError:
            # The client left, or the server is being closed.
            generation.cancel()
            await asyncio.wait({generation})
            raise
        finally:
            instance.generations.pop(generation, None)
        if exchange.request in self.kills:
            await self._kill(exchange)
        else:
            generation.result()

    def _get_instance(self, model: str) -> _Instance:
        instance = self._instances.pop(model, None)
        if instance is None:
            instance = _Instance(asyncio.Semaphore(self._parallel))
            while len(self._instances) >= self._capacity:
                self._evict()
        self._instances[model] = instance
        return instance

    def _evict(self) -> None:
        model = min(self._instances, key=lambda model: bool(self._instances[model].generations))
        self.swaps += 1
        for generation, exchange in self._instances.pop(model).generations.items():
            # If the head of a plain reply has been sent, the whole reply has been generated already.
            is_generated = exchange.started and not exchange.streamed
            if not is_generated and generation.cancel():
                self.kills.append(exchange.request)

    async def _generate(self, instance: _Instance, behaviour: Behaviour, exchange: Exchange) -> None:
        if not instance.loaded:
            await asyncio.sleep(self._load_seconds)
            instance.loaded = True
            self._changes.notify()
        async with instance.slots:
            await behaviour(exchange)

    async def _kill(self, exchange: Exchange) -> None:
        ending = self._random.choice(self._endings)
        if exchange.ended:
            return
        if ending == "reset":
            exchange.reset()
        elif exchange.started and exchange.streamed:
            if ending == "error":
                await exchange.chunk({"error": {"message": _UNLOADED_MESSAGE}, "message": _UNLOADED_MESSAGE})
        elif ending == "error" and not exchange.started:
            await reply(400, {"error": _UNLOADED_MESSAGE})(exchange)
        else:
            exchange.hang_up()
