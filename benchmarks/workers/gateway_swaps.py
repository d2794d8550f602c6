"""The workload of several programs at one server that holds one model, with and without the gateway.

Each program is a process with openai-python, which sends its requests at once: for two models at random, streamed and
plain in turn.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from contextlib import ExitStack
from typing import Any, Final

from benchmarks.gateways import GatewayProcess
from benchmarks.peers.base import MESSAGES
from benchmarks.specification import OURS
from benchmarks.swap_servers import SWAP_SERVERS, SwapServer, count_swaps, scripted_texts
from benchmarks.workers import serve
from benchmarks.workers.model_swaps import Answer, judge

_SEED: Final = 1796
_PROGRAM: Final = "program"


class GatewaySwapWorkloads:
    """The workload with or without the gateway.

    Args:
        peer: `OURS` for the gateway, anything else for programs that talk to the server directly.
    """

    def __init__(self, peer: str) -> None:
        self._with_gateway = peer == OURS

    async def answers(self, server: str, requests: int, processes: int) -> dict[str, Any]:
        """Sends the requests to a new server, and returns their outcomes, the total seconds and the number of swaps."""
        info = SWAP_SERVERS[server]
        with ExitStack() as stack:
            running = stack.enter_context(SwapServer(server))
            api_base = running.api_base
            if self._with_gateway:
                api_base = stack.enter_context(GatewayProcess("lmbridge", api_base, one_model=True)).api_base
            texts = {} if info.is_real else scripted_texts(running.models)
            draw = random.Random(_SEED)
            models = [draw.choice(running.models) for _ in range(requests)]
            shares = [models[first::processes] for first in range(processes)]
            programs = await asyncio.gather(*(self._start(api_base, share, info.tokens, texts) for share in shares))
            # All have imported openai before any of them begins.
            for program in programs:
                assert program.stdout is not None
                await program.stdout.readline()
            began = time.monotonic()
            answers = await asyncio.gather(*(program.communicate(b"\n") for program in programs))
            seconds = time.monotonic() - began
            outcomes = [outcome for printed, _ in answers for outcome in json.loads(printed)]
            return {"outcomes": outcomes, "seconds": seconds, "swaps": count_swaps(running.loads())}

    async def _start(
        self, api_base: str, models: list[str], tokens: int, texts: dict[str, str]
    ) -> asyncio.subprocess.Process:
        work = json.dumps({"api_base": api_base, "models": models, "tokens": tokens, "texts": texts})
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "benchmarks.workers.gateway_swaps", _PROGRAM, work),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )


async def _run_program(api_base: str, models: list[str], tokens: int, texts: dict[str, str]) -> None:
    """Runs one of the programs, which sends a request for each model, and prints the outcomes."""
    from openai import AsyncOpenAI  # noqa: PLC0415 - the worker itself does not need it

    async with AsyncOpenAI(base_url=api_base, api_key="none") as client:
        print(flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        work = (
            judge(_ask(client, model, tokens, streamed=index % 2 == 0), model, texts.get(model))
            for index, model in enumerate(models)
        )
        outcomes = await asyncio.gather(*work)
    print(json.dumps(outcomes), flush=True)


async def _ask(client: Any, model: str, tokens: int, *, streamed: bool) -> Answer:
    """Sends one request, and returns its answer."""
    options = {"model": model, "messages": MESSAGES, "max_tokens": tokens, "stream": streamed}
    answer = await client.chat.completions.create(**options)
    if not streamed:
        return Answer(answer.choices[0].message.content or "", answer.choices[0].finish_reason, {answer.model})
    text, finish_reason, models = "", None, set()
    async for chunk in answer:
        models.add(chunk.model)
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish_reason = choice.finish_reason or finish_reason
    return Answer(text, finish_reason, models)


if __name__ == "__main__":
    if sys.argv[1] == _PROGRAM:
        asyncio.run(_run_program(**json.loads(sys.argv[2])))
    else:
        serve(GatewaySwapWorkloads(sys.argv[1]))
